//! How many bytes of the log lie behind a record.

use crate::BatchInfo;
use rempart_types::Lsn;
use std::collections::VecDeque;

/// Batches remembered. What is further behind is just far.
const MOST: usize = 8192;

/// The bytes of the newest batches of the log.
#[derive(Debug)]
pub(crate) struct RecentBytes {
    /// Last record of a batch, and bytes of all batches to it.
    batches: VecDeque<(Lsn, u64)>,
    /// The record before the oldest batch, and the bytes before it.
    start: (Lsn, u64),
    total: u64,
}

impl RecentBytes {
    /// Nothing is known of what lies before `end`.
    pub fn new(end: Lsn) -> RecentBytes {
        RecentBytes { batches: VecDeque::new(), start: (end, 0), total: 0 }
    }

    pub fn push(&mut self, batch: &BatchInfo) {
        self.total += batch.bytes;
        self.batches.push_back((batch.last, self.total));
        if self.batches.len() > MOST
            && let Some(oldest) = self.batches.pop_front()
        {
            self.start = oldest;
        }
    }

    /// Bytes of the log after `lsn`; `None` if that is too far back.
    pub fn after(&self, lsn: Lsn) -> Option<u64> {
        if lsn < self.start.0 {
            return None;
        }
        Some(self.at_least_after(lsn))
    }

    /// As `after`, or what is remembered if that is too far back.
    pub fn at_least_after(&self, lsn: Lsn) -> u64 {
        let next = self.batches.partition_point(|(last, _)| *last <= lsn);
        let before = if next == 0 { self.start.1 } else { self.batches[next - 1].1 };
        self.total - before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_types::Term;

    #[test]
    fn bytes_behind_a_record_are_those_of_the_batches_after_it() {
        let mut recent = RecentBytes::new(Lsn(4));
        for (first, last, bytes) in [(5, 6, 100), (7, 7, 10), (8, 12, 1000)] {
            recent.push(&BatchInfo { term: Term::new(1, 0), first: Lsn(first), last: Lsn(last), bytes });
        }
        assert_eq!(recent.after(Lsn(3)), None);
        assert_eq!(recent.after(Lsn(4)), Some(1110));
        assert_eq!(recent.after(Lsn(6)), Some(1010));
        assert_eq!(recent.after(Lsn(9)), Some(1000), "a batch counts until all of it is there");
        assert_eq!(recent.after(Lsn(12)), Some(0));
        for n in 0..10_000 {
            let lsn = Lsn(13 + n);
            recent.push(&BatchInfo { term: Term::new(1, 0), first: lsn, last: lsn, bytes: 1 });
        }
        assert_eq!(recent.after(Lsn(12)), None);
        assert_eq!(recent.after(Lsn(10_012)), Some(0));
        assert_eq!(recent.after(Lsn(10_002)), Some(10));
    }
}
