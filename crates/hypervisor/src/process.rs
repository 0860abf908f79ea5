//! Processes that outlive the daemon, found again without the danger of hitting a stranger.

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;

/// A process, told apart from later ones that were given the same number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    pub pid: u32,
    /// Since boot, in clock ticks, as `/proc/PID/stat` has it.
    pub start_ticks: u64,
    /// The boot it lives in.
    pub boot_id: String,
}

impl ProcessIdentity {
    /// The process that has this number now; None if there is none.
    pub fn of(pid: u32) -> io::Result<Option<Self>> {
        let Some(start_ticks) = start_ticks(pid)? else { return Ok(None) };
        Ok(Some(Self { pid, start_ticks, boot_id: boot_id()? }))
    }

    /// A handle on exactly this process; None if it is gone. A pidfd stays with its process, so the check after
    /// opening it holds for every later use.
    pub fn open(&self) -> io::Result<Option<OwnedFd>> {
        if boot_id()? != self.boot_id {
            return Ok(None);
        }
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok((start_ticks(self.pid)? == Some(self.start_ticks)).then_some(pidfd))
    }
}

/// Sends a signal. A process that is gone is not an error.
pub(crate) fn signal(pidfd: &OwnedFd, signal: Signal) -> io::Result<()> {
    match rustix::process::pidfd_send_signal(pidfd, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits until the process has ended. Reaping it is its parent's.
pub(crate) async fn ended(pidfd: &OwnedFd) -> io::Result<()> {
    let pidfd = pidfd.try_clone()?;
    // SAFETY: the descriptor is open, and stays so: the AsyncFd owns it.
    let watched =
        unsafe { tokio::io::unix::AsyncFd::register_with_interest(pidfd, tokio::io::Interest::READABLE) }?;
    watched.readable().await?.retain_ready();
    Ok(())
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn start_ticks(pid: u32) -> io::Result<Option<u64>> {
    let stat = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // The process ended between open and read.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    // The second field is the program's name in parentheses and may hold anything; field 22 is the start.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let start = after_name.split_ascii_whitespace().nth(22 - 3).and_then(|field| field.parse().ok());
    start.map(Some).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_while_it_lives_and_a_reused_number_is_not_taken_for_it() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let identity = ProcessIdentity::of(child.id()).unwrap().unwrap();
        assert!(identity.open().unwrap().is_some());
        let earlier = ProcessIdentity { start_ticks: identity.start_ticks - 1, ..identity.clone() };
        assert!(earlier.open().unwrap().is_none());
        let other_boot = ProcessIdentity { boot_id: "another".into(), ..identity.clone() };
        assert!(other_boot.open().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(identity.open().unwrap().is_none());
        assert_eq!(ProcessIdentity::of(identity.pid).unwrap(), None);
    }
}
