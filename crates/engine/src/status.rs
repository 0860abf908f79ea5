//! Figures for people and for metrics.

use rempart_types::{Epoch, Lsn, NodeId, NodeSet, Term};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Serves the guest.
    Primary,
    /// Leads, but serves nothing yet or no more: see `Status::stalled_on`.
    PrimaryFrozen,
    /// Follows a leader's log.
    Secondary,
    /// Neither.
    Idle,
}

/// A snapshot of one replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    pub role: Role,
    pub term: Term,
    pub epoch: Epoch,
    pub in_sync: NodeSet,
    pub end: Lsn,
    pub accepted: Lsn,
    pub durable: Lsn,
    pub committed: Lsn,
    pub stable: Lsn,
    pub applied: Lsn,
    /// Bytes of log not yet in the image.
    pub unapplied_bytes: u64,
    pub journal_used_bytes: u64,
    pub journal_capacity_bytes: u64,
    /// Guest requests under way.
    pub in_flight: usize,
    /// Age of the oldest guest write not yet acknowledged.
    pub stall: Duration,
    pub stalled_on: Option<NodeId>,
    pub serving: bool,
    pub disk_failed: bool,
    pub peers: Vec<PeerStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    pub node: NodeId,
    pub connected: bool,
    pub in_sync: bool,
    pub accepted: Lsn,
    pub durable: Lsn,
    /// Records and bytes this leader has and the peer has not.
    pub lag_records: u64,
    pub lag_bytes: u64,
    pub resync: Option<ResyncStatus>,
    /// It holds records of its own and waits for `Command::ApproveOverwrite`.
    pub diverged: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResyncStatus {
    /// Bytes of extents sent so far, of those known to differ so far, and of the whole disks looked at so far.
    pub sent_bytes: u64,
    pub changed_bytes: u64,
    pub examined_bytes: u64,
    pub total_bytes: u64,
}
