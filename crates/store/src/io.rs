//! The store's I/O as data: commands it emits, completions it is told, and the synchronous disk it opens from.
//!
//! Commands may be executed and completed in any order, with two duties for who executes them:
//! a [`IoOp::Sync`] covers every write to its file whose completion was **delivered before the sync was
//! issued** (it may cover more), and a write whose completion was delivered is seen by every later read.
//! Writes in flight together never overlap, except that zeroing and writing of one image never do either:
//! the store waits.

use rempart_buffer::{Buffer, Slice};
use rempart_types::{DiskIndex, WallTime};
use std::fmt;

/// Names one command; never used twice by one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoId(pub u64);

/// The files of one group on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileId {
    Superblock,
    /// A journal segment, by the place it occupies; which part of the log it holds is in its header.
    Segment(u64),
    /// A disk's content: a raw file or a block device.
    Image(DiskIndex),
    ChangeMap(DiskIndex),
    /// Which extents snapshots saved, and where.
    SnapshotMap,
    /// The extents that snapshots saved.
    SnapshotData,
    /// The last applied configuration record (two slots).
    Config,
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileId::Superblock => f.write_str("superblock"),
            FileId::Segment(slot) => write!(f, "journal segment {slot}"),
            FileId::Image(disk) => write!(f, "image of disk {disk}"),
            FileId::ChangeMap(disk) => write!(f, "change map of disk {disk}"),
            FileId::SnapshotMap => f.write_str("snapshot map"),
            FileId::SnapshotData => f.write_str("snapshot data"),
            FileId::Config => f.write_str("configuration"),
        }
    }
}

/// How urgent a command is, and where it is best executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IoClass {
    /// A small write to the journal's page cache: execute inline, a guest waits for it.
    JournalWrite {
        /// Flushes are frequent: start write-back once the replies are out (`sync_file_range`).
        eager: bool,
    },
    /// A guest or a protocol step waits: a sync, a read, a large journal write. On a worker, first.
    Urgent,
    /// Application, checkpoints, snapshots, new segments. On a worker, last.
    Background,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IoOp {
    /// Writes `data`, joined, from `offset` on.
    Write { file: FileId, offset: u64, data: Vec<Slice> },
    /// Reads `len` bytes; past the end of the file they are zero. Answered with [`IoOutput::Data`].
    Read { file: FileId, offset: u64, len: usize },
    /// `fdatasync`.
    Sync { file: FileId },
    /// Makes `len` bytes read as zero. With `punch` the space is given back where that is possible; without,
    /// zeroes are really written, so that later writes there need no allocation.
    Zero { file: FileId, offset: u64, len: u64, punch: bool },
    /// Sets the length. Growing reads as zeroes. On a block device: checks that it is large enough.
    SetLen { file: FileId, len: u64 },
    /// Creates a file of `len` really written zeroes, replacing any old one; then `head` is written at 0.
    /// When it completes, zeroes, head and directory entry are durable, and were made so in that order.
    Create { file: FileId, len: u64, head: Slice },
    /// Removes the file, durably. A missing file is no error.
    Remove { file: FileId },
    /// Asks for length and change time. Answered with [`IoOutput::Stat`].
    Stat { file: FileId },
}

impl IoOp {
    pub fn file(&self) -> FileId {
        match *self {
            IoOp::Write { file, .. }
            | IoOp::Read { file, .. }
            | IoOp::Sync { file }
            | IoOp::Zero { file, .. }
            | IoOp::SetLen { file, .. }
            | IoOp::Create { file, .. }
            | IoOp::Remove { file }
            | IoOp::Stat { file } => file,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoCommand {
    pub id: IoId,
    pub class: IoClass,
    pub op: IoOp,
}

#[derive(Debug, Clone)]
pub enum IoOutput {
    Done,
    Data(Buffer),
    Stat(FileStat),
}

#[derive(Debug, Clone)]
pub struct IoCompletion {
    pub id: IoId,
    pub result: Result<IoOutput, IoError>,
}

/// Length in bytes and change time in nanoseconds since 1970 (0 where there is none, as for a block device).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileStat {
    pub len: u64,
    pub modified_ns: u64,
}

/// What kind of trouble a disk is in, where it matters to the reaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoErrorKind {
    /// No space left.
    Full,
    /// The file does not exist.
    Missing,
    /// Another process owns the store.
    Locked,
    /// Everything else: the device failed.
    Io,
}

/// A failed operation on one file.
#[derive(Debug, Clone)]
pub struct IoError {
    pub kind: IoErrorKind,
    pub file: FileId,
    /// Where the file is, for people; empty in simulation.
    pub path: String,
    /// The system's words.
    pub message: String,
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            write!(f, "{}: {}", self.file, self.message)
        } else {
            write!(f, "{} `{}`: {}", self.file, self.path, self.message)
        }
    }
}

impl std::error::Error for IoError {}

/// A group's files, used synchronously: only to format and to open, when nothing is served yet.
pub trait Disk {
    /// Every file that exists, except images, in any order.
    fn list(&mut self) -> Result<Vec<FileId>, IoError>;
    /// Executes one command to its end.
    fn execute(&mut self, op: &IoOp) -> Result<IoOutput, IoError>;
    /// Tells where disk `disk`'s image is. Called before the image is touched.
    fn locate_image(&mut self, disk: DiskIndex, location: &str);
    /// The wall clock, for nothing but people.
    fn wall_time(&self) -> WallTime {
        WallTime(0)
    }
}
