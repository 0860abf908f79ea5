//! Files' way back: everything is made anew in one folder, and nothing leads out of it.
//!
//! Each folder is made, and held open, before anything is made in it; names are single parts, never paths, and links are not
//! followed. So whatever an entry says, or somebody moves there meanwhile, nothing outside is touched.

use super::entry::{Entry, Kind, is_below, order, parent, parts};
use super::{FileReader, failed, place};
use crate::{BackupError, Progress};
use rempart_repository::{ChunkId, Decompressor, Error, ErrorKind};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chmodat, chownat,
    fsync, ftruncate, linkat, makedev, mkdirat, mknodat, openat, openat2, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::ffi::CString;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering as Atomic};
use std::sync::{Arc, Mutex};

/// Files, and bytes of them, that are written side by side.
const BATCH: usize = 256;
const BATCH_BYTES: u64 = 64 << 20;
/// Chunks that a thread reads from the repository at once.
const TOGETHER: usize = 32;
/// What was not restored is named, up to so many.
const NAMED: usize = 100;

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What was restored.
#[derive(Debug, Default)]
pub struct RestoredFiles {
    pub entries: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Entries that were not restored, or not as they were.
    pub failed: u64,
    /// The first of them, and why.
    pub named: Vec<(Vec<u8>, String)>,
}

impl RestoredFiles {
    fn fail(&mut self, path: &[u8], why: impl std::fmt::Display) {
        self.failed += 1;
        if self.named.len() < NAMED {
            self.named.push((path.to_vec(), why.to_string()));
        }
    }
}

/// What files hold.
pub(crate) trait Contents: Sync {
    /// Fills a new file of `size` bytes; `first` is what came with its entry. The second error says why it cannot be had whole.
    fn fill(
        &self,
        file: &OwnedFd,
        size: u64,
        first: u64,
        progress: &Progress,
        decompressor: &mut Decompressor,
    ) -> Result<Result<(), String>, BackupError>;
}

/// Restores what is at `wanted` and below it, all if that is empty, into a new folder, or an empty one, with the folders that
/// lead there.
pub fn restore_files(
    files: &FileReader<'_>,
    wanted: &[u8],
    to: &Path,
    threads: usize,
    progress: &Progress,
) -> Result<RestoredFiles, BackupError> {
    let mut restore = Restore::new(files, to, threads, progress)?;
    let others = first_names(files, wanted)?;
    let mut found = false;
    files.entries::<BackupError>(|entry, first| {
        if progress.is_stopped() {
            return Err(BackupError::Stopped);
        }
        let is_it = wanted.is_empty() || entry.path == wanted || is_below(&entry.path, wanted);
        found |= is_it;
        if is_it || is_below(wanted, &entry.path) {
            restore.entry(entry, first)?;
        } else if others.contains(&entry.path) {
            restore.first_names.insert(entry.path.clone(), (entry, first));
        } else if order(&entry.path, wanted) == Ordering::Greater {
            return Ok(ControlFlow::Break(()));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    if !found {
        let _ = rustix::fs::rmdir(to);
        return Err(Error::new(ErrorKind::Missing, super::shown(wanted), "the point has no such file").into());
    }
    restore.end(to)
}

impl Contents for FileReader<'_> {
    fn fill(
        &self,
        file: &OwnedFd,
        size: u64,
        first: u64,
        progress: &Progress,
        decompressor: &mut Decompressor,
    ) -> Result<Result<(), String>, BackupError> {
        let chunk_size = u64::from(self.tree().chunk_size);
        let mut wanted: Vec<(u64, ChunkId, usize)> = Vec::with_capacity(TOGETHER);
        let mut chunks = match self.chunks(size, first) {
            Ok(chunks) => chunks,
            Err(error) => return refuse(error),
        };
        loop {
            wanted.clear();
            for chunk in chunks.by_ref().take(TOGETHER) {
                match chunk {
                    Ok(chunk) => wanted.push(chunk),
                    Err(error) => return refuse(error),
                }
            }
            if wanted.is_empty() {
                return Ok(Ok(()));
            }
            if progress.is_stopped() {
                return Err(BackupError::Stopped);
            }
            let ids: Vec<ChunkId> = wanted.iter().map(|(_, id, _)| *id).collect();
            let mut unwritten = None;
            let read = self.reader().read_many(&ids, decompressor, |place, plain| {
                let (number, id, len) = wanted[place];
                if plain.len() != len {
                    let why = "it is not as long as its place in the file";
                    return Err(Error::new(ErrorKind::Damaged, id, why));
                }
                if let Err(errno) = write_at(file, plain, number * chunk_size) {
                    unwritten.get_or_insert(errno);
                }
                progress.add(len as u64);
                Ok(())
            });
            if let Err(error) = read {
                return refuse(error);
            }
            if let Some(errno) = unwritten {
                return Ok(Err(errno.to_string()));
            }
        }
    }
}

/// There may be one, if it is empty: what exists is not overwritten.
fn new_folder(to: &Path) -> Result<OwnedFd, BackupError> {
    let fail = |why| BackupError::File { action: "restore into", path: to.to_owned(), source: why };
    match mkdirat(CWD, to, Mode::RWXU) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            if std::fs::read_dir(to).map_err(fail)?.next().is_some() {
                return Err(fail(Errno::NOTEMPTY.into()));
            }
        }
        Err(errno) => return Err(fail(errno.into())),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, to, flags, Mode::empty()).map_err(|errno| fail(errno.into()))
}

/// First names, outside of what is wanted, of files that are in it under another.
fn first_names(files: &FileReader<'_>, wanted: &[u8]) -> Result<BTreeSet<Vec<u8>>, BackupError> {
    let mut others = BTreeSet::new();
    if !wanted.is_empty() {
        files.below(wanted, |entry| {
            if let Kind::Again { of } = entry.kind
                && of != wanted
                && !is_below(&of, wanted)
            {
                others.insert(of);
            }
            Ok(())
        })?;
    }
    Ok(others)
}

/// Makes files of entries that come in their order.
pub(crate) struct Restore<'a, C> {
    contents: &'a C,
    progress: &'a Progress,
    threads: usize,
    root: Arc<OwnedFd>,
    /// Those that lead to the entry before, each in the one before it.
    folders: Vec<Folder>,
    batch: Vec<Pending>,
    batch_bytes: u64,
    /// Files that were passed over, and that have other names.
    first_names: HashMap<Vec<u8>, (Entry, u64)>,
    /// Where those were restored instead.
    made_for: HashMap<Vec<u8>, Vec<u8>>,
    done: RestoredFiles,
    is_root: bool,
}

struct Folder {
    entry: Entry,
    /// Where it is.
    parent: Arc<OwnedFd>,
    name: CString,
    open: Arc<OwnedFd>,
}

/// A file that is to be written.
struct Pending {
    entry: Entry,
    first: u64,
    folder: Arc<OwnedFd>,
    name: CString,
}

impl<'a, C: Contents> Restore<'a, C> {
    /// Into a new folder, or an empty one.
    pub fn new(
        contents: &'a C,
        to: &Path,
        threads: usize,
        progress: &'a Progress,
    ) -> Result<Restore<'a, C>, BackupError> {
        Ok(Restore {
            contents,
            progress,
            threads: threads.max(1),
            root: Arc::new(new_folder(to)?),
            folders: Vec::new(),
            batch: Vec::new(),
            batch_bytes: 0,
            first_names: HashMap::new(),
            made_for: HashMap::new(),
            done: RestoredFiles::default(),
            // Who is not root makes all of it his own.
            is_root: rustix::process::geteuid().is_root(),
        })
    }

    /// Entries come no more.
    pub fn end(mut self, to: &Path) -> Result<RestoredFiles, BackupError> {
        self.finish(&[])?;
        fsync(&self.root).map_err(|errno| failed("write", to.as_os_str().as_bytes(), errno))?;
        Ok(self.done)
    }

    /// Tells of what is no entry.
    pub fn fail(&mut self, path: &[u8], why: impl std::fmt::Display) {
        self.done.fail(path, why);
    }

    pub fn entry(&mut self, mut entry: Entry, mut first: u64) -> Result<(), BackupError> {
        self.finish(&entry.path)?;
        self.done.entries += 1;
        if let Kind::Again { of } = &entry.kind
            && let Some((other, start)) = self.first_names.remove(of)
        {
            self.made_for.insert(other.path, entry.path.clone());
            (entry.kind, entry.unread, first) = (other.kind, other.unread, start);
        }
        let folder = match self.folders.last() {
            Some(folder) if parent(&entry.path) == Some(&folder.entry.path[..]) => folder.open.clone(),
            None if parent(&entry.path).is_none() => self.root.clone(),
            _ => {
                self.done.fail(&entry.path, "its folder was not restored");
                return Ok(());
            }
        };
        let name = parts(&entry.path).next_back().expect("every path has a part");
        let name = CString::new(name).expect("no entry has a zero in it");
        if let Some(why) = &entry.unread {
            self.done.fail(&entry.path, format_args!("was not backed up: it {why}"));
        }
        match &entry.kind {
            Kind::Folder => {
                let made = mkdirat(&folder, &name, Mode::RWXU)
                    .and_then(|()| openat(&folder, &name, FOLDER, Mode::empty()));
                match made {
                    Ok(open) => {
                        self.folders.push(Folder { entry, parent: folder, name, open: Arc::new(open) });
                    }
                    Err(errno) => self.done.fail(&entry.path, errno),
                }
                return Ok(());
            }
            Kind::File { size } => {
                self.batch_bytes += size;
                self.batch.push(Pending { entry, first, folder, name });
                if self.batch.len() >= BATCH || self.batch_bytes >= BATCH_BYTES {
                    self.write_batch()?;
                }
                return Ok(());
            }
            Kind::Again { of } => {
                // It may be in the batch.
                let of = self.made_for.get(of).unwrap_or(of).clone();
                self.write_batch()?;
                if let Err(errno) = self.link(&of, folder.as_fd(), &name) {
                    self.done.fail(&entry.path, errno);
                }
                // Its attributes are those of the file.
                return Ok(());
            }
            _ => {}
        }
        let device = |kind, major, minor| mknodat(&folder, &name, kind, Mode::RUSR, makedev(major, minor));
        let made = match &entry.kind {
            Kind::Link { target } => symlinkat(target.as_slice(), &folder, &name),
            Kind::CharacterDevice { major, minor } => device(FileType::CharacterDevice, *major, *minor),
            Kind::BlockDevice { major, minor } => device(FileType::BlockDevice, *major, *minor),
            Kind::Pipe => device(FileType::Fifo, 0, 0),
            Kind::Socket => device(FileType::Socket, 0, 0),
            // It was told.
            Kind::Unknown => return Ok(()),
            Kind::Folder | Kind::File { .. } | Kind::Again { .. } => unreachable!("handled above"),
        };
        match made.and_then(|()| set_metadata(&entry, folder.as_fd(), &name, self.is_root)) {
            Ok(()) => {}
            Err(errno) => self.done.fail(&entry.path, errno),
        }
        Ok(())
    }

    /// Another name of a file that was made here.
    fn link(&self, of: &[u8], folder: BorrowedFd<'_>, name: &CString) -> Result<(), Errno> {
        let root = self.root.as_fd();
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let last = parts(of).next_back().expect("every path has a part");
        match parent(of) {
            None => linkat(root, last, folder, name, AtFlags::empty()),
            Some(parent) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let parent = openat2(root, parent, flags, Mode::empty(), inside)?;
                linkat(&parent, last, folder, name, AtFlags::empty())
            }
        }
    }

    /// Leaves the folders that do not lead to `path`: all is in them, so they become as they were.
    fn finish(&mut self, path: &[u8]) -> Result<(), BackupError> {
        while let Some(folder) = self.folders.last() {
            if is_below(path, &folder.entry.path) {
                return Ok(());
            }
            self.write_batch()?;
            let Folder { entry, parent, name, .. } = self.folders.pop().expect("it is the last");
            if let Err(errno) = set_metadata(&entry, parent.as_fd(), &name, self.is_root) {
                self.done.fail(&entry.path, errno);
            }
        }
        if path.is_empty() { self.write_batch() } else { Ok(()) }
    }

    fn write_batch(&mut self) -> Result<(), BackupError> {
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
        let refused = Mutex::new(Vec::new());
        let this = &*self;
        std::thread::scope(|scope| {
            for _ in 0..this.threads.min(batch.len()) {
                scope.spawn(|| {
                    let mut decompressor = Decompressor::new();
                    while let Some(file) = batch.get(next.fetch_add(1, Atomic::Relaxed)) {
                        match this.write(file, &mut decompressor) {
                            Ok(Ok(())) => {}
                            Ok(Err(why)) => {
                                refused
                                    .lock()
                                    .expect("no holder panics")
                                    .push((file.entry.path.clone(), why));
                            }
                            Err(error) => {
                                failed.lock().expect("no holder panics").get_or_insert(error);
                                return;
                            }
                        }
                    }
                });
            }
        });
        if let Some(error) = failed.into_inner().expect("a panic of a thread goes on here") {
            return Err(error);
        }
        for (path, why) in refused.into_inner().expect("a panic of a thread goes on here") {
            self.done.fail(&path, why);
        }
        self.done.bytes += batch.iter().map(|file| size_of(&file.entry)).sum::<u64>();
        Ok(())
    }

    /// Writes one file. One that cannot be had whole is not there; the second error says why.
    fn write(
        &self,
        pending: &Pending,
        decompressor: &mut Decompressor,
    ) -> Result<Result<(), String>, BackupError> {
        let Pending { entry, first, folder, name } = pending;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(folder, name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => file,
            Err(errno) => return Ok(Err(errno.to_string())),
        };
        let size = size_of(entry);
        let written = match ftruncate(&file, size) {
            Ok(()) => self.contents.fill(&file, size, *first, self.progress, decompressor)?,
            Err(errno) => Err(errno.to_string()),
        };
        let written = written.and_then(|()| {
            set_metadata(entry, folder.as_fd(), name, self.is_root).map_err(|errno| errno.to_string())
        });
        if written.is_err() && size > 0 {
            let _ = unlinkat(folder, name, AtFlags::empty());
        }
        Ok(written)
    }
}

/// What is lost is lost; a place that does not answer ends all.
fn refuse(error: Error) -> Result<Result<(), String>, BackupError> {
    if crate::restore::is_of_the_place(&error) { Err(error.into()) } else { Ok(Err(error.to_string())) }
}

fn size_of(entry: &Entry) -> u64 {
    match entry.kind {
        Kind::File { size } => size,
        _ => 0,
    }
}

pub(crate) fn write_at(file: &OwnedFd, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(len) => {
                bytes = &bytes[len..];
                at += len as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Owner, attributes, permissions and time, in the order in which none undoes another.
fn set_metadata(
    entry: &Entry,
    folder: BorrowedFd<'_>,
    name: &CString,
    with_owner: bool,
) -> Result<(), Errno> {
    let no_follow = AtFlags::SYMLINK_NOFOLLOW;
    if with_owner {
        let (owner, group) = (Uid::from_raw(entry.owner), Gid::from_raw(entry.group));
        chownat(folder, name, Some(owner), Some(group), no_follow)?;
    }
    if !matches!(entry.kind, Kind::Link { .. }) {
        // It was made here as what it is, in a folder that is held open.
        chmodat(folder, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
    }
    let mut refused = Ok(());
    for (key, value) in &entry.attributes {
        // The kernel gives some of them to root alone.
        let is_ours = with_owner || key.starts_with(b"user.");
        if let Err(errno) = place::set_attribute(folder, name, key, value)
            && is_ours
        {
            refused = Err(errno);
        }
    }
    let time = Timespec { tv_sec: entry.modified.seconds, tv_nsec: entry.modified.nanoseconds.into() };
    utimensat(folder, name, &Timestamps { last_access: time, last_modification: time }, no_follow)?;
    refused
}
