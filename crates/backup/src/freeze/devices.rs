//! What a block device consists of, by what the kernel says in `/sys/dev/block`.

use super::FreezeError;
use super::mounts::Mount;
use rustix::fs::{FileType, Mode, OFlags, makedev, open, stat};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The number of a block device.
pub(super) fn number(path: &Path) -> Result<u64, FreezeError> {
    let fail = |why: String| FreezeError::new(path, why, "");
    let found = stat(path).map_err(|errno| fail(errno.to_string()))?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::BlockDevice => Ok(found.st_rdev),
        _ => Err(fail("it is no block device".to_owned())),
    }
}

fn folder(device: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

fn number_in(folder: &Path) -> Option<u64> {
    let text = read_to_string(folder.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn folders(below: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(below).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

/// What lies directly on a device: its partitions, and what device mapper, RAID and the like made of it.
fn above(device: u64) -> Vec<u64> {
    let folder = folder(device);
    let partitions = folders(&folder).filter(|entry| entry.join("partition").exists());
    partitions.chain(folders(&folder.join("holders"))).filter_map(|entry| number_in(&entry)).collect()
}

/// The device and all that lies on it.
pub(super) fn all_of(device: u64) -> BTreeSet<u64> {
    let (mut all, mut next) = (BTreeSet::from([device]), vec![device]);
    while let Some(device) = next.pop() {
        next.extend(above(device).into_iter().filter(|above| all.insert(*above)));
    }
    all
}

/// Keeps everybody from mounting a device on which nothing is mounted, as long as what it returns is open. `None` where other
/// devices lie on it, or it is swap.
pub(super) fn hold(device: u64) -> Result<Option<OwnedFd>, FreezeError> {
    if !above(device).is_empty() {
        return Ok(None);
    }
    let told = read_to_string(folder(device).join("uevent")).unwrap_or_default();
    let name = told.lines().find_map(|line| line.strip_prefix("DEVNAME=")).unwrap_or_default();
    let path = Path::new("/dev").join(name);
    match open(&path, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
        Ok(held) => Ok(Some(held)),
        Err(Errno::BUSY) if is_swap(device) => Ok(None),
        Err(Errno::BUSY) => Err(FreezeError::new(
            &path,
            "something has it in use that is not mounted here".to_owned(),
            "it may be mounted in another mount namespace, such as a container's, or be one of several devices of a file system",
        )),
        Err(errno) => Err(FreezeError::new(&path, errno.to_string(), "")),
    }
}

fn is_swap(device: u64) -> bool {
    let swaps = read_to_string("/proc/swaps").unwrap_or_default();
    let mut paths = swaps.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
    paths.any(|path| stat(path).is_ok_and(|found| found.st_rdev == device))
}

/// The files that a device's bytes lie in, if it is a loop device, or made of such.
pub(super) fn backing_files(device: u64) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let (mut seen, mut next) = (BTreeSet::from([device]), vec![device]);
    while let Some(device) = next.pop() {
        let folder = folder(device);
        if let Ok(file) = read_to_string(folder.join("loop/backing_file")) {
            files.push(PathBuf::from(file.trim_end_matches('\n')));
        }
        let whole = folder.join("partition").exists().then(|| number_in(&folder.join(".."))).flatten();
        let below = folders(&folder.join("slaves")).filter_map(|entry| number_in(&entry)).chain(whole);
        next.extend(below.filter(|below| seen.insert(*below)));
    }
    files
}

/// The file systems on some of these devices, each once, by all of its mounts, in the order that they were mounted.
pub(super) fn file_systems<'a>(mounts: &'a [Mount], devices: &BTreeSet<u64>) -> Vec<Vec<&'a Mount>> {
    let mut found: Vec<Vec<&Mount>> = Vec::new();
    for mount in mounts.iter().filter(|mount| devices.iter().any(|device| mount.is_on(*device))) {
        match found.iter_mut().find(|known| known[0].superblock == mount.superblock) {
            Some(known) => known.push(mount),
            None => found.push(vec![mount]),
        }
    }
    found
}
