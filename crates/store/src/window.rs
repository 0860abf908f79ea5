//! The records that are not in the image yet, in memory: application and catch-up read them from here.

use crate::batch::Batch;
use crate::superblock::JournalPosition;
use rempart_types::Lsn;
use std::collections::VecDeque;

#[derive(Debug)]
pub(crate) struct Unapplied {
    pub batch: Batch,
    /// Right after it in the journal, once it was written there.
    pub position: Option<JournalPosition>,
}

#[derive(Debug, Default)]
pub(crate) struct Window {
    pub batches: VecDeque<Unapplied>,
    pub bytes: u64,
}

impl Window {
    pub fn push(&mut self, batch: Batch) {
        self.bytes += batch.byte_len() as u64;
        self.batches.push_back(Unapplied { batch, position: None });
    }

    pub fn placed(&mut self, last: Lsn, position: JournalPosition) {
        let index = self.index_of(last).expect("an unwritten batch is in the window");
        self.batches[index].position = Some(position);
    }

    /// Where the batch that holds `lsn` is.
    pub fn index_of(&self, lsn: Lsn) -> Option<usize> {
        let index = self.batches.partition_point(|entry| entry.batch.last() < lsn);
        (index < self.batches.len() && self.batches[index].batch.first() <= lsn).then_some(index)
    }

    /// The end of the last whole batch that ends at or before `lsn`.
    pub fn floor(&self, lsn: Lsn) -> Option<Lsn> {
        let index = self.batches.partition_point(|entry| entry.batch.last() <= lsn);
        index.checked_sub(1).map(|index| self.batches[index].batch.last())
    }

    /// Batches after `from` that end at or before `to`.
    pub fn between(&self, from: Lsn, to: Lsn) -> impl Iterator<Item = &Unapplied> {
        let start = self.batches.partition_point(|entry| entry.batch.last() <= from);
        self.batches.iter().skip(start).take_while(move |entry| entry.batch.last() <= to)
    }

    /// Drops the batches up to `lsn`; the last one's position.
    pub fn drop_to(&mut self, lsn: Lsn) -> Option<JournalPosition> {
        let mut position = None;
        while self.batches.front().is_some_and(|entry| entry.batch.last() <= lsn) {
            let entry = self.batches.pop_front().expect("just seen");
            self.bytes -= entry.batch.byte_len() as u64;
            position = entry.position;
        }
        position
    }

    pub fn truncate_after(&mut self, lsn: Lsn) {
        while self.batches.back().is_some_and(|entry| entry.batch.last() > lsn) {
            let entry = self.batches.pop_back().expect("just seen");
            self.bytes -= entry.batch.byte_len() as u64;
        }
    }
}
