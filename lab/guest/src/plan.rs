//! What is written behind the ring, and where: drawn from a seed, which whoever made the disk put there.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `RMPTSCAT` |
//! | 8 | 8 | seed |
//! | 16 | 8 | life: boots of the guest so far |
//!
//! It is a sector at the end of the ring of disk 2; integers are little-endian.

use std::ops::Range;

/// A sector: the shortest write that a disk takes.
pub const PLAN_BYTES: usize = 512;
/// Bytes of a write, at most.
pub const LONGEST: usize = 256 << 10;
const MAGIC: &[u8; 8] = b"RMPTSCAT";
const SECTOR: u64 = PLAN_BYTES as u64;

/// By which numbers a life of the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub seed: u64,
    pub life: u64,
}

/// How a range is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Data,
    Zeroes,
    Trim,
}

impl Plan {
    pub fn encode(&self, sector: &mut [u8]) {
        sector.fill(0);
        sector[..8].copy_from_slice(MAGIC);
        sector[8..16].copy_from_slice(&self.seed.to_le_bytes());
        sector[16..24].copy_from_slice(&self.life.to_le_bytes());
    }

    pub fn decode(sector: &[u8]) -> Option<Plan> {
        let number = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight bytes"));
        (sector.len() == PLAN_BYTES && &sector[..8] == MAGIC)
            .then(|| Plan { seed: number(8), life: number(16) })
    }

    pub fn random(&self) -> Random {
        let state = (self.seed ^ self.life.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        Random(state.max(1))
    }
}

/// xorshift64
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        // Its lowest bits are its worst.
        (self.next() >> 16) % limit
    }

    /// Whole sectors between `from` and `end`: one to 512 of them, as often short as long.
    pub fn next_write(&mut self, from: u64, end: u64) -> (Kind, Range<u64>) {
        let room = (end - from) / SECTOR;
        let scale = 1 << self.below(10);
        let sectors = (1 + self.below(scale)).min(room);
        let start = from + self.below(room - sectors + 1) * SECTOR;
        let kind = match self.below(8) {
            0 => Kind::Trim,
            1 => Kind::Zeroes,
            _ => Kind::Data,
        };
        (kind, start..start + sectors * SECTOR)
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_plan_reads_back_and_nothing_else_is_one() {
        let plan = Plan { seed: 7, life: 3 };
        let mut sector = [0xFF; PLAN_BYTES];
        plan.encode(&mut sector);
        assert_eq!(Plan::decode(&sector), Some(plan));
        sector[3] ^= 1;
        assert_eq!(Plan::decode(&sector), None);
        assert_eq!(Plan::decode(&[0; PLAN_BYTES]), None);
    }

    #[test]
    fn writes_are_of_every_kind_and_length_and_stay_inside() {
        let (from, end) = (1 << 20, (1 << 20) + (2 << 20) + 512);
        let mut random = Plan { seed: 1, life: 1 }.random();
        let writes: Vec<_> = (0..20_000).map(|_| random.next_write(from, end)).collect();
        assert!(writes.iter().all(|(_, place)| place.start >= from && place.end <= end));
        assert!(writes.iter().all(|(_, place)| place.start % SECTOR == 0 && place.end % SECTOR == 0));
        let lengths: BTreeSet<u64> = writes.iter().map(|(_, place)| place.end - place.start).collect();
        assert_eq!((lengths.first(), lengths.last()), (Some(&SECTOR), Some(&(LONGEST as u64))));
        let kinds: BTreeSet<Kind> = writes.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds.len(), 3);
        let other = Plan { seed: 1, life: 2 }.random().next_write(from, end);
        assert_ne!(writes[0], other, "another life writes elsewhere");
    }
}
