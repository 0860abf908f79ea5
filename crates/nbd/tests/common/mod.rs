//! A small NBD server on the session, and the tools it is tried with.
#![allow(dead_code, reason = "each test program uses its part")]

pub mod certificates;
pub mod disk;
pub mod server;
pub mod tools;

/// Bytes that tell where they came from: no two sectors of an export are equal.
pub fn pattern(offset: u64, length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length);
    for word in 0..(length as u64).div_ceil(8) {
        let mixed = (offset / 8 + word + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.rotate_left(17);
        bytes.extend_from_slice(&mixed.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
