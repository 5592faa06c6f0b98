use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::testing::{interrupt, wait_until};
use super::super::{Interrupt, status};
use super::*;
use crate::machine::report::{Ending, Reports, VmEvent, channel};

type OnKick = Box<dyn FnMut(usize) -> Result<Progress, WorkerError> + Send>;

struct Scripted {
    on_kick: OnKick,
    watched: Option<UnixStream>,
    ready: Arc<AtomicU32>,
}

impl Handler for Scripted {
    fn watch(&mut self, poller: &Poller) -> io::Result<()> {
        self.watched.as_ref().map_or(Ok(()), |fd| poller.add(fd.as_fd(), 7, Readiness::READ))
    }

    fn kicked(&mut self, queue: usize, _poller: &Poller) -> Result<Progress, WorkerError> {
        (self.on_kick)(queue)
    }

    fn ready(
        &mut self,
        token: u32,
        readiness: Readiness,
        poller: &Poller,
    ) -> Result<(), WorkerError> {
        assert!(readiness.readable);
        self.ready.fetch_add(token, Ordering::SeqCst);
        let fd = self.watched.as_ref().unwrap();
        poller.remove(fd.as_fd()).unwrap();
        Ok(())
    }
}

struct Rig {
    worker: Worker,
    kicks: Vec<EventFd>,
    interrupt: Interrupt,
    reporter: Reporter,
    reports: Reports,
}

fn start(on_kick: OnKick) -> Rig {
    start_with(on_kick, None, Arc::default())
}

fn start_with(on_kick: OnKick, watched: Option<UnixStream>, ready: Arc<AtomicU32>) -> Rig {
    let kicks: Vec<EventFd> = (0..2).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    let (interrupt, (reporter, reports)) = (interrupt(), channel().unwrap());
    let wiring = Wiring {
        kicks: kicks.iter().map(|kick| kick.try_clone().unwrap()).collect(),
        interrupt: interrupt.clone(),
        reporter: reporter.clone(),
    };
    let worker =
        Worker::spawn("a-rather-long-name", wiring, Scripted { on_kick, watched, ready }).unwrap();
    Rig { worker, kicks, interrupt, reporter, reports }
}

#[test]
fn a_kick_reaches_the_handler_with_its_queue() {
    let seen = Arc::new(AtomicU32::new(0));
    let there = seen.clone();
    let rig = start(Box::new(move |queue| {
        there.fetch_or(1 << queue, Ordering::SeqCst);
        Ok(Progress::Done)
    }));
    rig.kicks[1].write(1).unwrap();
    wait_until(|| seen.load(Ordering::SeqCst) == 0b10);
    rig.kicks[0].write(2).unwrap();
    wait_until(|| seen.load(Ordering::SeqCst) == 0b11);
    wait_until(|| rig.interrupt.counters().snapshot().kicks == 3);
}

#[test]
fn an_unfinished_queue_is_served_again_without_a_kick() {
    let calls = Arc::new(AtomicU32::new(0));
    let there = calls.clone();
    let rig = start(Box::new(move |_| {
        let before = there.fetch_add(1, Ordering::SeqCst);
        Ok(if before < 9 { Progress::More } else { Progress::Done })
    }));
    rig.kicks[0].write(1).unwrap();
    wait_until(|| calls.load(Ordering::SeqCst) == 10);
}

#[test]
fn a_queue_that_never_finishes_does_not_keep_the_worker_from_stopping() {
    let calls = Arc::new(AtomicU32::new(0));
    let there = calls.clone();
    let rig = start(Box::new(move |_| {
        there.fetch_add(1, Ordering::SeqCst);
        Ok(Progress::More)
    }));
    rig.kicks[0].write(1).unwrap();
    wait_until(|| calls.load(Ordering::SeqCst) > 3);
    drop(rig.worker);
    let after = calls.load(Ordering::SeqCst);
    rig.kicks[1].write(1).unwrap();
    assert_eq!(calls.load(Ordering::SeqCst), after);
}

#[test]
fn a_guest_fault_needs_a_reset_and_ends_the_thread_only() {
    let rig = start(Box::new(|_| Err(GuestFault::TooLong.into())));
    rig.kicks[0].write(1).unwrap();
    wait_until(|| rig.interrupt.status() == status::DEVICE_NEEDS_RESET);
    drop(rig.worker);
    assert_eq!(rig.reporter.ending(), None);
}

#[test]
fn a_host_failure_is_reported_with_its_cause() {
    let rig = start(Box::new(|_| {
        Err(WorkerError::Host { what: "frob", source: io::Error::other("no frobs left") })
    }));
    rig.kicks[0].write(1).unwrap();
    wait_until(|| rig.reporter.ending().is_some());
    drop(rig.worker);
    let failure = Ending::Failure("device a-rather-long-name: cannot frob: no frobs left".into());
    assert_eq!(rig.reports.drain(), [VmEvent::Ended(failure)]);
    assert_eq!(rig.interrupt.status(), 0, "the guest did nothing wrong");
}

#[test]
fn a_panic_is_reported() {
    let rig = start(Box::new(|_| panic!("a bug")));
    rig.kicks[0].write(1).unwrap();
    wait_until(|| rig.reporter.ending().is_some());
    drop(rig.worker);
    let ending = rig.reporter.ending().unwrap();
    assert!(matches!(&ending, Ending::Failure(why) if why.contains("panicked")), "{ending:?}");
}

#[test]
fn a_watched_descriptor_reports_its_token() {
    let (near, far) = UnixStream::pair().unwrap();
    let ready = Arc::new(AtomicU32::new(0));
    let rig = start_with(Box::new(|_| Ok(Progress::Done)), Some(near), ready.clone());
    io::Write::write_all(&mut &far, b"x").unwrap();
    wait_until(|| ready.load(Ordering::SeqCst) == 7);
    drop(rig);
}
