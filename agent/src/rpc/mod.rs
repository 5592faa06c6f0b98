//! The gRPC service: requests in, statuses out, nothing else.
//!
//! Here is what the service knows of the pod as a whole; [`service`] has the calls, [`status`] what
//! their errors become.

mod service;
mod status;

use std::sync::{Arc, Mutex, Once};

use husk_proto::agent as wire;
use husk_proto::agent::agent_server::AgentServer;
use tokio::sync::{Notify, watch};
use tonic::Status;

use crate::added::Added;
use crate::container::{ContainerError, Runner};
use crate::dial::Dialer;
use crate::host::Host;
use crate::hotplug;
use crate::net::Network;
use crate::pod::{self, PodInfo};
use crate::reaper::Reaper;
use crate::{chain, lock, storage};

/// Largest request in bytes: room for all files of a pod's volumes, or for a container's arguments
/// and environment. A larger one is refused before it is read.
const MAX_REQUEST: usize = 4 * 1024 * 1024;

/// Where the pod is in its life.
#[derive(Debug, Clone)]
enum Pod {
    /// Nothing has been asked for.
    New,
    /// Its world is being made.
    SettingUp,
    /// Its world is there.
    Ready(Arc<PodInfo>),
    /// Its world could not be made.
    Failed,
    /// Its world is gone, or about to be.
    Over,
}

/// When the agent came to life, ns of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    init_ns: u64,
    ready_ns: u64,
}

/// The service.
#[derive(Clone)]
pub(crate) struct Agent {
    host: Host,
    runner: Runner,
    dialer: Dialer,
    network: Network,
    added: Added,
    pod: Arc<Mutex<Pod>>,
    times: Arc<Mutex<Times>>,
    shutdown: Arc<Notify>,
    /// Whether devices that a start does not need have been looked for.
    late_devices: Arc<Once>,
    /// True once streams without an end have to end: an open one would hold the connection.
    over: watch::Sender<bool>,
}

impl Agent {
    /// The service of an agent whose first instruction ran at `init_ns`.
    ///
    /// # Errors
    /// If /proc is not there.
    pub(crate) fn new(host: Host, reaper: Reaper, init_ns: u64) -> std::io::Result<Self> {
        Ok(Self {
            runner: Runner::new(host.transport(), reaper)?,
            dialer: Dialer::new(host.transport()),
            network: Network::default(),
            added: Added::default(),
            host,
            pod: Arc::new(Mutex::new(Pod::New)),
            times: Arc::new(Mutex::new(Times { init_ns, ready_ns: 0 })),
            shutdown: Arc::default(),
            late_devices: Arc::new(Once::new()),
            over: watch::Sender::new(false),
        })
    }

    /// Notes when the agent became ready.
    pub(crate) fn mark_ready(&self, ready_ns: u64) {
        lock(&self.times).ready_ns = ready_ns;
    }

    /// Is notified when a client has asked for the end.
    pub(crate) fn shutdown_requested(&self) -> Arc<Notify> {
        Arc::clone(&self.shutdown)
    }

    /// As a service for a connection.
    pub(crate) fn into_service(self) -> AgentServer<Self> {
        AgentServer::new(self).max_decoding_message_size(MAX_REQUEST)
    }

    fn ready_pod(&self) -> Result<Arc<PodInfo>, ContainerError> {
        let state = match &*lock(&self.pod) {
            Pod::Ready(info) => return Ok(Arc::clone(info)),
            Pod::New => "is not set up",
            Pod::SettingUp => "is being set up",
            Pod::Failed => "could not be set up",
            Pod::Over => "is shutting down",
        };
        Err(ContainerError::NoPod(state))
    }

    async fn set_up(
        &self,
        request: wire::SetupPodRequest,
    ) -> Result<wire::SetupPodResponse, Status> {
        {
            let mut pod = lock(&self.pod);
            if !matches!(*pod, Pod::New) {
                return Err(Status::failed_precondition("the pod has been set up before"));
            }
            *pod = Pod::SettingUp;
        }
        let result = pod::set_up(&self.host, &request).await;
        {
            let mut pod = lock(&self.pod);
            // It may have been asked to shut down meanwhile.
            if matches!(*pod, Pod::SettingUp) {
                *pod = match &result {
                    Ok(info) => Pod::Ready(Arc::new(info.clone())),
                    Err(_) => Pod::Failed,
                };
            }
        }
        result.map_err(|e| status::pod_status(&e))?;
        let Times { init_ns, ready_ns } = *lock(&self.times);
        let release = rustix::system::uname();
        let kernel_release = release.release().to_string_lossy().into_owned();
        Ok(wire::SetupPodResponse { kernel_release, init_ns, ready_ns })
    }

    /// The pod runs: what a start does not need can come now.
    fn look_for_late_devices(&self) {
        if matches!(self.host, Host::Vm) {
            self.late_devices.call_once(|| drop(tokio::spawn(hotplug::find_late_devices())));
        }
    }

    async fn shut_down(&self) -> Result<(), Status> {
        *lock(&self.pod) = Pod::Over;
        self.runner.kill_all().await;
        // An open stream or an unanswered call would hold the connection.
        self.runner.end_events();
        self.dialer.end();
        // In a process of its own: writing back a disk can take long.
        if let Err(error) = self.runner.in_child("unmount", storage::unmount_all).await {
            // The VM ends all the same: nobody could do better.
            tracing::error!(error = chain(&error), "the pod's disks may not be clean");
        }
        // Last, so that the log tells of all that.
        self.over.send_replace(true);
        self.shutdown.notify_one();
        Ok(())
    }
}
