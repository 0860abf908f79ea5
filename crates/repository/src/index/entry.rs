//! An entry's 32 bytes: the first half of the id (16), the pack's number (4), the rest of what a blob is (12).

use crate::ChunkId;
use crate::blob::{BlobKind, Codec};
use crate::pack::Blob;

/// Bytes of an entry.
pub(super) const ENTRY: usize = 32;

// Bits of the last twelve bytes, lowest first; what is left is zero.
const OFFSET: u32 = 27;
const LENGTH: u32 = 21;
const ORDINAL: u32 = 16;
const STORED_AT: u32 = OFFSET;
const PLAIN_AT: u32 = STORED_AT + LENGTH;
const ORDINAL_AT: u32 = PLAIN_AT + LENGTH;
const CODEC_AT: u32 = ORDINAL_AT + ORDINAL;
const KIND_AT: u32 = CODEC_AT + 2;
const USED: u32 = KIND_AT + 1;

const _: () = assert!(crate::pack::MAX_PACK <= 1 << OFFSET);
const _: () = assert!(crate::blob::MAX_PLAIN + crate::key::TAG < 1 << LENGTH);
const _: () = assert!(crate::pack::MAX_BLOBS <= 1 << ORDINAL);
const _: () = assert!(USED <= 96);
const _: () = assert!(PLAIN_AT <= 64);

/// What the index knows of a stored blob. Its order is that of ids; of equal ones, any but always the same.
///
/// Only half of the id is kept: which of two blobs that agree in it is meant shows when they are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct IndexEntry([u8; ENTRY]);

/// Where a blob may be: the pack's number, and all that opening it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Located {
    pub pack: u32,
    pub blob: Blob,
}

impl IndexEntry {
    pub(super) fn new(pack: u32, blob: &Blob) -> IndexEntry {
        let packed = u128::from(blob.offset)
            | u128::from(blob.stored_len) << STORED_AT
            | u128::from(blob.plain_len) << PLAIN_AT
            | u128::from(blob.ordinal) << ORDINAL_AT
            | u128::from(blob.codec.code()) << CODEC_AT
            | u128::from(blob.kind.code()) << KIND_AT;
        let mut bytes = [0; ENTRY];
        bytes[..16].copy_from_slice(&blob.id.0[..16]);
        bytes[16..20].copy_from_slice(&pack.to_le_bytes());
        bytes[20..].copy_from_slice(&packed.to_le_bytes()[..12]);
        IndexEntry(bytes)
    }

    /// `None` if no writer made it.
    pub(super) fn parse(bytes: &[u8; ENTRY]) -> Option<IndexEntry> {
        let entry = IndexEntry(*bytes);
        // Any id that begins as it does will do.
        let mut id = ChunkId([1; 32]);
        id.0[..16].copy_from_slice(&bytes[..16]);
        let located = entry.locate(&id)?;
        (located.blob.is_possible() && IndexEntry::new(located.pack, &located.blob) == entry).then_some(entry)
    }

    pub(crate) fn bytes(&self) -> &[u8; ENTRY] {
        &self.0
    }

    /// The first half of the blob's id.
    pub fn id(&self) -> [u8; 16] {
        self.0[..16].try_into().expect("16 bytes")
    }

    /// The number of its pack: in a segment its place among the segment's packs, in a local index that of the log.
    pub fn pack(&self) -> u32 {
        u32::from_le_bytes([self.0[16], self.0[17], self.0[18], self.0[19]])
    }

    /// Bytes of its blob in the pack.
    pub(crate) fn stored_len(&self) -> u64 {
        let packed = u64::from_le_bytes(self.0[20..28].try_into().expect("8 bytes"));
        packed >> STORED_AT & ((1 << LENGTH) - 1)
    }

    pub(super) fn with_pack(mut self, pack: u32) -> IndexEntry {
        self.0[16..20].copy_from_slice(&pack.to_le_bytes());
        self
    }

    /// What it says, if it is about `id`.
    pub(crate) fn locate(&self, id: &ChunkId) -> Option<Located> {
        if self.0[..16] != id.0[..16] {
            return None;
        }
        let mut packed = [0; 16];
        packed[..12].copy_from_slice(&self.0[20..]);
        let packed = u128::from_le_bytes(packed);
        let bits = |at: u32, count: u32| (packed >> at) as u32 & ((1 << count) - 1);
        let blob = Blob {
            id: *id,
            kind: BlobKind::from_code(bits(KIND_AT, 1) as u8)?,
            codec: Codec::from_code(bits(CODEC_AT, 2) as u8)?,
            ordinal: bits(ORDINAL_AT, ORDINAL),
            offset: bits(0, OFFSET),
            stored_len: bits(STORED_AT, LENGTH),
            plain_len: bits(PLAIN_AT, LENGTH),
        };
        Some(Located { pack: self.pack(), blob })
    }
}
