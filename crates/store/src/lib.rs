//! A group's local store: one journal, an image and a change map per disk, a superblock, snapshots.
//!
//! The logic of [`Store`] does no I/O: operations put [`IoCommand`]s into an [`Output`], their
//! [`IoCompletion`]s come back through [`Store::complete`], and [`StoreEvent`]s tell what became true.
//! [`file`] executes the commands on real files, `simulated` (a cargo feature) in memory with crashes.
//! Byte layouts and the recovery decision table: docs/formats/store.md.

mod apply;
mod batch;
mod change_map;
mod checksum;
mod codec;
mod disks;
mod event;
pub mod file;
mod format;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod interval;
mod io;
mod journal;
mod params;
mod read;
mod recovery;
mod recovery_rows;
mod resync;
mod segment;
#[cfg(any(test, feature = "simulated"))]
pub mod simulated;
mod snapshot;
mod start;
mod store;
mod superblock;
mod superblock_writer;
mod task;
mod timers;
mod truncate;
mod window;

pub use batch::{
    BATCH_HEADER_LEN, BATCH_MAGIC, BATCH_VERSION, Batch, BatchBuilder, BatchError, BatchHeader, BatchPlace,
    ChainValue, MAX_BATCH_LEN, MAX_CONFIG, MAX_PAYLOAD, MAX_RECORDS, PAYLOAD_START, PayloadBuffer,
    RECORD_LEN, Record, RecordKind, parse_header,
};
pub use checksum::crc32c;
pub use event::{
    AppendError, Extent, LogChunk, LogReadError, Output, PinId, ReadPiece, Refused, SnapshotId, SnapshotLoss,
    SnapshotReadError, StoreEvent, StoreFailure, Token,
};
pub use io::{
    Disk, FileId, FileStat, IoClass, IoCommand, IoCompletion, IoError, IoErrorKind, IoId, IoOp, IoOutput,
};
pub use params::{DiskEntry, FormatParams, Limits};
pub use recovery_rows::RecoveryRows;
pub use rempart_buffer::{Buffer, BufferMut, PAGE_SIZE, Slice, is_zero, keep_no_spares};
pub use store::{Damage, Health, OpenError, OpenOptions, Pressure, Recovered, Store, SyncingPhase};
pub use superblock::{COPY_SIZE as SUPERBLOCK_COPY_SIZE, SuperblockChange};
