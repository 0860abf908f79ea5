//! What a store is made of, and its bounds.

use rempart_types::{DiskIndex, GroupId, Lsn};
use std::time::Duration;

/// An extent's size where memory is counted.
pub(crate) const EXTENT_BYTES: usize = rempart_types::EXTENT_SIZE as usize;

/// One disk of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskEntry {
    pub index: DiskIndex,
    /// Bytes, a multiple of 512.
    pub size: u64,
    /// Where the image is: a path to a file or block device, handed to [`Disk::locate_image`](crate::Disk).
    /// Empty: beside the journal, under a name of the disk's index.
    pub location: String,
    /// Extents that the change map never saw count as changed at this number: [`DiskEntry::EMPTY`] for a disk
    /// that starts as zeroes, [`DiskEntry::EXISTING`] for an image that came with content.
    pub base: Lsn,
}

impl DiskEntry {
    pub const EMPTY: Lsn = Lsn(0);
    pub const EXISTING: Lsn = Lsn(1);
}

/// What [`Store::format`](crate::Store::format) writes.
#[derive(Debug, Clone)]
pub struct FormatParams {
    pub group: GroupId,
    pub disks: Vec<DiskEntry>,
    /// Bytes per journal segment; the same on all replicas of a group.
    pub segment_size: u64,
    /// Segments written ahead at once, at least 2.
    pub segments: u64,
}

impl FormatParams {
    pub const SEGMENT_SIZE: u64 = 64 * 1024 * 1024;

    pub fn new(group: GroupId, disks: Vec<DiskEntry>) -> FormatParams {
        FormatParams { group, disks, segment_size: Self::SEGMENT_SIZE, segments: 4 }
    }
}

/// Bounds and paces of a running store; may differ at every start.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of records that are not in the image yet: at this, [`Pressure::Full`](crate::Pressure).
    pub window: u64,
    /// Bytes appended after which the store syncs on its own.
    pub sync_every: u64,
    /// Appended records are synced on their own after so long.
    pub sync_delay: Duration,
    /// Bytes worth one round of application.
    pub apply_round: u64,
    /// Records that may be applied are applied after so long, even if they are few.
    pub apply_delay: Duration,
    /// Bytes applied after which a checkpoint is taken.
    pub checkpoint_every: u64,
    /// Applied records are checkpointed after so long.
    pub checkpoint_delay: Duration,
    /// Journal bytes kept for peers that were away.
    pub retention: u64,
    /// Journal bytes kept at most for pins.
    pub pin_bound: u64,
    /// Bytes that all snapshots together keep aside at most; past it they are given up. A resync's undo snapshot is not
    /// bound by it.
    pub snapshots: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        const MIB: u64 = 1024 * 1024;
        Limits {
            window: 64 * MIB,
            sync_every: 8 * MIB,
            sync_delay: Duration::from_millis(500),
            apply_round: 8 * MIB,
            apply_delay: Duration::from_millis(250),
            checkpoint_every: 64 * MIB,
            checkpoint_delay: Duration::from_secs(5),
            retention: 1024 * MIB,
            pin_bound: 8 * 1024 * MIB,
            snapshots: u64::MAX,
        }
    }
}

impl Limits {
    /// Everything happens as soon as it may: for transcripts and simulations with tiny disks.
    pub fn immediate() -> Limits {
        Limits {
            window: 1024 * 1024,
            sync_every: u64::MAX,
            sync_delay: Duration::from_millis(10),
            apply_round: 256 * 1024,
            apply_delay: Duration::ZERO,
            checkpoint_every: 256 * 1024,
            checkpoint_delay: Duration::from_millis(50),
            retention: 0,
            pin_bound: 1024 * 1024,
            snapshots: u64::MAX,
        }
    }
}
