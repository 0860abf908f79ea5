//! The moments a member waits for. Whatever depends on time depends on one of these having gone off, never on a
//! comparison elsewhere: so an exhaustive check may let them go off in every order.

use rempart_types::{MonotonicTime, NodeId};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Timer {
    /// The first turn of a life.
    Start,
    /// The lease given to the guard ends.
    Lease,
    /// Leading: the next beacon is due.
    Beacon,
    /// Following: no beacon for too long.
    Suspect,
    /// The request to the register is given up.
    RegisterDeadline,
    /// The register may be asked again.
    RegisterRetry,
    /// Look whether the register is still there.
    RegisterCheck,
    /// Booting: long enough without the register.
    Patience,
    /// Every older lease has ended: the machine may start.
    TakeoverWait,
    /// The planned handover is given up.
    Handover,
    /// This peer has not answered a beacon for too long.
    PeerDeadline(NodeId),
    /// This peer may join again.
    Readmit(NodeId),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Timers(BTreeMap<Timer, MonotonicTime>);

impl Timers {
    pub(crate) fn set(&mut self, timer: Timer, at: MonotonicTime) {
        self.0.insert(timer, at);
    }

    pub(crate) fn set_if_idle(&mut self, timer: Timer, at: MonotonicTime) {
        self.0.entry(timer).or_insert(at);
    }

    pub(crate) fn clear(&mut self, timer: Timer) {
        self.0.remove(&timer);
    }

    pub(crate) fn retain(&mut self, keep: impl Fn(Timer) -> bool) {
        self.0.retain(|&timer, _| keep(timer));
    }

    pub(crate) fn at(&self, timer: Timer) -> Option<MonotonicTime> {
        self.0.get(&timer).copied()
    }

    pub(crate) fn is_set(&self, timer: Timer) -> bool {
        self.0.contains_key(&timer)
    }

    pub(crate) fn next(&self) -> Option<MonotonicTime> {
        self.0.values().min().copied()
    }

    /// Takes the earliest that is due.
    pub(crate) fn take_due(&mut self, now: MonotonicTime) -> Option<(Timer, MonotonicTime)> {
        let (&timer, &at) = self.0.iter().min_by_key(|&(timer, at)| (*at, *timer))?;
        (at <= now).then(|| {
            self.0.remove(&timer);
            (timer, at)
        })
    }

    #[cfg(any(test, feature = "model"))]
    pub(crate) fn all(&self) -> impl Iterator<Item = Timer> + '_ {
        self.0.keys().copied()
    }
}
