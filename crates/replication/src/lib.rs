//! How a group's log becomes the same on every replica, without I/O, clock or threads.
//!
//! A primary counts what it and its peers hold and derives *committed* and *stable*; it takes each peer from an
//! unknown state to the end of its log. A follower checks session, term and order. The rules are those of
//! `docs/architecture.md`.

mod config;
mod event;
mod message;

pub use config::Config;
pub use event::{Action, Event, FlushId, Payload, Report};
pub use message::{
    Digest, ExtentPiece, LogState, Message, REGION_EXTENTS, Region, RegionBits, ResyncMode, Syncing,
};

use rempart_types::{Lineage, Lsn, MonotonicTime, NodeId};

/// What recovery found in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    pub state: LogState,
    /// The first record the journal can still give.
    pub journal_start: Lsn,
}

/// One replica's replication of one group.
#[derive(Debug)]
pub struct Replication {
    #[expect(dead_code)]
    node: NodeId,
}

impl Replication {
    pub fn new(node: NodeId, _config: Config, _recovered: Recovered) -> Replication {
        Replication { node }
    }

    /// Takes one fact; appends what follows from it to `out`.
    pub fn handle(&mut self, _event: Event, _now: MonotonicTime, _out: &mut Vec<Action>) {
        todo!()
    }

    /// Everything ready in this turn was handed in: sends the acknowledgements and news that were held back to be
    /// told once.
    pub fn end_turn(&mut self, _now: MonotonicTime, _out: &mut Vec<Action>) {
        todo!()
    }

    /// When `Event::Tick` is wanted next.
    pub fn next_wake(&self) -> Option<MonotonicTime> {
        todo!()
    }

    pub fn lineage(&self) -> &Lineage {
        todo!()
    }

    pub fn committed(&self) -> Lsn {
        todo!()
    }
}
