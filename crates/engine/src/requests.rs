//! The guest's requests on their way: checked, numbered, held while nothing may be served, answered.

use crate::work::{Beside, Work};
use crate::{Action, DiskRange, Engine, GuestError, ReadPiece, Reply, Token, WriteBuffer};
use rempart_replication::{Event as ReplicationEvent, FlushId};
use rempart_store::{IoError, MAX_PAYLOAD, PAGE_SIZE, PAYLOAD_START, PayloadBuffer, Pressure};
use rempart_types::{DiskIndex, Lsn, SECTOR_SIZE};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A numbered write that is not committed, or with `fua` not stable yet.
#[derive(Debug)]
struct Numbered {
    lsn: Lsn,
    token: Token,
    fua: bool,
}

/// A request that waits until requests may be served.
#[derive(Debug)]
enum Held {
    Read(Token, DiskRange),
    Write { token: Token, disk: DiskIndex, offset: u64, payload: PayloadBuffer, fua: bool },
    Zero { token: Token, range: DiskRange, unmap: bool, fua: bool },
    Flush(Token),
}

impl Held {
    fn token(&self) -> Token {
        match self {
            Held::Read(token, _) | Held::Flush(token) => *token,
            Held::Write { token, .. } | Held::Zero { token, .. } => *token,
        }
    }
}

/// Who waits for a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FlushFor {
    Guest(Token),
    /// `Action::Drain` of cluster.
    Drain,
    /// Nobody: something only wants the log to become stable soon.
    Nobody,
}

/// Everything of the guest that is under way.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    /// In the order of their numbers; not committed, or not acknowledged because nothing may be now.
    writes: VecDeque<Numbered>,
    /// Committed, and waiting to be stable.
    forced: VecDeque<(Lsn, Token)>,
    flushes: BTreeMap<u64, FlushFor>,
    next_flush: u64,
    /// Flushes that are done, but may not be acknowledged now.
    flushed: Vec<FlushFor>,
    reads: BTreeSet<Token>,
    held: VecDeque<Held>,
}

impl Requests {
    pub fn in_flight(&self) -> usize {
        self.writes.len() + self.forced.len() + self.flushes.len() + self.reads.len() + self.held.len()
    }
}

impl Engine {
    /// The node should stop reading guest requests while this is false: nothing may be served now, or the log has
    /// outrun the image. Requests that come all the same are held.
    pub fn accepts_writes(&self) -> bool {
        self.takes_writes() && self.requests.held.is_empty()
    }

    fn is_open(&self) -> bool {
        self.serving && !self.frozen && self.failure.is_none()
    }

    fn takes_writes(&self) -> bool {
        self.is_open() && self.store.pressure() != Pressure::Full
    }

    fn may_write_now(&self) -> bool {
        self.requests.held.is_empty() && self.takes_writes()
    }

    fn check(&self, range: DiskRange) -> Result<(), GuestError> {
        let size = self.disk_sizes.get(usize::from(range.disk.0)).copied().filter(|&size| size > 0);
        let size = size.ok_or(GuestError::NoSuchDisk)?;
        if !range.offset.is_multiple_of(SECTOR_SIZE) || !range.length.is_multiple_of(SECTOR_SIZE) {
            return Err(GuestError::Unaligned);
        }
        match range.offset.checked_add(range.length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(GuestError::OutOfBounds),
        }
    }

    pub(crate) fn reply(&mut self, token: Token, reply: Reply) {
        self.out.push(Action::Reply { token, reply });
    }

    /// True when nothing is left to do: the request was refused, or is empty.
    fn settle_at_once(&mut self, token: Token, range: DiskRange) -> bool {
        match self.check(range) {
            Err(error) => self.reply(token, Reply::Failed(error)),
            Ok(()) if range.length == 0 => self.reply(token, Reply::Done),
            Ok(()) => return false,
        }
        true
    }

    /// Reads. Like every guest call, this needs no time and no list of actions: what follows from it comes out of
    /// the next `end_turn`.
    pub fn read(&mut self, token: Token, range: DiskRange) {
        if self.settle_at_once(token, range) {
            return;
        }
        if range.length > MAX_PAYLOAD as u64 {
            return self.reply(token, Reply::Failed(GuestError::TooLarge));
        }
        self.requests.reads.insert(token);
        if self.is_open() {
            self.start_read(token, range);
        } else {
            self.requests.held.push_back(Held::Read(token, range));
        }
    }

    fn start_read(&mut self, token: Token, range: DiskRange) {
        let length = usize::try_from(range.length).expect("bounded by the largest request");
        let started = self.with_store(|store, out| {
            store.read(rempart_store::Token(token.0), range.disk, range.offset, length, out)
        });
        if let Err(refused) = started {
            panic!("the store refuses a read that was checked: {refused}");
        }
    }

    pub(crate) fn read_done(&mut self, token: Token, result: Result<Vec<rempart_store::ReadPiece>, IoError>) {
        if !self.requests.reads.remove(&token) {
            return;
        }
        let reply = match result {
            Ok(pieces) => Reply::Data(pieces.into_iter().map(piece).collect()),
            Err(_) => Reply::Failed(GuestError::Disk),
        };
        self.reply(token, reply);
    }

    /// Writes; the payload is copied once, now. Writes take their places in the log in the order of these calls.
    pub fn write(&mut self, token: Token, disk: DiskIndex, offset: u64, payload: &[u8], fua: bool) {
        let range = DiskRange { disk, offset, length: payload.len() as u64 };
        if self.settle_at_once(token, range) {
            return;
        }
        if payload.len() > MAX_PAYLOAD {
            return self.reply(token, Reply::Failed(GuestError::TooLarge));
        }
        if !self.may_write_now() {
            let mut buffer = PayloadBuffer::new(payload.len());
            buffer.payload_mut().copy_from_slice(payload);
            self.requests.held.push_back(Held::Write { token, disk, offset, payload: buffer, fua });
            return;
        }
        self.put_write(disk, offset, payload);
        self.note_write(token, fua);
    }

    /// A buffer for a large write, to be filled by the caller while other requests go on. The write takes its
    /// place in the log when `write_buffer` is called, not now.
    pub fn reserve(&self, length: usize) -> Result<WriteBuffer, GuestError> {
        if length > MAX_PAYLOAD {
            return Err(GuestError::TooLarge);
        }
        Ok(WriteBuffer(PayloadBuffer::new(length)))
    }

    /// Writes what the buffer holds, without a copy.
    pub fn write_buffer(
        &mut self,
        token: Token,
        disk: DiskIndex,
        offset: u64,
        buffer: WriteBuffer,
        fua: bool,
    ) {
        let range = DiskRange { disk, offset, length: buffer.payload().len() as u64 };
        if self.settle_at_once(token, range) {
            return;
        }
        if self.may_write_now() {
            self.put_write_buffer(token, disk, offset, buffer.0, fua);
        } else {
            self.requests.held.push_back(Held::Write { token, disk, offset, payload: buffer.0, fua });
        }
    }

    /// Makes the range read as zeroes. `may_unmap`: its space may be given back.
    pub fn write_zeroes(&mut self, token: Token, range: DiskRange, may_unmap: bool, fua: bool) {
        if self.settle_at_once(token, range) {
            return;
        }
        if self.may_write_now() {
            self.put_zero(token, range, may_unmap, fua);
        } else {
            self.requests.held.push_back(Held::Zero { token, range, unmap: may_unmap, fua });
        }
    }

    /// Gives the range's space back; it reads as zeroes.
    pub fn discard(&mut self, token: Token, range: DiskRange, fua: bool) {
        self.write_zeroes(token, range, true, fua);
    }

    /// Done when everything acknowledged before this call is durable on every member.
    pub fn flush(&mut self, token: Token) {
        self.flush_habit.flushed();
        if self.is_open() {
            self.start_flush(FlushFor::Guest(token), false);
            self.pump();
        } else {
            self.requests.held.push_back(Held::Flush(token));
        }
    }

    /// Forgets what a closed connection of the guest still has under way: nothing of it is answered any more but
    /// the returned writes, which are on their way into the log. A successor of that connection is served only
    /// when all of them were replied to.
    pub fn abandon(&mut self, tokens: &[Token]) -> Vec<Token> {
        let gone: BTreeSet<Token> = tokens.iter().copied().collect();
        self.requests.held.retain(|held| !gone.contains(&held.token()));
        self.requests.reads.retain(|token| !gone.contains(token));
        let of_gone = |flush: &FlushFor| matches!(flush, FlushFor::Guest(token) if gone.contains(token));
        self.requests.flushes.retain(|_, flush| !of_gone(flush));
        self.requests.flushed.retain(|flush| !of_gone(flush));
        let writes = self.requests.writes.iter().map(|write| write.token);
        let forced = self.requests.forced.iter().map(|(_, token)| *token);
        writes.chain(forced).filter(|token| gone.contains(token)).collect()
    }

    // --- into the log ---

    /// Bytes one record's payload may have here.
    fn max_record(&self) -> usize {
        self.store.max_batch_len() - PAYLOAD_START
    }

    /// Adds a write to the open batch; a large one may take several records and batches.
    fn put_write(&mut self, disk: DiskIndex, offset: u64, payload: &[u8]) {
        let most = self.max_record() / PAGE_SIZE * PAGE_SIZE;
        let mut at = offset;
        for part in payload.chunks(most) {
            self.make_room(part.len());
            self.builder.write(disk, at, part);
            at += part.len() as u64;
        }
    }

    fn put_write_buffer(
        &mut self,
        token: Token,
        disk: DiskIndex,
        offset: u64,
        payload: PayloadBuffer,
        fua: bool,
    ) {
        if payload.payload().len() > self.max_record() {
            self.put_write(disk, offset, payload.payload());
            return self.note_write(token, fua);
        }
        // In a batch of its own it needs no copy; a small one rather shares its batch.
        if payload.payload().len() > 4 * PAGE_SIZE {
            self.seal();
        }
        self.make_room(payload.payload().len());
        self.builder.write_buffer(disk, offset, payload);
        self.note_write(token, fua);
    }

    fn put_zero(&mut self, token: Token, range: DiskRange, unmap: bool, fua: bool) {
        self.make_room(0);
        if unmap {
            self.builder.discard(range.disk, range.offset, range.length);
        } else {
            self.builder.zero(range.disk, range.offset, range.length);
        }
        self.note_write(token, fua);
    }

    pub(crate) fn make_room(&mut self, payload: usize) {
        if !self.builder.fits(payload) {
            self.seal();
            if !self.builder.fits(payload) {
                // Only a failed store leaves the batch open. Its records are never numbered again.
                assert!(self.failure.is_some(), "a batch that may be sealed is sealed");
                self.discard_open_batch();
            }
        }
    }

    fn note_write(&mut self, token: Token, fua: bool) {
        let lsn = self.open_end();
        self.sync_open_batch |= fua;
        self.requests.writes.push_back(Numbered { lsn, token, fua });
    }

    /// The number of the last record in the open batch.
    pub(crate) fn open_end(&self) -> Lsn {
        self.replication.end().plus(self.builder.record_count() as u64)
    }

    // --- answers ---

    pub(crate) fn start_flush(&mut self, flush: FlushFor, all: bool) {
        let id = self.requests.next_flush;
        self.requests.next_flush += 1;
        self.requests.flushes.insert(id, flush);
        self.queue
            .push_back(Work::Replication(ReplicationEvent::Flush { id: FlushId(id), all }, Beside::Nothing));
    }

    pub(crate) fn flush_done(&mut self, id: FlushId) {
        let Some(flush) = self.requests.flushes.remove(&id.0) else { return };
        match flush {
            FlushFor::Drain => self.drained(),
            FlushFor::Nobody => {}
            FlushFor::Guest(_) => {
                self.requests.flushed.push(flush);
                self.answer();
            }
        }
    }

    /// Acknowledges what is committed and stable, unless nothing may be acknowledged now.
    pub(crate) fn answer(&mut self) {
        if self.frozen {
            return;
        }
        let (committed, stable) = (self.replication.committed(), self.replication.stable());
        while let Some(write) = self.requests.writes.front()
            && write.lsn <= committed
        {
            let write = self.requests.writes.pop_front().expect("just seen");
            if write.fua && write.lsn > stable {
                self.requests.forced.push_back((write.lsn, write.token));
            } else {
                self.out.push(Action::Reply { token: write.token, reply: Reply::Done });
            }
        }
        while let Some(&(lsn, token)) = self.requests.forced.front()
            && lsn <= stable
        {
            self.requests.forced.pop_front();
            self.out.push(Action::Reply { token, reply: Reply::Done });
        }
        for flush in std::mem::take(&mut self.requests.flushed) {
            if let FlushFor::Guest(token) = flush {
                self.out.push(Action::Reply { token, reply: Reply::Done });
            }
        }
    }

    /// Serves what was held, in order, as far as that goes.
    pub(crate) fn release_held(&mut self) {
        while self.is_open()
            && let Some(held) = self.requests.held.front()
        {
            let writes = matches!(held, Held::Write { .. } | Held::Zero { .. });
            if writes && !self.takes_writes() {
                return;
            }
            match self.requests.held.pop_front().expect("just seen") {
                Held::Read(token, range) => self.start_read(token, range),
                Held::Flush(token) => {
                    self.start_flush(FlushFor::Guest(token), false);
                    self.pump();
                }
                Held::Write { token, disk, offset, payload, fua } => {
                    self.put_write_buffer(token, disk, offset, payload, fua);
                }
                Held::Zero { token, range, unmap, fua } => self.put_zero(token, range, unmap, fua),
            }
        }
    }

    /// This replica leads no more: nobody is answered.
    pub(crate) fn drop_requests(&mut self) {
        let requests = std::mem::take(&mut self.requests);
        self.requests.next_flush = requests.next_flush;
        let flush_token = |flush: FlushFor| match flush {
            FlushFor::Guest(token) => Some(token),
            _ => None,
        };
        let held = requests.held.iter().map(Held::token).filter(|token| !requests.reads.contains(token));
        let tokens = (requests.writes.iter().map(|write| write.token))
            .chain(requests.forced.iter().map(|(_, token)| *token))
            .chain(requests.flushes.into_values().filter_map(flush_token))
            .chain(requests.flushed.iter().copied().filter_map(flush_token))
            .chain(held)
            .chain(requests.reads.iter().copied());
        self.out.extend(tokens.map(|token| Action::Reply { token, reply: Reply::Dropped }));
    }
}

fn piece(piece: rempart_store::ReadPiece) -> ReadPiece {
    match piece {
        rempart_store::ReadPiece::Data(slice) => ReadPiece::Data(slice.into_bytes()),
        rempart_store::ReadPiece::Zero(length) => ReadPiece::Zeroes(length as u64),
    }
}
