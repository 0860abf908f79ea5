//! True time, which no node sees, and what is due in it.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

/// Nanoseconds of true time since the world began. Nodes see it only through their [`Clock`](crate::clock::Clock).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Moment(pub u64);

impl Moment {
    pub const START: Moment = Moment(0);
    pub const NEVER: Moment = Moment(u64::MAX);

    /// Zero if `earlier` is later.
    pub fn since(self, earlier: Moment) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Moment {
    type Output = Moment;

    fn add(self, duration: Duration) -> Moment {
        Moment(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Moment {
    type Output = Moment;

    fn sub(self, duration: Duration) -> Moment {
        Moment(self.0.saturating_sub(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>5}.{:06} s", self.0 / 1_000_000_000, self.0 / 1_000 % 1_000_000)
    }
}

/// Everything that is going to happen, earliest first. What is due at the same moment comes in the order of
/// the tie-break number, which the world draws at random, so that no accidental order is relied on.
#[derive(Debug)]
pub struct Agenda<E> {
    heap: BinaryHeap<Entry<E>>,
    count: u64,
    now: Moment,
}

#[derive(Debug)]
struct Entry<E> {
    at: Moment,
    tie: u32,
    count: u64,
    event: E,
}

impl<E> Entry<E> {
    fn key(&self) -> (Moment, u32, u64) {
        (self.at, self.tie, self.count)
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<E> Eq for Entry<E> {}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Entry<E> {
    /// Reversed: `BinaryHeap` gives its greatest first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}

impl<E> Default for Agenda<E> {
    fn default() -> Self {
        Agenda { heap: BinaryHeap::new(), count: 0, now: Moment::START }
    }
}

impl<E> Agenda<E> {
    pub fn now(&self) -> Moment {
        self.now
    }

    /// Plans `event`; what should have happened already happens next.
    pub fn at(&mut self, at: Moment, tie: u32, event: E) {
        self.count += 1;
        self.heap.push(Entry { at: at.max(self.now), tie, count: self.count, event });
    }

    pub fn next_at(&self) -> Option<Moment> {
        self.heap.peek().map(|entry| entry.at)
    }

    /// Moves time on to the next event and gives it out.
    pub fn pop(&mut self) -> Option<(Moment, E)> {
        let entry = self.heap.pop()?;
        self.now = entry.at;
        Some((entry.at, entry.event))
    }

    /// Moves time on to `at`, before which nothing is due.
    pub fn advance(&mut self, at: Moment) {
        assert!(self.next_at().is_none_or(|next| next >= at), "time jumped over an event");
        self.now = self.now.max(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn earliest_first_then_by_tie_break() {
        let mut agenda = Agenda::default();
        agenda.at(Moment(5), 2, "c");
        agenda.at(Moment(5), 1, "b");
        agenda.at(Moment(1), 9, "a");
        let order: Vec<_> = std::iter::from_fn(|| agenda.pop()).map(|(_, event)| event).collect();
        assert_eq!(order, ["a", "b", "c"]);
        agenda.at(Moment(2), 0, "late");
        assert_eq!(agenda.pop(), Some((Moment(5), "late")), "time never goes back");
    }
}
