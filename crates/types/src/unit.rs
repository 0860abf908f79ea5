//! Disks and the units their space is counted in.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// The unit of guest I/O: every offset and length is a multiple of it.
pub const SECTOR_SIZE: u64 = 512;

/// Bytes per extent, the unit of change tracking, snapshots and resync.
pub const EXTENT_SIZE: u64 = 64 * 1024;

/// A disk's place among the disks of its virtual machine, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct DiskIndex(pub u16);

impl fmt::Display for DiskIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An extent's place on its disk: it covers bytes `index * EXTENT_SIZE ..` of it. The last may be short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ExtentIndex(pub u64);

impl ExtentIndex {
    pub fn containing(offset: u64) -> ExtentIndex {
        ExtentIndex(offset / EXTENT_SIZE)
    }

    /// The byte range it covers on a disk of `disk_size` bytes.
    pub fn bytes(self, disk_size: u64) -> Range<u64> {
        let start = self.0.saturating_mul(EXTENT_SIZE).min(disk_size);
        start..start.saturating_add(EXTENT_SIZE).min(disk_size)
    }
}

/// The extents that `length` bytes from `offset` touch.
pub fn extents_of(offset: u64, length: u64) -> impl Iterator<Item = ExtentIndex> {
    let range =
        if length == 0 { 0..0 } else { offset / EXTENT_SIZE..(offset + length - 1) / EXTENT_SIZE + 1 };
    range.map(ExtentIndex)
}
