//! A device's timer: a descriptor that becomes readable at a time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::worker::WorkerError;

/// Fires once at the time for which it was set last.
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
    /// For when it is set.
    armed: Option<Instant>,
}

impl Timer {
    /// A timer that is not set.
    ///
    /// # Errors
    /// The host has no descriptor for it.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Timer { fd: timerfd_create(TimerfdClockId::Monotonic, flags)?, armed: None })
    }

    /// Sets it, instead of what it was set for; at once if `deadline` is over.
    ///
    /// # Errors
    /// [`WorkerError::Host`].
    pub fn arm(&mut self, deadline: Instant, now: Instant) -> Result<(), WorkerError> {
        if self.armed == Some(deadline) {
            return Ok(());
        }
        // Zero would disarm it.
        let wait = deadline.saturating_duration_since(now).max(Duration::from_nanos(1));
        let failed = |source| WorkerError::Host { what: "set a timer", source };
        let value = Timespec::try_from(wait).map_err(|error| failed(io::Error::other(error)))?;
        let once = Itimerspec { it_interval: Timespec::default(), it_value: value };
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &once)
            .map_err(|errno| failed(errno.into()))?;
        self.armed = Some(deadline);
        Ok(())
    }

    /// To be called when it is readable: makes it silent until it is set again.
    ///
    /// # Errors
    /// [`WorkerError::Host`].
    pub fn acknowledge(&mut self) -> Result<(), WorkerError> {
        self.armed = None;
        match rustix::io::read(&self.fd, &mut [0_u8; 8]) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(errno) => Err(WorkerError::Host { what: "read a timer", source: errno.into() }),
        }
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn is_ready(timer: &Timer, seconds: i64) -> bool {
        let mut fds = [PollFd::new(timer, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: seconds, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn it_fires_once_for_each_time_that_it_is_set() {
        let mut timer = Timer::new().unwrap();
        assert!(!is_ready(&timer, 0));
        let now = Instant::now();
        timer.arm(now - Duration::from_secs(1), now).unwrap();
        assert!(is_ready(&timer, 60));
        timer.acknowledge().unwrap();
        assert!(!is_ready(&timer, 0));
        timer.arm(now + Duration::from_millis(1), now).unwrap();
        assert!(is_ready(&timer, 60));
    }

    #[test]
    fn the_last_time_counts() {
        let mut timer = Timer::new().unwrap();
        let now = Instant::now();
        timer.arm(now, now).unwrap();
        timer.arm(now + Duration::from_secs(3600), now).unwrap();
        assert!(!is_ready(&timer, 0));
    }
}
