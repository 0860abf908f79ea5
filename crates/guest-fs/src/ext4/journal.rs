//! The journal (jbd2): what it holds is read in place of what it is to be written over.
//!
//! Transactions that have a commit block count, from the first on that is not known to be in its place. A block that was
//! revoked by a transaction is not taken from it or one before.

use super::superblock::{Superblock, checksum};
use crate::disk::{Disk, Fault, Section};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;

const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;
const INCOMPAT_64BIT: u32 = 0x2;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
const INCOMPAT_KNOWN: u32 = 0x3f;
const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;
/// 4 GiB of blocks of 4 KiB.
const MOST_BLOCKS: u64 = 1 << 20;

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// A file system, and in place of some blocks what its journal has of them.
pub struct Replayed<'a> {
    section: Section<'a>,
    block_len: u64,
    blocks: BTreeMap<u64, Logged>,
}

/// A block in the journal.
#[derive(Clone, Copy)]
struct Logged {
    /// Byte of the file system.
    at: u64,
    /// It begins as the journal's own blocks do, and has zeroes in their place.
    is_escaped: bool,
}

impl<'a> Replayed<'a> {
    pub fn without(section: Section<'a>) -> Replayed<'a> {
        Replayed { section, block_len: 1024, blocks: BTreeMap::new() }
    }

    /// `journal` are the bytes of the file system where its blocks lie, in order.
    pub fn new(
        section: Section<'a>,
        superblock: &Superblock,
        journal: &[Range<u64>],
    ) -> Result<Replayed<'a>, Fault> {
        let log = Log::open(section, superblock, journal)?;
        let blocks = match log {
            Some(log) => log.scan(superblock)?,
            None => BTreeMap::new(),
        };
        Ok(Replayed { section, block_len: superblock.block_len, blocks })
    }

    /// Where the bytes lie that a file has at `bytes`, in order.
    pub fn places(&self, bytes: Range<u64>) -> Result<Vec<Range<u64>>, Fault> {
        let mut places = Vec::new();
        let mut at = bytes.start;
        let blocks = bytes.start / self.block_len..bytes.end.div_ceil(self.block_len);
        for (block, logged) in self.blocks.range(blocks) {
            let start = (block * self.block_len).max(at);
            let end = ((block + 1) * self.block_len).min(bytes.end);
            if logged.is_escaped {
                return Err(Fault::Unsupported(
                    "a file whose bytes in the journal look like the journal's own",
                ));
            }
            places.push(at..start);
            let moved = logged.at + (start - block * self.block_len);
            places.push(moved..moved + (end - start));
            at = end;
        }
        places.push(at..bytes.end);
        Ok(places)
    }
}

impl Disk for Replayed<'_> {
    fn len(&self) -> u64 {
        self.section.len()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let read = |at: u64, buffer: &mut [u8]| match self.section.read(at, buffer) {
            Ok(()) => Ok(()),
            Err(Fault::Read(error)) => Err(error),
            Err(fault) => Err(io::Error::other(fault.to_string())),
        };
        read(offset, buffer)?;
        let end = offset + buffer.len() as u64;
        for (block, logged) in self.blocks.range(offset / self.block_len..end.div_ceil(self.block_len)) {
            let begin = block * self.block_len;
            let (from, to) = (offset.max(begin), end.min(begin + self.block_len));
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            read(logged.at + (from - begin), part)?;
            if logged.is_escaped {
                for (place, byte) in (begin..).zip(MAGIC.to_be_bytes()) {
                    if (from..to).contains(&place) {
                        part[(place - from) as usize] = byte;
                    }
                }
            }
        }
        Ok(())
    }
}

struct Log<'a> {
    section: Section<'a>,
    block_len: u64,
    /// Where its blocks lie.
    blocks: Vec<u64>,
    first: usize,
    start: usize,
    sequence: u32,
    incompat: u32,
    seed: u32,
}

/// A transaction that has no commit block yet.
#[derive(Default)]
struct Open {
    writes: Vec<(u64, Logged)>,
    revoked: Vec<u64>,
}

impl<'a> Log<'a> {
    /// `None` if it is empty.
    fn open(
        section: Section<'a>,
        superblock: &Superblock,
        journal: &[Range<u64>],
    ) -> Result<Option<Log<'a>>, Fault> {
        const DAMAGED: &str = "an ext4 file system with a damaged journal";
        let step = superblock.block_len;
        if journal.iter().map(|range| (range.end - range.start) / step).sum::<u64>() > MOST_BLOCKS {
            return Err(Fault::Unsupported("an ext4 file system with a very large journal"));
        }
        let blocks: Vec<u64> =
            journal.iter().flat_map(|range| range.clone().step_by(step as usize)).collect();
        let Some(at) = blocks.first() else { return Fault::damaged(DAMAGED) };
        let raw = section.read_vec(*at, 1024)?;
        let is_v2 = be32(&raw, 4) == 4;
        if be32(&raw, 0) != MAGIC || !matches!(be32(&raw, 4), 3 | 4) || u64::from(be32(&raw, 12)) != step {
            return Fault::damaged(DAMAGED);
        }
        let incompat = if is_v2 { be32(&raw, 0x28) } else { 0 };
        if incompat & !INCOMPAT_KNOWN != 0 {
            return Err(Fault::Unsupported("an ext4 file system whose journal is of a kind not known here"));
        }
        let fast = match (incompat & INCOMPAT_FAST_COMMIT, be32(&raw, 0x54)) {
            (0, _) => 0,
            (_, 0) => 256,
            (_, count) => count,
        };
        let end = be32(&raw, 0x10).saturating_sub(fast) as usize;
        let (first, start) = (be32(&raw, 0x14) as usize, be32(&raw, 0x1c) as usize);
        if start == 0 {
            return Ok(None);
        }
        if end > blocks.len() || first == 0 || first >= end || !(first..end).contains(&start) {
            return Fault::damaged(DAMAGED);
        }
        let blocks = blocks[..end].to_vec();
        let (sequence, seed) = (be32(&raw, 0x18), checksum(u32::MAX, &[&raw[0x30..0x40]]));
        Ok(Some(Log { section, block_len: step, blocks, first, start, sequence, incompat, seed }))
    }

    fn has(&self, features: u32) -> bool {
        self.incompat & features != 0
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 >= self.blocks.len() { self.first } else { at + 1 }
    }

    /// Where a block of its own has its checksum, if it has one.
    fn checks(&self, block: &[u8], at: usize) -> bool {
        if !self.has(INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) {
            return true;
        }
        checksum(self.seed, &[&block[..at], &[0; 4], &block[at + 4..]]) == be32(block, at)
    }

    fn scan(&self, superblock: &Superblock) -> Result<BTreeMap<u64, Logged>, Fault> {
        let mut writes: Vec<(u32, u64, Logged)> = Vec::new();
        let mut revoked: HashMap<u64, u32> = HashMap::new();
        let (mut at, mut sequence, mut open) = (self.start, self.sequence, Open::default());
        // Once around, at most.
        let mut left = self.blocks.len();
        while left > 0 {
            let block = self.section.read_vec(self.blocks[at], self.block_len as usize)?;
            if be32(&block, 0) != MAGIC || be32(&block, 8) != sequence {
                break;
            }
            (at, left) = (self.next(at), left - 1);
            let tail = block.len() - 4;
            match be32(&block, 4) {
                DESCRIPTOR if self.checks(&block, tail) => {
                    for (target, flags) in self.tags(&block) {
                        if left == 0 || target >= superblock.blocks {
                            return Fault::damaged("an ext4 file system whose journal makes no sense");
                        }
                        let is_escaped = flags & TAG_ESCAPED != 0;
                        open.writes.push((target, Logged { at: self.blocks[at], is_escaped }));
                        (at, left) = (self.next(at), left - 1);
                    }
                }
                REVOKE if self.checks(&block, tail) => {
                    let used = (be32(&block, 12) as usize).min(block.len());
                    let width = if self.has(INCOMPAT_64BIT) { 8 } else { 4 };
                    let records = block.get(16..used).unwrap_or_default().chunks_exact(width);
                    open.revoked.extend(records.map(|record| {
                        record.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
                    }));
                }
                COMMIT if self.checks(&block, 16) => {
                    let done = std::mem::take(&mut open);
                    writes.extend(done.writes.into_iter().map(|(block, logged)| (sequence, block, logged)));
                    revoked.extend(done.revoked.into_iter().map(|block| (block, sequence)));
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
        }
        // Sequences wrap around.
        let is_after = |one: u32, other: u32| one.wrapping_sub(other).cast_signed() > 0;
        writes.retain(|(sequence, block, _)| {
            revoked.get(block).is_none_or(|revoked| is_after(*sequence, *revoked))
        });
        Ok(writes.into_iter().map(|(_, block, logged)| (block, logged)).collect())
    }

    /// The blocks that a descriptor names, and their flags.
    fn tags(&self, block: &[u8]) -> Vec<(u64, u32)> {
        const UUID: usize = 16;
        let is_v3 = self.has(INCOMPAT_CSUM_V3);
        let has_tail = self.has(INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3);
        let len = if is_v3 {
            16
        } else {
            8 + if self.has(INCOMPAT_CSUM_V2) { 2 } else { 0 } + if self.has(INCOMPAT_64BIT) { 4 } else { 0 }
        };
        let mut rest = &block[12..block.len() - if has_tail { 4 } else { 0 }];
        let mut tags = Vec::new();
        while rest.len() >= len {
            let flags = if is_v3 { be32(rest, 4) } else { be32(rest, 4) & 0xffff };
            let high = if self.has(INCOMPAT_64BIT) { u64::from(be32(rest, 8)) } else { 0 };
            tags.push((u64::from(be32(rest, 0)) | high << 32, flags));
            let uuid = if flags & TAG_SAME_UUID == 0 { UUID } else { 0 };
            if flags & TAG_LAST != 0 || rest.len() < len + uuid {
                break;
            }
            rest = &rest[len + uuid..];
        }
        tags
    }
}
