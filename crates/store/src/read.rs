//! Reads: committed records that are not in the image yet, else the image; and the log itself.

use crate::batch::{Batch, BatchError, RecordKind};
use crate::event::{LogChunk, LogReadError, Output, ReadPiece, Refused, StoreEvent, Token};
use crate::interval::Content;
use crate::io::{FileId, IoClass, IoError, IoOp};
use crate::store::{Pending, Store};
use rempart_buffer::Slice;
use rempart_types::{DiskIndex, ExtentIndex, Lsn, extents_of};

/// A guest read with parts still under way.
#[derive(Debug)]
pub(crate) struct GuestRead {
    token: Token,
    pieces: Vec<Option<ReadPiece>>,
    waiting: usize,
    failed: Option<IoError>,
}

/// A read of the log under way: one chunk of one segment.
#[derive(Debug, Clone)]
pub(crate) struct LogRead {
    pub token: Token,
    pub after: Lsn,
    pub max_bytes: usize,
    pub sequence: u64,
    pub offset: u64,
    /// The segment's end when the read was issued.
    pub end: u64,
    pub found: Vec<Batch>,
    pub found_bytes: usize,
}

/// Bytes read from a segment at once.
const CHUNK: u64 = 1024 * 1024;

impl Store {
    /// Makes newly committed records visible to reads.
    pub(crate) fn index_committed(&mut self) {
        let Some(upto) = self.window.floor(self.committed_told.min(self.journal.log_end)) else { return };
        if upto <= self.indexed {
            return;
        }
        for entry in self.window.between(self.indexed, upto) {
            for record in entry.batch.records() {
                let content = match record.kind {
                    RecordKind::Write => Content::Data(entry.batch.payload(&record)),
                    RecordKind::Zero => Content::Zero { punch: false },
                    RecordKind::Discard => Content::Zero { punch: true },
                    RecordKind::Config => {
                        self.config_committed = Some((record.lsn, entry.batch.payload(&record)));
                        continue;
                    }
                    RecordKind::Mark | RecordKind::TermStart => continue,
                };
                let index = self.index.entry(record.disk).or_default();
                index.insert(record.offset, record.offset + record.len, record.lsn, content);
            }
        }
        self.indexed = upto;
    }

    /// Reads no longer see records after `lsn`, which were committed and are cut off.
    pub(crate) fn uncommit_after(&mut self, lsn: Lsn) {
        self.committed_told = self.committed_told.min(lsn);
        if self.indexed > lsn {
            self.index.clear();
            self.indexed = self.applied;
            self.config_committed = self.config_applied.clone();
            self.index_committed();
        }
    }

    /// Reads committed bytes: `Read` follows (at once when memory has it all).
    pub fn read(
        &mut self,
        token: Token,
        disk: DiskIndex,
        offset: u64,
        len: usize,
        out: &mut Output,
    ) -> Result<(), Refused> {
        self.check_running()?;
        if self.indexed.max(self.applied) < self.serve_after || self.superblock.syncing.is_some() {
            return Err(Refused::NotServing);
        }
        let size = self.disk_size(disk).ok_or(Refused::OutOfRange)?;
        let end = offset.checked_add(len as u64).filter(|&end| end <= size).ok_or(Refused::OutOfRange)?;
        let parts = match self.index.get(&disk) {
            Some(index) => index.parts(offset, end),
            None => vec![(offset, end, None)],
        };
        let mut read = GuestRead { token, pieces: Vec::with_capacity(parts.len()), waiting: 0, failed: None };
        let key = self.next_io;
        for (from, to, content) in parts.into_iter().filter(|(from, to, _)| from < to) {
            let len = (to - from) as usize;
            let piece = match content {
                Some(Content::Data(slice)) => Some(ReadPiece::Data(slice)),
                Some(Content::Zero { .. }) => Some(ReadPiece::Zero(len)),
                None if extents_of(from, to - from).all(|extent| self.is_untouched(disk, extent)) => {
                    Some(ReadPiece::Zero(len))
                }
                None => {
                    read.waiting += 1;
                    let op = IoOp::Read { file: FileId::Image(disk), offset: from, len };
                    self.issue(IoClass::Urgent, op, Pending::GuestRead(key, read.pieces.len()), out);
                    None
                }
            };
            read.pieces.push(piece);
        }
        if read.waiting == 0 {
            let result = Ok(read.pieces.into_iter().flatten().collect());
            out.events.push(StoreEvent::Read { token, result });
        } else {
            self.guest_reads.insert(key, read);
        }
        Ok(())
    }

    pub(crate) fn guest_read_done(
        &mut self,
        key: u64,
        piece: usize,
        result: Result<Slice, IoError>,
        out: &mut Output,
    ) {
        let read = self.guest_reads.get_mut(&key).expect("a read's part completes while it runs");
        match result {
            Ok(data) => read.pieces[piece] = Some(ReadPiece::Data(data)),
            Err(error) => read.failed = Some(error),
        }
        read.waiting -= 1;
        if read.waiting == 0 {
            let read = self.guest_reads.remove(&key).expect("just seen");
            let result = match read.failed {
                Some(error) => Err(error),
                None => Ok(read.pieces.into_iter().flatten().collect()),
            };
            out.events.push(StoreEvent::Read { token: read.token, result });
        }
    }

    /// Whether no record in the image ever touched this extent, nor came it with content.
    pub fn is_untouched(&self, disk: DiskIndex, extent: ExtentIndex) -> bool {
        self.maps.get(&disk).is_some_and(|map| map.get(extent) == Lsn::ZERO)
    }

    /// The first record that [`Store::read_log`] can still give.
    pub fn oldest_available_lsn(&self) -> Lsn {
        let window = self.window.batches.front().map(|entry| entry.batch.first());
        let journal = self.journal.segments.front().map(|segment| segment.first.max(self.journal_from));
        match (window, journal) {
            (Some(window), Some(journal)) => window.min(journal),
            (Some(lsn), None) | (None, Some(lsn)) => lsn,
            (None, None) => self.journal.log_end.next(),
        }
    }

    /// Batches after `after`, about `max_bytes` of them (at least one): `LogRead` follows.
    pub fn read_log(&mut self, token: Token, after: Lsn, max_bytes: usize, out: &mut Output) {
        if after >= self.journal.log_end {
            let result = Ok(LogChunk { batches: Vec::new() });
            return out.events.push(StoreEvent::LogRead { token, result });
        }
        if self.read_log_from_memory(token, after, max_bytes, out) {
            return;
        }
        let wanted = after.next();
        if wanted < self.oldest_available_lsn() || self.failed.is_some() {
            return self.log_gone(token, out);
        }
        let segment = self.journal.segments.iter().find(|segment| segment.last >= wanted);
        let Some(segment) = segment.filter(|segment| segment.first <= wanted) else {
            return self.log_gone(token, out);
        };
        let (_, offset) = segment.position_before(wanted);
        let read = LogRead {
            token,
            after,
            max_bytes,
            sequence: segment.sequence,
            offset,
            end: segment.end,
            found: Vec::new(),
            found_bytes: 0,
        };
        self.read_log_chunk(read, CHUNK, out);
    }

    fn read_log_from_memory(&mut self, token: Token, after: Lsn, max_bytes: usize, out: &mut Output) -> bool {
        let Some(start) = self.window.index_of(after.next()) else { return false };
        let (mut batches, mut bytes) = (Vec::new(), 0);
        for entry in self.window.batches.range(start..) {
            bytes += entry.batch.byte_len();
            if bytes > max_bytes && !batches.is_empty() {
                break;
            }
            batches.push(entry.batch.clone());
        }
        out.events.push(StoreEvent::LogRead { token, result: Ok(LogChunk { batches }) });
        true
    }

    fn log_gone(&mut self, token: Token, out: &mut Output) {
        let result = Err(LogReadError::Gone { oldest: self.oldest_available_lsn() });
        out.events.push(StoreEvent::LogRead { token, result });
    }

    fn read_log_chunk(&mut self, read: LogRead, len: u64, out: &mut Output) {
        let slot = self.journal.segments.iter().find(|s| s.sequence == read.sequence).map(|s| s.slot);
        let Some(slot) = slot else { return self.log_gone(read.token, out) };
        let len = len.min(read.end - read.offset) as usize;
        let op = IoOp::Read { file: FileId::Segment(slot), offset: read.offset, len };
        let key = self.next_io;
        self.log_reads.insert(key);
        self.issue(IoClass::Background, op, Pending::LogRead(key, read), out);
    }

    pub(crate) fn log_chunk_read(
        &mut self,
        key: u64,
        mut read: LogRead,
        result: Result<Slice, IoError>,
        out: &mut Output,
    ) {
        self.log_reads.remove(&key);
        let token = read.token;
        let chunk = match result {
            Ok(chunk) => chunk,
            Err(error) => {
                let result = Err(LogReadError::Io(error));
                return out.events.push(StoreEvent::LogRead { token, result });
            }
        };
        // A truncation may have cut off what was being read.
        let known_end =
            self.journal.segments.iter().find(|s| s.sequence == read.sequence).map_or(0, |s| s.end);
        read.end = read.end.min(known_end);
        let wanted = read.after.next();
        let mut at = 0;
        while read.offset < read.end && at < chunk.len() {
            match Batch::parse(&chunk[at..]) {
                Ok(batch) => {
                    let len = batch.byte_len();
                    at += len;
                    read.offset += len as u64;
                    if batch.last() < wanted {
                        continue;
                    }
                    if read.found_bytes + len > read.max_bytes && !read.found.is_empty() {
                        break;
                    }
                    read.found_bytes += len;
                    read.found.push(batch);
                }
                // The chunk ends inside a batch: read on from its start, all of it.
                Err(BatchError::Short) => {
                    let header = crate::batch::parse_header(&chunk[at..]);
                    let len = header.map_or(CHUNK, |header| header.len as u64);
                    if at == 0 && chunk.len() as u64 >= len {
                        return self.log_damaged(read, out);
                    }
                    if read.found.is_empty() {
                        return self.read_log_chunk(read, len.max(CHUNK), out);
                    }
                    break;
                }
                Err(_) => return self.log_damaged(read, out),
            }
        }
        if read.found.is_empty() {
            if read.offset < read.end {
                return self.read_log_chunk(read, CHUNK, out);
            }
            let still_there = |s: &crate::journal::Segment| s.sequence == read.sequence && s.last >= wanted;
            if self.journal.segments.iter().any(still_there) {
                return self.log_damaged(read, out);
            }
            // It was cut off meanwhile.
            return self.read_log(token, read.after, read.max_bytes, out);
        }
        let result = Ok(LogChunk { batches: read.found });
        out.events.push(StoreEvent::LogRead { token, result });
    }

    /// The old part of the journal is damaged: it serves no one any more; extents do.
    fn log_damaged(&mut self, read: LogRead, out: &mut Output) {
        if !read.found.is_empty() {
            let result = Ok(LogChunk { batches: read.found });
            return out.events.push(StoreEvent::LogRead { token: read.token, result });
        }
        let last =
            self.journal.segments.iter().find(|s| s.sequence == read.sequence).map_or(Lsn::ZERO, |s| s.last);
        self.journal_from = self.journal_from.max(last.next());
        self.log_gone(read.token, out);
    }
}
