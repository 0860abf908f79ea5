//! Figures for people and for metrics.

use crate::Engine;
use rempart_cluster::FrozenWhy;
use rempart_replication::{PeerProgress, REGION_EXTENTS, Report};
use rempart_types::{EXTENT_SIZE, Epoch, LogPosition, Lsn, MonotonicTime, NodeId, NodeSet, RegisterId, Term};
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

/// The little that is looked at after every step of a simulation, without a single allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Glance {
    pub role: Role,
    pub term: Term,
    pub serving: bool,
    pub end: Lsn,
    pub accepted: Lsn,
    pub durable: Lsn,
    pub committed: Lsn,
    pub stable: Lsn,
    pub applied: Lsn,
}

/// One replica at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    pub role: Role,
    pub term: Term,
    pub epoch: Epoch,
    /// Who leads, as far as this replica knows.
    pub primary: Option<NodeId>,
    /// The register the group lives in, when known.
    pub register: Option<RegisterId>,
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
    /// Guest requests under way.
    pub in_flight: usize,
    /// Age of the oldest guest write not yet acknowledged.
    pub stall: Duration,
    pub stalled_on: Option<NodeId>,
    pub serving: bool,
    /// Why the guest's writes are not acknowledged.
    pub frozen: Option<FrozenWhy>,
    pub disk_failed: bool,
    /// A resync of this copy waits for room on this node's disk.
    pub disk_full: bool,
    /// The group was led on by force elsewhere: this copy waits for `Command::Rejoin`.
    pub superseded: bool,
    /// This copy is unfinished: what it was before its resync began, which it can be rolled back to.
    pub set_aside: Option<LogPosition>,
    pub peers: Vec<PeerStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    pub node: NodeId,
    pub connected: bool,
    pub in_sync: bool,
    pub accepted: Lsn,
    pub durable: Lsn,
    /// Records this leader has and the peer has not.
    pub lag_records: u64,
    /// Their bytes; at least, if it is far behind.
    pub lag_bytes: u64,
    /// The one under way, else the last one of this engine's life.
    pub resync: Option<ResyncStatus>,
    /// It holds records of its own and waits for `Command::ApproveOverwrite`.
    pub diverged: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResyncStatus {
    /// Bytes of extents sent so far.
    pub sent_bytes: u64,
    /// Bytes of extents found to differ so far.
    pub changed_bytes: u64,
    /// Bytes of the disks looked at so far.
    pub examined_bytes: u64,
    pub total_bytes: u64,
    pub running: bool,
}

impl Engine {
    /// Bytes of log not yet in the image.
    pub fn unapplied_bytes(&self) -> u64 {
        self.store.unapplied_bytes()
    }

    /// Bytes that snapshots keep aside here.
    pub fn snapshot_bytes(&self) -> u64 {
        self.store.snapshot_bytes()
    }

    pub(crate) fn is_superseded(&self) -> bool {
        self.member.role() == rempart_cluster::Role::Superseded
    }

    /// What became of the last resync is shown after its end, too.
    pub(crate) fn note_resync(&mut self, report: &Report) {
        if let Report::ResyncFinished { peer, bytes_sent, bytes_changed } = *report {
            let total_bytes = self.disk_sizes.iter().sum();
            let resync = ResyncStatus {
                sent_bytes: bytes_sent,
                changed_bytes: bytes_changed,
                examined_bytes: total_bytes,
                total_bytes,
                running: false,
            };
            self.last_resyncs.insert(peer, resync);
        }
    }

    fn serves(&self) -> bool {
        self.serving && !self.frozen && self.failure.is_none()
    }

    pub fn role(&self) -> Role {
        use rempart_cluster::Role as Cluster;
        match self.member.role() {
            Cluster::Leading | Cluster::HandingOver if self.serves() => Role::Primary,
            Cluster::Leading | Cluster::HandingOver => Role::PrimaryFrozen,
            Cluster::Following | Cluster::Suspecting => Role::Secondary,
            _ => Role::Idle,
        }
    }

    pub fn glance(&self) -> Glance {
        Glance {
            role: self.role(),
            term: self.member.term().unwrap_or_default(),
            serving: self.serves(),
            end: self.log_end(),
            accepted: self.replication.accepted(),
            durable: self.replication.durable(),
            committed: self.replication.committed(),
            stable: self.replication.stable(),
            applied: self.store.applied(),
        }
    }

    pub fn status(&self, now: MonotonicTime) -> Status {
        let cluster = self.member.status();
        let replication = self.replication.status(now);
        let Glance { role, term, serving, end, accepted, durable, committed, stable, applied } =
            self.glance();
        let total_bytes = self.disk_sizes.iter().sum();
        let peers = replication.peers.iter().map(|peer| PeerStatus {
            node: peer.peer,
            connected: peer.progress != PeerProgress::Away,
            in_sync: cluster.in_sync.contains(peer.peer),
            accepted: peer.accepted,
            durable: peer.durable,
            lag_records: end.0.saturating_sub(peer.accepted.0),
            lag_bytes: peer.lag_bytes,
            resync: match peer.progress {
                PeerProgress::Resyncing { bytes_sent, bytes_changed, regions_done } => Some(ResyncStatus {
                    sent_bytes: bytes_sent,
                    changed_bytes: bytes_changed,
                    examined_bytes: (regions_done * REGION_EXTENTS * EXTENT_SIZE).min(total_bytes),
                    total_bytes,
                    running: true,
                }),
                _ => self.last_resyncs.get(&peer.peer).copied(),
            },
            diverged: peer.progress == PeerProgress::Diverged,
        });
        Status {
            role,
            term,
            epoch: cluster.epoch,
            primary: cluster.primary,
            register: cluster.register,
            in_sync: cluster.in_sync.clone(),
            end,
            accepted,
            durable,
            committed,
            stable,
            applied,
            unapplied_bytes: self.store.unapplied_bytes(),
            journal_used_bytes: self.store.journal_bytes(),
            in_flight: self.requests.in_flight(),
            stall: replication.stall,
            stalled_on: replication.stalled_on,
            serving,
            frozen: cluster.frozen,
            disk_failed: self.failure.is_some(),
            disk_full: self.store.waits_for_room(),
            superseded: self.is_superseded(),
            set_aside: self.store.set_aside(),
            peers: peers.collect(),
        }
    }
}
