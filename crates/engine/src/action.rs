//! What the engine wants done.

use crate::{
    Bytes, CommandError, CommandId, CommandOutput, PeerMessage, Reply, Token, ViewId, ViewReadError,
};
use rempart_cluster::RequestId;
use rempart_types::{Epoch, MonotonicTime, NodeId, RegisterId, RegisterValue, SessionId, Term};

/// Names one request for digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DigestJob(pub u64);

/// One thing to do. Execute them in order: an I/O command submitted before a message was meant to run beside it,
/// but never after it.
#[derive(Debug)]
pub enum Action {
    /// Execute on the group's files; answer with `Input::Io`.
    Io(rempart_store::IoCommand),
    /// Send on this session if it is still the one with that peer; drop otherwise.
    Send {
        peer: NodeId,
        session: SessionId,
        message: PeerMessage,
    },
    /// Close this session and connect anew.
    CloseSession {
        peer: NodeId,
        session: SessionId,
        why: &'static str,
    },
    /// Answer a guest's request.
    Reply {
        token: Token,
        reply: Reply,
    },
    /// Ask the register; answer with `Input::Register`.
    Register(RegisterRequest),
    Vm(VmAction),
    /// SHA-256 of each extent-sized part; answer with `Input::Digested`. May be computed on another thread.
    Digest {
        job: DigestJob,
        parts: Vec<Vec<Bytes>>,
    },
    CommandDone {
        id: CommandId,
        result: Result<CommandOutput, CommandError>,
    },
    /// Answers `Input::ReadView`: the extent, up to its disk's end; nothing where all of it is zero.
    ViewRead {
        view: ViewId,
        token: Token,
        result: Result<Option<Bytes>, ViewReadError>,
    },
    /// An open view is lost: nobody closed it.
    ViewEnded {
        view: ViewId,
        why: String,
    },
    Report(Report),
}

/// One request to a register. Never retried by the adapter: a repetition is the cluster's decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterRequest {
    Read {
        request: RequestId,
        register: RegisterId,
    },
    Swap {
        request: RequestId,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    },
    /// For a register that lost its state; no answer.
    Inform {
        register: RegisterId,
        known: Option<RegisterValue>,
        promise: Epoch,
    },
}

impl RegisterRequest {
    pub fn register(&self) -> RegisterId {
        match self {
            RegisterRequest::Read { register, .. }
            | RegisterRequest::Swap { register, .. }
            | RegisterRequest::Inform { register, .. } => *register,
        }
    }
}

/// What is to happen to the virtual machine here. `Input::Vm` tells what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmAction {
    /// It may run here: start it, adopt it or let it go on, as its definition wants.
    Run {
        term: Term,
    },
    /// For the guard: stop the vCPUs at `until`.
    RenewLease {
        until: MonotonicTime,
    },
    /// Stop its vCPUs; it may continue.
    Pause,
    Resume,
    /// In order, by force if it does not obey.
    ShutDown,
    /// At once.
    Kill,
}

/// What an operator should learn. Each begins a state and is told once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    Cluster(rempart_cluster::Condition),
    Replication(rempart_replication::Report),
    LocalDiskFailed {
        what: String,
    },
    /// This node's disk is full, and what a resync overwrites here cannot be kept: it stands still, and tries again
    /// by itself.
    DiskFull {
        what: String,
    },
    /// The resync that stood still goes on.
    DiskHasRoom,
}
