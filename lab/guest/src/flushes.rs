//! The program's other task: pages written anywhere on a disk and flushed, one after the other, and how long each took.

use std::convert::Infallible;
use std::io;
use std::time::Instant;

use lab_guest::record::RECORD_BYTES;

use crate::disk::{Aligned, Disk};

/// Says `flush MICROSECONDS` for each, for ever.
pub fn run(path: &str) -> io::Result<Infallible> {
    let disk = Disk::open(path)?;
    let (mut random, mut page) = (0x9E37_79B9_7F4A_7C15u64, Aligned::slot());
    loop {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // No two pages alike.
        page[..8].copy_from_slice(&random.to_le_bytes());
        let started = Instant::now();
        disk.write(random % (disk.bytes / RECORD_BYTES as u64), &page)?;
        println!("flush {}", started.elapsed().as_micros());
    }
}
