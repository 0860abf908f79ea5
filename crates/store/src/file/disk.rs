//! A group's files, executed synchronously.

use crate::file::ring::{self, Ring, RingRead, RingWrite};
use crate::io::{Disk, FileId, FileStat, IoError, IoErrorKind, IoOp, IoOutput};
use rempart_buffer::{BufferMut, Slice, total_len};
use rempart_types::{DiskIndex, WallTime};
use rustix::fs::{
    self, AtFlags, FallocateFlags, FileType, FlockOperation, IFlags, Mode, OFlags, SeekFrom, StatxFlags,
};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

/// Slices per `pwritev` at most (the system's own bound is 1024).
const SLICES: usize = 256;
/// Longer writes to segments and images always go past the page cache: the copy into it, and the processor time of
/// writing it back, would cost more than waiting for the device.
pub(crate) const BUFFERED_LIMIT: usize = 256 * 1024;
/// What such a write has to be aligned to, in the file and in memory.
const DIRECT_ALIGNMENT: usize = 4096;
/// Zeroes written at once.
const ZEROES: usize = 1024 * 1024;

/// A group's files in one directory, locked against a second daemon. Images may be anywhere.
#[derive(Debug, Clone)]
pub struct FileDisk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    directory: PathBuf,
    /// Holds the lock as long as anyone may write.
    _lock: File,
    open: RwLock<BTreeMap<FileId, Arc<File>>>,
    /// The same files with `O_DIRECT`; none where the file system has no such thing.
    direct: RwLock<BTreeMap<FileId, Option<Arc<File>>>>,
    images: RwLock<BTreeMap<DiskIndex, PathBuf>>,
}

impl FileDisk {
    /// Opens (and creates) the directory and takes its lock ([`IoErrorKind::Locked`] when another process
    /// has it).
    pub fn open(directory: &Path) -> Result<FileDisk, IoError> {
        let fail = |errno: Errno| error(FileId::Superblock, directory, errno);
        if let Err(cause) = std::fs::create_dir_all(directory) {
            return Err(fail(Errno::from_io_error(&cause).unwrap_or(Errno::IO)));
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let lock = fs::open(directory.join("lock"), flags, Mode::from_raw_mode(0o600)).map_err(fail)?;
        match fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(IoError {
                    kind: IoErrorKind::Locked,
                    file: FileId::Superblock,
                    path: directory.display().to_string(),
                    message: "another process has it open".to_owned(),
                });
            }
            Err(errno) => return Err(fail(errno)),
        }
        let shared = Shared {
            directory: directory.to_owned(),
            _lock: File::from(lock),
            open: RwLock::default(),
            direct: RwLock::default(),
            images: RwLock::default(),
        };
        Ok(FileDisk { shared: Arc::new(shared) })
    }

    /// Where a file is.
    pub fn path(&self, file: FileId) -> PathBuf {
        let name = match file {
            FileId::Superblock => "superblock".to_owned(),
            FileId::Segment(slot) => format!("journal-{slot:08}"),
            FileId::Image(disk) => {
                let images = self.shared.images.read().expect("no holder panics");
                match images.get(&disk) {
                    Some(path) => return path.clone(),
                    None => format!("disk-{disk}.raw"),
                }
            }
            FileId::ChangeMap(disk) => format!("changes-{disk}"),
            FileId::SnapshotMap => "snapshot-map".to_owned(),
            FileId::SnapshotData => "snapshot-data".to_owned(),
            FileId::Config => "definition".to_owned(),
        };
        self.shared.directory.join(name)
    }

    /// Starts write-back without waiting for it. Only a hint: errors show at the next sync.
    pub(crate) fn start_write_back(&self, file: FileId, offset: u64, len: u64) {
        if let Some(handle) = self.opened(file) {
            let _ = sync_file_range(&handle, offset, len, libc::SYNC_FILE_RANGE_WRITE);
        }
    }

    /// Writes back, and waits for it, without what makes it durable. An error is told here and not again by a sync.
    pub(crate) fn write_back(&self, file: FileId, offset: u64, len: u64) -> Result<(), IoError> {
        let Some(handle) = self.opened(file) else { return Ok(()) };
        let flags = libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        match sync_file_range(&handle, offset, len, flags) {
            // Not every kind of file knows it; a sync does the same work later.
            Ok(()) | Err(Errno::SPIPE | Errno::INVAL | Errno::NOSYS) => Ok(()),
            Err(errno) => Err(error(file, &self.path(file), errno)),
        }
    }

    fn opened(&self, file: FileId) -> Option<Arc<File>> {
        self.shared.open.read().expect("no holder panics").get(&file).cloned()
    }

    /// Tells where disk `disk`'s image is.
    pub fn set_image(&self, disk: DiskIndex, path: &Path) {
        self.shared.images.write().expect("no holder panics").insert(disk, path.to_owned());
        self.forget(FileId::Image(disk));
    }

    fn forget(&self, file: FileId) {
        self.shared.open.write().expect("no holder panics").remove(&file);
        self.shared.direct.write().expect("no holder panics").remove(&file);
    }

    /// The file for writes past the page cache, where that is possible.
    fn direct_handle(&self, file: FileId) -> Option<Arc<File>> {
        if let Some(known) = self.shared.direct.read().expect("no holder panics").get(&file) {
            return known.clone();
        }
        let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
        match fs::open(self.path(file), flags, Mode::empty()) {
            Ok(fd) => {
                let handle = File::from(fd);
                // Two writers that share a page, one of them through the cache, would be in each other's way.
                let shares_pages = matches!(file, FileId::Image(_)) && cache_unit(&handle) > DIRECT_ALIGNMENT;
                let handle = (!shares_pages).then(|| Arc::new(handle));
                let mut direct = self.shared.direct.write().expect("no holder panics");
                direct.entry(file).or_insert(handle).clone()
            }
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                self.has_no_direct(file);
                None
            }
            // What is wrong now need not be for ever.
            Err(_) => None,
        }
    }

    /// A device with larger blocks, or a file system that promised too much: as if it had no `O_DIRECT`.
    fn has_no_direct(&self, file: FileId) {
        self.shared.direct.write().expect("no holder panics").insert(file, None);
    }

    /// Writes past the page cache if that pays and is possible. False when nothing was done.
    fn write_direct(&self, file: FileId, offset: u64, data: &[Slice]) -> Result<bool, Errno> {
        let len = total_len(data);
        let fits = matches!(file, FileId::Image(_) | FileId::Segment(_))
            && len > BUFFERED_LIMIT
            && is_aligned(offset, data.iter().map(|slice| &slice[..]));
        let Some(handle) = fits.then(|| self.direct_handle(file)).flatten() else { return Ok(false) };
        match write_all(&handle, offset, data) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                self.has_no_direct(file);
                Ok(false)
            }
            Err(errno) => Err(errno),
        }
    }

    /// The way past the page cache, to read an image. Guests have a cache of their own, a resync is not to push everything
    /// else out of the host's, and in the large folios that reading ahead leaves, every later small write walks through
    /// all their blocks.
    fn direct_handle_to_read(&self, file: FileId, offset: u64, buffer: &[u8]) -> Option<Arc<File>> {
        let fits = matches!(file, FileId::Image(_)) && is_aligned(offset, std::iter::once(buffer));
        fits.then(|| self.direct_handle(file)).flatten()
    }

    /// Writes a new file's `len` bytes, so that no later write has to allocate. Past the page cache: a whole
    /// segment written back at once is what other writes wait behind, and the large folios it would leave cost
    /// every small write a walk through all their blocks.
    fn write_ahead(&self, file: FileId, handle: &File, len: u64) -> Result<(), Errno> {
        if len == 0 {
            return Ok(());
        }
        match fs::fallocate(handle, FallocateFlags::empty(), 0, len) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NODEV) => {}
            Err(errno) => return Err(errno),
        }
        let direct = self.direct_handle(file);
        match write_zeroes(direct.as_deref().unwrap_or(handle), 0, len) {
            Err(Errno::INVAL | Errno::OPNOTSUPP) if direct.is_some() => write_zeroes(handle, 0, len)?,
            written => written?,
        }
        fs::fdatasync(handle)?;
        let _ = fs::fadvise(handle, 0, None, fs::Advice::DontNeed);
        Ok(())
    }

    fn handle(&self, file: FileId, create: bool) -> Result<Arc<File>, Errno> {
        if let Some(handle) = self.opened(file) {
            return Ok(handle);
        }
        let mut flags = OFlags::RDWR | OFlags::CLOEXEC;
        if create {
            flags |= OFlags::CREATE;
        }
        let path = self.path(file);
        let handle = Arc::new(File::from(fs::open(&path, flags, Mode::from_raw_mode(0o600))?));
        let mut open = self.shared.open.write().expect("no holder panics");
        Ok(open.entry(file).or_insert(handle).clone())
    }

    /// Makes a created or removed name durable.
    fn sync_directory(&self, of: &Path) -> Result<(), Errno> {
        let parent = of.parent().unwrap_or(Path::new("."));
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        fs::fsync(fs::open(parent, flags, Mode::empty())?)
    }

    /// Executes one command to its end. Any thread may.
    pub fn perform(&self, op: &IoOp) -> Result<IoOutput, IoError> {
        let file = op.file();
        self.try_perform(op).map_err(|errno| error(file, &self.path(file), errno))
    }

    /// Executes writes to images all at once and past the page cache, where that is possible. What is not is written back
    /// before this returns, and its errors are told: a reader looks past the cache, where a failed write-back leaves the
    /// old bytes, and a later sync does not see its error again.
    pub(crate) fn write_together(
        &self,
        ring: &mut Option<Ring>,
        ops: &[&IoOp],
    ) -> Vec<Result<IoOutput, IoError>> {
        let mut results = self.write_direct_together(ring, ops);
        let mut cached: BTreeMap<FileId, (u64, u64, Vec<usize>)> = BTreeMap::new();
        for (index, (op, result)) in ops.iter().zip(&mut results).enumerate() {
            if let IoOp::Write { file, offset, data } = op
                && result.is_none()
            {
                *result = Some(self.perform(op));
                let end = offset + total_len(data) as u64;
                let (from, to, indexes) = cached.entry(*file).or_insert((*offset, end, Vec::new()));
                (*from, *to) = ((*from).min(*offset), (*to).max(end));
                indexes.push(index);
            }
        }
        for (file, (from, to, indexes)) in cached {
            if let Err(error) = self.write_back(file, from, to - from) {
                indexes.into_iter().for_each(|index| results[index] = Some(Err(error.clone())));
            }
        }
        results.into_iter().map(|result| result.expect("all are writes")).collect()
    }

    /// `None` for what cannot go this way.
    fn write_direct_together(
        &self,
        ring: &mut Option<Ring>,
        ops: &[&IoOp],
    ) -> Vec<Option<Result<IoOutput, IoError>>> {
        let mut results = vec![None; ops.len()];
        if ring.is_none() {
            return results;
        }
        let direct = ops.iter().enumerate().filter_map(|(index, op)| {
            let IoOp::Write { file, offset, data } = op else { return None };
            let fits = data.len() <= SLICES && is_aligned(*offset, data.iter().map(|slice| &slice[..]));
            let handle = fits.then(|| self.direct_handle(*file)).flatten()?;
            Some((index, RingWrite { file: handle, offset: *offset, data }))
        });
        let (indexes, writes): (Vec<usize>, Vec<RingWrite<'_>>) = direct.unzip();
        for (indexes, writes) in indexes.chunks(ring::ENTRIES).zip(writes.chunks(ring::ENTRIES)) {
            let Some(written) = ring.as_mut().and_then(|ring| ring.write(writes)) else {
                *ring = None;
                break;
            };
            for ((&index, write), written) in indexes.iter().zip(writes).zip(written) {
                let file = ops[index].file();
                let len = total_len(write.data);
                let result = match written {
                    Ok(written) if written == len => Ok(()),
                    // In part, or not at this moment.
                    Ok(_) | Err(Errno::AGAIN | Errno::CANCELED | Errno::INTR) => {
                        write_all(&write.file, write.offset, write.data)
                    }
                    Err(errno) => Err(errno),
                };
                results[index] = match result {
                    // A device with larger blocks, or a file system that promised too much.
                    Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                        self.has_no_direct(file);
                        None
                    }
                    Ok(()) => Some(Ok(IoOutput::Done)),
                    Err(errno) => Some(Err(error(file, &self.path(file), errno))),
                };
            }
        }
        results
    }

    /// Executes reads of images all at once and past the page cache, where that is possible.
    pub(crate) fn read_together(
        &self,
        ring: &mut Option<Ring>,
        ops: &[&IoOp],
    ) -> Vec<Result<IoOutput, IoError>> {
        let mut results = vec![None; ops.len()];
        let (mut indexes, mut reads) = (Vec::new(), Vec::new());
        // One alone is as fast without it.
        for (index, op) in ops.iter().enumerate().filter(|_| ops.len() > 1 && ring.is_some()) {
            let IoOp::Read { file, offset, len } = op else { continue };
            let buffer = BufferMut::for_overwrite(*len);
            if let Some(handle) = self.direct_handle_to_read(*file, *offset, &buffer) {
                indexes.push(index);
                reads.push(RingRead { file: handle, offset: *offset, buffer });
            }
        }
        for (indexes, reads) in indexes.chunks(ring::ENTRIES).zip(reads.chunks_mut(ring::ENTRIES)) {
            let Some(read) = ring.as_mut().and_then(|ring| ring.read(reads)) else {
                *ring = None;
                break;
            };
            for ((&index, into), read) in indexes.iter().zip(reads).zip(read) {
                // In part, not at this moment or not this way: it is tried again below, which tells the error.
                if read == Ok(into.buffer.len()) {
                    let buffer = std::mem::take(&mut into.buffer);
                    results[index] = Some(Ok(IoOutput::Data(buffer.freeze())));
                }
            }
        }
        ops.iter().zip(results).map(|(op, result)| result.unwrap_or_else(|| self.perform(op))).collect()
    }

    fn try_perform(&self, op: &IoOp) -> Result<IoOutput, Errno> {
        match op {
            IoOp::Write { file, offset, data } => {
                if self.write_direct(*file, *offset, data)? {
                    return Ok(IoOutput::Done);
                }
                // Maps and snapshot files come to be on first use; images and segments never do.
                let create = !matches!(file, FileId::Image(_) | FileId::Segment(_));
                write_all(&*self.handle(*file, create)?, *offset, data)?;
            }
            IoOp::Read { file, offset, len } => {
                let mut buffer = BufferMut::for_overwrite(*len);
                let direct = self.direct_handle_to_read(*file, *offset, &buffer);
                let at = match direct.map(|handle| read_all(&handle, *offset, &mut buffer)) {
                    Some(Ok(read)) => read,
                    // A device with larger blocks, say: as if there were no such way.
                    Some(Err(Errno::INVAL | Errno::OPNOTSUPP)) | None => {
                        read_all(&*self.handle(*file, false)?, *offset, &mut buffer)?
                    }
                    Some(Err(errno)) => return Err(errno),
                };
                // Past the end of the file.
                buffer[at..].fill(0);
                return Ok(IoOutput::Data(buffer.freeze()));
            }
            IoOp::Sync { file } => fs::fdatasync(&*self.handle(*file, false)?)?,
            IoOp::Zero { file, offset, len, punch } => {
                zero(*file, &*self.handle(*file, false)?, *offset, *len, *punch)?;
            }
            IoOp::SetLen { file, len } => {
                let path = self.path(*file);
                let is_new = !path.exists();
                let handle = self.handle(*file, true)?;
                match file_type(&handle)? {
                    FileType::BlockDevice if fs::seek(&*handle, SeekFrom::End(0))? < *len => {
                        return Err(Errno::NOSPC);
                    }
                    FileType::BlockDevice => {}
                    _ => fs::ftruncate(&*handle, *len)?,
                }
                if is_new {
                    self.sync_directory(&path)?;
                }
            }
            IoOp::Create { file, len, head } => self.create(*file, *len, head)?,
            IoOp::Remove { file } => {
                let path = self.path(*file);
                self.forget(*file);
                match fs::unlink(&path) {
                    Ok(()) | Err(Errno::NOENT) => self.sync_directory(&path)?,
                    Err(errno) => return Err(errno),
                }
            }
            IoOp::Stat { file } => {
                let handle = self.handle(*file, false)?;
                let stat = fs::statx(&*handle, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
                if file_type(&handle)? == FileType::BlockDevice {
                    let len = fs::seek(&*handle, SeekFrom::End(0))?;
                    return Ok(IoOutput::Stat(FileStat { len, modified_ns: 0 }));
                }
                let modified_ns = (stat.stx_mtime.tv_sec as u64)
                    .wrapping_mul(1_000_000_000)
                    .wrapping_add(u64::from(stat.stx_mtime.tv_nsec));
                return Ok(IoOutput::Stat(FileStat { len: stat.stx_size, modified_ns }));
            }
        }
        Ok(IoOutput::Done)
    }

    /// Zeroes first, then the head, then the name: a file that has its head is complete.
    fn create(&self, file: FileId, len: u64, head: &Slice) -> Result<(), Errno> {
        let path = self.path(file);
        self.forget(file);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let handle = File::from(fs::open(&path, flags, Mode::from_raw_mode(0o600))?);
        if len > 0 {
            // Journals are overwritten in place all the time: copy-on-write would only scatter them.
            if let Ok(attributes) = fs::ioctl_getflags(&handle) {
                let _ = fs::ioctl_setflags(&handle, attributes | IFlags::NOCOW);
            }
        }
        self.write_ahead(file, &handle, len)?;
        if !head.is_empty() {
            write_all(&handle, 0, std::slice::from_ref(head))?;
        }
        fs::fsync(&handle)?;
        self.sync_directory(&path)?;
        self.shared.open.write().expect("no holder panics").insert(file, Arc::new(handle));
        Ok(())
    }
}

fn file_type(file: &File) -> Result<FileType, Errno> {
    Ok(FileType::from_raw_mode(fs::fstat(file)?.st_mode))
}

/// The unit, in bytes, in which the page cache keeps this file.
fn cache_unit(file: &File) -> usize {
    let block = fs::fstat(file).map_or(0, |stat| stat.st_blksize as usize);
    rustix::param::page_size().max(block)
}

/// Whether these bytes, at this place in the file and in memory, fit for `O_DIRECT`.
fn is_aligned<'a>(offset: u64, mut parts: impl Iterator<Item = &'a [u8]>) -> bool {
    let unit = DIRECT_ALIGNMENT;
    offset.is_multiple_of(unit as u64)
        && parts.all(|part| part.len().is_multiple_of(unit) && (part.as_ptr() as usize).is_multiple_of(unit))
}

/// Reads to the end of the buffer or of the file; returns the bytes read.
fn read_all(file: &File, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
    let mut at = 0;
    while at < buffer.len() {
        match rustix::io::pread(file, &mut buffer[at..], offset + at as u64) {
            Ok(0) => break,
            Ok(read) => at += read,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(at)
}

fn write_all(file: &File, offset: u64, data: &[Slice]) -> Result<(), Errno> {
    let total = total_len(data);
    let mut written = 0;
    while written < total {
        let mut skip = written;
        let mut parts = Vec::with_capacity(data.len().min(SLICES));
        for slice in data {
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            parts.push(IoSlice::new(&slice[skip..]));
            skip = 0;
            if parts.len() == SLICES {
                break;
            }
        }
        match rustix::io::pwritev(file, &parts, offset + written as u64) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => written += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn write_zeroes(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    let zeroes = BufferMut::zeroed(ZEROES.min(len as usize)).freeze();
    let mut at = 0;
    while at < len {
        let part = (len - at).min(ZEROES as u64);
        write_all(file, offset + at, &[zeroes.slice(0..part as usize)])?;
        at += part;
    }
    Ok(())
}

fn zero(id: FileId, file: &File, offset: u64, len: u64, punch: bool) -> Result<(), Errno> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    let ways: &[FallocateFlags] = match id {
        // A segment stays written: the journal's syncs must not have to allocate.
        FileId::Segment(_) => &[],
        _ if punch => &[hole, range],
        _ => &[range, hole],
    };
    for &flags in ways {
        match fs::fallocate(file, flags, offset, len) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NODEV) => {}
            Err(errno) => return Err(errno),
        }
    }
    // Never past the end: zeroing does not grow a file.
    let end = match file_type(file)? {
        FileType::BlockDevice => offset + len,
        _ => (offset + len).min(fs::fstat(file)?.st_size as u64),
    };
    write_zeroes(file, offset, end.saturating_sub(offset))
}

fn sync_file_range(file: &File, offset: u64, len: u64, flags: libc::c_uint) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for the call; no memory is passed.
    let result = unsafe {
        libc::sync_file_range(file.as_raw_fd(), offset as libc::off64_t, len as libc::off64_t, flags)
    };
    match result {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

fn error(file: FileId, path: &Path, errno: Errno) -> IoError {
    let kind = match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => IoErrorKind::Full,
        Errno::NOENT => IoErrorKind::Missing,
        _ => IoErrorKind::Io,
    };
    let message = std::io::Error::from(errno).to_string();
    IoError { kind, file, path: path.display().to_string(), message }
}

impl Disk for FileDisk {
    fn list(&mut self) -> Result<Vec<FileId>, IoError> {
        let directory = &self.shared.directory;
        let fail = |cause: std::io::Error| {
            error(FileId::Superblock, directory, Errno::from_io_error(&cause).unwrap_or(Errno::IO))
        };
        let mut files = Vec::new();
        for entry in std::fs::read_dir(directory).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Some(slot) = name.strip_prefix("journal-").and_then(|slot| slot.parse().ok()) {
                files.push(FileId::Segment(slot));
            } else if let Some(disk) = name.strip_prefix("changes-").and_then(|disk| disk.parse().ok()) {
                files.push(FileId::ChangeMap(DiskIndex(disk)));
            }
        }
        let fixed = [FileId::Superblock, FileId::SnapshotMap, FileId::SnapshotData, FileId::Config];
        files.extend(fixed.into_iter().filter(|&file| self.path(file).exists()));
        Ok(files)
    }

    fn execute(&mut self, op: &IoOp) -> Result<IoOutput, IoError> {
        self.perform(op)
    }

    fn locate_image(&mut self, disk: DiskIndex, location: &str) {
        self.set_image(disk, Path::new(location));
    }

    fn wall_time(&self) -> WallTime {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        WallTime(since.as_millis() as u64)
    }
}
