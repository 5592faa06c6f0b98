//! Pods for tests of what stands on them: without a task, and with a guest that a test plays.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use oci_spec::image::ImageConfiguration;
use tokio::sync::{mpsc, watch};

use super::changes::Changes;
use super::images::ResolvedImage;
use super::runtime::{GuestRuntime, Parts};
use super::timeline::Timeline;
use super::{PodAccess, SharedFindings, Stopper};
use crate::guest::Guest;
use crate::storage;
use crate::types::{
    ContainerKind, ContainerSpec, Network, PodMetadata, PodSpec, PullPolicy, Resources,
    RestartPolicy, Rootfs, SecurityContext, VmSize,
};

/// A pod with these containers, none of which has an input.
pub(crate) fn spec(containers: &[&str]) -> PodSpec {
    let container = |name: &&str| ContainerSpec {
        name: (*name).to_owned(),
        kind: ContainerKind::Main,
        rootfs: Rootfs::Image { reference: "x".into(), pull_policy: PullPolicy::Never },
        command: vec!["sh".into()],
        args: Vec::new(),
        env: Vec::new(),
        working_dir: None,
        ports: Vec::new(),
        resources: Resources::default(),
        volume_mounts: Vec::new(),
        volume_devices: Vec::new(),
        security: SecurityContext::default(),
        tty: false,
        stdin: false,
        stdin_once: false,
        probes: Default::default(),
        lifecycle: Default::default(),
        termination_message: Default::default(),
    };
    PodSpec {
        metadata: PodMetadata::default(),
        hostname: "h".into(),
        restart_policy: RestartPolicy::Never,
        termination_grace_s: 30,
        active_deadline_s: None,
        init_containers: Vec::new(),
        containers: containers.iter().map(container).collect(),
        volumes: Vec::new(),
        vm: VmSize { vcpus: 1, memory_mib: 128 },
        fs_group: None,
        supplemental_groups: Vec::new(),
        sysctls: BTreeMap::new(),
        service_account: String::new(),
        network: Network::Loopback,
        dns: Default::default(),
        host_aliases: Vec::new(),
    }
}

/// Access to a pod with this guest; without one it does not run.
pub(crate) fn access(spec: Arc<PodSpec>, guest: Option<Guest>) -> PodAccess {
    let runtime = guest.map(|guest| {
        let images = spec.all_containers().map(|container| {
            let image = ResolvedImage { layers: Vec::new(), config: ImageConfiguration::default() };
            (container.name.clone(), image)
        });
        GuestRuntime::new(Parts {
            guest,
            spec: spec.clone(),
            changes: Changes::new(spec.clone()),
            uid: "uid".into(),
            node_name: "node".into(),
            host_ips: Vec::new(),
            pod_ips: Vec::new(),
            images: images.collect(),
            layout: storage::Layout::default(),
            logs: mpsc::channel(1).0,
            inputs: Default::default(),
            starts: Mutex::default(),
            disks: Default::default(),
            checks: AtomicU64::default(),
            timeline: Timeline::new(),
            findings: SharedFindings::default(),
            measure: false,
        })
    });
    // What is there at the start stays, without a sender.
    PodAccess::new(spec, watch::channel(runtime).1)
}

/// A means of ending a pod that has no task: it has ended.
pub(crate) fn stopper() -> Stopper {
    Stopper(mpsc::channel(1).0.downgrade())
}
