//! Where views keep their files, and how a later process sees whose maker is gone.
//!
//! | in the directory of one VM | what |
//! |---|---|
//! | `lock` | held while a view is made or taken away: QEMU's graph of block nodes has one editor |
//! | `tracker-NAME` | held by the view of that tracker for its whole life |
//! | `view-ID` | held by the view for its whole life: one that nobody holds is a leftover |
//! | `paused`, `frozen` | exists while the guest, or its file systems, stand still for a view |
//! | `nbd.sock` | QEMU's NBD server |
//! | `scratch/ID-N` | room for the old bytes of one disk |
//! | `memory.sock` | where the guest's memory comes from QEMU |
//!
//! Locks are the kernel's (`flock`): they end with the process that holds them.

use super::names::{Tracker, ViewId};
use crate::error::{Error, ErrorKind, Result};
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixListener;

/// Another view is made or taken away within this time.
const EDITOR_PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);

/// A unix socket's path has 107 bytes.
const LONGEST_SOCKET_PATH: usize = 107;

/// The directory of one VM's views.
#[derive(Debug, Clone)]
pub(super) struct ViewDirectory {
    path: PathBuf,
}

impl ViewDirectory {
    /// Made if it is not there. VMs are told apart by the path of their monitor.
    pub(super) fn open(base: &Path, monitor: &Path) -> Result<Self> {
        let action = || format!("use `{}` for a view's files", base.display());
        let io_error = |error: io::Error| Error::io(action(), error);
        let monitor = std::fs::canonicalize(monitor)
            .map_err(|error| Error::io(format!("find QEMU's monitor `{}`", monitor.display()), error))?;
        let base = std::path::absolute(base).map_err(io_error)?;
        let path = base.join(format!("{:016x}", fnv1a(monitor.as_os_str().as_encoded_bytes())));
        let refuse = |detail: String| Err(Error::new(ErrorKind::InvalidDefinition, action(), detail));
        if path.to_str().is_none() {
            return refuse("QEMU is told paths in UTF-8".into());
        }
        if path.join("memory.sock").as_os_str().len() > LONGEST_SOCKET_PATH {
            return refuse(format!(
                "a socket is in it, whose path has at most {LONGEST_SOCKET_PATH} bytes: choose a shorter one"
            ));
        }
        // Others must reach the VM's own directory, which is closed to all but QEMU.
        DirBuilder::new().recursive(true).mode(0o711).create(&base).map_err(io_error)?;
        for private in [path.clone(), path.join("scratch")] {
            match DirBuilder::new().mode(0o700).create(&private) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io_error(error)),
                _ => (),
            }
        }
        Ok(Self { path })
    }

    /// Gives the files that QEMU uses to the user it runs as.
    pub(super) fn hand_to(&self, user: u32, group: u32) -> Result<()> {
        for path in [self.path.clone(), self.scratch()] {
            let action = || format!("give `{}` to QEMU's user {user}", path.display());
            let found = std::fs::metadata(&path).map_err(|error| Error::io(action(), error))?;
            if found.uid() != user {
                std::os::unix::fs::chown(&path, Some(user), Some(group))
                    .map_err(|error| Error::io(action(), error))?;
            }
        }
        Ok(())
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.path.join("nbd.sock")
    }

    fn scratch(&self) -> PathBuf {
        self.path.join("scratch")
    }

    pub(super) fn scratch_file(&self, view: ViewId, disk: usize) -> PathBuf {
        self.scratch().join(format!("{view}-{disk}"))
    }

    /// A file without contents that may grow to `bytes`.
    pub(super) fn make_scratch(
        &self,
        view: ViewId,
        disk: usize,
        bytes: u64,
        owner: (u32, u32),
    ) -> Result<PathBuf> {
        let path = self.scratch_file(view, disk);
        let make = || {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.set_len(bytes)?;
            if file.metadata()?.uid() != owner.0 {
                std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
            }
            Ok(())
        };
        make().map_err(|error: io::Error| Error::io(format!("make `{}`", path.display()), error))?;
        Ok(path)
    }

    /// A file without a name, for the guest's memory: only who has it open reads it.
    pub(super) fn make_memory(&self, view: ViewId) -> Result<File> {
        let path = self.scratch().join(format!("{view}-memory"));
        let make = || {
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        };
        make().map_err(|error: io::Error| Error::io(format!("make `{}`", path.display()), error))
    }

    /// A socket that QEMU, as its user, can connect to.
    pub(super) fn listen_for_memory(&self, owner: (u32, u32)) -> Result<(UnixListener, PathBuf)> {
        let path = self.path.join("memory.sock");
        let _ = std::fs::remove_file(&path);
        let make = || {
            let listener = UnixListener::bind(&path)?;
            // Nobody else enters the directory; QEMU may have put a link in its place.
            std::os::unix::fs::lchown(&path, Some(owner.0), Some(owner.1))?;
            Ok(listener)
        };
        let listener =
            make().map_err(|error: io::Error| Error::io(format!("listen on `{}`", path.display()), error))?;
        Ok((listener, path))
    }

    /// Takes away what a view that is over has left here.
    pub(super) fn clear(&self, view: ViewId) {
        let prefix = format!("{view}-");
        for entry in std::fs::read_dir(self.scratch()).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let _ = std::fs::remove_file(self.view_lock(view));
    }

    /// Views that left files and whose process is gone.
    pub(super) fn leftovers(&self) -> Vec<ViewId> {
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        let views = entries.filter_map(|entry| {
            let name = entry.file_name();
            let number = u32::from_str_radix(name.to_str()?.strip_prefix("view-")?, 16).ok()?;
            Some(ViewId(number))
        });
        views.filter(|view| self.is_over(*view)).collect()
    }

    /// The directory that a view was made with, told by a scratch file of it.
    pub(super) fn of_scratch_file(file: &Path) -> Option<Self> {
        let path = file.parent()?.parent()?.to_owned();
        Some(Self { path })
    }

    /// Nobody holds this view: its process is gone.
    pub(super) fn is_over(&self, view: ViewId) -> bool {
        match File::open(self.view_lock(view)) {
            Ok(file) => file.try_lock_shared().is_ok(),
            Err(_) => true,
        }
    }

    fn view_lock(&self, view: ViewId) -> PathBuf {
        self.path.join(format!("view-{view}"))
    }

    pub(super) fn hold_view(&self, view: ViewId) -> Result<File> {
        let path = self.view_lock(view);
        try_lock(&path)?.ok_or_else(|| {
            Error::new(ErrorKind::Protocol, format!("lock `{}`", path.display()), "another view has it")
        })
    }

    pub(super) fn hold_tracker(&self, tracker: &Tracker) -> Result<File> {
        let path = self.path.join(format!("tracker-{}", tracker.as_str()));
        try_lock(&path)?.ok_or_else(|| {
            let detail = "another run of the same job reads it now: wait for it to end";
            Error::new(
                ErrorKind::AlreadyRunning,
                format!("take a view of this VM for `{}`", tracker.as_str()),
                detail,
            )
        })
    }

    /// Waits until this process is the only one that changes QEMU's graph.
    pub(super) async fn edit(&self) -> Result<File> {
        let path = self.path.join("lock");
        let end = tokio::time::Instant::now() + EDITOR_PATIENCE;
        loop {
            if let Some(lock) = try_lock(&path)? {
                return Ok(lock);
            }
            if tokio::time::Instant::now() > end {
                return Err(Error::deadline(format!("lock `{}`", path.display()), EDITOR_PATIENCE));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Exists while the guest's file systems are frozen for a view.
    pub(super) fn frozen_mark(&self) -> PathBuf {
        self.path.join("frozen")
    }

    /// Says that the guest stands still for a view, until [`Self::unmark_paused`].
    pub(super) fn mark_paused(&self) -> Result<()> {
        let path = self.path.join("paused");
        File::create(&path).map(drop).map_err(|error| Error::io(format!("make `{}`", path.display()), error))
    }

    pub(super) fn unmark_paused(&self) {
        let _ = std::fs::remove_file(self.path.join("paused"));
    }

    pub(super) fn is_marked_paused(&self) -> bool {
        self.path.join("paused").exists()
    }

    /// QEMU has just made it, for everybody.
    pub(super) fn close_socket(&self) -> Result<()> {
        let socket = self.socket();
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
            .map_err(|error| Error::io(format!("close `{}` to others", socket.display()), error))
    }
}

/// Short, and the same in every release.
fn fnv1a(bytes: &[u8]) -> u64 {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix)
}

/// The lock, or None if another process (or another part of this one) has it.
fn try_lock(path: &Path) -> Result<Option<File>> {
    let action = || format!("lock `{}`", path.display());
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| Error::io(action(), error))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(Error::io(action(), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_is_over_when_nobody_holds_it() {
        let base = tempfile::tempdir().unwrap();
        let directory = ViewDirectory::open(&base.path().join("views"), base.path()).unwrap();
        let view = ViewId(7);
        assert!(directory.is_over(view));
        let held = directory.hold_view(view).unwrap();
        let owner = std::fs::metadata(base.path()).unwrap();
        directory.make_scratch(view, 0, 4096, (owner.uid(), owner.gid())).unwrap();
        assert!(!directory.is_over(view));
        assert_eq!(directory.leftovers(), []);
        drop(held);
        assert_eq!(directory.leftovers(), [view]);
        directory.clear(view);
        assert_eq!(directory.leftovers(), []);
        assert!(!directory.scratch_file(view, 0).exists());
    }

    #[test]
    fn a_tracker_has_one_run_at_a_time() {
        let base = tempfile::tempdir().unwrap();
        let directory = ViewDirectory::open(base.path(), base.path()).unwrap();
        let (nightly, weekly) = (Tracker::new("nightly").unwrap(), Tracker::new("weekly").unwrap());
        let held = directory.hold_tracker(&nightly).unwrap();
        assert_eq!(directory.hold_tracker(&nightly).unwrap_err().kind(), ErrorKind::AlreadyRunning);
        directory.hold_tracker(&weekly).unwrap();
        drop(held);
        directory.hold_tracker(&nightly).unwrap();
    }
}
