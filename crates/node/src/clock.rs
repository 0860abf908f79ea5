//! The two clocks of a node.

use rempart_types::{MonotonicTime, WallTime};
use rustix::time::{ClockId, clock_gettime};

/// CLOCK_BOOTTIME: goes on through suspend, never steps.
pub fn monotonic() -> MonotonicTime {
    let time = clock_gettime(ClockId::Boottime);
    MonotonicTime(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

pub fn wall() -> WallTime {
    let time = clock_gettime(ClockId::Realtime);
    WallTime(time.tv_sec.max(0) as u64 * 1000 + time.tv_nsec as u64 / 1_000_000)
}
