//! The calls a directory of objects is made of: the kernel's, or a test's that loses power.

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::fmt::Debug;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

/// What a call tells of a file.
#[derive(Debug, Clone, Copy)]
pub struct Stat {
    pub is_file: bool,
    pub len: u64,
    /// Names that the file has.
    pub links: u64,
    /// Since it was last written to.
    pub age: Duration,
}

/// An entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    pub name: &'a str,
    pub is_dir: bool,
}

/// One call of the kernel each. Nothing follows a symbolic link.
pub trait FileSystem: Debug + Send + Sync {
    type Dir: Debug + Send + Sync;
    type File: Debug + Send + Sync;

    fn open_dir(&self, parent: &Self::Dir, name: &str) -> io::Result<Self::Dir>;
    fn make_dir(&self, parent: &Self::Dir, name: &str) -> io::Result<()>;
    /// Fails unless it is empty.
    fn remove_dir(&self, parent: &Self::Dir, name: &str) -> io::Result<()>;
    /// Its entries and their names are on the disk.
    fn sync_dir(&self, dir: &Self::Dir) -> io::Result<()>;
    /// In no order, one after the other: all packs may be in one directory.
    fn entries(&self, dir: &Self::Dir, each: &mut dyn FnMut(Entry<'_>)) -> io::Result<()>;

    /// A new file, locked until it is closed.
    fn create_file(&self, dir: &Self::Dir, name: &str) -> io::Result<Self::File>;
    fn open_file(&self, dir: &Self::Dir, name: &str) -> io::Result<Self::File>;
    /// Whether nobody else, alive, has it locked.
    fn lock_file(&self, file: &Self::File) -> io::Result<bool>;
    fn stat(&self, file: &Self::File) -> io::Result<Stat>;
    fn stat_at(&self, dir: &Self::Dir, name: &str) -> io::Result<Stat>;
    fn write(&self, file: &Self::File, parts: &[&[u8]]) -> io::Result<()>;
    fn read(&self, file: &Self::File, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
    /// Its content is on the disk.
    fn sync_file(&self, file: &Self::File) -> io::Result<()>;

    /// Gives a file a second name, if that is free.
    fn link(&self, from: (&Self::Dir, &str), to: (&Self::Dir, &str)) -> io::Result<()>;
    fn unlink(&self, dir: &Self::Dir, name: &str) -> io::Result<()>;
    /// All of the file system is on the disk.
    fn sync_all(&self, dir: &Self::Dir) -> io::Result<()>;
}

/// The kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct Linux;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// Bytes from which on a file is written past the page cache: the memory is the machines', and copying costs more than the
/// rest of the write. Where they have to begin a page.
const LARGE: usize = 1 << 20;
const PAGE: usize = 4096;
/// Slices of one write.
const MOST_SLICES: usize = 1024;

impl Linux {
    /// The directory at `path`; the path itself may lead through symbolic links.
    pub fn open_root(path: &std::path::Path) -> io::Result<OwnedFd> {
        Ok(rustix::fs::open(path, DIRECTORY, Mode::empty())?)
    }
}

/// Writes as much as can be that way, from the file's end on. Returns how much.
fn write_past_cache(mut file: &File, bytes: &[u8]) -> io::Result<usize> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    if rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT).is_err() {
        return Ok(0);
    }
    let mut written = 0;
    let ended = loop {
        match file.write(&bytes[written..]) {
            // From a place that is not a page's beginning it goes no further that way.
            Ok(more) if more > 0 && more.is_multiple_of(PAGE) && written + more < bytes.len() => {
                written += more
            }
            Ok(more) => break Ok(written + more),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The file system wants larger units, or has no such writes.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => break Ok(written),
            Err(error) => break Err(error),
        }
    };
    rustix::fs::fcntl_setfl(file, flags)?;
    ended
}

fn stat_of(stat: &rustix::fs::Stat) -> Stat {
    let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
    let modified = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    Stat {
        is_file: FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
        len: u64::try_from(stat.st_size).unwrap_or(0),
        links: stat.st_nlink,
        age: modified
            .and_then(|modified| SystemTime::now().duration_since(modified).ok())
            .unwrap_or_default(),
    }
}

impl FileSystem for Linux {
    type Dir = OwnedFd;
    type File = File;

    fn open_dir(&self, parent: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
        Ok(rustix::fs::openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?)
    }

    fn make_dir(&self, parent: &OwnedFd, name: &str) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(parent, name, Mode::RWXU)?)
    }

    fn remove_dir(&self, parent: &OwnedFd, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
    }

    fn sync_dir(&self, dir: &OwnedFd) -> io::Result<()> {
        Ok(rustix::io::retry_on_intr(|| rustix::fs::fsync(dir))?)
    }

    fn entries(&self, dir: &OwnedFd, each: &mut dyn FnMut(Entry<'_>)) -> io::Result<()> {
        for entry in rustix::fs::Dir::read_from(dir)? {
            let entry = entry?;
            // A name that is no text is no object's.
            let Ok(name) = entry.file_name().to_str() else { continue };
            let kind = match entry.file_type() {
                FileType::Unknown => match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                    Err(Errno::NOENT) => continue,
                    Err(error) => return Err(error.into()),
                },
                kind => kind,
            };
            if name != "." && name != ".." && matches!(kind, FileType::Directory | FileType::RegularFile) {
                each(Entry { name, is_dir: kind == FileType::Directory });
            }
        }
        Ok(())
    }

    fn create_file(&self, dir: &OwnedFd, name: &str) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?);
        // Where nothing can be locked, a leftover's age alone tells that nobody works on it.
        let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        Ok(file)
    }

    fn open_file(&self, dir: &OwnedFd, name: &str) -> io::Result<File> {
        // A FIFO of that name must not hold us up.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?))
    }

    fn lock_file(&self, file: &File) -> io::Result<bool> {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn stat(&self, file: &File) -> io::Result<Stat> {
        Ok(stat_of(&rustix::fs::fstat(file)?))
    }

    fn stat_at(&self, dir: &OwnedFd, name: &str) -> io::Result<Stat> {
        Ok(stat_of(&rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?))
    }

    fn write(&self, mut file: &File, parts: &[&[u8]]) -> io::Result<()> {
        let (large, rest);
        let parts = match parts {
            [one] if one.len() >= LARGE && one.as_ptr().addr().is_multiple_of(PAGE) => {
                (large, rest) = one.split_at(one.len() - one.len() % PAGE);
                let written = write_past_cache(file, large)?;
                &[&large[written..], rest][..]
            }
            parts => parts,
        };
        // Of empty slices alone nothing would be written, as on a disk that takes nothing.
        let parts = parts.iter().filter(|part| !part.is_empty());
        let mut slices: Vec<_> = parts.map(|part| IoSlice::new(part)).collect();
        let mut left = &mut slices[..];
        while !left.is_empty() {
            let now = left.len().min(MOST_SLICES);
            match file.write_vectored(&left[..now]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read(&self, file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        file.read_exact_at(bytes, offset)
    }

    fn sync_file(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn link(&self, from: (&OwnedFd, &str), to: (&OwnedFd, &str)) -> io::Result<()> {
        Ok(rustix::fs::linkat(from.0, from.1, to.0, to.1, AtFlags::empty())?)
    }

    fn unlink(&self, dir: &OwnedFd, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(dir, name, AtFlags::empty())?)
    }

    fn sync_all(&self, dir: &OwnedFd) -> io::Result<()> {
        Ok(rustix::fs::syncfs(dir)?)
    }
}
