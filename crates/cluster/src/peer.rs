//! What a member knows about another replica's node, and when it may join again.

use crate::Timing;
use rempart_types::{Epoch, MonotonicTime, SessionId};
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Peer {
    pub(crate) session: Option<SessionId>,
    /// It said in this session that its group lives in our register, in one that ours replaced, or in none yet.
    pub(crate) agrees: bool,
    /// The highest promise it told. A promise is never undone, so this outlives the session.
    pub(crate) promise: Epoch,
    /// When the newest beacon it acknowledged was sent.
    pub(crate) acknowledged: Option<MonotonicTime>,
    /// No beacon answered within the deadline.
    pub(crate) silent: bool,
    /// Its deadline was noticed late once already: we slept, not it.
    pub(crate) graced: bool,
    /// It keeps the guest waiting (rule 17).
    pub(crate) blocking: bool,
    /// It asked to leave.
    pub(crate) leaving: bool,
    /// Replication may make it an acknowledger at this instant.
    pub(crate) caught_up: bool,
    /// An attempt that admits it is open, and it has acknowledged without a break since.
    pub(crate) joining: bool,
    /// Counts how often it left lately.
    pub(crate) leaves: u32,
    pub(crate) joined_at: Option<MonotonicTime>,
    pub(crate) held_back_told: bool,
    /// It is not to be a replica any more; forgotten once nothing names it.
    pub(crate) removed: bool,
}

impl Peer {
    /// A new session starts: what was true of the old one says nothing any more.
    pub(crate) fn connect(&mut self, session: SessionId) {
        self.disconnect();
        self.session = Some(session);
        // The primary's verdicts stand until a beacon is answered; a request to leave was made by an older life.
        self.leaving = false;
    }

    pub(crate) fn disconnect(&mut self) {
        self.session = None;
        self.agrees = false;
        self.caught_up = false;
        self.joining = false;
    }

    /// What no register ever gets to is not believed: the epochs after it would wrap.
    pub(crate) fn may_be_told(epoch: Epoch) -> bool {
        const HIGHEST: Epoch = Epoch(u64::MAX / 2);
        epoch <= HIGHEST
    }

    /// It told what it promised.
    pub(crate) fn promised(&mut self, promise: Epoch) {
        if Peer::may_be_told(promise) {
            self.promise = self.promise.max(promise);
        }
    }

    /// It should not be waited for any longer.
    pub(crate) fn unfit(&self) -> bool {
        self.silent || self.blocking || self.leaving || self.removed
    }

    /// It left the in-sync set: how long it must stay outside. Doubles while it keeps coming and going.
    pub(crate) fn left(&mut self, timing: &Timing, now: MonotonicTime) -> Duration {
        const MAX_LEAVES: u32 = 24;
        let stayed = self.joined_at.take().is_some_and(|at| now.since(at) >= timing.readmit_forget);
        if stayed {
            self.leaves = 0;
        }
        let pause = timing.readmit_after.saturating_mul(1 << self.leaves).min(timing.readmit_most);
        if pause < timing.readmit_most && self.leaves < MAX_LEAVES {
            self.leaves += 1;
        }
        self.held_back_told = false;
        self.joining = false;
        self.blocking = false;
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_that_no_register_gets_to_is_not_believed() {
        let mut peer = Peer::default();
        peer.promised(Epoch(7));
        peer.promised(Epoch(u64::MAX));
        peer.promised(Epoch(3));
        assert_eq!(peer.promise, Epoch(7));
    }

    #[test]
    fn a_flapping_peer_waits_twice_as_long_each_time_and_a_steady_one_is_forgiven() {
        let timing = Timing::default();
        let mut peer = Peer::default();
        let now = MonotonicTime(1);
        let pauses: Vec<u64> = (0..8).map(|_| peer.left(&timing, now).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        peer.joined_at = Some(now);
        assert_eq!(peer.left(&timing, now + timing.readmit_forget).as_secs(), 1);
    }
}
