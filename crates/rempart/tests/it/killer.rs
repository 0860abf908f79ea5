//! Ends a real program by SIGKILL right before a chosen change that it makes to files, by ptrace(2): the program has no part in
//! it.

use libc::c_long;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A call that changes files or makes changes durable, and the file.
#[derive(Debug, Clone)]
pub struct Step {
    pub call: &'static str,
    pub path: PathBuf,
}

/// What became of a program.
#[derive(Debug)]
pub struct Run {
    /// Its exit status; none if it was killed.
    pub status: Option<i32>,
    /// What it did below the folder, in the order in which it began to.
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

/// Runs `command` to its end, or until it is about to take, for the time `before` counted from 0, one of the steps below
/// `folder`. That step is not taken.
pub fn run(mut command: Command, folder: &Path, before: Option<usize>) -> Run {
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
    go_on(main, None);
    loop {
        match waitpid(None, Some(ours)) {
            Ok(WaitStatus::PtraceSyscall(thread)) => {
                if let Some(step) = step_of(thread, folder) {
                    if before == Some(run.steps.len()) {
                        kill(main, Signal::SIGKILL).expect("it is there");
                    } else {
                        run.steps.push(step);
                    }
                }
                go_on(thread, None);
            }
            Ok(WaitStatus::PtraceEvent(thread, ..)) => go_on(thread, None),
            // With that a new thread begins.
            Ok(WaitStatus::Stopped(thread, Signal::SIGSTOP)) => go_on(thread, None),
            Ok(WaitStatus::Stopped(thread, signal)) => go_on(thread, Some(signal)),
            Ok(WaitStatus::Exited(process, status)) if process == main => run.status = Some(status),
            Ok(_) => {}
            Err(Errno::ECHILD) => return run,
            Err(error) => panic!("cannot wait for what is traced: {error}"),
        }
    }
}

fn go_on(thread: Pid, signal: Option<Signal>) {
    match ptrace::syscall(thread, signal) {
        // One that was just killed does not go on.
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => panic!("cannot let {thread} go on: {error}"),
    }
}

/// What a thread is about to do, if it is a step below `folder`.
fn step_of(thread: Pid, folder: &Path) -> Option<Step> {
    let info = ptrace::syscall_info(thread).ok()?;
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: `op` says which of the union it is.
    let entry = unsafe { info.u.entry };
    let (_, call, names) = CALLS.iter().find(|(number, ..)| *number as u64 == entry.nr)?;
    let descriptor = |at: usize| match entry.args[at] as i32 {
        libc::AT_FDCWD => std::fs::read_link(format!("/proc/{thread}/cwd")).ok(),
        open => std::fs::read_link(format!("/proc/{thread}/fd/{open}")).ok(),
    };
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
    path.starts_with(folder).then_some(Step { call, path })
}

/// The text at an address of a stopped thread.
fn text(thread: Pid, address: u64) -> Option<PathBuf> {
    let mut bytes = [0; libc::PATH_MAX as usize];
    // What lies behind it may not be mapped: less is read then.
    let read =
        File::open(format!("/proc/{thread}/mem")).and_then(|memory| memory.read_at(&mut bytes, address));
    let text = &bytes[..read.ok()?];
    let end = text.iter().position(|byte| *byte == 0)?;
    Some(PathBuf::from(std::str::from_utf8(&text[..end]).ok()?))
}
