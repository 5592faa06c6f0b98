//! tmp
use husk_cases::vmm::Vm;
use husk_vmm_api::Phase;
fn main() {
    let rounds: usize = std::env::args().nth(1).unwrap().parse().unwrap();
    let cmd = std::env::args().nth(2).unwrap_or_default();
    let vars = ["none", "copy", "thp", "copy,thp"];
    let mut all = vec![vec![]; 4];
    for r in 0..=rounds {
        for (i, v) in vars.iter().enumerate() {
            unsafe { std::env::set_var("HUSK_EXP", v) };
            let mut vm = Vm::with_agent(256).unwrap();
            vm.config.cmdline = cmd.clone();
            let mut vm = vm.start().unwrap();
            vm.wait_for(Phase::Init).unwrap();
            let t = vm.started.elapsed().as_millis();
            if r > 0 {
                all[i].push(t);
            }
            if r == 1 {
                vm.wait_for(Phase::AgentReady).unwrap();
                let s =
                    std::fs::read_to_string(format!("/proc/{}/smaps_rollup", vm.pid())).unwrap();
                println!("{v}: {}", s.lines().find(|l| l.starts_with("Rss")).unwrap());
            }
        }
    }
    for (i, v) in vars.iter().enumerate() {
        all[i].sort();
        println!("{v}: median {} min {}", all[i][all[i].len() / 2], all[i][0]);
    }
}
