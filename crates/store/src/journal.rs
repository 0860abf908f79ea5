//! The journal as it grows: segments, appends, syncs, preparing and recycling segments.

use crate::batch::{Batch, ChainValue};
use crate::event::{AppendError, Output, PinId, StoreEvent};
use crate::io::{FileId, IoClass, IoOp};
use crate::segment::{BATCHES_START, SegmentHeader};
use crate::store::{Pending, Store};
use crate::superblock::JournalPosition;
use crate::superblock_writer::Waiter;
use rempart_types::{Lsn, Term, WallTime};
use std::collections::{BTreeMap, VecDeque};

/// Segments made ready ahead of the one in use, so that no append waits for one.
const PREPARED_AHEAD: usize = 2;
/// Distance in a segment between known batch positions.
const INDEX_STEP: u64 = 256 * 1024;
/// Flushes are frequent while no more than so many bytes are appended from one to the next.
const FREQUENT_FLUSHES: u64 = 512 * 1024;

/// One part of the log, in one file.
#[derive(Debug)]
pub(crate) struct Segment {
    pub slot: u64,
    pub sequence: u64,
    /// Its first record. Only segments with records are in the list.
    pub first: Lsn,
    pub last: Lsn,
    /// Where the next batch goes.
    pub end: u64,
    /// Some batches' first records and offsets, rising.
    pub index: Vec<(Lsn, u64)>,
    /// Records to here are covered by a sync that was issued.
    pub synced: Lsn,
}

impl Segment {
    pub fn note(&mut self, first: Lsn, offset: u64) {
        if self.index.last().is_none_or(|&(_, at)| offset >= at + INDEX_STEP) {
            self.index.push((first, offset));
        }
    }

    /// A known batch position at or before the record `lsn`.
    pub fn position_before(&self, lsn: Lsn) -> (Lsn, u64) {
        let after = self.index.partition_point(|&(first, _)| first <= lsn);
        if after == 0 { (self.first, BATCHES_START) } else { self.index[after - 1] }
    }
}

/// A segment without records, its header durable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prepared {
    pub slot: u64,
    pub sequence: u64,
}

/// A segment being made ready.
#[derive(Debug)]
pub(crate) enum Preparing {
    Creating(Prepared),
    Stamping(Prepared),
    SyncingStamp(Prepared),
}

#[derive(Debug)]
pub(crate) struct Journal {
    /// Those with records, oldest first, sequences without gaps; the last one takes the batches.
    pub segments: VecDeque<Segment>,
    /// The next ones, in sequence.
    pub prepared: VecDeque<Prepared>,
    pub preparing: Option<Preparing>,
    pub next_sequence: u64,
    pub next_slot: u64,
    pub log_end: Lsn,
    pub term: Term,
    pub chain: Option<ChainValue>,
    pub wall: WallTime,
    /// Appended, waiting for a segment (or for a superblock write, see `gate`).
    pub waiting: VecDeque<Batch>,
    /// Issued writes in log order: last record, done.
    pub in_flight: VecDeque<(Lsn, bool)>,
    pub accepted: Lsn,
    pub durable: Lsn,
    /// The sync under way: what it makes durable, commands outstanding.
    pub syncing: Option<(Lsn, usize)>,
    pub sync_next: Option<Lsn>,
    pub sync_later: Option<Lsn>,
    pub bytes_since_sync: u64,
    /// Bytes appended since the last explicit sync: few mean that flushes are frequent.
    pub bytes_since_flush: u64,
    /// They were, until the last one.
    pub flushes_frequent: bool,
    pub pins: BTreeMap<PinId, Lsn>,
    /// Records up to here came in batches that claim a stability this copy could not confirm.
    pub unbacked_to: Lsn,
    /// The superblock is being told that claims do not count; batches wait.
    pub gate: bool,
    pub removing: usize,
}

impl Store {
    pub(crate) fn check_append(&self, batch: &Batch) -> Result<(), AppendError> {
        let header = batch.header();
        let writable = self.failed.is_none()
            && self.superblock.damage.is_none()
            && !self.takes_extents()
            && !self.truncating
            && !self.closing;
        if !writable {
            return Err(AppendError::NotWritable);
        }
        if header.group != self.superblock.group {
            return Err(AppendError::OtherGroup);
        }
        if header.first != self.journal.log_end.next() {
            return Err(AppendError::NotNext { expected: self.journal.log_end.next(), found: header.first });
        }
        if self.journal.chain.is_some_and(|chain| chain != header.previous) {
            return Err(AppendError::OtherBranch);
        }
        if header.term < self.journal.term {
            return Err(AppendError::OlderTerm);
        }
        if header.len > self.max_batch_len() {
            return Err(AppendError::TooLarge);
        }
        for record in batch.records().filter(|record| record.kind.changes_disk()) {
            let inside = self.disk_size(record.disk).is_some_and(|size| record.offset + record.len <= size);
            if !inside {
                let (disk, offset, len) = (record.disk, record.offset, record.len);
                return Err(AppendError::OutOfRange { disk, offset, len });
            }
        }
        Ok(())
    }

    pub(crate) fn append_checked(&mut self, batch: &Batch, out: &mut Output) {
        let header = batch.header();
        self.journal.log_end = header.last();
        self.journal.term = header.term;
        self.journal.chain = Some(header.chain);
        self.journal.wall = self.journal.wall.max(header.wall);
        self.superblock.lineage.append(header.term, header.first);
        self.journal.bytes_since_sync += header.len as u64;
        self.journal.bytes_since_flush += header.len as u64;
        self.window.push(batch.clone());
        self.journal.waiting.push_back(batch.clone());
        self.place_batches(out);
        self.index_committed();
        if self.journal.bytes_since_sync >= self.limits.sync_every {
            self.want_sync(out);
        }
        self.arm_timers();
    }

    /// Writes what waits, as far as segments are ready.
    pub(crate) fn place_batches(&mut self, out: &mut Output) {
        while let Some(batch) = self.journal.waiting.front() {
            if !self.claim_is_backed(batch.header().stable, batch.last()) {
                self.gate_claims(out);
                break;
            }
            let batch = self.journal.waiting.front().expect("just seen").clone();
            let len = batch.byte_len() as u64;
            let fits = self.journal.segments.back().is_some_and(|segment| {
                segment.sequence >= self.superblock.first_sequence
                    && segment.end + len <= self.superblock.segment_size
            });
            if !fits {
                let Some(next) = self.journal.prepared.pop_front() else { break };
                self.journal.segments.push_back(Segment {
                    slot: next.slot,
                    sequence: next.sequence,
                    first: batch.first(),
                    last: batch.first().previous(),
                    end: BATCHES_START,
                    index: Vec::new(),
                    synced: batch.first().previous(),
                });
            }
            self.journal.waiting.pop_front();
            let segment = self.journal.segments.back_mut().expect("one was just made sure of");
            let (offset, slot) = (segment.end, segment.slot);
            segment.note(batch.first(), offset);
            segment.end += len;
            segment.last = batch.last();
            let position = JournalPosition {
                sequence: segment.sequence,
                offset: segment.end,
                chain: Some(batch.chain()),
            };
            self.window.placed(batch.last(), position);
            self.journal.in_flight.push_back((batch.last(), false));
            let eager = self.journal.flushes_frequent && self.journal.bytes_since_flush <= FREQUENT_FLUSHES;
            let class = IoClass::JournalWrite { eager };
            let op = IoOp::Write { file: FileId::Segment(slot), offset, data: vec![batch.as_slice()] };
            self.issue(class, op, Pending::JournalWrite(batch.last()), out);
        }
        self.prepare_segments(out);
    }

    /// A batch's claim of stability counts at recovery, so it must not be written while it says more than
    /// this copy has: after a power loss it would turn a torn tail into "acknowledged records are missing".
    fn claim_is_backed(&mut self, claim: Lsn, last: Lsn) -> bool {
        if claim <= self.journal.durable {
            return true;
        }
        self.journal.unbacked_to = self.journal.unbacked_to.max(last);
        self.superblock.claims_since.is_none() && !self.journal.gate
    }

    fn gate_claims(&mut self, out: &mut Output) {
        if !self.journal.gate {
            self.journal.gate = true;
            self.superblock.claims_since = None;
            self.write_superblock(Waiter::Gate, out);
        }
    }

    /// Claims count again once all that was written while they did not is durable.
    pub(crate) fn trust_claims_again(&mut self) {
        let journal = &self.journal;
        if self.superblock.claims_since.is_none() && !journal.gate && journal.durable >= journal.unbacked_to {
            self.superblock.claims_since = Some(journal.durable);
        }
    }

    pub(crate) fn journal_written(&mut self, last: Lsn, out: &mut Output) {
        let entry = self.journal.in_flight.iter_mut().find(|(lsn, _)| *lsn == last);
        entry.expect("a completed journal write was in flight").1 = true;
        let before = self.journal.accepted;
        while let Some(&(lsn, true)) = self.journal.in_flight.front() {
            self.journal.accepted = lsn.min(self.journal.log_end);
            self.journal.in_flight.pop_front();
        }
        if self.journal.accepted > before {
            out.events.push(StoreEvent::Accepted(self.journal.accepted));
        }
        self.issue_sync(out);
        self.advance_task(out);
    }

    /// An explicit sync: somebody flushes.
    pub(crate) fn note_flush(&mut self) {
        self.journal.flushes_frequent = self.journal.bytes_since_flush <= FREQUENT_FLUSHES;
        self.journal.bytes_since_flush = 0;
    }

    pub(crate) fn want_sync(&mut self, out: &mut Output) {
        self.journal.bytes_since_sync = 0;
        let target = self.journal.log_end;
        let known = [Some(self.journal.durable), self.journal.syncing.map(|(lsn, _)| lsn)];
        if known.into_iter().flatten().any(|lsn| lsn >= target) {
            return;
        }
        if self.journal.sync_next.is_none() {
            self.journal.sync_next = Some(target);
        } else {
            self.journal.sync_later = Some(target);
        }
        self.issue_sync(out);
    }

    /// Starts the wanted sync once what it is about is accepted and no other sync runs.
    pub(crate) fn issue_sync(&mut self, out: &mut Output) {
        let Some(wanted) = self.journal.sync_next else { return };
        if self.journal.syncing.is_some() || self.journal.accepted < wanted {
            return;
        }
        let target = self.journal.accepted;
        self.journal.sync_next = self.journal.sync_later.take().filter(|&later| later > target);
        let mut slots = Vec::new();
        for segment in self.journal.segments.iter_mut().rev() {
            let covered = segment.last.min(target);
            if covered > segment.synced {
                segment.synced = covered;
                slots.push(segment.slot);
            } else if segment.last <= self.journal.durable {
                break;
            }
        }
        self.journal.syncing = Some((target, slots.len()));
        for slot in slots {
            self.issue(
                IoClass::Urgent,
                IoOp::Sync { file: FileId::Segment(slot) },
                Pending::JournalSync,
                out,
            );
        }
        if self.journal.syncing == Some((target, 0)) {
            self.journal.syncing = None;
            self.durable_reached(target, out);
        }
    }

    pub(crate) fn journal_synced(&mut self, out: &mut Output) {
        let (target, outstanding) = self.journal.syncing.expect("a sync completes that was issued");
        if outstanding > 1 {
            self.journal.syncing = Some((target, outstanding - 1));
            return;
        }
        self.journal.syncing = None;
        self.durable_reached(target, out);
        self.issue_sync(out);
    }

    fn durable_reached(&mut self, target: Lsn, out: &mut Output) {
        // A truncation may have cut off what the sync was about.
        let target = target.min(self.journal.log_end);
        if target > self.journal.durable {
            self.journal.durable = target;
            out.events.push(StoreEvent::Durable(target));
        }
        if !self.journal.waiting.is_empty() {
            self.place_batches(out);
        }
        self.apply_more(out);
        self.advance_task(out);
    }

    /// Makes the next segment ready: a recycled one where the journal is long enough, else a new one.
    pub(crate) fn prepare_segments(&mut self, out: &mut Output) {
        let enough = self.journal.prepared.len() >= PREPARED_AHEAD || self.closing;
        if enough || self.journal.preparing.is_some() || self.truncating || self.log_restarting {
            return;
        }
        let sequence = self.journal.next_sequence;
        self.journal.next_sequence += 1;
        let head =
            SegmentHeader { group: self.superblock.group, sequence, size: self.superblock.segment_size }
                .encode();
        if self.oldest_is_free(self.superblock.segment_size) {
            let old = self.journal.segments.pop_front().expect("the oldest was just seen");
            let prepared = Prepared { slot: old.slot, sequence };
            self.journal.preparing = Some(Preparing::Stamping(prepared));
            let op = IoOp::Write { file: FileId::Segment(old.slot), offset: 0, data: vec![head] };
            self.issue(IoClass::Background, op, Pending::Prepare, out);
        } else {
            let slot = self.journal.next_slot;
            self.journal.next_slot += 1;
            self.journal.preparing = Some(Preparing::Creating(Prepared { slot, sequence }));
            let op = IoOp::Create { file: FileId::Segment(slot), len: self.superblock.segment_size, head };
            self.issue(IoClass::Background, op, Pending::Prepare, out);
        }
    }

    pub(crate) fn segment_prepared(&mut self, out: &mut Output) {
        match self.journal.preparing.take().expect("a segment was being prepared") {
            Preparing::Stamping(prepared) => {
                self.journal.preparing = Some(Preparing::SyncingStamp(prepared));
                let op = IoOp::Sync { file: FileId::Segment(prepared.slot) };
                self.issue(IoClass::Background, op, Pending::Prepare, out);
            }
            Preparing::Creating(prepared) | Preparing::SyncingStamp(prepared) => {
                self.journal.prepared.push_back(prepared);
                self.place_batches(out);
                self.advance_task(out);
            }
        }
    }

    /// Whether the oldest segment serves nobody if the journal may shrink by `shrink` bytes less than its
    /// retention.
    fn oldest_is_free(&self, grow: u64) -> bool {
        let Some(oldest) = self.journal.segments.front() else { return false };
        let redo = self.superblock_written.redo.sequence;
        let kept = self.journal_bytes() + grow;
        let pinned = self.journal.pins.values().any(|&after| after < oldest.last);
        let bound =
            if pinned { self.limits.pin_bound.max(self.limits.retention) } else { self.limits.retention };
        self.journal.segments.len() > 1 && oldest.sequence < redo && self.log_reads.is_empty() && kept > bound
    }

    /// Gives back what the journal keeps beyond its bounds.
    pub(crate) fn trim(&mut self, out: &mut Output) {
        self.prepare_segments(out);
        while self.journal.removing == 0
            && self.journal.prepared.len() >= PREPARED_AHEAD
            && self.oldest_is_free(0)
        {
            let old = self.journal.segments.pop_front().expect("the oldest was just seen");
            self.journal.removing += 1;
            let op = IoOp::Remove { file: FileId::Segment(old.slot) };
            self.issue(IoClass::Background, op, Pending::RemoveSegment, out);
        }
        self.drop_lost_pins(out);
    }

    fn drop_lost_pins(&mut self, out: &mut Output) {
        let oldest = self.oldest_available_lsn();
        let lost: Vec<PinId> = self
            .journal
            .pins
            .iter()
            .filter(|&(_, after)| after.next() < oldest)
            .map(|(&pin, _)| pin)
            .collect();
        for pin in lost {
            self.journal.pins.remove(&pin);
            out.events.push(StoreEvent::PinLost(pin));
        }
    }
}
