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
    /// The image may be anything: it came with content, or was changed behind our back, or is damaged.
    pub image_unknown: bool,
    /// Its disks were all zeroes when its log was empty.
    pub blank_start: bool,
    /// The operator of this replica allowed that what only it holds is overwritten.
    pub may_overwrite: bool,
    /// An unfinished resync.
    pub syncing: Option<Syncing>,
}

/// How far an unfinished resync went, as its target remembers it. Only `base` and `whole` outlive the process.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Syncing {
    /// The last state of this copy that both sides know; extents not covered by `levels` stand there, but for
    /// what this side changed on its own.
    pub base: LogPosition,
    /// Nothing may be concluded from `base`: everything is compared.
    pub whole: bool,
    /// Regions before `.0` stand at `.1` or later, which the log after `.1` makes one state. Ascending.
    pub levels: Vec<(Region, LogPosition)>,
}

impl Syncing {
    /// Levels kept; beyond, two neighbours become the older one.
    pub const MAX_LEVELS: usize = 8;

    /// Where the source's changes must be counted from for `region`.
    pub fn since(&self, region: Region) -> Lsn {
        self.levels.iter().find(|(end, _)| region < *end).map_or(self.base.lsn, |(_, at)| at.lsn)
    }

    /// Notes that the regions before `end` now stand at `at`.
    pub fn raise(&mut self, end: Region, at: LogPosition) {
        self.levels.retain(|(old, _)| *old > end);
        self.levels.insert(0, (end, at));
        if self.levels.len() > Self::MAX_LEVELS {
            // Forgetting the newer of two neighbours leaves its regions to the older: right, but more is sent.
            self.levels.remove(Self::MAX_LEVELS - 1);
        }
    }
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

/// A replication message. The leader's term comes first; a message of another term or session is dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// Leader: I lead this session; what do you hold?
    Probe { term: Term },
    /// Follower: this.
    State { term: Term, state: Box<LogState> },
    /// Follower: it promised not to follow terms below this epoch.
    Refused { term: Term, promise: Epoch },
    /// Leader: what you hold to `to` is ours as well; drop everything after it, before anything else.
    Truncate { term: Term, to: Lsn, stable: Lsn },
    /// Follower: done, durably. Its log now is a beginning of the leader's.
    Truncated { term: Term, end: Lsn },
    /// Leader: a batch (the payload), written in the term `written`. `sync`: make it durable at once.
    Append { term: Term, written: Term, first: Lsn, last: Lsn, stable: Lsn, sync: bool },
    /// Leader: make everything up to here durable.
    Sync { term: Term, upto: Lsn },
    /// Leader: the stable watermark, where no batch carried it.
    Stable { term: Term, stable: Lsn },
    /// Follower: cumulative watermarks. `whole`: no resync is unfinished.
    Ack { term: Term, accepted: Lsn, durable: Lsn, applied: Lsn, whole: bool },
    /// Leader about to start its term: send me what you hold from `from` on.
    Pull { term: Term, from: Lsn },
    /// Member: a batch of it (the payload).
    Pulled { term: Term, written: Term, first: Lsn, last: Lsn },
    /// Leader: the log alone cannot bring you up; keep your copy aside and become the target of a resync.
    /// `restart`: what earlier rounds brought counts for nothing.
    ResyncBegin { term: Term, round: u64, base: LogPosition, mode: ResyncMode, restart: bool },
    /// Target: kept aside, durably marked as syncing.
    ResyncReady { term: Term, round: u64 },
    /// Leader: extents will be as of `at` or later; the log after `at` makes them one state again. `lineage` ends
    /// at `at`.
    /// `chain`: by what the batch after `at` names what ends there.
    ResyncFrom { term: Term, round: u64, at: LogPosition, chain: Option<u32>, lineage: Lineage },
    /// Target: give me a region: what you changed after `since`, and what this side changed on its own
    /// (`changed`); or, with `digests`, whatever differs from them. Missing digests at the end are of holes.
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
    /// Target: every extent is here, durably; the log after `at` may come.
    ResyncLog { term: Term, round: u64, at: Lsn },
    /// Either: this round cannot go on.
    ResyncFailed { term: Term, round: u64 },
}

impl Message {
    /// The leader's term it belongs to.
    pub fn term(&self) -> Term {
        match *self {
            Message::Probe { term }
            | Message::State { term, .. }
            | Message::Refused { term, .. }
            | Message::Truncate { term, .. }
            | Message::Truncated { term, .. }
            | Message::Append { term, .. }
            | Message::Sync { term, .. }
            | Message::Stable { term, .. }
            | Message::Ack { term, .. }
            | Message::Pull { term, .. }
            | Message::Pulled { term, .. }
            | Message::ResyncBegin { term, .. }
            | Message::ResyncReady { term, .. }
            | Message::ResyncFrom { term, .. }
            | Message::ResyncRegion { term, .. }
            | Message::ResyncExtents { term, .. }
            | Message::ResyncTaken { term, .. }
            | Message::ResyncLog { term, .. }
            | Message::ResyncFailed { term, .. } => term,
        }
    }

    /// Whether a leader sends it (and a follower takes it), or the other way round. `ResyncFailed` goes both ways.
    pub(crate) fn is_from_leader(&self) -> bool {
        matches!(
            self,
            Message::Probe { .. }
                | Message::Truncate { .. }
                | Message::Append { .. }
                | Message::Sync { .. }
                | Message::Stable { .. }
                | Message::Pull { .. }
                | Message::ResyncBegin { .. }
                | Message::ResyncFrom { .. }
                | Message::ResyncExtents { .. }
        )
    }
}
