//! The process that thaws what this one froze, should it die or hang.

use crate::leave_out::protocol::{read_text, write_text};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::setsid;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Said by who freezes: one more is frozen.
const FROZEN: u8 = b'f';
/// It thawed everything itself.
const DONE: u8 = b'!';
/// Between two attempts to thaw what is just being frozen.
const AGAIN: Duration = Duration::from_millis(100);

/// `FIFREEZE` and `FITHAW`, of <linux/fs.h>. The kernel looks at no argument.
const FREEZE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<i32>(b'X', 119);
const THAW: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<i32>(b'X', 120);

/// Has the file system of an open folder written back, and stand still. [`Errno::BUSY`] if somebody froze it already,
/// [`Errno::OPNOTSUPP`] if it cannot stand still.
pub(super) fn freeze(folder: impl AsFd) -> Result<(), Errno> {
    // SAFETY: it takes no argument.
    unsafe { rustix::ioctl::ioctl(folder, rustix::ioctl::NoArg::<FREEZE>::new()) }
}

/// [`Errno::INVAL`] if it does not stand still.
pub(super) fn thaw(folder: impl AsFd) -> Result<(), Errno> {
    // SAFETY: it takes no argument.
    unsafe { rustix::ioctl::ioctl(folder, rustix::ioctl::NoArg::<THAW>::new()) }
}

/// What the process is told at first, as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Task {
    parent: u32,
    /// Folders of the file systems, by their descriptors in the parent, in the order that they are frozen.
    folders: Vec<i32>,
    limit_ms: u64,
}

/// The parent's end. Dropped, everything is thawed.
#[derive(Debug)]
pub(super) struct Watch {
    to: ChildStdin,
    /// Ends after the process.
    pub ended: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts `child`, a process that calls [`thaw_file_systems`], and waits until it watches over these folders.
    pub fn start(child: &mut Command, folders: Vec<i32>, limit: Duration) -> io::Result<(Watch, Child)> {
        let limit_ms = limit.as_millis().try_into().unwrap_or(u64::MAX);
        let mut child =
            child.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut to = child.stdin.take().expect("it is piped");
        let mut from = child.stdout.take().expect("it is piped");
        let task = serde_json::to_vec(&Task { parent: std::process::id(), folders, limit_ms })
            .map_err(io::Error::other)?;
        let ready = write_text(&mut to, &task).and_then(|()| to.flush()).and_then(|()| read_text(&mut from));
        match ready.as_deref() {
            Ok([]) => Ok((Watch { to, ended: None }, child)),
            Ok(why) => Err(io::Error::other(String::from_utf8_lossy(why).into_owned())),
            Err(_) => Err(io::Error::other("it ended at once")),
        }
    }

    /// One more is frozen.
    pub fn tell_frozen(&mut self) {
        // It may be gone, which is noticed elsewhere.
        let _ = self.to.write_all(&[FROZEN]);
    }

    /// It ends, and thaws nothing. Afterwards nothing of the file systems is open any more: they can be unmounted.
    pub fn stand_down(mut self) {
        let _ = self.to.write_all(&[DONE]);
        drop(self.to);
        let _ = self.ended.map(JoinHandle::join);
    }
}

/// Thaws file systems when standard input ends, when the time is over, or on a signal; for a process that does nothing else, and
/// was started by who freezes them.
///
/// It is in a session of its own, holds nothing but their folders, and is the last that the kernel kills where memory is short.
pub fn thaw_file_systems() -> io::Result<()> {
    setsid()?;
    let signals = signals()?;
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = std::env::set_current_dir("/");
    // Nothing is read ahead of what is asked for.
    let mut input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let task: Task = serde_json::from_slice(&read_text(&mut input)?).map_err(io::Error::other)?;
    let mut output = io::stdout().lock();
    let folders = match open_of_parent(&task) {
        Ok(folders) => folders,
        Err(error) => {
            write_text(&mut output, error.to_string().as_bytes())?;
            return output.flush();
        }
    };
    write_text(&mut output, b"")?;
    output.flush()?;
    let thaw_first = |count: usize| {
        // One may lie in a file of one that was frozen later, and writes when it is thawed. What somebody else froze is not ours.
        for folder in folders.iter().take(count).rev() {
            let _ = thaw(folder);
        }
    };
    let (deadline, mut frozen) = (Instant::now() + Duration::from_millis(task.limit_ms), 0);
    loop {
        match wait(&input, &signals, deadline.saturating_duration_since(Instant::now()))? {
            Heard::Byte(FROZEN) => frozen += 1,
            Heard::Byte(_) => return Ok(()),
            Heard::End => {
                // It may have been killed before it could say so of the last.
                thaw_first(frozen + 1);
                return Ok(());
            }
            Heard::Nothing => break,
        }
    }
    loop {
        thaw_first(frozen + 1);
        if frozen >= folders.len() {
            return Ok(());
        }
        // One that is just being frozen cannot be thawed before it is.
        match wait(&input, &signals, AGAIN)? {
            Heard::Byte(FROZEN) => frozen += 1,
            Heard::Byte(_) => return Ok(()),
            Heard::End => frozen = folders.len(),
            Heard::Nothing => {}
        }
    }
}

enum Heard {
    Byte(u8),
    End,
    /// Until the time was over, or there was a signal.
    Nothing,
}

fn wait(input: &File, signals: &OwnedFd, time: Duration) -> io::Result<Heard> {
    let mut ends = [PollFd::new(input, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
    let time = Timespec::try_from(time).map_err(io::Error::other)?;
    rustix::io::retry_on_intr(|| poll(&mut ends, Some(&time)))?;
    if ends[0].revents().is_empty() {
        return Ok(Heard::Nothing);
    }
    let mut byte = [0];
    match rustix::io::retry_on_intr(|| rustix::io::read(input, &mut byte))? {
        0 => Ok(Heard::End),
        _ => Ok(Heard::Byte(byte[0])),
    }
}

/// Opens the same folders as the parent, whatever has been mounted over them since.
fn open_of_parent(task: &Task) -> io::Result<Vec<File>> {
    let Task { parent, folders, .. } = task;
    folders.iter().map(|folder| File::open(format!("/proc/{parent}/fd/{folder}"))).collect()
}

/// Every signal that would end it is read from there.
fn signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is this frame's, and the descriptor is new and nobody else's.
    unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&mut all);
        if libc::sigprocmask(libc::SIG_BLOCK, &all, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::signalfd(-1, &all, libc::SFD_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            signals => Ok(OwnedFd::from_raw_fd(signals)),
        }
    }
}
