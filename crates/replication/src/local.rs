//! What this replica holds, whatever its role.

use crate::sync_queue::SyncQueue;
use crate::{Action, Config, LogState, Recovered, Syncing};
use rempart_types::{Epoch, Lineage, LogPosition, Lsn, MonotonicTime, NodeId, Term};

/// This replica's log, by numbers.
#[derive(Debug)]
pub(crate) struct Local {
    pub node: NodeId,
    pub config: Config,
    pub lineage: Lineage,
    /// The last record given to the store.
    pub end: Lsn,
    /// Records to here are in the journal file.
    pub accepted: Lsn,
    pub durable: Lsn,
    pub applied: Lsn,
    /// By what the next batch names what ends at `applied`: handed on to a peer whose log starts there.
    pub applied_chain: Option<u32>,
    pub committed: Lsn,
    pub stable: Lsn,
    /// The first record the journal can still give.
    pub journal_start: Lsn,
    pub promise: Epoch,
    pub wrote_alone: bool,
    pub image_unknown: bool,
    pub blank_start: bool,
    pub may_overwrite: bool,
    /// No resync is unfinished.
    pub whole: bool,
    pub syncing: Option<Syncing>,
    /// Where the store is about to start a new log after a resync.
    pub starting_log: Option<(LogPosition, Option<u32>, Lineage)>,
    /// Rounds of resync begun by this replica as leader.
    pub rounds: u64,
    /// Sizes of the disks in bytes, by index.
    pub disks: Vec<u64>,
    pub sync: SyncQueue,
    /// The store is busy with something that must end before a session starts: a truncation, setting aside,
    /// starting the log after a resync.
    pub busy: u32,
    pub bucket: Bucket,
}

impl Local {
    pub fn new(node: NodeId, config: Config, recovered: Recovered) -> Local {
        let Recovered { state, applied_chain, journal_start, promise, whole, disks } = recovered;
        let bucket = Bucket::new(config.resync_bytes_per_second);
        Local {
            node,
            config,
            lineage: state.lineage,
            end: state.end,
            accepted: state.end,
            durable: state.durable,
            applied: state.applied,
            applied_chain,
            committed: state.stable.min(state.end),
            stable: state.stable.min(state.end),
            journal_start,
            promise,
            wrote_alone: state.wrote_alone,
            image_unknown: state.image_unknown,
            blank_start: state.blank_start,
            may_overwrite: state.may_overwrite,
            whole,
            syncing: state.syncing,
            starting_log: None,
            rounds: 0,
            disks,
            sync: SyncQueue::default(),
            busy: 0,
            bucket,
        }
    }

    /// Nothing is on its way that would change what `state` says.
    pub fn is_settled(&self) -> bool {
        self.accepted == self.end && self.busy == 0
    }

    pub fn state(&self) -> LogState {
        LogState {
            lineage: self.lineage.clone(),
            end: self.end,
            durable: self.durable,
            stable: self.stable,
            applied: self.applied,
            wrote_alone: self.wrote_alone,
            image_unknown: self.image_unknown,
            blank_start: self.blank_start,
            may_overwrite: self.may_overwrite,
            syncing: self.syncing.clone(),
        }
    }

    /// A name for a round that no round of an older term had.
    pub fn next_round(&mut self, term: Term) -> u64 {
        self.rounds += 1;
        (term.epoch.0 << 24) | (u64::from(term.incarnation & 0xff) << 16) | (self.rounds & 0xffff)
    }

    /// The log is a new one, which starts after `from`.
    pub fn log_started(&mut self, from: Lsn, out: &mut Vec<Action>) {
        let (at, chain, lineage) = self.starting_log.take().expect("a log is started when it was asked for");
        assert_eq!(at.lsn, from, "the store starts the log where it was told");
        (self.end, self.accepted, self.durable) = (from, from, from);
        (self.applied, self.committed, self.stable) = (from, from, from);
        self.applied_chain = chain;
        self.journal_start = from.next();
        self.lineage = lineage;
        self.syncing = None;
        self.image_unknown = false;
        self.wrote_alone = false;
        self.may_overwrite = false;
        self.sync = SyncQueue::default();
        out.push(Action::LineageChanged);
    }

    /// The log grew by records of `term`.
    pub fn append(&mut self, term: Term, first: Lsn, last: Lsn, out: &mut Vec<Action>) {
        assert_eq!(first, self.end.next(), "a log is dense");
        assert!(last >= first, "a batch holds a record");
        if self.lineage.last_term() != term {
            self.lineage.append(term, first);
            out.push(Action::LineageChanged);
        }
        self.end = last;
    }

    /// The log ends at `end` now.
    pub fn truncate(&mut self, end: Lsn, out: &mut Vec<Action>) {
        assert!(
            end >= self.applied,
            "the image holds records to {}, the log cannot end at {end}",
            self.applied
        );
        let runs = self.lineage.runs().len();
        self.lineage.truncate(end);
        if self.lineage.runs().len() != runs {
            out.push(Action::LineageChanged);
        }
        self.end = self.end.min(end);
        self.accepted = self.accepted.min(end);
        self.durable = self.durable.min(end);
        self.committed = self.committed.min(end);
        self.stable = self.stable.min(end);
        self.sync.truncate(end);
    }
}

/// How fast a resync may go: bytes are paid for after they were sent.
#[derive(Debug)]
pub(crate) struct Bucket {
    rate: Option<u64>,
    /// Paid for up to here.
    free_at: MonotonicTime,
}

impl Bucket {
    fn new(rate: Option<u64>) -> Bucket {
        Bucket { rate: rate.filter(|&rate| rate > 0), free_at: MonotonicTime::ZERO }
    }

    pub fn set_rate(&mut self, rate: Option<u64>) {
        *self = Bucket::new(rate);
    }

    /// When something may be sent: `None` is now.
    pub fn wait_until(&self, now: MonotonicTime) -> Option<MonotonicTime> {
        (self.free_at > now).then_some(self.free_at)
    }

    pub fn spend(&mut self, bytes: u64, now: MonotonicTime) {
        let Some(rate) = self.rate else { return };
        let nanos = u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX);
        self.free_at = self.free_at.max(now) + std::time::Duration::from_nanos(nanos);
    }
}
