//! What changes in a namespace after it was joined: told again as a whole, after a quiet moment.

use std::io;
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use husk_netlink::link::{self, Link};
use husk_netlink::watch::Changes;
use husk_netlink::{NetlinkError, Socket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::cni::Stop;
use crate::join::{self, JoinError, Once, Snapshot};
use crate::netns::{Netns, NetnsError};

/// What changes is told when it has not changed for this long, or at the latest so long after its
/// first change.
const QUIET: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(1);

/// Largest MTU of a virtual machine's interface.
const MAX_MTU: u32 = 9000;

/// Why changes cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// It cannot be watched.
    #[error("cannot watch the pod's network namespace for changes")]
    Watch(#[source] NetlinkError),
    /// There can be no thread for it.
    #[error("cannot start following the changes of the pod's network namespace")]
    Start(#[source] io::Error),
}

/// A thread that follows what changes in a namespace; it ends with this.
#[derive(Debug)]
pub struct Follower {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Follows the namespace from how it was when it was joined. Its state is given to `tell` after
    /// changes, among them those that happened between; not every change changes what is told.
    ///
    /// # Errors
    /// [`FollowError`].
    pub fn start(
        netns: &Netns,
        joined: &Snapshot,
        tell: impl FnMut(Snapshot) + Send + 'static,
    ) -> Result<Self, FollowError> {
        // A socket is of the namespace that it was made in, wherever it is used.
        let open = || Ok((Changes::open()?, Socket::open()?));
        let (changes, socket) = netns.enter(open)?.map_err(FollowError::Watch)?;
        let known = joined.interfaces.iter().map(|interface| interface.link.clone()).collect();
        let stop = Stop::new().map_err(FollowError::Start)?;
        let following = Following { changes, socket, known, once: Once::default() };
        let thread = std::thread::Builder::new().name("network-follow".into()).spawn({
            let stop = stop.clone();
            move || following.run(&stop, tell)
        });
        Ok(Follower { stop, thread: Some(thread.map_err(FollowError::Start)?) })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that follows a pod's network panicked");
        }
    }
}

struct Following {
    changes: Changes,
    socket: Socket,
    /// The loopback interface, and those that the virtual machine has.
    known: Vec<Link>,
    once: Once,
}

impl Following {
    fn run(mut self, stop: &Stop, mut tell: impl FnMut(Snapshot)) {
        loop {
            match self.look() {
                Ok(snapshot) => tell(snapshot),
                // The next change may be read again.
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a change of the pod's network namespace is not told to the guest"
                ),
            }
            match self.wait(stop) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    return tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "changes of the pod's network namespace are not followed any more"
                    );
                }
            }
        }
    }

    /// Waits for changes and for the quiet after them. False once this is to end.
    fn wait(&self, stop: &Stop) -> Result<bool, NetlinkError> {
        let mut until: Option<Instant> = None;
        loop {
            let limit = match until {
                None => None,
                Some(until) => match until.checked_duration_since(Instant::now()) {
                    None => return Ok(true),
                    Some(rest) => Some(rest.min(QUIET)),
                },
            };
            let (stopped, changed) = self.poll(stop, limit)?;
            if stopped {
                return Ok(false);
            }
            if !changed && until.is_some() {
                return Ok(true);
            }
            if changed && self.changes.take()? {
                until = until.or_else(|| Instant::now().checked_add(LONGEST));
            }
        }
    }

    /// Whether this is to end, and whether something changed.
    fn poll(&self, stop: &Stop, limit: Option<Duration>) -> Result<(bool, bool), NetlinkError> {
        let limit = match limit.map(Timespec::try_from).transpose() {
            Ok(limit) => limit,
            Err(_) => return Err(NetlinkError::Socket("wait so long for", Errno::INVAL)),
        };
        let (stop, changes) = (stop.ends(), self.changes.as_fd());
        let mut fds = [PollFd::new(&stop, PollFlags::IN), PollFd::new(&changes, PollFlags::IN)];
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(NetlinkError::Socket("wait for", errno)),
        }
        let [stopped, changed] = fds.map(|fd| !fd.revents().is_empty());
        Ok((stopped, changed))
    }

    /// The namespace as it is now, as far as the virtual machine has its interfaces.
    fn look(&mut self) -> Result<Snapshot, JoinError> {
        let all = link::list(&mut self.socket).map_err(|e| JoinError::Read("interfaces", e))?;
        for link in all.iter().filter(|link| join::is_joined(link)) {
            let is_new = !self.known.iter().any(|known| known.index == link.index);
            if is_new && self.once.is_new(format!("interface {}", link.index)) {
                tracing::warn!(
                    interface = link.name,
                    "an interface that comes to a pod's network namespace after the pod's start is \
                     not one of the guest"
                );
            }
        }
        let mut links = Vec::new();
        for known in &self.known {
            let there = all.iter().find(|link| link.index == known.index);
            let Some(link) = there.filter(|link| join::is_told(link)) else { continue };
            let mut link = link.clone();
            if link.flags & link::LOOPBACK == 0 {
                follow_mtu(&mut self.socket, &all, &mut link, &mut self.once)?;
                if link.mac != known.mac && self.once.is_new(format!("MAC {:?}", link.mac)) {
                    let interface = &link.name;
                    tracing::warn!(interface, "the guest keeps the MAC address that it has");
                }
                link.mac = known.mac;
            }
            links.push(link);
        }
        join::collect(&mut self.socket, links, &mut self.once)
    }
}

/// Lets an interface's tap take packets of its size.
fn follow_mtu(
    socket: &mut Socket,
    all: &[Link],
    link: &mut Link,
    once: &mut Once,
) -> Result<(), JoinError> {
    if link.mtu > MAX_MTU {
        if once.is_new(format!("MTU {} {}", link.index, link.mtu)) {
            let interface = &link.name;
            tracing::warn!(interface, mtu = link.mtu, "the guest's MTU is {MAX_MTU}, the largest");
        }
        link.mtu = MAX_MTU;
    }
    let name = join::tap_name(link);
    match all.iter().find(|tap| tap.name == name && tap.mtu != link.mtu) {
        Some(tap) => {
            link::set_mtu(socket, tap.index, link.mtu).map_err(join::on("set the MTU of", tap))
        }
        None => Ok(()),
    }
}
