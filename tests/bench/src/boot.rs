//! Starting a bare VM, and what it weighs when its agent is ready.

use std::cell::RefCell;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_cases::vmm::Vm;
use husk_proto::agent::StatsRequest;
use husk_proto::agent::agent_client::AgentClient;
use husk_vmm_api::Phase;
use hyper_util::rt::TokioIo;
use tonic::transport::{Endpoint, Uri};

use crate::pairs::{self, Contender};
use crate::{Setup, qemu};

const MEMORY_MIB: u32 = 256;
const PAGE: u64 = 4096;
const KIB: u64 = 1024;

/// Spawn of the VMM to init's first instruction.
pub(crate) fn compare(setup: &Setup) -> Result<Vec<String>> {
    println!("boot: spawn to init's first instruction, {MEMORY_MIB} MiB, 1 vCPU");
    let kernel_alone = RefCell::new(Vec::new());
    let husk = || -> Result<Duration> {
        let mut vm = Vm::with_agent(MEMORY_MIB)?.start()?;
        vm.wait_for(Phase::Init)?;
        let took = vm.started.elapsed();
        let reached = vm.counters()?.phases_ns;
        let at = |phase| reached.get(&phase).copied().context("a phase of the boot is missing");
        let kernel = at(Phase::Init)?.saturating_sub(at(Phase::FirstInstruction)?);
        kernel_alone.borrow_mut().push(Duration::from_nanos(kernel));
        Ok(took)
    };
    let qemu = || qemu::spawn_to_init(setup, MEMORY_MIB);
    let mut contenders = [
        Contender { name: "husk-vmm", once: Box::new(husk) },
        Contender { name: "qemu-microvm", once: Box::new(qemu) },
    ];
    let held_back = hold_back()?;
    let samples = pairs::interleave(setup.rounds, scrub, &mut contenders)?;
    drop(held_back);
    let ratio = pairs::ratio(&samples[0], &samples[1]).context("no samples")?;
    drop(contenders);
    // What the ratio would be with a VMM that takes no time at all: the guest's kernel, which is
    // the peer's too. The first is of the warm-up.
    let kernel = kernel_alone.borrow();
    let floor = kernel.get(1..).and_then(|kernel| pairs::ratio(kernel, &samples[1]));
    let floor = floor.context("no samples")?;
    print_phases()?;
    Ok(vec![
        format!("ratio boot_spawn_to_init {ratio:.3} vs qemu-microvm"),
        format!("ratio boot_kernel_alone {floor:.3} vs qemu-microvm"),
    ])
}

/// Memory that the contenders share, in bytes. All of them together are content with it.
const SHARED: usize = 1 << 30;

/// What [`scrub`] leaves alone of it, so that nothing is killed for memory.
const SPARE: usize = 192 << 20;

/// Memory that nobody gets until this is dropped.
struct HeldBack(#[expect(dead_code, reason = "it is held, not read")] Vec<u8>);

/// Takes all memory of the host but [`SHARED`]. With [`scrub`] it sees to it that no contender gets
/// memory in which code has run.
///
/// In a test host that QEMU emulates, the first write to a page from which code once ran throws away
/// its translations, eight bytes at a time: up to 200 ms for the 2 MiB that held a guest's kernel,
/// and up to half of a whole boot. Who gets such pages is chance, and no host of metal has this cost.
fn hold_back() -> Result<HeldBack> {
    Ok(HeldBack(touched(available()?.saturating_sub(SHARED))))
}

/// Writes to all the memory that is free, and so to what the last VM gave back, before the next one
/// gets it.
fn scrub() -> Result<()> {
    drop(touched(available()?.saturating_sub(SPARE)));
    Ok(())
}

/// So many bytes of memory that are resident.
fn touched(bytes: usize) -> Vec<u8> {
    let mut memory = vec![0_u8; bytes];
    for page in memory.chunks_mut(PAGE as usize) {
        page[0] = 1;
    }
    std::hint::black_box(memory)
}

/// `MemAvailable` of proc_meminfo(5), in bytes.
fn available() -> Result<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kib: usize = kib.context("no MemAvailable in /proc/meminfo")?.trim().parse()?;
    Ok(kib.saturating_mul(1024))
}

/// Where the time of one more boot goes.
fn print_phases() -> Result<()> {
    let mut vm = Vm::with_agent(MEMORY_MIB)?.start()?;
    vm.wait_for(Phase::AgentReady)?;
    let reached = vm.counters()?.phases_ns;
    let mut last = None;
    for (phase, at_ns) in reached {
        if let Some(last) = last.replace(at_ns) {
            let took = Duration::from_nanos(at_ns.saturating_sub(last));
            println!("  {:>9.1} ms to {phase:?}", pairs::millis(took));
        }
    }
    Ok(())
}

/// Exits, pages, and resident memory of a VM whose agent is ready and idle.
pub(crate) fn weigh(setup: &Setup) -> Result<Vec<String>> {
    println!("weight: a VM with {MEMORY_MIB} MiB whose agent is ready");
    let (mut exits, mut pages, mut rss, mut agent) = (vec![], vec![], vec![], vec![]);
    for round in 1..=setup.rounds.min(5) {
        let mut vm = Vm::with_agent(MEMORY_MIB)?.start()?;
        vm.wait_for(Phase::AgentReady)?;
        let control = vm.wait_for_control()?;
        let memory = resident(vm.pid())?;
        exits.push(vm.counters()?.io_exits_at_agent_ready.context("no count of exits")?);
        pages.push(memory.guest / PAGE);
        rss.push(memory.vmm / KIB);
        agent.push(agent_rss(control)? / KIB);
        println!(
            "  round {round}: {} exits, {} guest pages, VMM {} KiB, agent {} KiB",
            exits[round - 1],
            pages[round - 1],
            rss[round - 1],
            agent[round - 1]
        );
    }
    let initramfs = std::fs::metadata(&setup.initramfs)?.len() / KIB;
    let of = |samples: &[u64]| pairs::median(samples).context("no samples");
    Ok(vec![
        format!("figure boot_exits {} exits", of(&exits)?),
        format!("figure boot_pages {} pages", of(&pages)?),
        format!("figure vmm_rss_less_guest {} KiB", of(&rss)?),
        format!("figure agent_rss {} KiB", of(&agent)?),
        format!("figure initramfs_size {initramfs} KiB"),
    ])
}

/// Resident bytes of a VMM's process.
#[derive(Debug, PartialEq, Eq)]
struct Resident {
    guest: u64,
    vmm: u64,
}

fn resident(pid: u32) -> Result<Resident> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    parse_smaps(&smaps, u64::from(MEMORY_MIB) * KIB * KIB)
}

/// Tells guest memory from the VMM's own: the one run of adjacent mappings that is as large as it.
fn parse_smaps(smaps: &str, memory_len: u64) -> Result<Resident> {
    let mut runs: Vec<Run> = Vec::new();
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Rss:") {
            let kib: u64 = kib.trim().trim_end_matches(" kB").parse()?;
            runs.last_mut().context("Rss before any mapping")?.resident += kib * KIB;
        } else if let Some((start, end)) = mapping(line) {
            match runs.last_mut() {
                Some(run) if run.end == start => run.end = end,
                _ => runs.push(Run { start, end, resident: 0 }),
            }
        }
    }
    let (guest, vmm): (Vec<_>, Vec<_>) =
        runs.iter().partition(|run| run.end - run.start >= memory_len);
    ensure!(guest.len() == 1, "{} mappings could be guest memory", guest.len());
    let sum = |runs: Vec<&Run>| runs.iter().map(|run| run.resident).sum();
    Ok(Resident { guest: sum(guest), vmm: sum(vmm) })
}

struct Run {
    start: u64,
    end: u64,
    resident: u64,
}

/// The range of a mapping's first line, `START-END PERMISSIONS ...`.
fn mapping(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

/// Asks the agent for its own resident memory.
fn agent_rss(control: std::os::fd::OwnedFd) -> Result<u64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stream = std::os::unix::net::UnixStream::from(control);
        stream.set_nonblocking(true)?;
        let mut stream = Some(TokioIo::new(tokio::net::UnixStream::from_std(stream)?));
        let connector = tower::service_fn(move |_: Uri| {
            let stream = stream.take().ok_or_else(|| std::io::Error::other("used already"));
            async move { stream }
        });
        let channel =
            Endpoint::from_static("http://agent").connect_with_connector(connector).await?;
        let stats = AgentClient::new(channel).stats(StatsRequest {}).await?.into_inner();
        Ok(stats.agent_rss)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_vmms_own() {
        let smaps = "\
00400000-00500000 r-xp 00000000 08:01 12 /opt/husk/bin/husk-vmm
Size:               1024 kB
Rss:                 300 kB
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Rss:               20000 kB
7f0008000000-7f0010000000 rw-p 00000000 00:00 0
Rss:                4000 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Rss:                  16 kB
VmFlags: rd wr mr
";
        let expected = Resident { guest: 24000 * KIB, vmm: 316 * KIB };
        assert_eq!(parse_smaps(smaps, 256 << 20).unwrap(), expected);
        assert!(parse_smaps(smaps, 512 << 20).is_err());
    }
}
