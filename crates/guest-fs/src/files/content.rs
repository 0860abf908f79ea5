//! Where a file's bytes lie.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A piece of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Byte of the file that it begins with.
    pub at: u64,
    /// Of the file system.
    pub bytes: Range<u64>,
}

impl Extent {
    pub fn len(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Byte of the file that it ends before.
    pub fn end(&self) -> u64 {
        self.at + self.len()
    }
}

/// What a file holds: bytes that are here, or extents in order. What neither has are zeroes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    pub size: u64,
    pub inline: Vec<u8>,
    pub extents: Vec<Extent>,
}

impl Content {
    pub fn inline(bytes: Vec<u8>) -> Content {
        Content { size: bytes.len() as u64, inline: bytes, extents: Vec::new() }
    }

    /// Nothing yet, of `size` bytes.
    pub fn new(size: u64) -> Content {
        Content { size, ..Content::default() }
    }

    /// Adds what comes next. Neighbours are joined, and what is behind the end is left out.
    pub fn push(&mut self, at: u64, mut bytes: Range<u64>) {
        let room = self.size.saturating_sub(at);
        bytes.end = bytes.end.min(bytes.start.saturating_add(room));
        if bytes.is_empty() {
            return;
        }
        match self.extents.last_mut() {
            Some(last) if last.end() == at && last.bytes.end == bytes.start => last.bytes.end = bytes.end,
            _ => self.extents.push(Extent { at, bytes }),
        }
    }

    /// Whether it lies in a file system of `len` bytes, and is no more than it says.
    pub fn is_sound(&self, len: u64) -> bool {
        let each = |extent: &Extent| {
            extent.bytes.start < extent.bytes.end
                && extent.bytes.end <= len
                && extent
                    .at
                    .checked_add(extent.bytes.end - extent.bytes.start)
                    .is_some_and(|end| end <= self.size)
        };
        i64::try_from(self.size).is_ok()
            && self.inline.len() as u64 <= self.size
            && (self.inline.is_empty() || self.extents.is_empty())
            && self.extents.iter().all(each)
            && self.extents.windows(2).all(|pair| pair[0].end() <= pair[1].at)
    }
}
