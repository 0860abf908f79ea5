//! Short-lived programs of the host: `ip` and `nft`.

use crate::error::{Error, ErrorKind, Result};
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Both answer within milliseconds.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs a program to its end and returns what it printed. Blocks, at most [`DEADLINE`].
pub(crate) fn run(program: &str, arguments: &[&str], input: Option<&[u8]>) -> Result<Vec<u8>> {
    let action = || format!("run `{program} {}`", arguments.join(" "));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                Error::new(ErrorKind::MissingOnHost, action(), format!("`{program}` is not installed"))
            }
            _ => Error::io(action(), error),
        })?;
    let pidfd = rustix::process::Pid::from_raw(child.id() as i32)
        .map(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()));
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // Far below a pipe's buffer. A program that ended early says why on stderr.
        let _ = stdin.write_all(input);
    }
    // Its output is far below a pipe's buffer too, so waiting for the end first cannot block it.
    if let Some(pidfd) = pidfd.transpose().map_err(|error| Error::io(action(), error))? {
        let mut watched = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
        let ended = rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, Some(&timeout)))
            .map_err(|error| Error::io(action(), error))?;
        if ended == 0 {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::deadline(action(), DEADLINE));
        }
    }
    let status = child.wait().map_err(|error| Error::io(action(), error))?;
    let read = |pipe: Option<&mut dyn Read>| {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            let _ = pipe.take(1 << 20).read_to_end(&mut bytes);
        }
        bytes
    };
    let output = read(child.stdout.as_mut().map(|pipe| pipe as _));
    if status.success() {
        return Ok(output);
    }
    let errors = read(child.stderr.as_mut().map(|pipe| pipe as _));
    let text = String::from_utf8_lossy(&errors);
    Err(Error::new(ErrorKind::Refused, action(), text.lines().next().unwrap_or("it failed silently")))
}
