//! What a member is told.

use crate::{Message, Receipt, RequestId};
use rempart_types::{Lineage, NodeId, RegisterId, RegisterValue, SessionId, Term};

/// A fact. All facts of one moment are handled before the next is taken in; actions are executed in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Event {
    /// `next_wake` has come. Harmless at any time.
    Tick,

    // The register.
    /// Answers `Action::ReadRegister`.
    RegisterRead {
        request: RequestId,
        outcome: ReadOutcome,
    },
    /// Answers `Action::SwapRegister`. Answers to requests given up meanwhile are ignored.
    RegisterSwapped {
        request: RequestId,
        outcome: SwapOutcome,
    },

    // The store.
    /// Everything persisted up to this receipt is durable.
    Persisted {
        receipt: Receipt,
    },
    /// This replica's log has these runs now. Told whenever it changes; it goes into what this member writes
    /// into the register.
    LogChanged {
        lineage: Lineage,
    },
    /// Whether this copy may lead. False while it is syncing, or if recovery, or another member, found it corrupt
    /// (rules 4, 14).
    CopyUsable(bool),
    /// The journal or an image cannot be written: an fsync failed, or the device is full. Final for this life.
    LocalDiskFailed,

    // The network.
    /// A session is open. It replaces an older one with that node, which need not be closed first.
    PeerConnected {
        node: NodeId,
        session: SessionId,
    },
    PeerDisconnected {
        node: NodeId,
        session: SessionId,
    },
    Message {
        from: NodeId,
        session: SessionId,
        message: Message,
    },

    // Replication.
    /// This connected peer is durable ≥ stable and its accepted is the log's end: making it an acknowledger at
    /// this instant loses nothing (rule 13). Stands until `PeerFellBehind`, the end of the session, the action by
    /// which it stops being an acknowledger, or the next `Action::Activate`: then it must be told anew. Must be true *when handled*: route it,
    /// and `PeerFellBehind`, before anything else is appended or acknowledged.
    PeerCaughtUp {
        node: NodeId,
    },
    PeerFellBehind {
        node: NodeId,
    },
    /// This acknowledger has kept a write or a flush waiting past the deadline (rule 17).
    CommitBlockedBy {
        node: NodeId,
    },
    /// Replication's peer refused this member's term.
    PeerRefused {
        node: NodeId,
        promise: rempart_types::Epoch,
    },
    /// The whole recovered log is committed in this term: requests may be served (rule 5).
    TailCommitted {
        term: Term,
    },
    /// Answers `Action::Drain`: nothing is in flight, everything acknowledged is stable on every acknowledger.
    Drained {
        term: Term,
    },

    // The machine. Tell one of these before the first `Tick` of a life, or a machine that is not there is ended.
    /// Its process exists on this node, running or paused.
    VmRunning,
    /// No process of it is left on this node.
    VmStopped,

    Command(Command),
}

/// What a read of the register gave.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ReadOutcome {
    /// `None`: the register holds nothing under this id.
    Value(Option<RegisterValue>),
    /// No answer in time, or an error that says nothing.
    Unreachable,
    /// The register lost its state and serves nobody until every replica told what it knows (rule 21).
    Amnesiac,
}

/// What became of a swap.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SwapOutcome {
    /// It landed.
    Won,
    /// It did not, or did and this is a repetition: the register holds this. Compare the nonce.
    Lost(Option<RegisterValue>),
    /// It may land at any time, or never.
    Unknown,
    /// The register lost its state and serves nobody (rule 21). This request did not land.
    Amnesiac,
}

/// An order of the operator or of the node's policy. A refusal is an `Action::Report`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Command {
    /// Create the group's register and lead it. Refused when the register holds a value.
    Lead,
    /// Give the primacy to `to`, which must be in sync. The machine is shut down here first.
    Handover { to: NodeId },
    /// Lead although the register does not allow it (rule 16). The caller has named the loss.
    Force {
        /// The operator states that no other replica runs the machine or will, until it has heard of this.
        confirmed_fenced: bool,
        /// A new, random id.
        new_register: RegisterId,
        /// Go on even if the old register cannot be reached, and leave no tombstone in it.
        old_register_lost: bool,
    },
    /// Live in `to` from here on, a register of its own that holds nothing, or what an earlier try left there. Only a
    /// primary without peers may: nobody else looks at the old register. It goes on serving.
    MoveRegister { to: RegisterId },
    /// Answers `Condition::Superseded`: follow the group into the register that replaced ours. What only this
    /// replica holds was saved aside or given up.
    Rejoin,
    /// Replicate to this node too.
    AddPeer { node: NodeId },
    /// Stop replicating to it. It leaves the in-sync set first.
    RemovePeer { node: NodeId },
    /// Neither lead nor follow until restarted. A primary should hand over first: its peer takes over.
    Stop,
}
