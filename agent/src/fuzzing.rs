//! Entry points for the fuzz targets in `tests/fuzz`; not for anything else.
//!
//! They go as far as a request goes before anything is made: what has an effect on the machine is
//! never called.

use std::collections::BTreeMap;
use std::error::Error;

use husk_proto::agent as wire;
use husk_proto::agent::agent_server::Agent as Service;
use prost::Message;
use tonic::{Code, Request, Status};

use crate::cgroup::values::{IfAbsent, Setting};
use crate::cgroup::{self, devices};
use crate::chain;
use crate::container::fuzzing::{check_disks, check_layers, exec, plan};
use crate::host::Host;
use crate::net;
use crate::pod::{self, PodInfo};
use crate::reaper::Reaper;
use crate::rpc::Agent;

/// The container that the requests speak of.
const ID: &str = "fuzz";

/// Parses a `config.json` and plans its container, and an exec of the same process in it.
pub fn config(bytes: &[u8]) {
    let plan = match plan(ID, bytes, "pod") {
        Ok(plan) => plan,
        Err(error) => return assert!(!chain(&error).is_empty()),
    };
    if let Ok(parts) = cgroup::components(&plan.cgroup_path) {
        assert!(parts.iter().all(|part| !part.contains('/') && *part != ".."));
    }
    assert!(!devices::program(&plan.device_rules).is_empty());
    for Setting { file, if_absent, .. } in &plan.cgroup_settings {
        let other = match if_absent {
            IfAbsent::Instead { file, .. } => file,
            IfAbsent::Refuse | IfAbsent::Skip => file,
        };
        for file in [file, other] {
            assert!(!file.contains('/'), "{file:?} leads out of the cgroup");
        }
    }
    let given = plan.given.clone();
    assert!(plan.exec(given).is_ok(), "what a container may be, an exec in it may be");
}

/// Parses the `process` object of an exec in a minimal container.
pub fn process(bytes: &[u8]) {
    if let Err(error) = exec(ID, bytes) {
        assert!(!chain(&error).is_empty());
    }
}

/// Decodes and checks one request: its kind is the first byte.
pub fn request(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    match kind % 17 {
        0 => {
            if let Ok(request) = wire::SetupPodRequest::decode(body) {
                check(&pod::check(&request).map_err(|e| e.into()));
            }
        }
        1 => {
            if let Ok(request) = wire::CreateContainerRequest::decode(body) {
                check(&create(&request));
            }
        }
        16 => {
            if let Ok(request) = wire::UpdateNetworkRequest::decode(body) {
                check(&net::check(&request).map_err(|e| e.into()));
            }
        }
        kind => answer(kind, body),
    }
}

fn check(result: &Result<(), Box<dyn Error>>) {
    if let Err(error) = result {
        assert!(!chain(error.as_ref()).is_empty());
    }
}

/// What a create checks before it makes anything.
fn create(request: &wire::CreateContainerRequest) -> Result<(), Box<dyn Error>> {
    let pod = PodInfo {
        hostname: "pod".to_owned(),
        filesystems: BTreeMap::from([("base".to_owned(), true), ("scratch".to_owned(), false)]),
        ..PodInfo::default()
    };
    crate::container::check_name("id", &request.id)?;
    let plan = plan(&request.id, &request.spec, &pod.hostname)?;
    assert!(request.id != ".." && !request.id.contains('/'), "it becomes a part of a path");
    assert!(!plan.given.args.is_empty());
    let rootfs = request.rootfs.clone().unwrap_or_default();
    check_layers(&pod, &rootfs.lower, &rootfs.upper_on)?;
    assert!(!rootfs.lower.is_empty() && rootfs.upper_on == "scratch");
    check_disks(&request.devices)?;
    Ok(())
}

/// Sends a request to an agent that has no container, so that it can have no effect.
fn answer(kind: u8, body: &[u8]) {
    thread_local! {
        static AGENT: (tokio::runtime::Runtime, Agent) = {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let host = Host::Test(std::path::PathBuf::from("/proc/self/no-such-directory"));
            match (runtime, Agent::new(host, Reaper::default(), 0)) {
                (Ok(runtime), Ok(agent)) => (runtime, agent),
                (runtime, agent) => {
                    eprintln!("no agent: {:?} {:?}", runtime.err(), agent.err());
                    std::process::abort();
                }
            }
        };
    }
    AGENT.with(|(runtime, agent)| {
        let refused = runtime.block_on(dispatch(agent, kind, body));
        if let Some(status) = refused {
            let expected = [
                Code::InvalidArgument,
                Code::NotFound,
                Code::FailedPrecondition,
                Code::Unimplemented,
            ];
            assert!(expected.contains(&status.code()), "{status:?}");
            assert!(!status.message().is_empty());
        }
    });
}

/// The refusal of a request that could be decoded.
async fn dispatch(agent: &Agent, kind: u8, body: &[u8]) -> Option<Status> {
    /// Decodes a request and sends it.
    macro_rules! send {
        ($request:ident, $method:ident) => {{
            let request = wire::$request::decode(body).ok()?;
            agent.$method(Request::new(request)).await.err()
        }};
    }
    match kind {
        2 => send!(StartContainerRequest, start_container),
        3 => send!(ExecProcessRequest, exec_process),
        4 => send!(WaitProcessRequest, wait_process),
        5 => send!(SignalProcessRequest, signal_process),
        6 => send!(ResizeTerminalRequest, resize_terminal),
        7 => send!(DeleteContainerRequest, delete_container),
        8 => send!(PauseContainerRequest, pause_container),
        9 => send!(ResumeContainerRequest, resume_container),
        10 => send!(UpdateContainerRequest, update_container),
        11 => send!(ListProcessesRequest, list_processes),
        12 => send!(ReadFileRequest, read_file),
        13 => send!(CopyOutRequest, copy_out),
        14 => send!(CopyInRequest, copy_in),
        _ => send!(UpdateVolumeRequest, update_volume),
    }
}
