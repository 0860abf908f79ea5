//! What the store reports, and how it refuses.

use crate::batch::{Batch, BatchError};
use crate::io::{FileId, IoCommand, IoError};
use rempart_buffer::Slice;
use rempart_types::{DiskIndex, ExtentIndex, LogPosition, Lsn};
use std::fmt;

/// The caller's name for an operation it started; comes back in the event that ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// Names a snapshot. Chosen by the caller; unique among the open ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId(pub u64);

/// Names a reader that keeps the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PinId(pub u64);

/// Where every operation puts the commands to execute and the events to act on.
#[derive(Debug, Default)]
pub struct Output {
    pub commands: Vec<IoCommand>,
    pub events: Vec<StoreEvent>,
}

/// A part of a read's answer; the parts follow each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadPiece {
    Data(Slice),
    /// So many zero bytes.
    Zero(usize),
}

impl ReadPiece {
    pub fn len(&self) -> usize {
        match self {
            ReadPiece::Data(slice) => slice.len(),
            ReadPiece::Zero(len) => *len,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[derive(Debug, Clone)]
pub enum StoreEvent {
    /// Every record to here is in the journal file.
    Accepted(Lsn),
    /// Every record to here is on the medium: it was accepted when the sync was issued.
    Durable(Lsn),
    /// The image holds every record to here (not yet durably: the journal still does).
    Applied(Lsn),
    /// The image holds every record to here durably; the journal before it serves catch-up only.
    Checkpointed(Lsn),
    /// The log ends here, durably; what followed will not come back.
    Truncated(Lsn),
    /// The change, and every earlier one, is durable. The only proof that may release messages.
    Persisted(Token),
    Read {
        token: Token,
        result: Result<Vec<ReadPiece>, IoError>,
    },
    LogRead {
        token: Token,
        result: Result<LogChunk, LogReadError>,
    },
    /// The disk table changed durably.
    DisksChanged(Token),
    SnapshotOpened {
        snapshot: SnapshotId,
        at: Lsn,
    },
    SnapshotClosed(SnapshotId),
    /// What the snapshot needs could not be saved, and it is closed.
    SnapshotLost {
        snapshot: SnapshotId,
        why: SnapshotLoss,
    },
    SnapshotRead {
        token: Token,
        result: Result<Extent, SnapshotReadError>,
    },
    ExtentRead {
        token: Token,
        result: Result<Extent, IoError>,
    },
    /// The extent is in the image; durable at the latest with [`StoreEvent::ResyncLogStarted`].
    ExtentWritten(Token),
    /// The old state is kept by the snapshot, "syncing" is durable: extents may come.
    ResyncBegun {
        undo: SnapshotId,
        at: Lsn,
    },
    /// All extents are durable; the log starts anew after `from`.
    ResyncLogStarted {
        from: LogPosition,
    },
    /// The copy is whole again, durably; the undo snapshot is closed.
    ResyncEnded,
    /// The journal a pin kept passed its bound and is given up.
    PinLost(PinId),
    /// Everything stable is in the image, the clean mark is durable; the store does nothing more.
    Closed,
    /// The disk is full, and what a resync is about to overwrite cannot be kept: it stands still, and tries again by
    /// itself. The image is as it was.
    NoRoom(IoError),
    /// The resync that stood still goes on.
    RoomAgain,
    /// Final: nothing is accepted or durable here from now on. Reported once; no command follows.
    Failed(StoreFailure),
}

/// One extent's content. `data` is absent when all of it is zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    pub disk: DiskIndex,
    pub extent: ExtentIndex,
    /// The content holds no change later than this.
    pub lsn: Lsn,
    pub data: Option<Slice>,
}

/// A run of batches from the log.
#[derive(Debug, Clone)]
pub struct LogChunk {
    /// In order and without gaps. Empty only when the asked position is the log's end. The first one holds
    /// the record after the asked position, and starts with it unless the position is inside a batch.
    pub batches: Vec<Batch>,
}

#[derive(Debug, Clone)]
pub enum LogReadError {
    /// The journal no longer reaches back that far (trimmed, or its old part is damaged).
    Gone {
        oldest: Lsn,
    },
    Io(IoError),
}

#[derive(Debug, Clone)]
pub enum SnapshotReadError {
    /// No open snapshot of that name, or no such disk.
    Unknown,
    Io(IoError),
}

/// Why a snapshot was given up. The copy is worth more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotLoss {
    DiskFull,
    /// All snapshots together would have kept more than [`Store::limit_snapshots`](crate::Store) allows.
    OverLimit,
}

impl fmt::Display for SnapshotLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SnapshotLoss::DiskFull => "the disk is full: what was overwritten could not be kept aside",
            SnapshotLoss::OverLimit => "more was overwritten than may be kept aside",
        })
    }
}

/// Why this replica's storage is out.
#[derive(Debug, Clone)]
pub struct StoreFailure {
    /// What was being done: a verb phrase.
    pub what: &'static str,
    /// The guest's disk, when its image failed.
    pub disk: Option<DiskIndex>,
    pub error: IoError,
}

impl fmt::Display for StoreFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.what, self.error)
    }
}

impl std::error::Error for StoreFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl StoreFailure {
    pub(crate) fn new(what: &'static str, error: IoError) -> StoreFailure {
        let disk = match error.file {
            FileId::Image(disk) | FileId::ChangeMap(disk) => Some(disk),
            _ => None,
        };
        StoreFailure { what, disk, error }
    }
}

/// Why a batch was not appended. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AppendError {
    /// It is not one: only from a peer.
    Invalid(BatchError),
    /// It starts at another number than the log's next.
    NotNext { expected: Lsn, found: Lsn },
    /// It continues another log: the header before it is not ours.
    OtherBranch,
    /// Its term is older than the log's last.
    OlderTerm,
    /// It belongs to another group.
    OtherGroup,
    /// A record lies outside its disk, or names an unknown one.
    OutOfRange { disk: DiskIndex, offset: u64, len: u64 },
    /// It does not fit a journal segment ([`Store::max_batch_len`](crate::Store::max_batch_len)).
    TooLarge,
    /// The copy is damaged, syncing its extents, truncating, closing or failed.
    NotWritable,
}

impl fmt::Display for AppendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AppendError::Invalid(error) => write!(f, "not a batch: {error}"),
            AppendError::NotNext { expected, found } => {
                write!(f, "starts at {found}, the log's next is {expected}")
            }
            AppendError::OtherBranch => f.write_str("continues another log"),
            AppendError::OlderTerm => f.write_str("its term is older than the log's last"),
            AppendError::OtherGroup => f.write_str("belongs to another group"),
            AppendError::OutOfRange { disk, offset, len } => {
                write!(f, "{len} bytes at {offset} are outside disk {disk}")
            }
            AppendError::TooLarge => f.write_str("does not fit a journal segment"),
            AppendError::NotWritable => f.write_str("the log takes no records now"),
        }
    }
}

impl std::error::Error for AppendError {}

/// Why an operation was refused. Nothing changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Recovered records are not all committed yet (rule 5), or the copy is syncing.
    NotServing,
    /// Outside the disk, or an unknown one.
    OutOfRange,
    /// Records to `bound` cannot be cut off: they are stable or in the image.
    Stable { bound: Lsn },
    /// The position is inside a batch, which is kept or dropped whole: `before` and `last` are its neighbours.
    InsideBatch { before: Lsn, last: Lsn },
    /// The image already passed that position.
    Passed,
    /// The name is in use, or unknown.
    Name,
    /// Not in this state (damaged, syncing or not syncing, closing, failed, or another one is under way).
    State,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::NotServing => f.write_str("this copy serves nothing yet"),
            Refused::OutOfRange => f.write_str("outside the disk"),
            Refused::Stable { bound } => write!(f, "records to {bound} are stable or in the image"),
            Refused::InsideBatch { before, last } => write!(f, "inside the batch {}..={last}", before.next()),
            Refused::Passed => f.write_str("the image already passed that position"),
            Refused::Name => f.write_str("the name is taken or unknown"),
            Refused::State => f.write_str("not possible in this state"),
        }
    }
}

impl std::error::Error for Refused {}
