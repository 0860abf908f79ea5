//! What goes into the core and what comes out. Guest bytes stay outside: counts and positions stand for them.

use crate::{Digest, ExtentPiece, Message, Region, RegionBits, ResyncMode, Syncing};
use rempart_types::{Epoch, Lineage, LogPosition, Lsn, MonotonicTime, NodeId, NodeSet, SessionId, Term};

/// Names one flush, chosen by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlushId(pub u64);

/// A batch of the log, without its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchInfo {
    /// The term it was written in.
    pub term: Term,
    pub first: Lsn,
    pub last: Lsn,
    pub bytes: u64,
}

/// A fact the core is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    // From cluster.
    /// Lead in `term`: adopt the longest log of the reachable acknowledgers, start the term, commit it all; then
    /// `Action::Serving`.
    Lead {
        term: Term,
        acknowledgers: NodeSet,
    },
    /// Go on leading without a break, in this newer term.
    Continue {
        term: Term,
        acknowledgers: NodeSet,
    },
    /// The replicas that must acknowledge from now on.
    Acknowledgers(NodeSet),
    /// Accept records of `leader` in `term` or above, and of none below. The promise is durable.
    Follow {
        leader: NodeId,
        term: Term,
    },
    /// Neither append, accept nor acknowledge from here on.
    StepDown,
    /// Terms of older epochs are refused from here on; the promise is durable.
    Promised {
        epoch: Epoch,
    },
    /// `peer` is in step but will not be admitted before `until`: the guest need not wait for it meanwhile.
    HoldBack {
        peer: NodeId,
        until: MonotonicTime,
    },

    // From transport.
    Connected {
        peer: NodeId,
        session: SessionId,
    },
    Disconnected {
        peer: NodeId,
        session: SessionId,
    },
    /// `bytes`: of the payload that travelled beside the message.
    Received {
        peer: NodeId,
        session: SessionId,
        message: Message,
        bytes: u64,
    },

    // From the store.
    /// This leader sealed a batch of its term and is appending it. `sync`: a request in it waits for the disk.
    Sealed {
        batch: BatchInfo,
        sync: bool,
    },
    /// The store cannot do what `TruncateAfter`, `ResyncSetAside` or `StartResyncLog` wanted. `syncing`: the copy takes
    /// extents; `whole`: no resync is unfinished.
    StoreRefused {
        syncing: bool,
        whole: bool,
    },
    /// The store did not take what `AppendForeign` gave it: the log still ends at `end`.
    AppendRefused {
        end: Lsn,
    },
    Accepted(Lsn),
    Durable(Lsn),
    /// The image holds records to `upto`. `chain` is the store's name for what ends there.
    Applied {
        upto: Lsn,
        chain: Option<u32>,
    },
    /// What `TruncateAfter` asked for is durable.
    Truncated {
        end: Lsn,
    },
    /// What `ReadLog` asked for, in order and without gaps. Empty: the log ended there.
    LogRead {
        peer: NodeId,
        session: SessionId,
        after: Lsn,
        batches: Vec<BatchInfo>,
    },
    /// The journal no longer holds what `ReadLog` asked for.
    LogGone {
        peer: NodeId,
        session: SessionId,
        after: Lsn,
        oldest: Lsn,
    },
    /// The journal now starts here.
    JournalStart(Lsn),

    // From the guest.
    /// Finish it when everything committed so far, or with `all` everything sealed so far, is stable.
    Flush {
        id: FlushId,
        all: bool,
    },

    // Resync, from the store.
    /// Target: what `ResyncSetAside` asked for is durable.
    ResyncSetAside {
        round: u64,
    },
    /// Source: extents of the region asked for, whose bytes come beside this event. `next`: where to go on in the
    /// region, `None` when it is complete.
    RegionRead {
        round: u64,
        region: Region,
        pieces: Vec<ExtentPiece>,
        bytes: u64,
        next: Option<u64>,
    },
    /// Target: what it changed itself in this region, or its digests when comparing.
    RegionKnown {
        round: u64,
        region: Region,
        changed: RegionBits,
        digests: Option<Vec<Digest>>,
    },
    /// Target: the extents of this message and all before were written.
    ExtentsWritten {
        round: u64,
        sequence: u64,
    },
    /// Target: what `StartResyncLog` asked for is durable.
    ResyncLogStarted {
        from: Lsn,
    },
    /// Target: the copy is one state of the history again, durably.
    Whole,
    /// Either: the store cannot go on with this round.
    ResyncBroken {
        round: u64,
    },
    /// The sizes of the disks changed.
    Disks(Vec<u64>),

    /// The operator lets `peer` overwrite what only it holds.
    ApproveOverwrite {
        peer: NodeId,
    },
    /// The operator of this replica lets the group overwrite what only it holds.
    MayOverwrite,
    LimitResync {
        bytes_per_second: Option<u64>,
    },
    Tick,
}

/// What the core wants done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send to this session, and to no other. `payload`: with the bytes that came beside the event being handled;
    /// of several batches, this one.
    Send {
        peer: NodeId,
        session: SessionId,
        message: Message,
        payload: Option<usize>,
    },
    /// Read the log after `after`, whole batches, about `bytes` of them; answer with `LogRead` or `LogGone`.
    ReadLog {
        peer: NodeId,
        session: SessionId,
        after: Lsn,
        bytes: u64,
    },
    /// Close this session: the peer breaks the protocol or does not answer.
    CloseSession {
        peer: NodeId,
        session: SessionId,
        why: &'static str,
    },

    /// Append a record that starts this term; answer with `Sealed`.
    StartTerm {
        term: Term,
    },
    /// Append the batch that came beside the message being handled; answer with `Accepted`.
    AppendForeign {
        peer: NodeId,
        session: SessionId,
        batch: BatchInfo,
    },
    /// Make what was accepted durable; answer with `Durable`.
    Sync,
    /// Accepted by every acknowledger up to here: writes may be acknowledged, reads may return it.
    Committed(Lsn),
    /// Durable on every acknowledger up to here: the image may take it.
    Stable(Lsn),
    FlushDone {
        id: FlushId,
    },
    /// Drop every record after this one; answer with `Truncated`.
    TruncateAfter(Lsn),
    /// Keep the journal after this record, for peers that are being brought up; `None`: for nobody.
    KeepJournal {
        after: Option<Lsn>,
    },
    /// Everything the term found is committed in it: requests may be served.
    Serving {
        term: Term,
    },
    /// The log's runs changed.
    LineageChanged,

    // To cluster.
    /// This peer holds everything committed and stable, and from here on nothing is committed without it: it may
    /// be made an acknowledger at any time while this stands.
    CaughtUp {
        peer: NodeId,
    },
    FellBehind {
        peer: NodeId,
    },
    /// This acknowledger (or this replica itself) has kept the guest waiting past the deadline.
    BlockedBy {
        peer: NodeId,
    },
    RefusedBy {
        peer: NodeId,
        promise: Epoch,
    },
    /// Records to `upto` were made durable here, an acknowledger knows, and this log ends before: it lost them. The
    /// copy is damaged from here on and no term is started with it; `StepDown` is awaited.
    CopyLost {
        upto: Lsn,
    },

    // Resync, to the store.
    /// Target: keep the copy as it is aside and mark it as syncing, durably. All of its log counts as stable.
    ResyncSetAside {
        round: u64,
        syncing: Syncing,
    },
    /// Source: read, from place `from` in the region on, about `bytes` of what changed after `since` or is in
    /// `also`; or, with `digests`, of what differs from them or changed after `at`.
    ReadRegion {
        round: u64,
        region: Region,
        from: u64,
        since: Lsn,
        also: RegionBits,
        digests: Option<Vec<Digest>>,
        at: Lsn,
        bytes: u64,
    },
    /// Target: find what this side changed there after `since`, or its digests. `at`: what comes of it is the
    /// source's content at that position or later.
    KnowRegion {
        round: u64,
        region: Region,
        since: Lsn,
        at: Lsn,
        mode: ResyncMode,
    },
    /// Target: write the extents whose bytes came beside the message being handled.
    WriteExtents {
        round: u64,
        sequence: u64,
        pieces: Vec<ExtentPiece>,
    },
    /// Target: make the extents durable, drop the old log and start a new one after `from`; then end the resync
    /// once the log reached what the extents need.
    StartResyncLog {
        from: LogPosition,
        /// By what the next batch names what ends at `from`.
        chain: Option<u32>,
        lineage: Lineage,
    },

    Report(Report),
}

/// What an operator wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// `peer` holds records after `common` that may have been acknowledged and that this side does not have.
    /// They are overwritten only on command.
    Diverged {
        peer: NodeId,
        common: Lsn,
        peer_end: Lsn,
    },
    /// The journal brings `peer` up.
    CatchUpStarted {
        peer: NodeId,
        after: Lsn,
        end: Lsn,
    },
    ResyncStarted {
        peer: NodeId,
        base: LogPosition,
        mode: ResyncMode,
    },
    /// The log does the rest.
    ResyncFinished {
        peer: NodeId,
        bytes_sent: u64,
        /// Of the extents that it lacked.
        bytes_changed: u64,
    },
    /// `peer` takes part in each commit.
    InStep {
        peer: NodeId,
    },
    /// `peer` knows that records to `upto` were durable on every member, but the log here ends at `end`.
    Lost {
        peer: NodeId,
        end: Lsn,
        upto: Lsn,
    },
    /// Records of `from` that this replica had not were adopted at the start of its term.
    Adopted {
        from: NodeId,
        first: Lsn,
        last: Lsn,
    },
}
