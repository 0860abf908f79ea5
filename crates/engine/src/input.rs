//! What the engine is told, beside guest requests.

use crate::{Bytes, DigestJob, PeerMessage};
use rempart_replication::Digest;
use rempart_types::{DiskIndex, ExtentIndex, Lsn, NodeId, SessionId};

/// Names one command, chosen by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

#[derive(Debug)]
pub enum Input {
    /// A session with a replica of this group is open. A newer one replaces an older one.
    Connected {
        peer: NodeId,
        session: SessionId,
    },
    Disconnected {
        peer: NodeId,
        session: SessionId,
    },
    Message {
        peer: NodeId,
        session: SessionId,
        message: PeerMessage,
    },
    Io(crate::pending::IoCompletion),
    Register(crate::pending::RegisterReply),
    Vm(VmFact),
    Digested {
        job: DigestJob,
        digests: Vec<Digest>,
    },
    Command {
        id: CommandId,
        command: Command,
    },
    /// `next_wake` has come.
    Tick,
}

/// What became of the virtual machine on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmFact {
    /// Its process runs (started, or adopted after a restart of the daemon).
    Running,
    Paused,
    /// No process of it is left here.
    Stopped,
    /// The guard reports that the lease ran out: the vCPUs are stopped, the process is or will be gone.
    GuardStopped,
}

/// What an operator or the control plane orders.
#[derive(Debug, Clone)]
pub enum Command {
    /// Replicate to `peer` too. `seeded`: its images hold something already; compare instead of sending all.
    AddPeer {
        peer: NodeId,
        seeded: bool,
    },
    RemovePeer {
        peer: NodeId,
    },
    /// Hand the primacy to `to`: drains first; the virtual machine is stopped here.
    Handover {
        to: NodeId,
    },
    /// Lead although the register says otherwise. The loss was named and the other side confirmed fenced.
    ForceLead,
    /// Let `peer` be overwritten although it holds records of its own.
    ApproveOverwrite {
        peer: NodeId,
    },
    /// Put the virtual machine's definition (its bytes are opaque here) into the log.
    PutConfig {
        content: Bytes,
    },
    /// A named consistency point.
    Mark {
        name: String,
    },
    /// Check the copies against each other, byte for byte, at one point of the log.
    Compare {
        peer: NodeId,
    },
    LimitResync {
        bytes_per_second: Option<u64>,
    },
    /// Finish what was accepted, apply it, mark a clean stop. The engine serves nothing afterwards.
    Stop,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandOutput {
    Done,
    /// At which record it stands.
    At(Lsn),
    Compared {
        at: Lsn,
        extents: u64,
        differing: Vec<(DiskIndex, ExtentIndex)>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    #[error("this replica does not lead")]
    NotPrimary,
    #[error("the peer is not connected or not in step")]
    PeerNotReady,
    #[error("another such command is under way")]
    Busy,
    #[error("no longer possible: {0}")]
    Aborted(&'static str),
    #[error("refused: {0}")]
    Refused(&'static str),
}
