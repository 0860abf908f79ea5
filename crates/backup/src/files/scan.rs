//! Meeting files in order.

use super::entry::{Entry, Kind, LONGEST_PAGE, LONGEST_PATH, Time};
use super::place;
use super::select::{Selection, below_root};
use crate::BackupError;
use crate::snapshot::SubvolumeSnapshot;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, major, minor, openat, readlinkat, statat,
};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a folder says that is a cache, in a file of this name (<https://bford.info/cachedir/>).
const CACHE_TAG: &CStr = c"CACHEDIR.TAG";
const CACHE_SIGNATURE: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";
/// Mount points that are named, at most.
const NAMED: usize = 20;

/// Something that was met.
#[derive(Debug)]
pub(super) struct Met {
    pub entry: Entry,
    pub stat: Stat,
    /// Where it is: its folder, and its name there.
    pub folder: Arc<OwnedFd>,
    pub name: CString,
}

/// What was passed over, knowingly.
#[derive(Debug, Default)]
pub(super) struct PassedOver {
    pub excluded: u64,
    pub caches: u64,
    /// Were there when their folder was read, and then not.
    pub vanished: u64,
    pub mounts: Vec<Vec<u8>>,
    pub more_mounts: u64,
}

pub(super) type Each<'a> = &'a mut dyn FnMut(Met) -> Result<(), BackupError>;

/// Gives everything that is selected, in the order of entries.
pub(super) fn scan(selection: &Selection, each: Each<'_>) -> Result<PassedOver, BackupError> {
    let mut scan = Scan { selection, each, passed_over: PassedOver::default(), device: 0, snapshot: None };
    let mut before: Vec<&Path> = Vec::new();
    for root in &selection.roots {
        // The folders that lead to it are restored as they were, too.
        let mut way: Vec<&Path> = root.ancestors().filter(|path| !below_root(path).is_empty()).collect();
        way.reverse();
        for path in way.into_iter().filter(|path| !before.contains(path)).collect::<Vec<_>>() {
            before.push(path);
            scan.root(path, path == root)?;
        }
        if below_root(root).is_empty() {
            let fail = |errno: Errno| super::failed("open", b"/", errno);
            let (place, snapshot) = selection.place(root);
            let folder = openat(CWD, place, FOLDER, Mode::empty()).map_err(fail)?;
            (scan.device, scan.snapshot) = (fstat(&folder).map_err(fail)?.st_dev, snapshot);
            scan.below(Arc::new(folder), b"")?;
        }
    }
    Ok(scan.passed_over)
}

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

struct Scan<'a> {
    selection: &'a Selection,
    each: Each<'a>,
    passed_over: PassedOver,
    /// The file system that is read.
    device: u64,
    snapshot: Option<&'a SubvolumeSnapshot>,
}

impl Scan<'_> {
    /// One of the roots, or a folder on the way to one.
    fn root(&mut self, path: &Path, with_content: bool) -> Result<(), BackupError> {
        let fail = |errno: Errno| super::failed("open", path.as_os_str().as_bytes(), errno);
        let (place, snapshot) = self.selection.place(path);
        let parent = place.parent().expect("it is not the root folder");
        let folder = Arc::new(openat(CWD, parent, FOLDER, Mode::empty()).map_err(fail)?);
        let name = place.file_name().expect("it is not the root folder");
        let name = CString::new(name.as_bytes()).expect("no name has a zero");
        let stat = statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        (self.device, self.snapshot) = (stat.st_dev, snapshot);
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let entry = entry_of(folder.as_fd(), &name, below_root(path).to_vec(), &stat);
        match (is_folder, with_content) {
            (true, true) => self.folder(folder, name, entry, stat),
            _ => (self.each)(Met { entry, stat, folder, name }),
        }
    }

    /// A folder and all that is in it.
    fn folder(
        &mut self,
        parent: Arc<OwnedFd>,
        name: CString,
        mut entry: Entry,
        stat: Stat,
    ) -> Result<(), BackupError> {
        let path = entry.path.clone();
        if stat.st_dev != self.device || self.snapshot.is_some_and(|snapshot| snapshot.lacks(&whole(&path))) {
            match self.passed_over.mounts.len() {
                NAMED => self.passed_over.more_mounts += 1,
                _ => self.passed_over.mounts.push(path),
            }
            return (self.each)(Met { entry, stat, folder: parent, name });
        }
        let opened = openat(&parent, &name, FOLDER, Mode::empty());
        if let Err(errno) = &opened {
            entry.unread = Some(format!("cannot be opened: {errno}"));
        }
        (self.each)(Met { entry, stat, folder: parent, name })?;
        let Ok(folder) = opened else { return Ok(()) };
        if self.selection.no_caches && is_cache(folder.as_fd()) {
            self.passed_over.caches += 1;
            return self.one(&Arc::new(folder), CACHE_TAG.to_owned(), &path);
        }
        self.below(Arc::new(folder), &path)
    }

    fn below(&mut self, folder: Arc<OwnedFd>, path: &[u8]) -> Result<(), BackupError> {
        let mut names = Vec::new();
        for found in Dir::read_from(&folder).map_err(|errno| super::failed("read", path, errno))? {
            let found = found.map_err(|errno| super::failed("read", path, errno))?;
            if !matches!(found.file_name().to_bytes(), b"." | b"..") {
                names.push(found.file_name().to_owned());
            }
        }
        names.sort_unstable_by(|one, other| one.to_bytes().cmp(other.to_bytes()));
        names.into_iter().try_for_each(|name| self.one(&folder, name, path))
    }

    fn one(&mut self, folder: &Arc<OwnedFd>, name: CString, parent: &[u8]) -> Result<(), BackupError> {
        let path = match parent {
            [] => name.to_bytes().to_vec(),
            parent => [parent, b"/", name.to_bytes()].concat(),
        };
        if self.selection.is_excluded(&path) {
            self.passed_over.excluded += 1;
            return Ok(());
        }
        if self.snapshot.is_some_and(|snapshot| snapshot.is_folder_of_snapshots(&whole(&path))) {
            return Ok(());
        }
        if path.len() > LONGEST_PATH {
            return Err(super::failed("back up", &path, Errno::NAMETOOLONG));
        }
        let stat = match statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => {
                self.passed_over.vanished += 1;
                return Ok(());
            }
            Err(errno) => {
                // The folder it is in tells what it can be looked at by.
                let stat = fstat(folder).map_err(|errno| super::failed("look at", parent, errno))?;
                let unread = Some(format!("cannot be looked at: {errno}"));
                let entry = Entry { kind: Kind::Unknown, mode: 0, unread, ..plain(path, &stat) };
                return (self.each)(Met { entry, stat, folder: folder.clone(), name });
            }
        };
        let entry = entry_of(folder.as_fd(), &name, path, &stat);
        match entry.kind {
            Kind::Folder => self.folder(folder.clone(), name, entry, stat),
            _ => (self.each)(Met { entry, stat, folder: folder.clone(), name }),
        }
    }
}

/// The path of an entry, from the root folder on.
fn whole(path: &[u8]) -> PathBuf {
    Path::new("/").join(OsStr::from_bytes(path))
}

fn is_cache(folder: BorrowedFd<'_>) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut begin = [0; CACHE_SIGNATURE.len()];
    let read = openat(folder, CACHE_TAG, flags, Mode::empty())
        .and_then(|tag| rustix::io::pread(&tag, &mut begin, 0));
    read == Ok(begin.len()) && begin == CACHE_SIGNATURE
}

fn plain(path: Vec<u8>, stat: &Stat) -> Entry {
    Entry {
        path,
        kind: Kind::Unknown,
        mode: stat.st_mode & 0o7777,
        owner: stat.st_uid,
        group: stat.st_gid,
        modified: Time { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec as u32 },
        attributes: Vec::new(),
        unread: None,
    }
}

/// Without its content.
fn entry_of(folder: BorrowedFd<'_>, name: &CStr, path: Vec<u8>, stat: &Stat) -> Entry {
    let mut entry = plain(path, stat);
    let (major, minor) = (major(stat.st_rdev), minor(stat.st_rdev));
    entry.kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Folder,
        FileType::RegularFile => Kind::File { size: 0 },
        FileType::Symlink => match readlinkat(folder, name, Vec::new()) {
            Ok(target) => Kind::Link { target: target.into_bytes() },
            Err(errno) => {
                entry.unread = Some(format!("cannot be read: {errno}"));
                Kind::Unknown
            }
        },
        FileType::CharacterDevice => Kind::CharacterDevice { major, minor },
        FileType::BlockDevice => Kind::BlockDevice { major, minor },
        FileType::Fifo => Kind::Pipe,
        FileType::Socket => Kind::Socket,
        FileType::Unknown => Kind::Unknown,
    };
    match place::attributes(folder, name) {
        Ok(attributes) => entry.attributes = attributes,
        Err(Errno::NOENT) => {}
        Err(errno) => entry.unread = Some(format!("its extended attributes cannot be read: {errno}")),
    }
    if entry.attributes.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() > LONGEST_PAGE / 2 {
        entry.attributes.clear();
        entry.unread = Some("its extended attributes are too long".to_owned());
    }
    entry
}
