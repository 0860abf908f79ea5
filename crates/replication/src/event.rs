//! What goes into the core and what comes out. Guest bytes stay outside: handles and counts stand for them.

use crate::{Digest, ExtentPiece, Message, Region, RegionBits, ResyncMode, Syncing};
use rempart_types::{LogPosition, Lsn, NodeId, NodeSet, SessionId, Term};

/// Names one flush, chosen by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlushId(pub u64);

/// Bytes kept by the caller under this number while a message that needs them is on its way through the core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Payload(pub u64);

/// A fact the core is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    // From cluster.
    /// This replica leads `term`. The first record it appends starts the term; nothing is served before that.
    Lead {
        term: Term,
        acknowledgers: NodeSet,
    },
    /// The replicas that must acknowledge from now on.
    Acknowledgers(NodeSet),
    /// It leads no more. Nothing is acknowledged from here on.
    StepDown,
    /// Terms below this one are refused from now on; the promise is durable.
    Promised {
        term: Term,
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
    /// `bytes` and `payload` tell of what travelled beside the message.
    Received {
        peer: NodeId,
        session: SessionId,
        message: Message,
        payload: Payload,
        bytes: u64,
    },

    // From the store.
    /// This leader sealed a batch of its term. `sync`: a request in it waits for the disk.
    Sealed {
        first: Lsn,
        last: Lsn,
        bytes: u64,
        sync: bool,
    },
    Accepted(Lsn),
    Durable(Lsn),
    Applied(Lsn),
    /// What `TruncateAfter` asked for is durable.
    Truncated {
        end: Lsn,
    },
    /// What `ReadLog` asked for. `first` is the one asked for unless the log no longer holds it (`Trimmed`).
    LogRead {
        peer: NodeId,
        session: SessionId,
        first: Lsn,
        last: Lsn,
        bytes: u64,
        payload: Payload,
    },
    /// The journal no longer holds what `ReadLog` asked for.
    Trimmed {
        peer: NodeId,
        session: SessionId,
    },

    // From the guest.
    /// Counted when it was parsed.
    Flush {
        id: FlushId,
    },

    // Resync and compare, from the store through the engine.
    /// Target: `ResyncSetAside` is durable.
    SetAside {
        round: u64,
    },
    /// Source: `ResyncPin` is done.
    Pinned {
        round: u64,
        at: LogPosition,
    },
    /// Source: extents of the region asked for; their bytes are `payload`.
    RegionRead {
        round: u64,
        region: Region,
        pieces: Vec<ExtentPiece>,
        bytes: u64,
        payload: Payload,
        last: bool,
    },
    /// Target: what it changed itself in this region, and its digests when comparing.
    RegionKnown {
        round: u64,
        region: Region,
        changed: RegionBits,
        digests: Option<Vec<Digest>>,
    },
    /// Target: extents were written.
    ExtentsWritten {
        round: u64,
        sequence: u64,
    },
    /// Target: everything taken so far is durable and so is the level it stands at.
    CheckpointDone {
        round: u64,
    },
    /// Target: the copy is whole at `at`.
    ResyncSettled {
        round: u64,
        at: LogPosition,
    },
    /// Either: the store cannot go on with this round.
    ResyncBroken {
        round: u64,
    },

    /// The operator lets `peer` overwrite what only it holds.
    ApproveOverwrite {
        peer: NodeId,
    },
    Tick,
}

/// What the core wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send to this session, and to no other. `payload`: these bytes go with it.
    Send {
        peer: NodeId,
        session: SessionId,
        message: Message,
        payload: Option<Payload>,
    },
    /// Send the batch that ends at `last` and was just sealed.
    SendSealed {
        peer: NodeId,
        session: SessionId,
        message: Message,
        first: Lsn,
        last: Lsn,
    },
    /// Read the log from `from`, whole batches, about `bytes` of them; answer with `LogRead` or `Trimmed`.
    ReadLog {
        peer: NodeId,
        session: SessionId,
        from: Lsn,
        bytes: u64,
    },
    /// Close this session: the peer breaks the protocol or does not answer.
    CloseSession {
        peer: NodeId,
        session: SessionId,
        why: &'static str,
    },

    /// Append the first record of this term; answer with `Sealed`.
    StartTerm {
        term: Term,
    },
    /// Append this batch of a leader; answer with `Accepted`.
    AppendForeign {
        payload: Payload,
        first: Lsn,
        last: Lsn,
    },
    /// Forget these bytes; the message they came with was dropped.
    Drop {
        payload: Payload,
    },
    /// Make what was accepted durable; answer with `Durable`.
    Sync,
    /// Durable on every member up to here: the image may take it.
    Stable(Lsn),
    /// Accepted by every member up to here: writes may be acknowledged, reads may return it.
    Committed(Lsn),
    FlushDone {
        id: FlushId,
    },
    /// Drop every record after this one; answer with `Truncated`.
    TruncateAfter(Lsn),
    /// The recovered tail is committed in this term: requests may be served.
    Serving {
        term: Term,
    },

    // To cluster.
    /// This peer holds everything: it may be admitted while this stands.
    Ready {
        peer: NodeId,
    },
    /// It no longer does.
    NotReady {
        peer: NodeId,
    },
    /// This member has kept the guest waiting past the deadline.
    BlockedBy {
        peer: NodeId,
    },
    /// This peer refuses the term; it promised `promise`.
    RefusedBy {
        peer: NodeId,
        promise: rempart_types::Epoch,
    },
    /// A leader with this term spoke to this replica.
    Led {
        by: NodeId,
        term: Term,
    },

    // Resync and compare, to the store through the engine.
    /// Target: keep the copy as of `syncing.base` aside and mark it durably.
    ResyncSetAside {
        round: u64,
        syncing: Syncing,
        restart: bool,
    },
    /// Source: pin a snapshot and the journal after it.
    ResyncPin {
        round: u64,
    },
    ResyncUnpin {
        round: u64,
    },
    /// Source: read what changed in this region after `since`, `also` these, or those whose digests differ.
    ReadRegion {
        round: u64,
        region: Region,
        since: Lsn,
        also: RegionBits,
        digests: Option<Vec<Digest>>,
        mode: ResyncMode,
    },
    /// Target: find what this side changed there since the base, and the digests if asked.
    KnowRegion {
        round: u64,
        region: Region,
        mode: ResyncMode,
    },
    /// Target: write these extents.
    WriteExtents {
        round: u64,
        sequence: u64,
        pieces: Vec<ExtentPiece>,
        payload: Payload,
    },
    /// Target: make what was taken durable and keep `syncing`.
    Checkpoint {
        round: u64,
        syncing: Syncing,
    },
    /// Target: make everything durable; the copy stands at `at`.
    ResyncSettle {
        round: u64,
        at: LogPosition,
        lineage: rempart_types::Lineage,
    },

    Report(Report),
}

/// What an operator wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// `peer` holds records after `common` that may have been acknowledged and that this side does not have.
    Diverged {
        peer: NodeId,
        common: Lsn,
        peer_end: Lsn,
    },
    CatchUpStarted {
        peer: NodeId,
        from: Lsn,
        to: Lsn,
    },
    ResyncStarted {
        peer: NodeId,
        base: LogPosition,
        mode: ResyncMode,
    },
    ResyncFinished {
        peer: NodeId,
        at: LogPosition,
        bytes_sent: u64,
    },
    InStep {
        peer: NodeId,
    },
}
