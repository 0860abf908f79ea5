//! A journal segment's header. It is durable before the segment takes its first batch, so a header that
//! cannot be read is damage, never a crash in between.

use crate::checksum::crc32c;
use rempart_buffer::{BufferMut, PAGE_SIZE, Slice, is_zero};
use rempart_types::GroupId;

pub(crate) const MAGIC: [u8; 8] = *b"RMPSEGMT";
pub(crate) const VERSION: u32 = 1;
/// Batches start here.
pub(crate) const BATCHES_START: u64 = PAGE_SIZE as u64;
/// One sector, which a disk writes whole or not at all.
const HEADER_LEN: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub group: GroupId,
    /// Which part of the log the segment holds: rises by one from segment to segment.
    pub sequence: u64,
    pub size: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// Creation was cut off: the segment was never used.
    Blank,
    Damaged,
}

impl SegmentHeader {
    pub fn encode(&self) -> Slice {
        let mut bytes = BufferMut::zeroed(HEADER_LEN);
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.group.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.size.to_le_bytes());
        let checksum = crc32c(&bytes[16..48]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        bytes.freeze().whole()
    }

    pub fn decode(bytes: &[u8]) -> Result<SegmentHeader, HeaderError> {
        let header = bytes.get(..HEADER_LEN).ok_or(HeaderError::Blank)?;
        if is_zero(header) {
            return Err(HeaderError::Blank);
        }
        let checksum = u32::from_le_bytes(header[12..16].try_into().expect("four bytes"));
        let sound = header[..8] == MAGIC
            && header[8..12] == VERSION.to_le_bytes()
            && checksum == crc32c(&header[16..48]);
        if !sound {
            return Err(HeaderError::Damaged);
        }
        let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        Ok(SegmentHeader {
            group: GroupId(u128::from_le_bytes(header[16..32].try_into().expect("sixteen bytes"))),
            sequence: word(32),
            size: word(40),
        })
    }
}
