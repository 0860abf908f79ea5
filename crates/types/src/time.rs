//! Points in time, always given by the caller.

use serde::{Deserialize, Serialize};
use std::ops::{Add, Sub};
use std::time::Duration;

/// Nanoseconds on a clock that goes on through suspend and never steps (CLOCK_BOOTTIME on Linux).
/// Comparable only within one boot of one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct MonotonicTime(pub u64);

impl MonotonicTime {
    pub const ZERO: MonotonicTime = MonotonicTime(0);
    /// Later than anything that happens.
    pub const FAR_FUTURE: MonotonicTime = MonotonicTime(u64::MAX);

    /// Time since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: MonotonicTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for MonotonicTime {
    type Output = MonotonicTime;

    fn add(self, duration: Duration) -> MonotonicTime {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        MonotonicTime(self.0.saturating_add(nanos))
    }
}

impl Sub<Duration> for MonotonicTime {
    type Output = MonotonicTime;

    fn sub(self, duration: Duration) -> MonotonicTime {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        MonotonicTime(self.0.saturating_sub(nanos))
    }
}

/// Milliseconds since 1970 UTC, as a node's wall clock told it. For people and for "at time T"; never for ordering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct WallTime(pub u64);
