//! What an operator may tune. Every field ends in its unit or is a `Duration`.

use std::time::Duration;

/// Limits and deadlines of one group's replication.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// A member that keeps a record from being committed, or a flush from being stable, that long is reported
    /// as blocking (rule 17): it leaves the in-sync set even if it still answers beacons. Half of it holds for a
    /// while after the guest had to wait for more than half of it.
    pub commit_deadline: Duration,
    /// How long an idle primary keeps news about the stable watermark to itself.
    pub stable_news_after: Duration,
    /// Bytes of log in flight to one peer, sent but not accepted.
    pub peer_window_bytes: u64,
    /// Bytes asked of the store in one read of the log.
    pub log_read_bytes: u64,
    /// Bytes asked of the store in one read of extents.
    pub extent_read_bytes: u64,
    /// Bytes of extents in flight in a resync, sent but not taken.
    pub resync_window_bytes: u64,
    /// Bytes per second a resync may send; `None` is as fast as it goes.
    pub resync_bytes_per_second: Option<u64>,
    /// Regions a target asks for ahead.
    pub resync_regions_ahead: usize,
    /// Bytes a target takes between two durable notes of how far it is.
    pub resync_checkpoint_bytes: u64,
    /// A new leader waits that long for a member to tell what it holds, then reports it as blocking.
    pub adoption_wait: Duration,
    /// A peer that does not answer a probe or a truncation is asked again in a new session after that long.
    pub answer_deadline: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            commit_deadline: Duration::from_millis(1500),
            stable_news_after: Duration::from_millis(50),
            peer_window_bytes: 16 << 20,
            log_read_bytes: 1 << 20,
            extent_read_bytes: 1 << 20,
            resync_window_bytes: 8 << 20,
            resync_bytes_per_second: None,
            resync_regions_ahead: 4,
            resync_checkpoint_bytes: 256 << 20,
            adoption_wait: Duration::from_millis(1500),
            answer_deadline: Duration::from_secs(5),
        }
    }
}
