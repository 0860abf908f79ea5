//! What replicas say to each other. Guest bytes travel beside a message, never in it.

use rempart_types::{DiskIndex, Epoch, ExtentIndex, Lineage, LogPosition, Lsn, Term};
use serde::{Deserialize, Serialize};

/// Extents a resync asks for at once: 64 MiB of disk.
pub const REGION_EXTENTS: u64 = 1024;

/// `REGION_EXTENTS` consecutive extents of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Region {
    pub disk: DiskIndex,
    /// Its place on the disk, in regions.
    pub index: u64,
}

impl Region {
    /// Its first extent.
    pub fn first_extent(self) -> ExtentIndex {
        ExtentIndex(self.index.saturating_mul(REGION_EXTENTS))
    }
}

/// A set of extents of one region, one bit each, lowest bit first. Empty means none.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct RegionBits(pub Vec<u8>);

impl RegionBits {
    pub fn insert(&mut self, place: u64) {
        let byte = usize::try_from(place / 8).expect("a place in a region is small");
        assert!(place < REGION_EXTENTS, "place {place} is outside a region");
        if self.0.len() <= byte {
            self.0.resize(byte + 1, 0);
        }
        self.0[byte] |= 1 << (place % 8);
    }

    pub fn contains(&self, place: u64) -> bool {
        usize::try_from(place / 8)
            .ok()
            .and_then(|byte| self.0.get(byte))
            .is_some_and(|b| b >> (place % 8) & 1 == 1)
    }

    pub fn count(&self) -> u64 {
        self.0.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&byte| byte == 0)
    }
}

/// A strong digest of one extent's bytes, computed outside the cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

/// What a replica holds, told in answer to a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogState {
    pub lineage: Lineage,
    /// The last record held; all up to it are accepted.
    pub end: Lsn,
    pub durable: Lsn,
    /// What this replica knows to be durable on every member.
    pub stable: Lsn,
    /// What its image has taken, at most.
    pub applied: Lsn,
    /// It appended as the only member of its in-sync set: what it holds beyond the common point may have
    /// been acknowledged to a guest, so it is a divergence to be shown, not a tail to be dropped.
    pub wrote_alone: bool,
    /// The image may be anything: never filled, changed behind our back, or beyond the reach of the tables.
    pub image_unknown: bool,
    /// An unfinished resync.
    pub syncing: Option<Syncing>,
}

/// How far an unfinished resync went, as its target keeps it durably.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Syncing {
    /// The last consistent state of this copy, kept aside; extents not covered by `levels` stand there.
    pub base: LogPosition,
    /// Nothing may be concluded from `base`: compare or send everything.
    pub whole: bool,
    /// Regions before `.0` stand at `.1` at least. Ascending.
    pub levels: Vec<(Region, LogPosition)>,
}

/// How the extents to send are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ResyncMode {
    /// Those either side changed since the common point.
    Changed,
    /// Those whose digests differ.
    Compare,
}

/// One extent of a resync.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ExtentPiece {
    pub disk: DiskIndex,
    pub extent: ExtentIndex,
    /// The record that last touched it on the source.
    pub lsn: Lsn,
    /// Bytes of the payload that are this extent's. 0: it reads as zeroes and stays a hole.
    pub length: u32,
}

/// A replication message. The sender's term comes first in each that depends on one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Leader: who leads this session, and what do you hold?
    Probe { term: Term, lineage: Lineage, end: Lsn, stable: Lsn },
    /// Follower: this.
    State { term: Term, state: Box<LogState> },
    /// Follower: it promised not to follow terms below this epoch.
    Refused { term: Term, promise: Epoch },
    /// Leader: drop everything after `to`, before anything else. `to` and before is ours as well.
    Truncate { term: Term, to: Lsn, stable: Lsn },
    /// Follower: done, durably.
    Truncated { term: Term, end: Lsn },
    /// Leader: a batch (the payload). `sync`: make it durable at once.
    Append { term: Term, first: Lsn, last: Lsn, stable: Lsn, sync: bool },
    /// Leader: make everything up to here durable.
    Sync { term: Term, upto: Lsn },
    /// Leader: the stable watermark, where no batch carried it.
    Stable { term: Term, stable: Lsn },
    /// Follower: cumulative watermarks.
    Ack { term: Term, accepted: Lsn, durable: Lsn, applied: Lsn },
    /// Leader about to start its term: send me what you hold from `from` on.
    Pull { term: Term, from: Lsn },
    /// Member: a batch of it (the payload); `last` is the record it ends with, `end` where the log ends.
    Pulled { term: Term, first: Lsn, last: Lsn, end: Lsn },
    /// Leader: you cannot be caught up from the log; set `base` aside and become a target.
    ResyncBegin { term: Term, round: u64, base: LogPosition, mode: ResyncMode, restart: bool },
    /// Target: set aside, durably marked as syncing.
    ResyncReady { term: Term, round: u64 },
    /// Leader: extents will be as of `at`.
    ResyncPinned { term: Term, round: u64, at: LogPosition, lineage: Lineage },
    /// Target: give me a region. `changed`: extents this side changed on its own.
    ResyncRegion {
        term: Term,
        round: u64,
        region: Region,
        since: Lsn,
        changed: RegionBits,
        digests: Option<Vec<Digest>>,
    },
    /// Leader: extents of a region (their bytes are the payload, in order). `last`: the region is complete.
    ResyncExtents {
        term: Term,
        round: u64,
        sequence: u64,
        region: Region,
        pieces: Vec<ExtentPiece>,
        last: bool,
    },
    /// Target: all messages of extents up to this sequence were written.
    ResyncTaken { term: Term, round: u64, sequence: u64 },
    /// Target: every region is taken and durable; this copy stands at `at` and is whole again.
    ResyncDone { term: Term, round: u64, at: Lsn },
    /// Either: this round cannot go on.
    ResyncFailed { term: Term, round: u64 },
    /// Leader: open a snapshot at exactly `at` to be compared.
    CompareOpen { term: Term, compare: u64, at: Lsn },
    /// Follower: it is open, or cannot be.
    CompareOpened { term: Term, compare: u64, opened: bool },
    /// Leader: digests of a region of that snapshot.
    CompareRegion { term: Term, compare: u64, region: Region },
    /// Follower: these, one an extent.
    CompareDigests { term: Term, compare: u64, region: Region, digests: Vec<Digest> },
    /// Leader: done with the snapshot.
    CompareClose { term: Term, compare: u64 },
}
