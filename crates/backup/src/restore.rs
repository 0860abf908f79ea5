//! A disk's way back out of the repository.

use crate::{BackupError, Progress};
use rempart_buffer::{BufferMut, PAGE_SIZE};
use rempart_repository::{
    BlobKind, BlobReader, ChunkId, ChunkSize, Decompressor, Error, FAN_OUT, PointDisk, Step, Tree, Walk,
};
use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom, fallocate, fstat, seek};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, mpsc};

/// Bytes of the disk that a thread reads and writes at a time.
const BATCH: u64 = 4 << 20;
/// Threads for each that was asked for: writes go past the page cache, and whoever waits for one computes nothing.
const THREADS: usize = 2;
/// Zeroes written at once, where nothing better works.
const ZEROES: u64 = 1 << 20;

/// Where a disk is restored to. Written from several threads.
pub trait Target: Sync {
    /// Those of these chunks, in order, that it does not hold already: only they are read from the repository.
    fn missing(&self, batch: &[(u64, ChunkId)]) -> Result<Vec<(u64, ChunkId)>, BackupError> {
        Ok(batch.to_vec())
    }

    /// `content` begins a page of memory, and is a whole number of pages unless it ends the disk.
    fn write(&self, offset: u64, content: &[u8]) -> Result<(), BackupError>;

    /// Makes a range read as zeroes.
    fn zero(&self, offset: u64, len: u64) -> Result<(), BackupError>;

    /// Makes it durable.
    fn finish(&self) -> Result<(), BackupError>;
}

/// What is restored.
#[derive(Debug, Clone, Copy)]
pub struct Content {
    pub tree: Tree,
    pub chunk_size: ChunkSize,
    /// Bytes of the disk.
    pub size: u64,
}

impl Content {
    /// All of a restore point's disk.
    pub fn of(disk: &PointDisk, chunk_size: ChunkSize) -> Content {
        Content { tree: disk.tree(chunk_size), chunk_size, size: disk.size }
    }
}

/// Writes all of a disk.
pub fn restore_disk(
    reader: &BlobReader,
    content: Content,
    target: &dyn Target,
    threads: usize,
    progress: &Progress,
) -> Result<(), BackupError> {
    let lost = &mut |node: LostNode| Err(node.why.into());
    for_batches(reader, content, target, threads * THREADS, progress, lost, |batch, worker| {
        match target.missing(batch)? {
            missing if missing.is_empty() => Ok(()),
            missing => write_batch(reader, content, target, &missing, worker),
        }
    })?;
    target.finish()
}

/// Bytes of chunks that are not all zeroes: what it takes at most.
pub fn data_bytes(reader: &BlobReader, content: Content) -> Result<u64, BackupError> {
    let mut chunks = 0;
    for step in Walk::new(reader, content.tree)? {
        chunks += u64::from(matches!(step?, Step::Chunk { .. }));
    }
    Ok((chunks * u64::from(content.chunk_size.bytes())).min(content.size))
}

/// A node of the tree that cannot be read: nobody knows what is below.
struct LostNode {
    id: ChunkId,
    /// Chunks of the disk.
    below: Range<u64>,
    why: Error,
}

/// Says whether to go on behind it.
type Lost<'a> = &'a mut dyn FnMut(LostNode) -> Result<(), BackupError>;

/// What a thread uses again and again.
struct Worker {
    decompressor: Decompressor,
    /// A batch's chunks.
    plain: BufferMut,
}

/// Gives all chunks to `each`, on several threads; makes zeroes.
fn for_batches(
    reader: &BlobReader,
    content: Content,
    target: &dyn Target,
    threads: usize,
    progress: &Progress,
    lost: Lost<'_>,
    each: impl Fn(&[(u64, ChunkId)], &mut Worker) -> Result<(), BackupError> + Sync,
) -> Result<(), BackupError> {
    let chunk_len = u64::from(content.chunk_size.bytes());
    let (batches, queue) = mpsc::sync_channel::<Vec<(u64, ChunkId)>>(threads);
    let queue = Mutex::new(queue);
    let failed = Mutex::new(None);
    let fail = |error| {
        failed.lock().expect("no holder panics").get_or_insert(error);
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                let plain = BufferMut::for_overwrite(BATCH as usize);
                let mut worker = Worker { decompressor: Decompressor::new(), plain };
                loop {
                    let next = queue.lock().expect("no holder panics").recv();
                    let Ok(batch) = next else { return };
                    if failed.lock().expect("no holder panics").is_some() {
                        continue;
                    }
                    match each(&batch, &mut worker) {
                        Ok(()) => progress.add(batch.len() as u64 * chunk_len),
                        Err(error) => fail(error),
                    }
                }
            });
        }
        if let Err(error) = tell_batches(reader, content, target, &batches, progress, lost) {
            fail(error);
        }
        drop(batches);
    });
    failed.into_inner().expect("a panic of a thread goes on here").map_or(Ok(()), Err)
}

/// Walks the tree: zeroes are made here, chunks go to the threads.
fn tell_batches(
    reader: &BlobReader,
    content: Content,
    target: &dyn Target,
    batches: &mpsc::SyncSender<Vec<(u64, ChunkId)>>,
    progress: &Progress,
    lost: Lost<'_>,
) -> Result<(), BackupError> {
    let chunk_len = u64::from(content.chunk_size.bytes());
    let mut batch: Vec<(u64, ChunkId)> = Vec::new();
    let mut next = 0;
    let zero_to = |from: u64, to: u64| {
        let (start, end) = (from * chunk_len, (to * chunk_len).min(content.size));
        if start >= end {
            return Ok(());
        }
        progress.skip(end - start);
        target.zero(start, end - start)
    };
    let mut entered = (ChunkId::ZERO, 0..0);
    for step in Walk::new(reader, content.tree)? {
        let (index, id) = match step {
            Ok(Step::Chunk { index, id }) => (index, id),
            Ok(Step::Node { id, level, first_chunk }) => {
                let below = (FAN_OUT as u64).pow(u32::from(level) + 1);
                entered = (id, first_chunk..(first_chunk + below).min(content.tree.chunks));
                continue;
            }
            Err(why) => {
                let (id, below) = entered.clone();
                zero_to(next, below.start)?;
                next = below.end;
                lost(LostNode { id, below, why })?;
                continue;
            }
        };
        if progress.is_stopped() {
            return Err(BackupError::Stopped);
        }
        zero_to(next, index)?;
        next = index + 1;
        batch.push((index, id));
        if batch.len() as u64 * chunk_len >= BATCH {
            let sent = batches.send(std::mem::take(&mut batch));
            assert!(sent.is_ok(), "the threads wait for the end of the queue");
        }
    }
    zero_to(next, content.tree.chunks)?;
    let sent = batches.send(batch);
    assert!(sent.is_ok(), "the threads wait for the end of the queue");
    Ok(())
}

fn write_batch(
    reader: &BlobReader,
    content: Content,
    target: &dyn Target,
    batch: &[(u64, ChunkId)],
    worker: &mut Worker,
) -> Result<(), BackupError> {
    let chunk_len = content.chunk_size.bytes() as usize;
    let ids: Vec<ChunkId> = batch.iter().map(|(_, id)| *id).collect();
    let bytes_of = |index: u64| (content.size - index * chunk_len as u64).min(chunk_len as u64) as usize;
    let Worker { decompressor, plain } = worker;
    reader.read_many(&ids, decompressor, |place, chunk| {
        let (index, id) = batch[place];
        if chunk.len() != bytes_of(index) {
            let why = format!(
                "it has {} bytes, and chunk {index} of the disk has {}",
                chunk.len(),
                bytes_of(index)
            );
            return Err(Error::new(rempart_repository::ErrorKind::Damaged, id, why));
        }
        plain[place * chunk_len..][..chunk.len()].copy_from_slice(chunk);
        Ok(())
    })?;
    // Neighbours on the disk are neighbours here, and are written at once.
    let mut at = 0;
    for run in batch.chunk_by(|one, next| one.0 + 1 == next.0) {
        let (Some((first, _)), Some((last, _))) = (run.first(), run.last()) else { continue };
        let len = (run.len() - 1) * chunk_len + bytes_of(*last);
        target.write(first * chunk_len as u64, &plain[at..at + len])?;
        at += run.len() * chunk_len;
    }
    Ok(())
}

/// A raw file, made new, or a block device.
#[derive(Debug)]
pub struct FileTarget {
    file: File,
    /// Past the page cache, where the file system can: what is restored is not read again at once, and the memory is
    /// the machines'.
    direct: Option<File>,
    path: PathBuf,
    /// What was never written reads as zeroes.
    is_fresh: bool,
}

impl FileTarget {
    /// A new file of `size` bytes. There must be none.
    pub fn create(path: &Path, size: u64) -> Result<FileTarget, BackupError> {
        let fail = |source| BackupError::Target { disk: path.display().to_string(), offset: 0, source };
        let file = File::options().write(true).create_new(true).open(path).map_err(fail)?;
        file.set_len(size).map_err(fail)?;
        Ok(FileTarget { file, direct: open_direct(path), path: path.to_owned(), is_fresh: true })
    }

    /// A block device with room for `size` bytes. All it holds is lost.
    pub fn device(path: &Path, size: u64) -> Result<FileTarget, BackupError> {
        let fail = |source| BackupError::Target { disk: path.display().to_string(), offset: 0, source };
        let file = File::options().write(true).open(path).map_err(fail)?;
        let stat = fstat(&file).map_err(|errno| fail(errno.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
            return Err(fail(io::Error::other("it is not a block device")));
        }
        let room = seek(&file, SeekFrom::End(0)).map_err(|errno| fail(errno.into()))?;
        if room < size {
            let why = format!("it has {room} bytes, and the disk needs {size}");
            return Err(fail(io::Error::new(io::ErrorKind::StorageFull, why)));
        }
        Ok(FileTarget { file, direct: open_direct(path), path: path.to_owned(), is_fresh: false })
    }

    fn fail(&self, offset: u64) -> impl Fn(io::Error) -> BackupError {
        let disk = self.path.display().to_string();
        move |source| BackupError::Target { disk: disk.clone(), offset, source }
    }
}

fn open_direct(path: &Path) -> Option<File> {
    File::options().write(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path).ok()
}

impl Target for FileTarget {
    fn write(&self, offset: u64, content: &[u8]) -> Result<(), BackupError> {
        let is_aligned =
            offset.is_multiple_of(PAGE_SIZE as u64) && content.as_ptr().addr().is_multiple_of(PAGE_SIZE);
        let pages = content.len() - content.len() % PAGE_SIZE;
        let (whole, rest) = match &self.direct {
            Some(direct) if is_aligned => {
                direct.write_all_at(&content[..pages], offset).map_err(self.fail(offset))?;
                (pages, &content[pages..])
            }
            _ => (0, content),
        };
        let at = offset + whole as u64;
        self.file.write_all_at(rest, at).map_err(self.fail(at))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), BackupError> {
        if self.is_fresh || fallocate(&self.file, FallocateFlags::ZERO_RANGE, offset, len).is_ok() {
            return Ok(());
        }
        let zeroes = vec![0; ZEROES.min(len) as usize];
        let mut at = offset;
        while at < offset + len {
            let part = (offset + len - at).min(ZEROES);
            self.write(at, &zeroes[..part as usize])?;
            at += part;
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), BackupError> {
        self.file.sync_all().map_err(self.fail(0))
    }
}

/// What a check found.
#[derive(Debug, Default)]
pub struct Checked {
    /// Bytes that are what was backed up, zeroes among them.
    pub sound: u64,
    /// What cannot be restored, in order.
    pub damaged: Vec<DamagedRange>,
    /// The chunks, and nodes, that are missing or damaged.
    pub chunks: Vec<ChunkId>,
}

/// Bytes of a disk that cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedRange {
    pub start: u64,
    pub end: u64,
    pub why: String,
}

/// Reads every chunk of a disk, and goes on where one cannot be read, or a node of its tree, below which nobody knows what is.
///
/// # Errors
/// If the place of the repository fails.
pub fn check_disk(
    reader: &BlobReader,
    content: Content,
    threads: usize,
    progress: &Progress,
) -> Result<Checked, BackupError> {
    struct Nowhere;
    impl Target for Nowhere {
        fn write(&self, _: u64, _: &[u8]) -> Result<(), BackupError> {
            Ok(())
        }
        fn zero(&self, _: u64, _: u64) -> Result<(), BackupError> {
            Ok(())
        }
        fn finish(&self) -> Result<(), BackupError> {
            Ok(())
        }
    }
    let damaged = Mutex::new(Vec::new());
    let bytes_of = |chunks: Range<u64>| {
        let chunk_len = u64::from(content.chunk_size.bytes());
        (chunks.start * chunk_len, (chunks.end * chunk_len).min(content.size))
    };
    let lost = &mut |node: LostNode| {
        if is_of_the_place(&node.why) {
            return Err(node.why.into());
        }
        let (start, end) = bytes_of(node.below);
        let range = DamagedRange { start, end, why: node.why.to_string() };
        damaged.lock().expect("no holder panics").push((range, node.id));
        Ok(())
    };
    for_batches(reader, content, &Nowhere, threads, progress, lost, |batch, worker| {
        if write_batch(reader, content, &Nowhere, batch, worker).is_ok() {
            return Ok(());
        }
        // One of them: each by itself.
        for chunk in batch {
            match write_batch(reader, content, &Nowhere, std::slice::from_ref(chunk), worker) {
                Err(BackupError::Repository(error)) if !is_of_the_place(&error) => {
                    let (start, end) = bytes_of(chunk.0..chunk.0 + 1);
                    let why = error.to_string();
                    damaged
                        .lock()
                        .expect("no holder panics")
                        .push((DamagedRange { start, end, why }, chunk.1));
                }
                ended => ended?,
            }
        }
        Ok(())
    })?;
    let damaged = damaged.into_inner().expect("a panic of a thread goes on here");
    let (damaged, chunks) = damaged.into_iter().unzip();
    Ok(Checked::of(content.size, damaged, chunks))
}

/// Reads every chunk of what is kept beside the disks: the chunks it is cut into, and its length in bytes.
///
/// # Errors
/// If the place of the repository fails.
pub fn check_kept(
    reader: &BlobReader,
    chunk_size: ChunkSize,
    kept: &(Vec<ChunkId>, u64),
) -> Result<Checked, BackupError> {
    let (ids, size) = kept;
    let (mut damaged, mut chunks) = (Vec::new(), Vec::new());
    let (mut plain, mut decompressor) = (Vec::new(), Decompressor::new());
    let mut start = 0;
    for id in ids {
        let end = (start + u64::from(chunk_size.bytes())).min(*size);
        let why = match id.is_zero() {
            true => None,
            false => match reader.read(BlobKind::Data, id, &mut plain, &mut decompressor) {
                Ok(()) if plain.len() as u64 == end - start => None,
                Ok(()) => Some(format!("it has {} bytes, and its place {}", plain.len(), end - start)),
                Err(error) if is_of_the_place(&error) => return Err(error.into()),
                Err(error) => {
                    chunks.push(*id);
                    Some(error.to_string())
                }
            },
        };
        damaged.extend(why.map(|why| DamagedRange { start, end, why }));
        start = end;
    }
    if start < *size {
        let why = format!("its chunks are {start} bytes, and it has {size}");
        damaged.push(DamagedRange { start, end: *size, why });
    }
    Ok(Checked::of(*size, damaged, chunks))
}

impl Checked {
    /// Of so many bytes.
    fn of(size: u64, mut damaged: Vec<DamagedRange>, chunks: Vec<ChunkId>) -> Checked {
        damaged.sort_unstable_by_key(|range| range.start);
        damaged.dedup_by(|next, range| {
            let joins = next.start == range.end && next.why == range.why;
            if joins {
                range.end = next.end;
            }
            joins
        });
        let lost: u64 = damaged.iter().map(|range| range.end - range.start).sum();
        Checked { sound: size - lost, damaged, chunks }
    }
}

/// The place does not answer: that says nothing of what it holds.
pub(crate) fn is_of_the_place(error: &Error) -> bool {
    use rempart_objects::ErrorKind as Place;
    use rempart_repository::ErrorKind;
    matches!(error.kind, ErrorKind::Objects(kind) if !matches!(kind, Place::Missing | Place::TooShort | Place::Failed))
}
