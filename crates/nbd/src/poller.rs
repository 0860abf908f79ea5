//! epoll, level-triggered, with a key per descriptor; and waking who waits there.

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::time::Timespec;
use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Events taken at once.
const BATCH: usize = 64;

#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    pub key: u64,
    pub readable: bool,
    pub writable: bool,
}

impl Poller {
    pub fn new() -> io::Result<Poller> {
        Ok(Poller { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    pub fn add(&self, fd: impl AsFd, key: u64, writable: bool) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, EventData::new_u64(key), flags(true, writable))?)
    }

    pub fn change(&self, fd: impl AsFd, key: u64, readable: bool, writable: bool) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, EventData::new_u64(key), flags(readable, writable))?)
    }

    pub fn remove(&self, fd: impl AsFd) {
        // Closing the descriptor removes it as well.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Waits for at most `timeout`; `None` waits for ever.
    pub fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        let timeout = timeout.map(|t| Timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(t.subsec_nanos()),
        });
        let mut buffer = [const { MaybeUninit::uninit() }; BATCH];
        let events = match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        ready.extend(events.iter().map(|event| {
            let flags = event.flags;
            let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
            Ready {
                key: event.data.u64(),
                readable: broken || flags.contains(EventFlags::IN),
                writable: broken || flags.contains(EventFlags::OUT),
            }
        }));
        Ok(())
    }
}

fn flags(readable: bool, writable: bool) -> EventFlags {
    let mut flags = EventFlags::empty();
    flags.set(EventFlags::IN, readable);
    flags.set(EventFlags::OUT, writable);
    flags
}

/// A descriptor that becomes readable when another thread says so, once for any number of times.
#[derive(Debug)]
pub struct Wake {
    descriptor: OwnedFd,
    /// It was said, and not taken note of yet.
    written: AtomicBool,
}

impl Wake {
    pub fn new() -> io::Result<Wake> {
        let descriptor = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Wake { descriptor, written: AtomicBool::new(false) })
    }

    pub fn wake(&self) {
        if !self.written.swap(true, Ordering::AcqRel) {
            let _ = rustix::io::write(&self.descriptor, &1u64.to_ne_bytes());
        }
    }

    /// Call when the descriptor is readable, before looking for what it was about: what comes after it wakes again.
    pub fn reset(&self) {
        let _ = rustix::io::read(&self.descriptor, &mut [0; 8]);
        self.written.store(false, Ordering::Release);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}
