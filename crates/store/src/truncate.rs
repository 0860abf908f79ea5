//! Cutting off the log's end, so that nothing of it ever comes back.

use crate::batch::ChainValue;
use crate::event::{Output, Refused, StoreEvent};
use crate::io::{FileId, IoOp};
use crate::journal::Prepared;
use crate::segment::BATCHES_START;
use crate::store::Store;
use crate::superblock::JournalPosition;
use crate::task::{Purpose, Task};
use rempart_types::Lsn;
use std::collections::VecDeque;

impl Store {
    /// Drops every record after `lsn`, durably, before `Truncated` is reported. Appends are refused meanwhile.
    /// Falls between batches only: all watermarks that replicas agree on do. Committed records may be among them:
    /// those that no flush covers are lost when a member that lost them with its power leads next.
    pub fn truncate_after(&mut self, lsn: Lsn, out: &mut Output) -> Result<(), Refused> {
        self.check_running()?;
        if self.truncating || self.takes_extents() || self.superblock.damage.is_some() {
            return Err(Refused::State);
        }
        if lsn >= self.journal.log_end {
            if lsn > self.journal.log_end {
                return Err(Refused::OutOfRange);
            }
            out.events.push(StoreEvent::Truncated(lsn));
            return Ok(());
        }
        let reached = self.round.as_ref().map_or(self.applied, |round| round.target);
        // What is committed and not stable is in memory here and there: a member that lost its power may lead without it.
        let bound = reached.max(self.stable_told).max(self.applied);
        if lsn < bound {
            return Err(Refused::Stable { bound: bound.min(self.journal.log_end) });
        }
        let (position, chain, term): (JournalPosition, Option<ChainValue>, _) = if lsn == self.applied {
            (self.applied_position, self.applied_position.chain, self.superblock.lineage.term_at(lsn))
        } else {
            let index = self.window.index_of(lsn).expect("unapplied records are in the window");
            let entry = &self.window.batches[index];
            if entry.last != lsn {
                let (before, last) = (entry.batch.first().previous(), entry.last);
                return Err(Refused::InsideBatch { before, last });
            }
            // A batch that was never written has no place: what follows was not written either.
            let position = entry.position.unwrap_or(JournalPosition {
                sequence: u64::MAX,
                offset: self.superblock.segment_size,
                chain: Some(entry.batch.chain()),
            });
            (position, Some(entry.batch.chain()), Some(entry.batch.term()))
        };
        self.truncating = true;
        self.truncate_position = position;
        self.window.truncate_after(lsn);
        self.uncommit_after(lsn);
        self.superblock.lineage.truncate(lsn);
        let journal = &mut self.journal;
        journal.waiting.retain(|batch| batch.last() <= lsn);
        journal.log_end = lsn;
        journal.chain = chain;
        journal.term = term.unwrap_or_default();
        journal.accepted = journal.accepted.min(lsn);
        journal.durable = journal.durable.min(lsn);
        journal.sync_next = None;
        journal.sync_later = None;
        for (_, at) in &mut self.openings {
            *at = (*at).min(lsn);
        }
        self.serve_after = self.serve_after.min(lsn);
        self.image_may_hold = self.image_may_hold.min(lsn);
        self.queue_task(Purpose::Truncate(lsn), out);
        Ok(())
    }

    /// 0: the intent is durable. 1: the dropped records' place is zeroed and their segments removed.
    /// 2: synced. 3: the intent is withdrawn.
    pub(crate) fn truncate_step(&mut self, task: &mut Task, step: u8, lsn: Lsn, out: &mut Output) -> bool {
        match step {
            0 => {
                self.superblock.truncate_to = Some(lsn);
                self.task_superblock(task, out);
            }
            // A batch that was never written leaves nothing to cut.
            1 if self.truncate_position.sequence == u64::MAX => {}
            1 => {
                let position = self.truncate_position;
                while let Some(segment) = self.journal.segments.back() {
                    let slot = segment.slot;
                    if segment.sequence > position.sequence {
                        self.journal.segments.pop_back();
                        self.issue_for_task(task, IoOp::Remove { file: FileId::Segment(slot) }, out);
                        continue;
                    }
                    let segment = self.journal.segments.back_mut().expect("just seen");
                    if segment.sequence == position.sequence && segment.end > position.offset {
                        let file = FileId::Segment(slot);
                        let (offset, len) = (position.offset, segment.end - position.offset);
                        segment.end = position.offset;
                        segment.last = lsn;
                        segment.synced = segment.synced.min(lsn);
                        segment.index.retain(|&(_, at)| at < position.offset);
                        if segment.end == BATCHES_START {
                            // Without records it is one of the prepared ones again.
                            let segment = self.journal.segments.pop_back().expect("just seen");
                            self.journal.prepared.push_front(Prepared { slot, sequence: segment.sequence });
                        }
                        self.issue_for_task(task, IoOp::Zero { file, offset, len, punch: false }, out);
                        self.truncated_slot = Some(slot);
                    }
                    break;
                }
                // A removed segment's sequence is missing: those prepared behind it are of no use.
                let used = self.journal.segments.back().map_or(position.sequence, |segment| segment.sequence);
                let mut next = used.max(position.sequence) + 1;
                let mut kept = VecDeque::new();
                for prepared in std::mem::take(&mut self.journal.prepared) {
                    if prepared.sequence == next || prepared.sequence <= used.max(position.sequence) {
                        next = next.max(prepared.sequence + 1);
                        kept.push_back(prepared);
                    } else {
                        self.issue_for_task(task, IoOp::Remove { file: FileId::Segment(prepared.slot) }, out);
                    }
                }
                self.journal.prepared = kept;
                self.journal.next_sequence = next;
            }
            2 => {
                if let Some(slot) = self.truncated_slot.take() {
                    self.issue_for_task(task, IoOp::Sync { file: FileId::Segment(slot) }, out);
                }
            }
            3 => {
                self.superblock.truncate_to = None;
                self.task_superblock(task, out);
            }
            _ => {
                self.truncating = false;
                out.events.push(StoreEvent::Truncated(lsn));
                self.prepare_segments(out);
                return true;
            }
        }
        false
    }
}
