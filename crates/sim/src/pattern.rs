//! What the simulated guest writes: every sector names the request that wrote it and where it belongs, so that
//! a value read tells its origin, and a sector that is torn, stale or misplaced shows.

use rempart_types::{DiskIndex, SECTOR_SIZE};

/// The request that wrote a sector. 0: never written, discarded or zeroed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tag(pub u64);

impl Tag {
    pub const ZERO: Tag = Tag(0);
}

const SECTOR: usize = SECTOR_SIZE as usize;

fn place(disk: DiskIndex, sector: u64) -> u64 {
    0xa5 << 56 | u64::from(disk.0) << 40 | sector
}

/// The bytes of `count` sectors from `first`, all written by `tag`.
pub fn fill(tag: Tag, disk: DiskIndex, first: u64, count: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((count * SECTOR_SIZE) as usize);
    for sector in first..first + count {
        let mut pair = [0; 16];
        pair[..8].copy_from_slice(&tag.0.to_le_bytes());
        pair[8..].copy_from_slice(&place(disk, sector).to_le_bytes());
        for _ in 0..SECTOR / 16 {
            bytes.extend_from_slice(&pair);
        }
    }
    bytes
}

/// Who wrote this sector; `None` if nobody wrote these bytes there.
pub fn tag_of(bytes: &[u8], disk: DiskIndex, sector: u64) -> Option<Tag> {
    debug_assert_eq!(bytes.len(), SECTOR);
    let (head, rest) = bytes.split_at(16);
    if rest.chunks_exact(16).any(|pair| pair != head) {
        return None;
    }
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    match (word(0), word(8)) {
        (0, 0) => Some(Tag::ZERO),
        (0, _) => None,
        (tag, at) => (at == place(disk, sector)).then_some(Tag(tag)),
    }
}

/// The tags of all sectors of `bytes`, which start at sector `first`; `Err(sector)` at the first that nobody wrote.
pub fn tags_of(bytes: &[u8], disk: DiskIndex, first: u64) -> Result<Vec<Tag>, u64> {
    let sectors = bytes.chunks_exact(SECTOR).zip(first..);
    sectors.map(|(bytes, sector)| tag_of(bytes, disk, sector).ok_or(sector)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_tells_who_wrote_it_and_a_damaged_one_tells_nothing() {
        let disk = DiskIndex(1);
        let mut bytes = fill(Tag(7), disk, 3, 2);
        assert_eq!(tags_of(&bytes, disk, 3), Ok(vec![Tag(7), Tag(7)]));
        assert_eq!(tags_of(&bytes, disk, 4), Err(4), "misplaced");
        assert_eq!(tags_of(&bytes, DiskIndex(0), 3), Err(3), "on the wrong disk");
        bytes[700] ^= 1;
        assert_eq!(tags_of(&bytes, disk, 3), Err(4), "one flipped bit");
        assert_eq!(tags_of(&[0; 512], disk, 9), Ok(vec![Tag::ZERO]));
    }
}
