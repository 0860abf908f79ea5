//! Snapshots of btrfs subvolumes.

use super::{checked, failed, run};
use crate::BackupError;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, flock, fstat, openat, statat, statfs,
};
use rustix::io::Errno;
use rustix::process::geteuid;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The folder of snapshots, in the root of their subvolume. Closed to others: what is in it was theirs to remove.
const FOLDER: &str = ".rempart-snapshots";
/// What statfs(2) says of btrfs.
const MAGIC: u64 = 0x9123_683e;
/// The inode of every subvolume's root: `BTRFS_FIRST_FREE_OBJECTID`.
const ROOT: u64 = 256;

/// A subvolume as it was at one instant, until this is dropped.
#[derive(Debug)]
pub struct SubvolumeSnapshot {
    /// The subvolume's root.
    root: PathBuf,
    /// What stat(2) calls the subvolume's device.
    device: u64,
    path: PathBuf,
    /// Locked as long as it is in use: one that is not was left by somebody who was killed.
    _lock: OwnedFd,
}

impl SubvolumeSnapshot {
    /// Of the subvolume that `path`, which has no links in it, is in. `None` if that is no btrfs, or its root is not above the
    /// path. What others left there is removed.
    pub fn of(path: &Path) -> Result<Option<SubvolumeSnapshot>, BackupError> {
        let fail = |errno: Errno| failed(path, errno);
        let stat = |path: &Path| statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW);
        let found = stat(path).map_err(fail)?;
        let device = found.st_dev;
        // Of a pipe or a device as of everything else: it is not opened.
        let folder = match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => path,
            _ => path.parent().expect("only folders have none"),
        };
        if statfs(folder).map_err(fail)?.f_type as u64 != MAGIC {
            return Ok(None);
        }
        let is_root = |above: &&Path| stat(above).is_ok_and(|it| it.st_dev == device && it.st_ino == ROOT);
        let Some(root) = folder.ancestors().find(is_root) else { return Ok(None) };
        Self::make(root, device).map(Some).map_err(|why| failed(path, why))
    }

    fn make(root: &Path, device: u64) -> io::Result<SubvolumeSnapshot> {
        let folder = root.join(FOLDER);
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let opened = open(&folder)?;
        let stat = fstat(&opened)?;
        if stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
            return Err(io::Error::other(format!("`{}` is open to others", folder.display())));
        }
        // Others that make one here wait: between making and locking it looks like a leftover.
        flock(&opened, FlockOperation::LockExclusive)?;
        for found in Dir::read_from(&opened)? {
            let found = found?;
            if let Ok(name) = found.file_name().to_str()
                && !matches!(name, "." | "..")
                && let Ok(left) = open(&folder.join(name))
                && flock(&left, FlockOperation::NonBlockingLockExclusive).is_ok()
            {
                remove(&folder.join(name))?;
            }
        }
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let path = folder.join(format!("{seconds}-{}", std::process::id()));
        let text = |path: &Path| path.to_str().map(str::to_owned).ok_or(io::ErrorKind::InvalidFilename);
        let arguments = ["subvolume", "snapshot", "-r"].map(str::to_owned);
        let arguments = [&arguments[..], &[text(root)?, text(&path)?]].concat();
        run("btrfs", &arguments).and_then(checked).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::other("there is no program `btrfs`: install btrfs-progs"),
            _ => error,
        })?;
        let lock = open(&path).and_then(|lock| {
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            Ok(lock)
        });
        let lock = lock.inspect_err(|_| drop(remove(&path)))?;
        Ok(SubvolumeSnapshot { root: root.to_owned(), device, path, _lock: lock })
    }

    /// Where `path`, which has no links in it, is in the snapshot; `None` if it is not below its subvolume's root.
    pub(crate) fn place(&self, path: &Path) -> Option<PathBuf> {
        let rest = path.strip_prefix(&self.root).ok()?;
        Some(if rest.as_os_str().is_empty() { self.path.clone() } else { self.path.join(rest) })
    }

    /// Whether a folder is another subvolume or file system, of which only the place is in the snapshot.
    pub(crate) fn lacks(&self, folder: &Path) -> bool {
        statat(CWD, folder, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| stat.st_dev != self.device)
    }

    /// Whether that is where the subvolume's snapshots are.
    pub(crate) fn is_folder_of_snapshots(&self, path: &Path) -> bool {
        path.file_name().is_some_and(|name| name == FOLDER) && path.parent() == Some(&self.root)
    }
}

fn open(folder: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(CWD, folder, flags, Mode::empty())?)
}

fn remove(path: &Path) -> io::Result<()> {
    let path = path.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
    run("btrfs", &["subvolume", "delete", path].map(str::to_owned)).and_then(checked).map(drop)
}

impl Drop for SubvolumeSnapshot {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(snapshot = %self.path.display(), %error, "a snapshot cannot be removed");
        }
    }
}
