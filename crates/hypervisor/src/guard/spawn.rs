//! Starting QEMU so that it cannot outlive its guard.
//!
//! The kernel sends QEMU a SIGKILL when the guard dies (PR_SET_PDEATHSIG): it needs nobody alive, and works while
//! QEMU is stopped. It is bound to the *thread* that forked, and the guard has only one. An exec of a program with
//! file capabilities, or a change of user after it was set, would clear it: so the user is changed before, and QEMU's
//! own `-run-with user=` is not used. A pipe or a cgroup would do the same with somebody's help; neither is better.

use crate::run_dir::{Launch, RunDir};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// For `pre_exec`: the child dies with this thread.
pub(super) fn die_with_parent() -> impl FnMut() -> io::Result<()> + Send + Sync + 'static {
    let parent = rustix::process::getpid();
    move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // The parent may have died before the request.
        if rustix::process::getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
}

/// Starts QEMU and returns it with the guard's end of its monitor.
pub(super) fn start_qemu(
    run_dir: &RunDir,
    launch: &Launch,
    taps: &[OwnedFd],
) -> io::Result<(Child, UnixStream)> {
    // A pair and not a socket in the run directory: nobody else can take the guard's monitor.
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let log = OpenOptions::new().create(true).append(true).open(run_dir.file("qemu.log"))?;
    let (program, arguments) =
        launch.command.split_first().ok_or_else(|| io::Error::other("there is no program to start"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .args(["-chardev".into(), format!("socket,id=guard,fd={}", theirs.as_raw_fd())])
        .args(["-mon", "chardev=guard,mode=control"]);
    for (tap, launch) in taps.iter().zip(&launch.taps) {
        let vhost = if launch.vhost { ",vhost=on" } else { "" };
        command.args(["-netdev".into(), format!("tap,id={},fd={}{vhost}", launch.netdev, tap.as_raw_fd())]);
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
    if let Some((uid, gid)) = launch.run_as {
        command.gid(gid).uid(uid);
    }
    let mut inherited: Vec<RawFd> = vec![theirs.as_raw_fd()];
    inherited.extend(taps.iter().map(AsRawFd::as_raw_fd));
    let mut die = die_with_parent();
    let prepare = move || {
        // After the user was changed, which would clear it.
        die()?;
        for fd in &inherited {
            // SAFETY: these descriptors were open when the parent forked, and this child has copies of them.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: it only calls prctl, getppid and fcntl, which are async-signal-safe.
    unsafe { command.pre_exec(prepare) };
    Ok((command.spawn()?, ours))
}
