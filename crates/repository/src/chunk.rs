//! Chunks: what disks are cut into.

use crate::ChunkId;
use crate::error::{Error, ErrorKind};
use std::fmt;

/// Bytes of every chunk of a repository; only the last of a disk may be shorter. A power of two from 64 KiB to 1 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChunkSize(u32);

impl ChunkSize {
    pub const DEFAULT: ChunkSize = ChunkSize(128 << 10);
    pub const SMALLEST: ChunkSize = ChunkSize(64 << 10);
    pub const LARGEST: ChunkSize = ChunkSize(1 << 20);

    pub fn new(bytes: u32) -> Result<ChunkSize, Error> {
        if bytes.is_power_of_two() && (Self::SMALLEST.0..=Self::LARGEST.0).contains(&bytes) {
            return Ok(ChunkSize(bytes));
        }
        let why = format!("{bytes} bytes are no size of a chunk: a power of two from 64 KiB to 1 MiB is");
        Err(Error::new(ErrorKind::Invalid, "chunk size", why))
    }

    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// Chunks that cover `disk_size` bytes.
    pub const fn count(self, disk_size: u64) -> u64 {
        disk_size.div_ceil(self.0 as u64)
    }
}

impl fmt::Display for ChunkSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} KiB", self.0 >> 10)
    }
}

impl ChunkId {
    /// Nothing but zeroes, of any length: a chunk that is stored nowhere, or the root of a subtree of such chunks.
    pub const ZERO: ChunkId = ChunkId([0; 32]);

    pub fn is_zero(&self) -> bool {
        *self == ChunkId::ZERO
    }
}

/// Whether there are only zeroes in `bytes`. Data gives itself away in its first bytes nearly always.
pub fn is_zero(bytes: &[u8]) -> bool {
    // A fixed-size block without an early exit inside becomes vector instructions.
    let (blocks, rest) = bytes.as_chunks::<256>();
    let block_is_zero = |block: &[u8; 256]| block.iter().fold(0, |all, byte| all | byte) == 0;
    blocks.iter().all(block_is_zero) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for good in [64 << 10, 128 << 10, 1 << 20] {
            assert_eq!(ChunkSize::new(good).expect("a size").bytes(), good);
        }
        for bad in [0, 1, 32 << 10, (64 << 10) + 1, 192 << 10, 2 << 20, u32::MAX] {
            assert_eq!(ChunkSize::new(bad).expect_err("no size").kind, ErrorKind::Invalid);
        }
        let size = ChunkSize::SMALLEST;
        assert_eq!((size.count(0), size.count(1), size.count(65536), size.count(65537)), (0, 1, 1, 2));
    }

    #[test]
    fn every_bit_is_seen() {
        let mut bytes = vec![0; 1000];
        for length in [0, 1, 255, 256, 257, 1000] {
            assert!(is_zero(&bytes[..length]));
        }
        for bit in 0..8000 {
            bytes[bit / 8] = 1 << (bit % 8);
            assert!(!is_zero(&bytes), "{bit}");
            assert!(is_zero(&bytes[..bit / 8]), "{bit}");
            bytes[bit / 8] = 0;
        }
    }
}
