//! A disk in memory that knows which of its blocks were written.

use bytes::Bytes;
use rempart_nbd::server::{Extent, Piece};
use rempart_nbd::{STATE_HOLE, STATE_ZERO};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

pub const BLOCK: u64 = 4096;

#[derive(Debug)]
pub struct Disk {
    content: Mutex<Content>,
    pub flushes: AtomicUsize,
    pub durable_writes: AtomicUsize,
    pub streamed_writes: AtomicUsize,
    /// Every request fails while this is not 0.
    pub broken: AtomicUsize,
}

#[derive(Debug)]
struct Content {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
    changed: Vec<bool>,
}

impl Disk {
    pub fn new(size: u64) -> Disk {
        let blocks = size.div_ceil(BLOCK) as usize;
        let content = Content {
            bytes: vec![0; size as usize],
            allocated: vec![false; blocks],
            changed: vec![false; blocks],
        };
        Disk {
            content: Mutex::new(content),
            flushes: AtomicUsize::new(0),
            durable_writes: AtomicUsize::new(0),
            streamed_writes: AtomicUsize::new(0),
            broken: AtomicUsize::new(0),
        }
    }

    pub fn size(&self) -> u64 {
        self.content.lock().unwrap().bytes.len() as u64
    }

    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst) != 0
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.content.lock().unwrap().bytes.clone()
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut content = self.content.lock().unwrap();
        content.bytes[offset as usize..][..data.len()].copy_from_slice(data);
        content.mark(offset, data.len() as u64, true);
    }

    pub fn zero(&self, offset: u64, length: u64, keep_allocated: bool) {
        let mut content = self.content.lock().unwrap();
        content.bytes[offset as usize..][..length as usize].fill(0);
        content.mark(offset, length, keep_allocated);
    }

    /// The bytes in the pieces a server replies with: holes where nothing was written.
    pub fn read(&self, offset: u64, length: u64) -> Vec<Piece> {
        let content = self.content.lock().unwrap();
        let runs = content.runs(&content.allocated, offset, length);
        let mut at = offset as usize;
        runs.into_iter()
            .map(|(length, allocated)| {
                let range = at..at + length as usize;
                at = range.end;
                if allocated {
                    Piece::Data(Bytes::copy_from_slice(&content.bytes[range]))
                } else {
                    Piece::Zeroes(length)
                }
            })
            .collect()
    }

    pub fn read_into(&self, offset: u64, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.content.lock().unwrap().bytes[offset as usize..][..buffer.len()]);
    }

    pub fn allocation(&self, offset: u64, length: u64) -> Vec<Extent> {
        let content = self.content.lock().unwrap();
        let runs = content.runs(&content.allocated, offset, length);
        let flags = |allocated| if allocated { 0 } else { STATE_HOLE | STATE_ZERO };
        runs.into_iter().map(|(length, allocated)| Extent { length, flags: flags(allocated) }).collect()
    }

    pub fn changes(&self, offset: u64, length: u64) -> Vec<Extent> {
        let content = self.content.lock().unwrap();
        let runs = content.runs(&content.changed, offset, length);
        runs.into_iter().map(|(length, changed)| Extent { length, flags: u64::from(changed) }).collect()
    }
}

impl Content {
    fn mark(&mut self, offset: u64, length: u64, allocated: bool) {
        let end = offset + length;
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            let whole = offset <= block * BLOCK && (block + 1) * BLOCK <= end;
            self.changed[block as usize] = true;
            if allocated || whole {
                self.allocated[block as usize] = allocated;
            }
        }
    }

    fn runs(&self, bits: &[bool], offset: u64, length: u64) -> Vec<(u64, bool)> {
        let (mut runs, mut at, end): (Vec<(u64, bool)>, _, _) = (Vec::new(), offset, offset + length);
        while at < end {
            let bit = bits[(at / BLOCK) as usize];
            let next = ((at / BLOCK + 1) * BLOCK).min(end);
            match runs.last_mut() {
                Some((length, last)) if *last == bit => *length += next - at,
                _ => runs.push((next - at, bit)),
            }
            at = next;
        }
        runs
    }
}
