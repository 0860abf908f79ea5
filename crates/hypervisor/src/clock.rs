//! The clock that leases are counted on.

use rempart_types::MonotonicTime;

/// Now on CLOCK_BOOTTIME: it goes on while the machine is suspended, so a lease cannot outlive a suspend.
pub fn boottime() -> MonotonicTime {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // The kernel never reports a negative time since boot.
    MonotonicTime(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
}
