//! Whether the log has anything to say ("XFS Algorithms & Data Structures", 3rd edition, chapter 14).
//!
//! A log is a ring of sectors, each stamped with the round in which it was written. A file system that was unmounted ends it
//! with a record that says so. One that is frozen, or idle for long, ends it with copies of its superblock, behind which
//! nothing waits to be written to its place. All else is not believed.

use super::{DAMAGED, Xfs, be32, be64};
use crate::disk::{Fault, u16_at, u32_at, u64_at};

const SECTOR: u64 = 512;
const RECORD_MAGIC: u32 = 0xfeed_babe;
/// Sectors that may be on their way at once, in any order: 8 records of 256 KiB.
const IN_FLIGHT: u64 = 4096;
/// Sectors of the smallest log there is.
const FEWEST: u64 = 512;
/// Words of sectors that a record's header keeps.
const KEPT: usize = 64;
/// Sectors of the records that are understood: two that are padded to 256 KiB each.
const MOST_LEFT: u64 = 1200;
const START: u8 = 0x1;
const COMMIT: u8 = 0x2;
const UNMOUNT: u8 = 0x20;
const TRANSACTION: u32 = 0x5452_414e;
const BUFFER: u16 = 0x123c;
const LITTLE_ENDIAN: u32 = 1;

struct Log<'a, 'd> {
    fs: &'a Xfs<'d>,
    start: u64,
    sectors: u64,
}

/// A record, by what its header says.
struct Record {
    header: Vec<u8>,
    /// Of the log.
    data: u64,
    end: u64,
}

/// Whether what lies in its place is all there is to say.
pub(super) fn is_at_rest(fs: &Xfs<'_>) -> Result<bool, Fault> {
    let raw = fs.section.read_array::<512>(0)?;
    let (first, blocks) = (be64(&raw, 48), u64::from(be32(&raw, 96)));
    if first == 0 {
        return Err(Fault::Unsupported("an XFS file system whose log is on another device"));
    }
    let start = fs.byte_of(first, blocks)?;
    let log = Log { fs, start, sectors: blocks * fs.block_len / SECTOR };
    if log.sectors < FEWEST {
        return Err(DAMAGED);
    }
    log.is_at_rest()
}

impl Log<'_, '_> {
    fn is_at_rest(&self) -> Result<bool, Fault> {
        let Some(head) = self.head()? else { return Ok(false) };
        let Some(last) = self.last(head)? else { return Ok(false) };
        if self.is_unmounted(&last)? {
            return Ok(true);
        }
        let tail = be64(&last.header, 24);
        let mut at = tail & u64::from(u32::MAX);
        if at >= self.sectors || (head + self.sectors - at) % self.sectors > MOST_LEFT {
            return Ok(false);
        }
        if self.record(at)?.is_none_or(|first| be64(&first.header, 16) != tail) {
            return Ok(false);
        }
        for _ in 0..MOST_LEFT {
            let Some(record) = self.record(at)? else { return Ok(false) };
            if !self.is_superblock(&record)? {
                return Ok(false);
            }
            at = record.end % self.sectors;
            if at == head % self.sectors {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn sector(&self, sector: u64) -> Result<[u8; SECTOR as usize], Fault> {
        self.fs.section.read_array(self.start + sector % self.sectors * SECTOR)
    }

    /// The round in which a sector was written.
    fn round(&self, sector: u64) -> Result<u32, Fault> {
        let word: [u8; 8] = self.fs.section.read_array(self.start + sector % self.sectors * SECTOR)?;
        Ok(round_of(&word))
    }

    /// The sector behind the last that was written, up to [`Self::sectors`]. None if some are missing before it or are there
    /// behind it.
    fn head(&self) -> Result<Option<u64>, Fault> {
        let (first, last) = (self.round(0)?, self.round(self.sectors - 1)?);
        if first == 0 || first != last && first != last.wrapping_add(1) {
            return Ok(None);
        }
        let mut head = self.sectors;
        if first != last {
            let (mut written, mut behind) = (0, self.sectors - 1);
            while behind - written > 1 {
                let middle = written + (behind - written) / 2;
                if self.round(middle)? == first { written = middle } else { behind = middle }
            }
            head = behind;
        }
        // What is on its way may be there in any order.
        let around = IN_FLIGHT.min(self.sectors / 2);
        let (mut sector, end) = (head + self.sectors - around, head + self.sectors + around);
        while sector < end {
            let (from, piece) = self.run(sector, end - sector)?;
            let mut rounds = (from..).zip(piece.chunks_exact(SECTOR as usize));
            let is_in_order = rounds.all(|(place, bytes)| {
                round_of(bytes) == if place < head { first } else { first.wrapping_sub(1) }
            });
            if !is_in_order {
                return Ok(None);
            }
            sector += piece.len() as u64 / SECTOR;
        }
        Ok(Some(head))
    }

    /// Up to `count` sectors from `sector` on, not past the log's end: the number of the first, and their bytes.
    fn run(&self, sector: u64, count: u64) -> Result<(u64, Vec<u8>), Fault> {
        let from = sector % self.sectors;
        let len = (count.min(self.sectors - from) * SECTOR) as usize;
        Ok((from, self.fs.section.read_vec(self.start + from * SECTOR, len)?))
    }

    /// The record that ends at the head.
    fn last(&self, head: u64) -> Result<Option<Record>, Fault> {
        for back in 1..=IN_FLIGHT.min(self.sectors / 2) {
            let at = (head + self.sectors - back) % self.sectors;
            let word: [u8; 4] = self.fs.section.read_array(self.start + at * SECTOR)?;
            if be32(&word, 0) == RECORD_MAGIC {
                let record = self.record(at)?;
                return Ok(record.filter(|record| record.end % self.sectors == head % self.sectors));
            }
        }
        Ok(None)
    }

    /// The record that begins at a sector.
    fn record(&self, at: u64) -> Result<Option<Record>, Fault> {
        let header = self.sector(at)?.to_vec();
        let (version, len, size) = (be32(&header, 8), be32(&header, 12), be32(&header, 320));
        if be32(&header, 0) != RECORD_MAGIC
            || be32(&header, 300) != LITTLE_ENDIAN
            || len == 0
            || len > 256 << 10
        {
            return Ok(None);
        }
        let headers = if version & 2 != 0 { u64::from(size).div_ceil(32 << 10).clamp(1, 8) } else { 1 };
        let data = at + headers;
        Ok(Some(Record { header, data, end: data + u64::from(len).div_ceil(SECTOR) }))
    }

    /// What a record has, with the words that its header keeps.
    fn data(&self, record: &Record) -> Result<Vec<u8>, Fault> {
        let mut data = Vec::new();
        for (number, sector) in (record.data..record.end).take(KEPT).enumerate() {
            let mut bytes = self.sector(sector)?;
            bytes[..4].copy_from_slice(&record.header[44 + number * 4..][..4]);
            data.extend_from_slice(&bytes);
        }
        data.truncate(be32(&record.header, 12) as usize);
        Ok(data)
    }

    fn is_unmounted(&self, record: &Record) -> Result<bool, Fault> {
        let data = self.data(record)?;
        Ok(be32(&record.header, 40) == 1 && data.len() >= 12 && data[9] & UNMOUNT != 0)
    }

    /// Whether it holds whole transactions that change the superblock and nothing else.
    fn is_superblock(&self, record: &Record) -> Result<bool, Fault> {
        let data = self.data(record)?;
        let mut rest = &data[..];
        let mut operations = Vec::new();
        for _ in 0..be32(&record.header, 40) {
            let Some((head, behind)) = rest.split_at_checked(12) else { return Ok(false) };
            let Some((bytes, behind)) = behind.split_at_checked(be32(head, 4) as usize) else {
                return Ok(false);
            };
            operations.push((head[9], bytes));
            rest = behind;
        }
        let mut next = operations.into_iter();
        while let Some((flags, bytes)) = next.next() {
            let begins = flags == START && bytes.is_empty();
            let is_headed = next.next().is_some_and(|(flags, bytes)| {
                flags == 0 && bytes.len() == 16 && u32_at(bytes, 0) == TRANSACTION
            });
            if !begins || !is_headed {
                return Ok(false);
            }
            loop {
                match next.next() {
                    Some((COMMIT, [])) => break,
                    Some((0, format))
                        if format.len() >= 24
                            && u16_at(format, 0) == BUFFER
                            && u16_at(format, 2) >= 1
                            && u64_at(format, 8) == 0 =>
                    {
                        for _ in 1..u16_at(format, 2) {
                            if next.next().is_none_or(|(flags, _)| flags != 0) {
                                return Ok(false);
                            }
                        }
                    }
                    _ => return Ok(false),
                }
            }
        }
        Ok(true)
    }
}

fn round_of(sector: &[u8]) -> u32 {
    match be32(sector, 0) {
        RECORD_MAGIC => be32(sector, 4),
        round => round,
    }
}
