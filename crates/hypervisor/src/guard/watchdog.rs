//! A hardware watchdog: resets the host when the guard cannot vouch for its machine any more.
//!
//! It is the cure for what no process can handle: a host that is frozen as a whole and goes on after the peer took
//! over. The device resets the host [`TIMEOUT_SECONDS`] after the last pet, which is within the time the peer waits
//! by default. One process can hold the device: use it on hosts with one protected machine.

use crate::error::{Error, Result};
use rempart_types::MonotonicTime;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

/// L + W with default times.
const TIMEOUT_SECONDS: libc::c_int = 4;

const PET_INTERVAL: Duration = Duration::from_millis(500);

/// linux/watchdog.h: `_IOWR('W', 6, int)`.
const WDIOC_SETTIMEOUT: libc::Ioctl = 0xc004_5706u32 as libc::Ioctl;

#[derive(Debug)]
pub(crate) struct Watchdog {
    device: File,
    next_pet: MonotonicTime,
}

impl Watchdog {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let device = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| Error::io(format!("open the watchdog `{}`", path.display()), error))?;
        let mut seconds = TIMEOUT_SECONDS;
        // SAFETY: the request takes a pointer to an int, which lives across the call.
        if unsafe { libc::ioctl(device.as_raw_fd(), WDIOC_SETTIMEOUT, &mut seconds) } != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, path = %path.display(), "the watchdog keeps its own timeout");
        }
        Ok(Self { device, next_pet: MonotonicTime::ZERO })
    }

    pub(crate) fn next_wake(&self) -> MonotonicTime {
        self.next_pet
    }

    /// Pets it when it is time and the machine is safe.
    pub(crate) fn tick(&mut self, safe: bool, now: MonotonicTime) {
        if now >= self.next_pet {
            self.next_pet = now + PET_INTERVAL;
            if safe && let Err(error) = self.device.write_all(b".") {
                tracing::warn!(%error, "cannot pet the watchdog");
            }
        }
    }

    /// Ends the watch: the machine is gone. Without this, closing the device would reset the host.
    pub(crate) fn release(mut self) {
        if let Err(error) = self.device.write_all(b"V") {
            tracing::warn!(%error, "cannot release the watchdog");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_petted_only_while_the_machine_is_safe_and_released_at_the_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut watchdog = Watchdog::open(file.path()).unwrap();
        let at = |millis: u64| MonotonicTime(millis * 1_000_000);
        watchdog.tick(true, at(1000));
        watchdog.tick(true, at(1100));
        watchdog.tick(false, at(1500));
        watchdog.tick(false, at(2000));
        watchdog.tick(true, at(2500));
        assert_eq!(std::fs::read(file.path()).unwrap(), b"..");
        watchdog.release();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"..V");
    }
}
