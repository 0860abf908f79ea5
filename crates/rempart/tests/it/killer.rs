//! Ends a real program by SIGKILL right before a chosen change that it makes to files, or asks a store of objects for, by
//! ptrace(2): the program has no part in it.

use libc::c_long;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A call that changes files or makes changes durable, and the file; or a request over HTTP, and the path in it, or `more` of it.
#[derive(Debug, Clone)]
pub struct Step {
    pub call: &'static str,
    pub path: PathBuf,
}

/// Whose changes count.
#[derive(Debug, Clone, Copy)]
pub struct Watched<'a> {
    /// Files below it.
    pub folder: &'a Path,
    /// Requests that change something, too, one write to a socket after the other. Nothing else may be sent there.
    pub requests: bool,
}

/// What became of a program.
#[derive(Debug)]
pub struct Run {
    /// Its exit status; none if it was killed.
    pub status: Option<i32>,
    /// What it did, in the order in which it began to.
    pub steps: Vec<Step>,
}

/// How a call names what it changes.
#[derive(Debug, Clone, Copy)]
enum Names {
    /// By a descriptor, the argument of that number.
    Open(usize),
    /// By a path.
    Path(usize),
    /// By a directory and a path in it.
    At(usize, usize),
    /// The same, if the argument of that number has `O_CREAT` or `O_TRUNC`.
    Creating(usize, usize, usize),
}

const CALLS: &[(c_long, &str, Names)] = &[
    (libc::SYS_write, "write", Names::Open(0)),
    (libc::SYS_pwrite64, "pwrite", Names::Open(0)),
    (libc::SYS_writev, "writev", Names::Open(0)),
    (libc::SYS_pwritev, "pwritev", Names::Open(0)),
    (libc::SYS_pwritev2, "pwritev", Names::Open(0)),
    (libc::SYS_sendfile, "sendfile", Names::Open(0)),
    (libc::SYS_copy_file_range, "copy_file_range", Names::Open(2)),
    (libc::SYS_ftruncate, "ftruncate", Names::Open(0)),
    (libc::SYS_fallocate, "fallocate", Names::Open(0)),
    (libc::SYS_fsync, "fsync", Names::Open(0)),
    (libc::SYS_fdatasync, "fdatasync", Names::Open(0)),
    (libc::SYS_syncfs, "syncfs", Names::Open(0)),
    (libc::SYS_openat, "create", Names::Creating(0, 1, 2)),
    (libc::SYS_mkdirat, "mkdir", Names::At(0, 1)),
    (libc::SYS_linkat, "link", Names::At(2, 3)),
    (libc::SYS_unlinkat, "unlink", Names::At(0, 1)),
    (libc::SYS_renameat2, "rename", Names::At(2, 3)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_renameat, "rename", Names::At(2, 3)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rename, "rename", Names::Path(1)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mkdir, "mkdir", Names::Path(0)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rmdir, "rmdir", Names::Path(0)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, "unlink", Names::Path(0)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_link, "link", Names::Path(1)),
];

/// How a call that may send over a socket names what it sends.
#[derive(Debug, Clone, Copy)]
enum Sends {
    /// By its address, the argument of that number.
    Bytes(usize),
    /// By an array that begins with its address.
    Parts(usize),
    /// By a header that holds the address of such an array behind two words.
    Message(usize),
}

const SENDS: &[(c_long, Sends)] = &[
    (libc::SYS_write, Sends::Bytes(1)),
    (libc::SYS_sendto, Sends::Bytes(1)),
    (libc::SYS_writev, Sends::Parts(1)),
    (libc::SYS_sendmsg, Sends::Message(1)),
];

/// What is asked for that changes something.
const CHANGES: [&str; 3] = ["PUT", "POST", "DELETE"];
/// Of a request, to tell what it asks for.
const REQUEST_LINE: usize = 1024;

/// Runs `command` to its end, or until it is about to take, for the time `before` counted from 0, one of the steps that are
/// watched. That step is not taken.
pub fn run(command: Command, watched: Watched<'_>, before: Option<usize>) -> Run {
    follow(command, watched, |number, _| before == Some(number))
}

/// Runs `command` to its end, and has it stand still before the first such step until `meanwhile` is over.
///
/// # Panics
/// If it takes none.
pub fn interrupt(
    command: Command,
    watched: Watched<'_>,
    before: impl Fn(&Step) -> bool,
    meanwhile: impl FnOnce(),
) -> Run {
    let mut meanwhile = Some(meanwhile);
    let run = follow(command, watched, |_, step| {
        if let Some(meanwhile) = meanwhile.take_if(|_| before(step)) {
            meanwhile();
        }
        false
    });
    assert!(meanwhile.is_none(), "it took no such step: {:?}", run.steps);
    run
}

/// `dies_before` is asked before each step, which is counted from 0.
fn follow(
    mut command: Command,
    watched: Watched<'_>,
    mut dies_before: impl FnMut(usize, &Step) -> bool,
) -> Run {
    // SAFETY: ptrace(2) is one system call.
    unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
    let main =
        Pid::from_raw(command.spawn().expect("it starts").id().try_into().expect("it is a process id"));
    // Children of other threads are other tests'.
    let ours = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    assert_eq!(waitpid(main, Some(ours)), Ok(WaitStatus::Stopped(main, Signal::SIGTRAP)), "it stops first");
    let children = Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACEFORK | Options::PTRACE_O_TRACEVFORK;
    let options = children | Options::PTRACE_O_TRACEEXEC | Options::PTRACE_O_TRACESYSGOOD;
    ptrace::setoptions(main, options | Options::PTRACE_O_EXITKILL).expect("it is traced");
    let mut run = Run { status: None, steps: Vec::new() };
    let mut asked = BTreeMap::new();
    // The caller may have children of its own.
    let (mut traced, mut gone) = (BTreeSet::from([main]), BTreeSet::new());
    go_on(main, None);
    while !traced.is_empty() {
        let status = waitpid(None, Some(ours)).unwrap_or_else(|error| panic!("cannot wait for it: {error}"));
        match status {
            WaitStatus::PtraceSyscall(thread) => {
                if let Some(step) = step_of(thread, watched, &mut asked) {
                    if dies_before(run.steps.len(), &step) {
                        kill(main, Signal::SIGKILL).expect("it is there");
                    } else {
                        run.steps.push(step);
                    }
                }
                go_on(thread, None);
            }
            WaitStatus::PtraceEvent(thread, ..) => {
                // That of a new thread or process, which may have told of itself, and even of its end, before.
                let new = ptrace::getevent(thread).ok().and_then(|new| i32::try_from(new).ok());
                traced
                    .extend(new.filter(|new| *new > 0).map(Pid::from_raw).filter(|new| !gone.contains(new)));
                go_on(thread, None);
            }
            // With that a new thread begins.
            WaitStatus::Stopped(thread, Signal::SIGSTOP) => {
                traced.insert(thread);
                go_on(thread, None);
            }
            WaitStatus::Stopped(thread, signal) => go_on(thread, Some(signal)),
            WaitStatus::Exited(thread, status) => {
                if thread == main {
                    run.status = Some(status);
                }
                traced.remove(&thread);
                gone.insert(thread);
            }
            WaitStatus::Signaled(thread, ..) => {
                traced.remove(&thread);
                gone.insert(thread);
            }
            _ => {}
        }
    }
    run
}

fn go_on(thread: Pid, signal: Option<Signal>) {
    match ptrace::syscall(thread, signal) {
        // One that was just killed does not go on.
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => panic!("cannot let {thread} go on: {error}"),
    }
}

/// What a thread is about to do, if it is a step. `asked` is what was asked for last on each socket, if it changes something.
fn step_of(
    thread: Pid,
    watched: Watched<'_>,
    asked: &mut BTreeMap<PathBuf, Option<PathBuf>>,
) -> Option<Step> {
    let info = ptrace::syscall_info(thread).ok()?;
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: `op` says which of the union it is.
    let entry = unsafe { info.u.entry };
    let call = |number: c_long| number as u64 == entry.nr;
    let descriptor = |at: usize| match entry.args[at] as i32 {
        libc::AT_FDCWD => std::fs::read_link(format!("/proc/{thread}/cwd")).ok(),
        open => std::fs::read_link(format!("/proc/{thread}/fd/{open}")).ok(),
    };
    if let Some((_, sends)) = SENDS.iter().find(|(number, _)| watched.requests && call(*number)) {
        let socket = descriptor(0)?;
        if socket.to_str()?.starts_with("socket:") {
            let address = match *sends {
                Sends::Bytes(at) => entry.args[at],
                Sends::Parts(at) => word(thread, entry.args[at])?,
                Sends::Message(at) => word(thread, word(thread, entry.args[at] + 16)?)?,
            };
            return request(thread, address, asked.entry(socket).or_default());
        }
    }
    let (_, call, names) = CALLS.iter().find(|(number, ..)| call(*number))?;
    let path = match *names {
        Names::Open(at) => descriptor(at)?,
        Names::Path(at) => text(thread, entry.args[at])?,
        Names::At(dir, at) => descriptor(dir)?.join(text(thread, entry.args[at])?),
        Names::Creating(dir, at, flags) => {
            let changes = entry.args[flags] as i32 & (libc::O_CREAT | libc::O_TRUNC) != 0;
            changes.then_some(())?;
            descriptor(dir)?.join(text(thread, entry.args[at])?)
        }
    };
    path.starts_with(watched.folder).then_some(Step { call, path })
}

/// The request, or the part of one, that a thread is about to send, if it changes something.
fn request(thread: Pid, address: u64, asked: &mut Option<PathBuf>) -> Option<Step> {
    let bytes = memory(thread, address, REQUEST_LINE)?;
    let line = bytes.split(|byte| *byte == b'\r').next().and_then(|line| std::str::from_utf8(line).ok());
    let words: Vec<&str> = line.map(|line| line.split(' ').collect()).unwrap_or_default();
    let [method, path, "HTTP/1.1"] = words[..] else {
        // Its content goes on.
        return asked.clone().map(|path| Step { call: "more", path });
    };
    let path = PathBuf::from(path.split('?').next()?);
    let call = CHANGES.into_iter().find(|change| *change == method);
    *asked = call.map(|_| path.clone());
    call.map(|call| Step { call, path })
}

/// At most so many bytes at an address of a stopped thread: what lies behind them may not be mapped.
fn memory(thread: Pid, address: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    let read =
        File::open(format!("/proc/{thread}/mem")).and_then(|memory| memory.read_at(&mut bytes, address));
    bytes.truncate(read.ok()?);
    Some(bytes)
}

fn word(thread: Pid, address: u64) -> Option<u64> {
    Some(u64::from_ne_bytes(memory(thread, address, 8)?.try_into().ok()?))
}

/// The text at an address of a stopped thread.
fn text(thread: Pid, address: u64) -> Option<PathBuf> {
    let bytes = memory(thread, address, libc::PATH_MAX as usize)?;
    let end = bytes.iter().position(|byte| *byte == 0)?;
    Some(PathBuf::from(std::str::from_utf8(&bytes[..end]).ok()?))
}
