//! A folder that is gone when all who use it are, in whatever way they ended.

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// For its owner only. A process of its own waits for the end of all who hold the pipe, and removes it.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    pipe: Option<OwnedFd>,
    remover: Child,
}

impl Scratch {
    pub fn create(parent: &Path) -> io::Result<Scratch> {
        let folder = tempfile::Builder::new().prefix("rempart-verify-").tempdir_in(parent)?;
        let (ends, pipe) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut command = Command::new("sh");
        command.args(["-c", r#"cat >/dev/null; exec rm -rf -- "$1""#, "sh"]).arg(folder.path());
        // A signal to the group of who started it must not end it.
        command.stdin(ends).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let remover = command.spawn()?;
        Ok(Scratch { path: folder.keep(), pipe: Some(pipe), remover })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// What a child has to inherit that uses it, and is to be waited for. See [`inherit`].
    pub fn pipe(&self) -> BorrowedFd<'_> {
        self.pipe.as_ref().expect("it is there until the end").as_fd()
    }
}

/// In a child, before it becomes another program.
pub fn inherit(pipe: BorrowedFd<'_>) -> io::Result<()> {
    Ok(fcntl_setfd(pipe, FdFlags::empty())?)
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.remover.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_with_the_last_who_uses_it() {
        let parent = tempfile::tempdir().expect("a folder");
        let scratch = Scratch::create(parent.path()).expect("a folder in it");
        let path = scratch.path().to_owned();
        std::fs::write(scratch.file("disk"), "x").expect("room");
        let held = rustix::io::dup(scratch.pipe()).expect("a copy");
        let over = std::thread::spawn(move || drop(scratch));
        assert!(path.join("disk").exists(), "somebody still uses it");
        drop(held);
        over.join().expect("it does not panic");
        assert!(!path.exists());
    }
}
