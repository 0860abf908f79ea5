//! What a member wants done.

use crate::{Message, PersistentState};
use rempart_types::{Epoch, MonotonicTime, NodeId, NodeSet, RegisterId, RegisterValue, SessionId, Term};

/// Names one request to the register. Rises within one life of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RequestId(pub u64);

/// Names one state given to the store. Rises within one life of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Receipt(pub u64);

/// An order to the world around a member, executed in the order given.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    // The register.
    ReadRegister {
        request: RequestId,
        register: RegisterId,
    },
    /// Replace the value if the register is at `expected` (`None`: if it holds nothing). Never retried by the
    /// adapter. Whatever it depends on is durable already.
    SwapRegister {
        request: RequestId,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    },
    /// Tell a register that lost its state, or holds too little, what this replica knows (rule 21). No answer is awaited; reads go on.
    InformRegister {
        register: RegisterId,
        known: Option<RegisterValue>,
        promise: Epoch,
    },

    // The store.
    /// Replace the cluster's part of the superblock and make it durable; then `Event::Persisted`. A later state
    /// includes every earlier one, so only the newest need be written.
    Persist {
        state: PersistentState,
        receipt: Receipt,
    },

    // The network.
    /// Send in this session, or drop it if the session is over.
    Send {
        to: NodeId,
        session: SessionId,
        message: Message,
    },

    /// Close this session: the peer says what cannot be true.
    CloseSession {
        peer: NodeId,
        session: SessionId,
        why: &'static str,
    },

    // Replication.
    /// Lead in `term` from here on. Serve no request until the whole recovered log, the longest of the reachable
    /// acknowledgers', is committed in it; then `Event::TailCommitted`. The promise is durable.
    Activate {
        term: Term,
        acknowledgers: NodeSet,
    },
    /// Go on leading without a break: the next record carries `term`. Needs no `TailCommitted` unless one is
    /// still due, which then names this term.
    ContinueIn {
        term: Term,
        acknowledgers: NodeSet,
    },
    /// Commit and stable need all of these from here on, starting with whatever is not acknowledged yet.
    SetAcknowledgers {
        nodes: NodeSet,
    },
    /// Acknowledge nothing to the guest and append nothing new, until `Thaw`. Requests wait.
    Freeze,
    Thaw,
    /// Freeze, and make everything appended committed and stable; then `Event::Drained`.
    Drain {
        term: Term,
    },
    /// Accept records of `primary` in `term`, and of none below. The promise is durable.
    Follow {
        primary: NodeId,
        term: Term,
    },
    /// Neither append, accept nor acknowledge until the next `Activate` or `Follow`.
    StepDown,

    // The machine.
    /// The machine may run on this node: start it, adopt it, or let it go on, as its definition wants. Holds until
    /// `ShutDownVm`, `KillVm` or, for its vCPUs, `PauseVm` or the end of the lease.
    RunVm {
        term: Term,
    },
    /// For the guard: stop the vCPUs at `until`. Never moves back in one life. May come before `RunVm`: a machine
    /// that an earlier life of this daemon was allowed to run goes on while its requests wait.
    RenewLease {
        until: MonotonicTime,
    },
    /// Stop the vCPUs, keep the machine.
    PauseVm,
    /// Undo `PauseVm`. If its process died meanwhile, start it.
    ResumeVm,
    /// Shut it down in order, by force if it does not obey; then `Event::VmStopped`, also when there was none. May no
    /// longer run here.
    ShutDownVm,
    /// End it now; then `Event::VmStopped`, also when there was none. May no longer run here.
    KillVm,

    /// Something an operator should learn.
    Report(Condition),
}

/// Why a primary acknowledges nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrozenWhy {
    /// It lost a member and the register is out of reach (or has not answered yet).
    RegisterOutOfReach,
    /// A peer promised a newer epoch and the register is out of reach (or has not answered yet).
    Refused,
    /// Its lease ran out; the machine is paused.
    LeaseExpired,
    /// It is giving the primacy away.
    HandingOver,
}

/// Why a planned handover did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HandoverFailure {
    DestinationLost,
    Deadline,
}

/// Why a command was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RefusedWhy {
    NotPrimary,
    /// Only a replica that does not lead, or is cut off from whoever could let it go on, can be forced.
    AlreadyPrimary,
    /// The named peer is not in sync, not connected or not known.
    PeerNotInSync,
    /// The group exists already.
    AlreadyCreated,
    /// Another order is being carried out.
    Busy,
    /// Fencing was not confirmed.
    NotConfirmed,
    /// This copy is syncing, corrupt, or its disk failed.
    CopyUnusable,
    RegisterOutOfReach,
    /// Nothing to rejoin.
    NotSuperseded,
    /// Only a primary without peers can move its register.
    NotAlone,
    /// The register to move to holds somebody else's value.
    RegisterTaken,
}

/// What an operator sees. States, not log lines: each is reported once when it begins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Condition {
    /// This replica leads.
    Leading {
        term: Term,
    },
    /// This replica led last, the register does not answer, and what it can reach does not tell that nobody was
    /// given the primacy since: it leads again once the register or every other replica says so.
    WaitsToLead,
    /// This replica follows `primary`.
    Following {
        primary: NodeId,
        term: Term,
    },
    /// The primary has not been heard for `suspect_after`.
    PrimarySuspected {
        primary: NodeId,
    },
    /// The register gave this replica the primacy; the machine waits for the old lease to end.
    TakingOver {
        from: NodeId,
        epoch: Epoch,
    },
    /// A newer epoch exists: this replica no longer leads.
    Fenced {
        by: NodeId,
        epoch: Epoch,
    },
    /// `node` left the in-sync set.
    Left {
        node: NodeId,
        epoch: Epoch,
    },
    /// `node` joined the in-sync set.
    Joined {
        node: NodeId,
        epoch: Epoch,
    },
    /// `node` is ready to join but left too recently, or too often.
    JoinHeldBack {
        node: NodeId,
        until: MonotonicTime,
    },
    Frozen {
        why: FrozenWhy,
    },
    Thawed,
    RegisterOutOfReach,
    RegisterBack,
    /// The register lost its state: every replica must tell what it knows.
    RegisterAmnesiac,
    /// The register holds nothing, or an older epoch than this replica acted on: it was reset or exchanged.
    RegisterWentBack {
        known: Epoch,
        found: Option<Epoch>,
    },
    /// The register says this replica should lead, but its copy cannot.
    CopyUnusable,
    LocalDiskFailed,
    /// The group lives on in another register, after a forced takeover or a move: what this replica holds beyond
    /// the common point is a branch of its own. Waits for `Command::Rejoin`.
    Superseded {
        successor: RegisterId,
    },
    /// A forced takeover happened here.
    Forced {
        epoch: Epoch,
        register: RegisterId,
    },
    /// The group lives in `register` now. That is durable: the old one is not asked any more.
    RegisterMoved {
        epoch: Epoch,
        register: RegisterId,
    },
    HandedOver {
        to: NodeId,
        epoch: Epoch,
    },
    HandoverFailed {
        to: NodeId,
        why: HandoverFailure,
    },
    /// A command was refused.
    Refused {
        command: &'static str,
        why: RefusedWhy,
    },
}
