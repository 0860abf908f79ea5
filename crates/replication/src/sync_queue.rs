//! When this replica's journal is made durable because somebody waits for it.

use rempart_types::Lsn;

/// At most one sync is under way; whoever asks meanwhile shares the next.
#[derive(Debug, Default)]
pub(crate) struct SyncQueue {
    /// The lowest and the highest record somebody waits for that no sync under way covers.
    wanted: Option<(Lsn, Lsn)>,
    /// What the sync under way covers: everything accepted when it was submitted.
    under_way: Option<Lsn>,
}

impl SyncQueue {
    /// Somebody waits for `lsn` to be durable.
    pub fn want(&mut self, lsn: Lsn, durable: Lsn) {
        if lsn <= durable || self.under_way.is_some_and(|covered| lsn <= covered) {
            return;
        }
        let (first, last) = self.wanted.unwrap_or((lsn, lsn));
        self.wanted = Some((first.min(lsn), last.max(lsn)));
    }

    /// True when a sync is to be submitted now.
    pub fn submit(&mut self, accepted: Lsn) -> bool {
        let Some((first, last)) = self.wanted else { return false };
        if self.under_way.is_some() || accepted < first {
            return false;
        }
        self.under_way = Some(accepted);
        self.wanted = (last > accepted).then(|| (accepted.next(), last));
        true
    }

    pub fn durable(&mut self, durable: Lsn) {
        if self.under_way.is_some_and(|covered| covered <= durable) {
            self.under_way = None;
        }
        self.wanted = self.wanted.filter(|&(_, last)| last > durable);
    }

    /// Records after `end` are gone, and nobody waits for them.
    pub fn truncate(&mut self, end: Lsn) {
        self.wanted = None;
        self.under_way = self.under_way.map(|covered| covered.min(end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_covers_what_was_accepted_when_it_was_submitted() {
        let mut queue = SyncQueue::default();
        queue.want(Lsn(3), Lsn(0));
        assert!(!queue.submit(Lsn(2)), "record 3 is not in the file yet");
        assert!(queue.submit(Lsn(3)));
        queue.want(Lsn(4), Lsn(0));
        queue.want(Lsn(5), Lsn(0));
        assert!(!queue.submit(Lsn(5)), "one at a time");
        queue.durable(Lsn(3));
        assert!(queue.submit(Lsn(4)), "whoever waits for 4 need not wait for 5");
        queue.durable(Lsn(4));
        assert!(queue.submit(Lsn(5)));
        queue.durable(Lsn(5));
        assert!(!queue.submit(Lsn(9)), "nobody asked");
    }
}
