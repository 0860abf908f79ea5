//! What the engine wants done.

use crate::{Bytes, CommandError, CommandId, CommandOutput, PeerMessage, Reply, Token};
use rempart_types::{Epoch, Lsn, MonotonicTime, NodeId, NodeSet, SessionId, Term};

/// Names one request for digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DigestJob(pub u64);

/// One thing to do. Execute them in order: an I/O command submitted before a message was meant to run beside it,
/// but never after it.
#[derive(Debug)]
pub enum Action {
    /// Execute on the group's files; answer with `Input::Io`.
    Io(crate::pending::IoCommand),
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
    Register(crate::pending::RegisterRequest),
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
    Report(Report),
}

/// What is to happen to the virtual machine here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmAction {
    /// Start it (or adopt it, if it still runs here) under the lease that follows.
    Run {
        term: Term,
    },
    /// The guard may let it run until `until`.
    RenewLease {
        until: MonotonicTime,
    },
    /// Stop its vCPUs; it may continue.
    Pause,
    Resume,
    /// It must not run here any more.
    Kill,
}

/// What an operator should learn. Each is also in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    Leads { term: Term, in_sync: NodeSet },
    Follows { leader: NodeId, term: Term },
    Degraded { lost: NodeId, epoch: Epoch },
    InSync { peer: NodeId, epoch: Epoch },
    Diverged { peer: NodeId, common: Lsn, peer_end: Lsn },
    ResyncStarted { peer: NodeId },
    ResyncFinished { peer: NodeId, bytes_sent: u64 },
    LocalDiskFailed { what: String },
}
