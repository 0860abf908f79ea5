//! Files' way into the repository.

use super::entry::{Entry, Kind, LONGEST_PAGE};
use super::known::{Identity, Kept, Known, NewKnown, Record};
use super::scan::{Met, PassedOver, scan};
use super::select::Selection;
use crate::{BackupError, Pace, Progress};
use rempart_repository::{
    BackupWriter, BlobWriter, ChunkId, Domain, FileTree, HowRead, NodeSink, NodeSource, Tree, TreeUpdate,
    is_zero,
};
use rustix::fs::{Advice, FileType, Mode, OFlags, SeekFrom, fadvise, fstat, openat, seek};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::CString;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

/// Files, and bytes of them, that are stored side by side before their entries are written.
const BATCH: usize = 512;
const BATCH_BYTES: u64 = 64 << 20;
/// Attempts to read a file that changes meanwhile.
const TRIES: u32 = 3;
/// A longer one is not read again for having changed.
const WORTH_IT: u64 = 256 << 20;
/// A page ends behind one entry in so many, chosen by their paths: what comes later is then the same page again, wherever
/// something was added; or when it is so long.
const ENTRIES: u64 = 1024;
const LONG_PAGE: usize = 256 << 10;
/// What could not be read is named, up to so many.
const NAMED: usize = 100;
/// Of files that changed and did not show it, in a note.
const NAMED_OTHER: usize = 20;

/// Files that are to be backed up.
#[derive(Debug)]
pub struct FilesJob<'a> {
    pub selection: &'a Selection,
    /// A folder of this machine for what it remembers of this repository.
    pub cache: &'a Path,
}

/// What was stored.
#[derive(Debug)]
pub struct StoredFiles {
    pub tree: FileTree,
    /// Paths whose content could not be read, and why: the first ones.
    pub unread: Vec<(Vec<u8>, String)>,
    /// For people.
    pub notes: Vec<String>,
    /// To be kept when the point is in the repository.
    pub known: Kept,
}

/// Stores what is new of files. Of those that did not change, by what is known, a few chunks are read all the same; if one of
/// them is another than before, everything is read.
pub fn back_up_files(
    writer: &BackupWriter,
    job: &FilesJob<'_>,
    pace: Pace,
    progress: &Progress,
) -> Result<StoredFiles, BackupError> {
    let new_before = writer.new_bytes();
    let name = blake3::hash(&job.selection.identity()).to_hex();
    let path = job.cache.join(format!("files-{}", &name[..32]));
    let (chunk_size, domain) = (writer.chunk_size().bytes(), writer.domain().id());
    let meet = |known: Option<&mut Known>| meet_all(writer, job, &path, pace, progress, known);
    let (met, full_because, audits) = match Known::open(&path, domain, chunk_size, pace.audit) {
        None => (
            meet(None)?,
            Some("this machine remembers no backup of these before".to_owned()),
            Audits::default(),
        ),
        Some(mut known) => {
            let mut met = meet(Some(&mut known))?;
            let audits = std::mem::take(met.0.audits.get_mut().expect("no holder panics"));
            match audits.missed {
                0 => (met, None, audits),
                missed => {
                    // What it stored is not stored again.
                    drop(met);
                    let why = format!(
                        "{missed} of {} chunks of files that had not changed, by their sizes and times, were other than before",
                        audits.audited
                    );
                    (meet(None)?, Some(why), audits)
                }
            }
        }
    };
    let (Store { sinks, mut pages, known, sums, .. }, passed_over) = met;
    let mut sinks = sinks.into_iter();
    let mut blobs = sinks.next().expect("there is one at least");
    sinks.try_for_each(BlobWriter::finish)?;
    pages.end(&mut blobs)?;
    let (mut records, kept) = known.finish()?;
    let mut next =
        || records.next().map_err(|why| super::failed("read", path.as_os_str().as_encoded_bytes(), why));
    let mut contents = Growing::new(writer, sums.chunks)?;
    let mut first = 0;
    while let Some(record) = next()? {
        for (chunk, id) in record.chunks {
            contents.set(first + chunk, id, &mut blobs)?;
        }
        first += record.size.div_ceil(chunk_size.into());
    }
    assert_eq!(first, sums.chunks, "each file with content has its record");
    let contents = contents.finish(&mut blobs)?;
    let mut tree = Growing::new(writer, pages.ids.len() as u64)?;
    for (page, id) in (0..).zip(&pages.ids) {
        tree.set(page, *id, &mut blobs)?;
    }
    let tree = tree.finish(&mut blobs)?;
    blobs.finish()?;
    let starts: Vec<u8> = pages.starts.iter().flat_map(|start| start.to_le_bytes()).collect();
    let starts = writer.keep(&starts)?;
    let new = writer.new_bytes() - new_before;
    let Audits { audited, missed, read, .. } = audits;
    let how = HowRead { full_because, read: sums.read + read, new, audited, missed };
    Ok(StoredFiles {
        tree: FileTree {
            pages: tree,
            starts,
            contents,
            chunk_size,
            entries: sums.entries,
            bytes: sums.bytes,
            unread: sums.unread,
            position: None,
            how,
        },
        notes: notes(&passed_over, &sums, &audits.files),
        unread: sums.named,
        known: kept,
    })
}

/// Meets everything that is selected, and reads what is not known.
fn meet_all<'a>(
    writer: &'a BackupWriter,
    job: &FilesJob<'_>,
    path: &Path,
    pace: Pace,
    progress: &'a Progress,
    mut known: Option<&mut Known>,
) -> Result<(Store<'a>, PassedOver), BackupError> {
    let chunk_size = writer.chunk_size().bytes();
    let mut store = Store {
        writer,
        chunk_size,
        progress,
        sinks: writer.sinks(pace.threads),
        batch: Vec::new(),
        batch_bytes: 0,
        pages: Pages::default(),
        known: NewKnown::create(path, writer.domain().id(), chunk_size)?,
        names: HashMap::new(),
        sums: Sums::default(),
        audits: Mutex::default(),
    };
    let passed_over = scan(job.selection, &mut |met| store.take(met, known.as_deref_mut()))?;
    store.store_batch()?;
    Ok((store, passed_over))
}

/// What may be asked for why it is not there, or not as it was.
fn notes(passed_over: &PassedOver, sums: &Sums, other: &[Vec<u8>]) -> Vec<String> {
    let PassedOver { excluded, caches, vanished, mounts, more_mounts } = passed_over;
    let mut notes = Vec::new();
    let mut count = |count: u64, what: &str| {
        if count > 0 {
            notes.push(format!("{count} {what}"));
        }
    };
    count(sums.unread, "files or folders could not be read, and are not in it");
    count(sums.changed, "files changed while they were read, and may be part old, part new");
    count(*vanished + sums.vanished, "files were removed before they were read");
    count(*excluded, "files or folders were excluded");
    count(*caches, "caches were left empty");
    let named = |paths: &[Vec<u8>], more: u64| {
        let named = paths.iter().map(|path| super::shown(path));
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        named.collect::<Vec<_>>().join(", ") + &more
    };
    if !mounts.is_empty() {
        let named = named(mounts, *more_mounts);
        notes.push(format!("other file systems are mounted there, and were not read: {named}"));
    }
    if !other.is_empty() {
        let first = &other[..other.len().min(NAMED_OTHER)];
        let named = named(first, (other.len() - first.len()) as u64);
        notes.push(format!("files were other than before, and their sizes and times the same: {named}"));
    }
    notes
}

/// What was read of files that had not changed, by what is known.
#[derive(Debug, Default)]
struct Audits {
    /// Chunks.
    audited: u64,
    missed: u64,
    /// Bytes.
    read: u64,
    /// Those that were other than before.
    files: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Sums {
    entries: u64,
    bytes: u64,
    chunks: u64,
    read: u64,
    unread: u64,
    changed: u64,
    vanished: u64,
    named: Vec<(Vec<u8>, String)>,
}

struct Store<'a> {
    writer: &'a BackupWriter,
    chunk_size: u32,
    progress: &'a Progress,
    sinks: Vec<BlobWriter<'a>>,
    batch: Vec<Pending>,
    batch_bytes: u64,
    pages: Pages,
    known: NewKnown,
    /// Files that have several names: the first.
    names: HashMap<(u64, u64), Vec<u8>>,
    sums: Sums,
    audits: Mutex<Audits>,
}

/// An entry whose turn has not come.
struct Pending {
    entry: Entry,
    content: Content,
}

enum Content {
    None,
    Known {
        record: Record,
        /// Numbers of its chunks that are read all the same.
        audit: Vec<u64>,
        at: (Arc<OwnedFd>, CString),
    },
    /// To be read.
    At(Arc<OwnedFd>, CString),
}

/// What came of a file.
enum Outcome {
    Read { record: Record, read: u64, changed: bool },
    Unread(String),
    Vanished,
}

impl<'a> Store<'a> {
    fn take(&mut self, met: Met, known: Option<&mut Known>) -> Result<(), BackupError> {
        if self.progress.is_stopped() {
            return Err(BackupError::Stopped);
        }
        let Met { mut entry, stat, folder, name } = met;
        let mut content = Content::None;
        if matches!(entry.kind, Kind::File { .. }) && entry.unread.is_none() {
            let identity = Identity::of(&stat);
            let first = (stat.st_nlink > 1).then_some((stat.st_dev, stat.st_ino));
            if let Some(of) = first.and_then(|file| self.names.get(&file)) {
                entry.kind = Kind::Again { of: of.clone() };
            } else {
                if let Some(file) = first {
                    self.names.insert(file, entry.path.clone());
                }
                let found = known.and_then(|known| known.find(&entry.path));
                content = match found.filter(|(record, _)| record.identity == identity) {
                    Some((record, audit)) if self.is_there(&record)? => {
                        Content::Known { record, audit, at: (folder, name) }
                    }
                    _ => Content::At(folder, name),
                };
                self.batch_bytes += identity.size;
            }
        }
        self.batch.push(Pending { entry, content });
        if self.batch.len() >= BATCH || self.batch_bytes >= BATCH_BYTES {
            self.store_batch()?;
        }
        Ok(())
    }

    /// Whether the repository still has what the file holds. Then this backup requires it.
    fn is_there(&self, record: &Record) -> Result<bool, BackupError> {
        for (_, id) in &record.chunks {
            if !self.writer.take_over(id)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn store_batch(&mut self) -> Result<(), BackupError> {
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        let outcomes = self.read_batch(&batch)?;
        for (Pending { mut entry, content }, outcome) in batch.into_iter().zip(outcomes) {
            let record = match (content, outcome) {
                (Content::Known { record, .. }, None) => Some(record),
                (_, Some(Outcome::Read { record, read, changed })) => {
                    self.sums.read += read;
                    self.sums.changed += u64::from(changed);
                    Some(record)
                }
                (_, Some(Outcome::Unread(why))) => {
                    entry.unread = Some(why);
                    None
                }
                (_, Some(Outcome::Vanished)) => {
                    self.sums.vanished += 1;
                    continue;
                }
                (_, None) => None,
            };
            let first = self.sums.chunks;
            if let Some(record) = record {
                entry.kind = Kind::File { size: record.size };
                self.sums.bytes += record.size;
                self.sums.chunks += entry.chunks(self.chunk_size);
                self.known.push(&record)?;
            }
            if let Some(why) = &entry.unread {
                self.sums.unread += 1;
                if self.sums.named.len() < NAMED {
                    self.sums.named.push((entry.path.clone(), why.clone()));
                }
            }
            self.sums.entries += 1;
            self.pages.push(&entry, first, &mut self.sinks[0])?;
        }
        Ok(())
    }

    /// Reads what must be read of a batch, on several threads.
    fn read_batch(&mut self, batch: &[Pending]) -> Result<Vec<Option<Outcome>>, BackupError> {
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
        let outcomes: Vec<Mutex<Option<Outcome>>> = batch.iter().map(|_| Mutex::new(None)).collect();
        let (chunk_size, progress, writer, audits) =
            (self.chunk_size, self.progress, self.writer, &self.audits);
        std::thread::scope(|scope| {
            for blobs in &mut self.sinks {
                scope.spawn(|| {
                    let mut buffer = vec![0; chunk_size as usize];
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let Some(pending) = batch.get(number) else { return };
                        let (folder, name, known) = match &pending.content {
                            Content::At(folder, name) => (folder, name, None),
                            Content::Known { record, audit, at: (folder, name) } if !audit.is_empty() => {
                                (folder, name, Some((record, audit)))
                            }
                            Content::None | Content::Known { .. } => continue,
                        };
                        if failed.lock().expect("no holder panics").is_some() {
                            return;
                        }
                        let mut reading = Reading {
                            path: &pending.entry.path,
                            folder,
                            name,
                            buffer: &mut buffer,
                            progress,
                        };
                        if let Some((record, audit)) = known
                            && reading.is_as_before(record, audit, writer.domain(), audits)
                        {
                            continue;
                        }
                        match reading.store(blobs) {
                            Ok(outcome) => {
                                *outcomes[number].lock().expect("no holder panics") = Some(outcome);
                            }
                            Err(error) => {
                                failed.lock().expect("no holder panics").get_or_insert(error);
                            }
                        }
                    }
                });
            }
        });
        if let Some(error) = failed.into_inner().expect("a panic of a thread goes on here") {
            return Err(error);
        }
        Ok(outcomes.into_iter().map(|outcome| outcome.into_inner().expect("no holder panics")).collect())
    }
}

/// One file that is being read.
struct Reading<'a> {
    path: &'a [u8],
    folder: &'a OwnedFd,
    name: &'a CString,
    /// A chunk long.
    buffer: &'a mut [u8],
    progress: &'a Progress,
}

/// Why a file was not read to its end.
enum NotRead {
    /// All ends.
    Backup(BackupError),
    /// It ends before it should.
    CutShort,
    Errno(Errno),
}

impl From<Errno> for NotRead {
    fn from(errno: Errno) -> NotRead {
        NotRead::Errno(errno)
    }
}

impl From<rempart_repository::Error> for NotRead {
    fn from(error: rempart_repository::Error) -> NotRead {
        NotRead::Backup(error.into())
    }
}

impl Reading<'_> {
    /// Whether these chunks of a file that did not change, by its size and times, are as they were. What cannot be told is to
    /// be found out by reading it.
    fn is_as_before(
        &mut self,
        record: &Record,
        audit: &[u64],
        domain: &Domain,
        audits: &Mutex<Audits>,
    ) -> bool {
        let (mut missed, mut read) = (0, 0);
        let chunk_size = self.buffer.len() as u64;
        let mut compare = || {
            let file = self.open()?;
            for number in audit {
                let start = number * chunk_size;
                let plain = &mut self.buffer[..(record.size - start).min(chunk_size) as usize];
                if !read_at(&file, plain, start)? {
                    return Err(Errno::NODATA);
                }
                read += plain.len() as u64;
                let before = record.chunks.iter().find(|(chunk, _)| chunk == number).map(|(_, id)| *id);
                let now = (!is_zero(plain)).then(|| domain.chunk_id(plain));
                missed += u64::from(now != before);
            }
            let after = fstat(&file)?;
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
            Ok(Identity::of(&after))
        };
        let after = compare();
        self.progress.add(read);
        let mut audits = audits.lock().expect("no holder panics");
        audits.read += read;
        if after != Ok(record.identity) {
            // It changed just now, and shows it.
            return false;
        }
        audits.audited += audit.len() as u64;
        audits.missed += missed;
        if missed > 0 {
            audits.files.push(self.path.to_vec());
        }
        missed == 0
    }

    fn store(mut self, blobs: &mut BlobWriter<'_>) -> Result<Outcome, BackupError> {
        for attempt in 1..=TRIES {
            let file = match self.open() {
                Ok(file) => file,
                Err(Errno::NOENT) => return Ok(Outcome::Vanished),
                Err(errno) => return Ok(Outcome::Unread(format!("cannot be opened: {errno}"))),
            };
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let unread = |errno: Errno| Outcome::Unread(format!("cannot be read: {errno}"));
            let before = match fstat(&file) {
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => {
                    Identity::of(&stat)
                }
                Ok(_) => return Ok(Outcome::Unread("is no file any more".to_owned())),
                Err(errno) => return Ok(unread(errno)),
            };
            let (chunks, read) = match self.read(&file, before.size, blobs) {
                Ok(read) => read,
                Err(NotRead::CutShort) => continue,
                Err(NotRead::Errno(errno)) => return Ok(unread(errno)),
                Err(NotRead::Backup(error)) => return Err(error),
            };
            let after = match fstat(&file) {
                Ok(stat) => Identity::of(&stat),
                Err(errno) => return Ok(unread(errno)),
            };
            // A file whose pages are dropped is not in the way of those that are used.
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
            let changed = before != after;
            if changed && attempt < TRIES && before.size <= WORTH_IT {
                continue;
            }
            let is_settled = !changed && before.is_settled(i64::try_from(now).unwrap_or_default());
            let record =
                Record { path: self.path.to_vec(), identity: before, is_settled, size: before.size, chunks };
            return Ok(Outcome::Read { record, read, changed });
        }
        Ok(Outcome::Unread("was cut short while it was read, again and again".to_owned()))
    }

    fn open(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match openat(self.folder, self.name, flags | OFlags::NOATIME, Mode::empty()) {
            // Only its owner may ask for that.
            Err(Errno::PERM) => openat(self.folder, self.name, flags, Mode::empty()),
            // It is a link now.
            Err(Errno::LOOP) => Err(Errno::NOENT),
            opened => opened,
        }
    }

    /// Stores what is not zeroes. Tells how many bytes were read.
    fn read(
        &mut self,
        file: &OwnedFd,
        size: u64,
        blobs: &mut BlobWriter<'_>,
    ) -> Result<(Vec<(u64, ChunkId)>, u64), NotRead> {
        let chunk_size = self.buffer.len() as u64;
        let (mut chunks, mut at, mut read) = (Vec::new(), 0, 0);
        while at < size {
            let data = data_from(file, at, size)?;
            if data.is_empty() {
                break;
            }
            let first = (data.start / chunk_size).max(at / chunk_size);
            for chunk in first..data.end.div_ceil(chunk_size) {
                if self.progress.is_stopped() {
                    return Err(NotRead::Backup(BackupError::Stopped));
                }
                let start = chunk * chunk_size;
                let plain = &mut self.buffer[..(size - start).min(chunk_size) as usize];
                if !read_at(file, plain, start)? {
                    return Err(NotRead::CutShort);
                }
                read += plain.len() as u64;
                self.progress.add(plain.len() as u64);
                if !is_zero(plain) {
                    chunks.push((chunk, blobs.chunk(plain)?));
                }
            }
            at = data.end.next_multiple_of(chunk_size);
        }
        Ok((chunks, read))
    }
}

/// The next bytes that are no hole.
fn data_from(file: &OwnedFd, at: u64, size: u64) -> Result<Range<u64>, Errno> {
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start.min(size),
        Err(Errno::NXIO) => return Ok(size..size),
        // This file system does not tell.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(at..size),
        Err(errno) => return Err(errno),
    };
    Ok(start..seek(file, SeekFrom::Hole(start)).unwrap_or(size).clamp(start, size))
}

/// Whether there was enough.
fn read_at(file: &OwnedFd, mut buffer: &mut [u8], mut at: u64) -> Result<bool, Errno> {
    while !buffer.is_empty() {
        match rustix::io::pread(file, &mut *buffer, at) {
            Ok(0) => return Ok(false),
            Ok(len) => {
                buffer = &mut buffer[len..];
                at += len as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(true)
}

/// Entries on their way into pages.
#[derive(Debug, Default)]
struct Pages {
    bytes: Vec<u8>,
    /// The first chunk of content of the page that is being filled.
    start: u64,
    ids: Vec<ChunkId>,
    starts: Vec<u64>,
}

impl Pages {
    /// `first` is the first chunk of its content.
    fn push(&mut self, entry: &Entry, first: u64, blobs: &mut BlobWriter<'_>) -> Result<(), BackupError> {
        let encoded = entry.encode();
        assert!(encoded.len() <= LONGEST_PAGE - LONG_PAGE, "its parts are bounded");
        if self.bytes.is_empty() {
            self.start = first;
        }
        self.bytes.extend(encoded);
        let chosen = blake3::hash(&entry.path);
        let chosen = u64::from_le_bytes(chosen.as_bytes()[..8].try_into().expect("8 bytes"));
        if self.bytes.len() >= LONG_PAGE || chosen.is_multiple_of(ENTRIES) {
            self.end(blobs)?;
        }
        Ok(())
    }

    fn end(&mut self, blobs: &mut BlobWriter<'_>) -> Result<(), BackupError> {
        if !self.bytes.is_empty() {
            self.ids.push(blobs.chunk(&self.bytes)?);
            self.starts.push(self.start);
            self.bytes.clear();
        }
        Ok(())
    }
}

/// A tree that is made from nothing.
pub(super) struct Growing<'a>(TreeUpdate<'a>);

/// There is nothing to read where all was zeroes.
struct Nothing;

impl NodeSource for Nothing {
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, rempart_repository::Error> {
        unreachable!("node {id} of a tree of zeroes")
    }
}

impl<'a> Growing<'a> {
    pub fn new(writer: &'a BackupWriter, chunks: u64) -> Result<Growing<'a>, BackupError> {
        Ok(Growing(TreeUpdate::new(writer.domain(), &Nothing, Tree::zero(chunks))?))
    }

    pub fn set(&mut self, chunk: u64, id: ChunkId, sink: &mut dyn NodeSink) -> Result<(), BackupError> {
        Ok(self.0.set(chunk, id, sink)?)
    }

    pub fn finish(self, sink: &mut dyn NodeSink) -> Result<Tree, BackupError> {
        Ok(self.0.finish(sink)?)
    }
}
