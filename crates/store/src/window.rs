//! The records that are not in the image yet, in memory: application and catch-up read them from here.

use crate::batch::Batch;
use crate::superblock::JournalPosition;
use rempart_types::Lsn;
use std::collections::VecDeque;

#[derive(Debug)]
pub(crate) struct Unapplied {
    pub batch: Batch,
    /// Its last record: looked for so often that it is kept where the search goes.
    pub last: Lsn,
    /// Right after it in the journal, once it was written there.
    pub position: Option<JournalPosition>,
    /// Bytes of all batches that ever were in the window, to the end of this one.
    pushed: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Window {
    pub batches: VecDeque<Unapplied>,
    /// Of the last batch, or of the last one dropped.
    pushed: u64,
}

impl Window {
    pub fn push(&mut self, batch: Batch) {
        self.pushed += batch.byte_len() as u64;
        self.batches.push_back(Unapplied { last: batch.last(), batch, position: None, pushed: self.pushed });
    }

    /// Bytes of all batches in it.
    pub fn bytes(&self) -> u64 {
        self.pushed - self.pushed_before(0)
    }

    pub fn placed(&mut self, last: Lsn, position: JournalPosition) {
        let index = self.index_of(last).expect("an unwritten batch is in the window");
        self.batches[index].position = Some(position);
    }

    /// Where the batch that holds `lsn` is.
    pub fn index_of(&self, lsn: Lsn) -> Option<usize> {
        let index = self.batches.partition_point(|entry| entry.last < lsn);
        (index < self.batches.len() && self.batches[index].batch.first() <= lsn).then_some(index)
    }

    /// The end of the last whole batch that ends at or before `lsn`.
    pub fn floor(&self, lsn: Lsn) -> Option<Lsn> {
        let index = self.index_after(lsn);
        index.checked_sub(1).map(|index| self.batches[index].last)
    }

    /// Where the first batch is that ends after `lsn`.
    fn index_after(&self, lsn: Lsn) -> usize {
        self.batches.partition_point(|entry| entry.last <= lsn)
    }

    /// Batches after `from` that end at or before `to`.
    pub fn between(&self, from: Lsn, to: Lsn) -> impl Iterator<Item = &Unapplied> {
        self.batches.range(self.index_after(from)..).take_while(move |entry| entry.last <= to)
    }

    /// Bytes of the batches after `from` that end at or before `to`.
    pub fn bytes_between(&self, from: Lsn, to: Lsn) -> u64 {
        self.pushed_before(self.index_after(to)).saturating_sub(self.pushed_before(self.index_after(from)))
    }

    /// Where the batch ends with which those after `from` are at least so many `bytes`, or the last that ends at or before
    /// `to`.
    pub fn end_of(&self, bytes: u64, from: Lsn, to: Lsn) -> Option<Lsn> {
        let (start, end) = (self.index_after(from), self.index_after(to));
        let wanted = self.pushed_before(start) + bytes;
        let index = self.batches.partition_point(|entry| entry.pushed < wanted).min(end.checked_sub(1)?);
        (index >= start).then(|| self.batches[index].last)
    }

    fn pushed_before(&self, index: usize) -> u64 {
        match self.batches.get(index) {
            Some(entry) => entry.pushed - entry.batch.byte_len() as u64,
            None => self.pushed,
        }
    }

    /// Drops the batches up to `lsn`; the last one's position.
    pub fn drop_to(&mut self, lsn: Lsn) -> Option<JournalPosition> {
        let mut position = None;
        while self.batches.front().is_some_and(|entry| entry.last <= lsn) {
            let entry = self.batches.pop_front().expect("just seen");
            position = entry.position;
        }
        position
    }

    pub fn truncate_after(&mut self, lsn: Lsn) {
        while self.batches.back().is_some_and(|entry| entry.last > lsn) {
            let entry = self.batches.pop_back().expect("just seen");
            self.pushed -= entry.batch.byte_len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{BatchBuilder, BatchPlace, ChainValue, MAX_BATCH_LEN, PAYLOAD_START};
    use rempart_types::{DiskIndex, GroupId, Term, WallTime};

    const PAGE: u64 = PAYLOAD_START as u64;

    /// A batch of two records, numbered from `first` on, of 1 + `pages` pages.
    fn batch(first: u64, pages: usize) -> Batch {
        let mut builder = BatchBuilder::new(MAX_BATCH_LEN);
        builder.write(DiskIndex(0), 0, &vec![1; pages * PAYLOAD_START]);
        builder.zero(DiskIndex(0), 0, PAGE);
        let (wall, previous) = (WallTime(0), ChainValue(0));
        let (group, term) = (GroupId(1), Term::new(1, 0));
        builder.seal(&BatchPlace {
            group,
            term,
            first: Lsn(first),
            stable: Lsn::ZERO,
            wall,
            clock: wall,
            previous,
        })
    }

    #[test]
    fn bytes_are_counted_over_whole_batches_also_after_some_were_dropped() {
        let mut window = Window::default();
        assert_eq!((window.bytes_between(Lsn(0), Lsn(9)), window.end_of(1, Lsn(0), Lsn(9))), (0, None));
        for (first, pages) in [(1, 1), (3, 2), (5, 3), (7, 4)] {
            window.push(batch(first, pages));
        }
        window.drop_to(Lsn(2));
        window.truncate_after(Lsn(6));
        window.push(batch(7, 1));
        assert_eq!(window.bytes(), (3 + 4 + 2) * PAGE);
        assert_eq!(window.bytes_between(Lsn(2), Lsn(8)), window.bytes());
        assert_eq!(window.bytes_between(Lsn(0), Lsn(7)), 7 * PAGE, "half a batch does not count");
        assert_eq!(window.bytes_between(Lsn(4), Lsn(8)), 6 * PAGE);
        assert_eq!(window.bytes_between(Lsn(8), Lsn(8)), 0);

        let end_of = |pages: u64, from, to| window.end_of(pages * PAGE, Lsn(from), Lsn(to)).map(|lsn| lsn.0);
        assert_eq!(end_of(1, 2, 8), Some(4), "at least one");
        assert_eq!(end_of(3, 2, 8), Some(4));
        assert_eq!(end_of(4, 2, 8), Some(6));
        assert_eq!(end_of(99, 2, 8), Some(8), "all there is");
        assert_eq!(end_of(99, 2, 7), Some(6), "no further than told");
        assert_eq!(end_of(1, 2, 3), None);
        assert_eq!(end_of(1, 8, 8), None);
    }
}
