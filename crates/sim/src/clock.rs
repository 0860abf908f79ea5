//! What a node sees of time: a monotonic clock that runs a little fast or slow, and a wall clock that may step.

use crate::agenda::Moment;
use rempart_types::{MonotonicTime, WallTime};
use std::time::Duration;

/// One node's clocks. The monotonic one starts anew, at any value, with every boot of the machine.
#[derive(Debug, Clone)]
pub struct Clock {
    boot: Moment,
    boot_reading: MonotonicTime,
    /// Nanoseconds gained in each second of true time.
    drift_ppb: i64,
    wall_offset_ms: i64,
}

const SECOND: i128 = 1_000_000_000;

impl Clock {
    pub fn new(boot: Moment, boot_reading: MonotonicTime, drift_ppb: i64) -> Clock {
        assert!(drift_ppb.abs() < 500_000_000, "no clock drifts that much");
        Clock { boot, boot_reading, drift_ppb, wall_offset_ms: 1_700_000_000_000 }
    }

    /// The machine restarts: the crystal stays the same, the reading does not.
    pub fn reboot(&mut self, boot: Moment, boot_reading: MonotonicTime) {
        self.boot = boot;
        self.boot_reading = boot_reading;
    }

    /// From `at` on this clock gains `drift_ppb`; what it showed before stays.
    pub fn set_drift(&mut self, at: Moment, drift_ppb: i64) {
        self.boot_reading = self.reading(at);
        self.boot = at;
        self.drift_ppb = drift_ppb;
    }

    pub fn step_wall(&mut self, by_ms: i64) {
        self.wall_offset_ms += by_ms;
    }

    pub fn reading(&self, at: Moment) -> MonotonicTime {
        let elapsed = i128::from(at.since(self.boot).as_nanos() as u64);
        let local = elapsed * (SECOND + i128::from(self.drift_ppb)) / SECOND;
        self.boot_reading + Duration::from_nanos(local as u64)
    }

    pub fn wall(&self, at: Moment) -> WallTime {
        WallTime((at.0 as i64 / 1_000_000 + self.wall_offset_ms).max(0) as u64)
    }

    /// The first moment at which this clock shows `reading` or more.
    pub fn moment_of(&self, reading: MonotonicTime) -> Moment {
        if reading == MonotonicTime::FAR_FUTURE {
            return Moment::NEVER;
        }
        let local = i128::from(reading.0) - i128::from(self.boot_reading.0);
        if local <= 0 {
            return self.boot;
        }
        let rate = SECOND + i128::from(self.drift_ppb);
        let elapsed = (local * SECOND + rate - 1) / rate;
        self.boot + Duration::from_nanos(u64::try_from(elapsed).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A timer set by this clock rings neither early nor more than a tick late.
        #[test]
        fn the_moment_of_a_reading_shows_it(
            boot in 0u64..1 << 40, start in 0u64..1 << 40, drift in -10_000_000i64..10_000_000, ahead in 0u64..1 << 45,
        ) {
            let clock = Clock::new(Moment(boot), MonotonicTime(start), drift);
            let reading = MonotonicTime(start + ahead);
            let moment = clock.moment_of(reading);
            prop_assert!(clock.reading(moment) >= reading);
            prop_assert!(moment.0 == boot || clock.reading(Moment(moment.0 - 1)) < reading);
        }
    }
}
