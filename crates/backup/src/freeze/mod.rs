//! File systems that stand still while their device is read.
//!
//! | when | who thaws |
//! |---|---|
//! | the device was read, or cannot be | the caller, by [`FrozenDevices::thaw`] |
//! | the caller returned early, panicked | [`FrozenDevices`], when it is dropped |
//! | this process was killed | a child in a session of its own, when its pipe ends |
//! | this process hangs, or was stopped | the same child, when the limit is over |
//! | the child was killed | a thread of this process, which waits for that |
//! | both were killed at the same instant | nobody: `fsfreeze --unfreeze` |
//!
//! Whether a file system stood still all the time is asked of the kernel at the end: it refuses to thaw what does not stand still.

mod devices;
mod mounts;
mod watch;

pub use watch::thaw_file_systems;

use crate::{FileSource, Reader, Source, SourceError};
use devices::{all_of, file_systems, hold, number};
use mounts::{Mount, mount_of, mounts, written_below};
use rustix::fs::{Mode, OFlags, open, syncfs};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use thiserror::Error;
use watch::{Watch, freeze, thaw};

/// Why file systems do not stand still, or did not until the end.
#[derive(Debug, Error)]
#[error("cannot keep `{}` frozen: {why}", .place.display())]
pub struct FreezeError {
    /// A device, or where a file system is mounted.
    pub place: PathBuf,
    pub why: String,
    /// What to do; may be empty.
    pub hint: &'static str,
}

impl FreezeError {
    fn new(place: &Path, why: String, hint: &'static str) -> FreezeError {
        FreezeError { place: place.to_owned(), why, hint }
    }
}

/// Devices on which nothing changes, until this is dropped, or the time is over: file systems on them are frozen, and what is not
/// mounted is kept from being mounted.
#[derive(Debug)]
pub struct FrozenDevices {
    standing: Arc<Standing>,
    /// None where nothing had to be frozen.
    watch: Option<Watch>,
    _held: Vec<OwnedFd>,
    limit: Duration,
    since: Instant,
}

#[derive(Debug)]
struct Standing {
    /// In the order that they are frozen, each by a folder of it.
    file_systems: Vec<(PathBuf, OwnedFd)>,
    /// Of these, from the first on; `None` when they go on.
    frozen: Mutex<Option<usize>>,
}

/// What stood still until the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thawed {
    /// Where the file systems are mounted.
    pub file_systems: Vec<PathBuf>,
    pub frozen_for: Duration,
}

impl Standing {
    fn frozen(&self) -> MutexGuard<'_, Option<usize>> {
        self.frozen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Freezes the next; false if they go on already.
    fn freeze(&self, folder: &OwnedFd) -> Result<bool, Errno> {
        let mut frozen = self.frozen();
        let Some(frozen) = &mut *frozen else { return Ok(false) };
        freeze(folder)?;
        *frozen += 1;
        Ok(true)
    }

    /// Has those go on that were frozen; an error if one of them did so before.
    fn thaw(&self) -> Result<(), FreezeError> {
        let before =
            |point: &Path| FreezeError::new(point, "it was thawed before it was read".to_owned(), "");
        let Some(frozen) = self.frozen().take() else {
            return self.file_systems.first().map_or(Ok(()), |(point, _)| Err(before(point)));
        };
        let mut ended = Ok(());
        // One may lie in a file of one that was frozen later, and writes when it is thawed.
        for (point, folder) in self.file_systems[..frozen].iter().rev() {
            ended = match thaw(folder) {
                Ok(()) => ended,
                Err(Errno::INVAL) => ended.and(Err(before(point))),
                Err(errno) => Err(FreezeError::new(point, format!("it does not thaw: {errno}"), "")),
            };
        }
        ended
    }
}

impl FrozenDevices {
    /// Freezes the file systems on `devices`, for `limit` at most. What this program writes to until they are thawed is named in
    /// `written`, with what it is; `child` is a process that calls [`thaw_file_systems`].
    ///
    /// # Errors
    /// If anything on the devices cannot be kept still, would keep this program from writing, or is the root. Nothing is frozen
    /// then.
    pub fn freeze(
        devices: &[&Path],
        written: &[(&str, PathBuf)],
        child: &mut Command,
        limit: Duration,
    ) -> Result<FrozenDevices, FreezeError> {
        let whole = *devices.first().expect("there is a device");
        let mounts = mounts().map_err(|why| FreezeError::new(whole, why.to_string(), ""))?;
        let mut all = BTreeSet::new();
        for device in devices {
            all.extend(all_of(number(device)?));
        }
        let found = file_systems(&mounts, &all);
        for file_system in &found {
            refuse(&mounts, file_system, written)?;
        }
        let idle = all.iter().filter(|device| !mounts.iter().any(|mount| mount.is_on(**device)));
        let held = idle.filter_map(|device| hold(*device).transpose()).collect::<Result<_, _>>()?;
        // One may lie in a file of one that was mounted before.
        let opened = found.iter().rev().map(|mounted_at| folder(&mounts, mounted_at));
        let standing =
            Standing { file_systems: opened.collect::<Result<_, _>>()?, frozen: Mutex::new(Some(0)) };
        let mut frozen = FrozenDevices {
            standing: Arc::new(standing),
            watch: None,
            _held: held,
            limit,
            since: Instant::now(),
        };
        if !frozen.standing.file_systems.is_empty() {
            frozen.stop(child).map_err(|why| FreezeError::new(whole, why.to_string(), ""))??;
        }
        Ok(frozen)
    }

    fn stop(&mut self, child: &mut Command) -> std::io::Result<Result<(), FreezeError>> {
        let file_systems = &self.standing.file_systems;
        for (_, folder) in file_systems {
            // While it is being frozen nobody writes to it, so that little is left to write back then.
            syncfs(folder)?;
        }
        let folders = file_systems.iter().map(|(_, folder)| folder.as_raw_fd()).collect();
        let (watch, mut child) = Watch::start(child, folders, self.limit)?;
        self.since = Instant::now();
        let watch = self.watch.insert(watch);
        let standing = self.standing.clone();
        let ended = std::thread::Builder::new().name("thaw".to_owned()).spawn(move || {
            let _ = child.wait();
            // The time was over, or somebody killed it; or all is done already.
            let _ = standing.thaw();
        })?;
        watch.ended = Some(ended);
        for (point, folder) in &self.standing.file_systems {
            let (why, hint) = match self.standing.freeze(folder) {
                Ok(true) => {
                    watch.tell_frozen();
                    continue;
                }
                Ok(false) => ("freezing it took too long".to_owned(), "`--freeze-timeout` gives it more"),
                Err(Errno::BUSY) => (
                    "another program froze it already".to_owned(),
                    "wait for it; where it is gone, `fsfreeze --unfreeze` ends what it left",
                ),
                Err(Errno::OPNOTSUPP) => {
                    ("its file system cannot be frozen".to_owned(), "unmount it for the backup")
                }
                Err(Errno::PERM) => ("only root may".to_owned(), ""),
                Err(errno) => (errno.to_string(), ""),
            };
            let error = FreezeError::new(point, why, hint);
            // What somebody else froze nobody here thaws.
            if let (Ok(()), Some(watch)) = (self.standing.thaw(), self.watch.take()) {
                watch.stand_down();
            }
            return Ok(Err(error));
        }
        Ok(Ok(()))
    }

    /// Whether they do not stand still any more.
    pub fn is_over(&self) -> bool {
        self.standing.frozen().is_none()
    }

    /// A device that cannot be read any more when they do not stand still.
    pub fn source<'a>(&'a self, device: &'a FileSource) -> FrozenSource<'a> {
        FrozenSource { device, frozen: self }
    }

    /// Has them go on.
    ///
    /// # Errors
    /// If one of them did not stand still until now.
    pub fn thaw(mut self) -> Result<Thawed, FreezeError> {
        let thawed = self.standing.thaw();
        let frozen_for = self.since.elapsed();
        let limit = self.limit;
        match thawed {
            Ok(()) => {
                let file_systems =
                    self.standing.file_systems.iter().map(|(point, _)| point.clone()).collect();
                if let Some(watch) = self.watch.take() {
                    watch.stand_down();
                }
                Ok(Thawed { file_systems, frozen_for })
            }
            Err(FreezeError { place, .. }) if frozen_for >= limit => {
                let why = format!("{} s were not enough to read it", limit.as_secs());
                Err(FreezeError::new(
                    &place,
                    why,
                    "`--freeze-timeout` gives it more, during which nobody can write to it",
                ))
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for FrozenDevices {
    fn drop(&mut self) {
        // What was not frozen yet cannot be thawed. The child, whose pipe ends now, does it again.
        let _ = self.standing.thaw();
    }
}

/// Not the root, on which everything depends, nor what this program waits for meanwhile.
fn refuse(mounts: &[Mount], file_system: &[&Mount], written: &[(&str, PathBuf)]) -> Result<(), FreezeError> {
    let point = &file_system[0].point;
    if file_system.iter().any(|mount| mount.point == Path::new("/")) {
        let hint = "take a snapshot of it (LVM, btrfs), or leave out `--freeze`";
        return Err(FreezeError::new(point, "the machine would stand still with its root".to_owned(), hint));
    }
    for (what, path) in written {
        let is_below = file_system.iter().any(|mount| mount.point.starts_with(path));
        if is_below || written_below(mounts, path).contains(&file_system[0].superblock) {
            let why = format!("{what} (`{}`) is on it, and is written to meanwhile", path.display());
            return Err(FreezeError::new(point, why, "have it elsewhere"));
        }
    }
    Ok(())
}

/// Opens a place at which it is mounted, and nothing else above it.
fn folder(mounts: &[Mount], mounted_at: &[&Mount]) -> Result<(PathBuf, OwnedFd), FreezeError> {
    for mount in mounted_at {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(folder) = open(&mount.point, flags, Mode::empty()) else { continue };
        let opened = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
        if mount_of(mounts, &opened).is_some_and(|opened| opened.superblock == mount.superblock) {
            return Ok((mount.point.clone(), folder));
        }
    }
    let why = "no folder of it can be opened".to_owned();
    Err(FreezeError::new(&mounted_at[0].point, why, "something else may be mounted over it"))
}

/// A device as long as it stands still.
#[derive(Debug)]
pub struct FrozenSource<'a> {
    device: &'a FileSource,
    frozen: &'a FrozenDevices,
}

impl Source for FrozenSource<'_> {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn reader(&self) -> Result<Box<dyn Reader + '_>, SourceError> {
        Ok(Box::new(FrozenReader { reader: self.device.reader()?, frozen: self.frozen }))
    }

    fn data(&self, chunk_len: u64) -> Result<crate::ChunkSet, SourceError> {
        self.device.data(chunk_len)
    }
}

struct FrozenReader<'a> {
    reader: Box<dyn Reader + 'a>,
    frozen: &'a FrozenDevices,
}

impl Reader for FrozenReader<'_> {
    fn piece(&self) -> u64 {
        self.reader.piece()
    }

    fn ahead(&mut self, ranges: &[Range<u64>]) -> Result<(), SourceError> {
        self.reader.ahead(ranges)
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        if self.frozen.is_over() {
            // Nobody wants the rest any more.
            let disk = "the device".to_owned();
            return Err(SourceError {
                action: "read",
                disk,
                offset: Some(offset),
                source: "it was thawed".into(),
            });
        }
        self.reader.read(offset, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tried on a list of mounts: nobody wants to see it fail on a machine.
    #[test]
    fn the_root_does_not_stand_still() {
        let mounts = mounts().expect("the kernel tells");
        let root = mount_of(&mounts, Path::new("/")).expect("there is a root");
        let of_root: Vec<&Mount> =
            mounts.iter().filter(|mount| mount.superblock == root.superblock).collect();
        let error = refuse(&mounts, &of_root, &[]).expect_err("it is the root");
        assert!(error.to_string().contains("would stand still with its root"), "{error}");
        let proc = mounts.iter().find(|mount| mount.point == Path::new("/proc")).expect("it is there");
        refuse(&mounts, &[proc], &[("the cache", "/".into())]).expect_err("it is below");
        refuse(&mounts, &[proc], &[("the cache", "/proc/self".into())]).expect_err("it is on it");
        refuse(&mounts, &[proc], &[("the cache", "/sys".into())]).expect("it is elsewhere");
    }
}
