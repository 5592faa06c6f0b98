//! Runs one row under husk and under the runtime that it is compared with.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::Value;
use tonic::Code;

use crate::case::{Case, Expect, Reference, matches};
use crate::guest::{Guest, Options};
use crate::reference::{Bundle, namespaces};

/// Where a guest has the volume that rows name `{volume}`.
const VOLUME: &str = "/run/husk/volumes/v";

/// Where it has the image's only layer.
const LAYER: &str = "/run/husk/fs/base";

/// Says something that must not be lost when the test passes.
#[expect(clippy::explicit_write, reason = "eprintln! is shown only if the test fails")]
fn say(text: &str) {
    assert!(std::env::var_os("HUSK_CONFORMANCE_STRICT").is_none(), "{text}");
    writeln!(std::io::stderr(), "conformance: {text}").unwrap();
}

/// Runs a row.
pub(crate) async fn check(name: &str, case: Case) {
    let controllers = controllers();
    if let Some(missing) = case.needs.iter().find(|needed| !controllers.contains(needed)) {
        say(&format!("{name} did not run: cgroup v2 has no controller {missing:?} here"));
        return;
    }
    let guest = Guest::boot().await;
    match &case.expect {
        Expect::Refused { named, .. } => refused(&guest, &case, named).await,
        Expect::Alone { prints, .. } => expect("husk", prints, &husk(&guest, &case).await),
        Expect::Same(reference, prints) => {
            let seen = husk(&guest, &case).await;
            expect("husk", prints, &seen);
            if let Some(other) = under(*reference, name, &case) {
                assert_eq!(seen, other, "husk (left) differs from {} (right)", reference.name());
            }
        }
        Expect::Differs { reference, husk: prints, other: there, .. } => {
            expect("husk", prints, &husk(&guest, &case).await);
            if let Some(other) = under(*reference, name, &case) {
                expect(reference.name(), there, &other);
            }
        }
    }
}

fn expect(who: &str, pattern: &str, seen: &str) {
    assert!(matches(pattern, seen), "{who} printed:\n{seen}\nand not:\n{pattern}\n");
}

/// The controllers that containers can have here.
fn controllers() -> Vec<&'static str> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = mounts.lines().find(|l| l.contains(" - cgroup2 ")).and_then(|l| l.split(' ').nth(4));
    let all = fs::read_to_string(Path::new(root.unwrap()).join("cgroup.controllers")).unwrap();
    let known = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];
    known.into_iter().filter(|name| all.split_whitespace().any(|given| given == *name)).collect()
}

/// The `config.json` of a row.
fn config(case: &Case, volume: &str, layer: &str, cgroup: &str) -> Value {
    let disks = fs::read_dir("/sys/block").unwrap();
    let numbers = disks
        .map(|disk| fs::read_to_string(disk.unwrap().path().join("dev")).unwrap())
        .find(|numbers| !numbers.starts_with("7:") && !numbers.starts_with("1:"));
    let numbers = numbers.unwrap_or_default();
    let (major, minor) = numbers.trim().split_once(':').unwrap_or(("0", "0"));
    case.config(&[
        ("{volume}", volume),
        ("{layer}", layer),
        ("{cgroup}", cgroup),
        ("{disk major}", major),
        ("{disk minor}", minor),
    ])
}

/// The create fails, the error names the field, and nothing is left.
async fn refused(guest: &Guest, case: &Case, named: &str) {
    let config = config(case, VOLUME, LAYER, "/c");
    let options = Options { terminal: case.has_terminal(), ..Options::default() };
    let error = guest.try_create("c", config, options).await.expect_err("it was created");
    assert!(matches!(error.code(), Code::InvalidArgument | Code::Internal), "{error}");
    assert!(error.message().contains(named), "{named} is not named: {}", error.message());
    assert!(guest.nothing_left("c"));
}

/// What the process prints in husk.
async fn husk(guest: &Guest, case: &Case) -> String {
    let config = config(case, VOLUME, LAYER, "/c");
    let options = Options { terminal: case.has_terminal(), ..Options::default() };
    let run = guest.run_with("c", config, options).await;
    let runtime = guest.agent();
    let hostname = "pod";
    let seen = normal(run.stdout, run.exit.exit_code, &namespaces(&runtime), hostname);
    println!("husk:\n{seen}{}", run.stderr);
    guest.delete("c").await;
    assert!(guest.nothing_left("c"));
    seen
}

/// What it prints under another runtime, if that is here.
fn under(reference: Reference, name: &str, case: &Case) -> Option<String> {
    let Some(program) = reference.find() else {
        let runtime = reference.name();
        say(&format!("{name} ran under husk alone: {runtime} is not in PATH"));
        return None;
    };
    let bundle = Bundle::new(program);
    let (volume, layer) = (bundle.volume(), bundle.layer());
    let cgroup = bundle.cgroup();
    let config = config(case, volume.to_str().unwrap(), layer.to_str().unwrap(), &cgroup);
    let (stdout, stderr, code) = if case.has_terminal() {
        let (shown, stderr) = bundle.run_on_terminal(&config);
        (shown, stderr, 0)
    } else {
        bundle.run(&config)
    };
    let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let own = namespaces(Path::new("/proc/self"));
    let seen = normal(stdout, u32::try_from(code).unwrap_or(u32::MAX), &own, &hostname);
    println!("{}:\n{seen}{stderr}", reference.name());
    Some(seen)
}

/// An output without what must differ: which runtime's namespaces and host name it speaks of, and
/// the line ends of a terminal. With the exit code, if it is not 0.
fn normal(output: String, code: u32, runtime: &[String], hostname: &str) -> String {
    let mut text = output.replace("\r\n", "\n");
    for link in runtime {
        let kind = link.split(':').next().unwrap_or_default();
        text = text.replace(link.as_str(), &format!("{kind}:runtime"));
        let other = format!("{kind}:[");
        while let Some((before, rest)) = text.split_once(&other) {
            let after = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == ']');
            text = format!("{before}{kind}:own{after}");
        }
    }
    text = text
        .lines()
        .map(|line| if line == hostname { "(the runtime's)" } else { line })
        .map(|line| format!("{line}\n"))
        .collect();
    if code != 0 {
        text.push_str(&format!("exit {code}\n"));
    }
    text
}
