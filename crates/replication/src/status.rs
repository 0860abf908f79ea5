//! Figures of the core.

use crate::link::Progress;
use crate::{Replication, Role};
use rempart_types::{Lsn, MonotonicTime, NodeId};
use std::time::Duration;

/// How far a peer is, as its leader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerProgress {
    Away,
    /// Being asked what it holds.
    Probing,
    Refused,
    Diverged,
    Resyncing {
        bytes_sent: u64,
        bytes_changed: u64,
        regions_done: u64,
    },
    CatchingUp,
    Streaming,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerStatus {
    pub peer: NodeId,
    pub progress: PeerProgress,
    pub accepted: Lsn,
    pub durable: Lsn,
    pub applied: Lsn,
    /// Bytes of the log it has not accepted. Of a peer that is far behind: at least.
    pub lag_bytes: u64,
    pub caught_up: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    pub serving: bool,
    /// Age of the oldest write or flush that waits.
    pub stall: Duration,
    /// The member it waits for.
    pub stalled_on: Option<NodeId>,
    pub accepted: Lsn,
    pub durable: Lsn,
    pub peers: Vec<PeerStatus>,
}

impl Replication {
    pub fn status(&self, now: MonotonicTime) -> Status {
        let Role::Leader(leader) = &self.role else {
            return Status {
                serving: false,
                stall: Duration::ZERO,
                stalled_on: None,
                accepted: self.local.accepted,
                durable: self.local.durable,
                peers: Vec::new(),
            };
        };
        let peers = leader.links.values().map(|link| PeerStatus {
            peer: link.peer,
            progress: match &link.progress {
                Progress::Away => PeerProgress::Away,
                Progress::Refused => PeerProgress::Refused,
                Progress::Diverged(_) => PeerProgress::Diverged,
                Progress::Resyncing(source) => PeerProgress::Resyncing {
                    bytes_sent: source.bytes_sent,
                    bytes_changed: source.bytes_changed,
                    regions_done: source.regions_done,
                },
                Progress::CatchingUp { .. } => PeerProgress::CatchingUp,
                Progress::Streaming => PeerProgress::Streaming,
                Progress::Probing
                | Progress::Known(_)
                | Progress::Pulling { .. }
                | Progress::Truncating { .. } => PeerProgress::Probing,
            },
            accepted: link.accepted.unwrap_or_default(),
            durable: link.durable.unwrap_or_default(),
            applied: link.applied,
            lag_bytes: leader.recent.at_least_after(link.accepted.unwrap_or_default()),
            caught_up: link.caught_up,
        });
        Status {
            serving: leader.is_serving(),
            stall: leader.stall(now),
            stalled_on: leader.stalled_on(&self.local),
            accepted: self.local.accepted,
            durable: self.local.durable,
            peers: peers.collect(),
        }
    }
}
