//! What the engine is told, beside guest requests.

use crate::{Bytes, DigestJob, OpenedView, PeerMessage, Token, ViewId, ViewedExtents};
use rempart_cluster::{ReadOutcome, RequestId, SwapOutcome};
use rempart_replication::Digest;
use rempart_types::{DiskIndex, ExtentIndex, LogPosition, Lsn, NodeId, RegisterId, SessionId};

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
    Io(rempart_store::IoCompletion),
    /// Answers `Action::Register`.
    Register(RegisterReply),
    Vm(VmFact),
    Digested {
        job: DigestJob,
        digests: Vec<Digest>,
    },
    Command {
        id: CommandId,
        command: Command,
    },
    /// Read extents of an open view: `Action::ViewRead` follows for each, the first with `token`, the others with the
    /// numbers after it, in any order. How many are under way is the caller's to bound.
    ReadView {
        view: ViewId,
        token: Token,
        extents: ViewedExtents,
    },
    /// `next_wake` has come.
    Tick,
}

/// What a register answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterReply {
    Read { request: RequestId, outcome: ReadOutcome },
    Swapped { request: RequestId, outcome: SwapOutcome },
}

/// What became of the virtual machine on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmFact {
    /// Its process exists here, running or paused (started, or found after a restart of the daemon).
    Running,
    /// No process of it is left here.
    Stopped,
}

/// What an operator or the control plane orders.
#[derive(Debug, Clone)]
pub enum Command {
    /// Create the group in its register and lead it: the first replica of a new group.
    Create,
    /// Replicate to `peer` too.
    AddPeer {
        peer: NodeId,
    },
    RemovePeer {
        peer: NodeId,
    },
    /// Hand the primacy to `to`: the virtual machine is shut down here, the log drained, then the register told.
    Handover {
        to: NodeId,
    },
    /// Lead although the register does not allow it: the loss was named.
    Force {
        confirmed_fenced: bool,
        new_register: RegisterId,
        old_register_lost: bool,
    },
    /// On a primary without peers: live in another register from here on, and go on serving.
    MoveRegister {
        to: RegisterId,
    },
    /// After `Condition::Superseded`: follow the group into its new register. What only this replica holds may
    /// be overwritten; it is kept as a snapshot until the copy is whole again.
    Rejoin,
    /// On the primary: let `peer` be overwritten although it holds records of its own.
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
    /// Check the copies against each other, byte for byte, at one point of the log, while the machine runs.
    Compare {
        peer: NodeId,
    },
    /// On the primary: keep all disks readable as they are now, until the view is closed or lost.
    OpenView {
        /// The position of an earlier view, to learn whether the change map tells what changed since.
        since: Option<LogPosition>,
        /// What all snapshots of this copy may keep aside from now on. Past it all views are lost.
        keep_bytes: u64,
    },
    CloseView {
        view: ViewId,
    },
    /// `None`: as fast as it goes.
    LimitResync {
        bytes_per_second: Option<u64>,
    },
    /// On this replica only, with the followers first. Its image's place is known to who executes I/O.
    AddDisk {
        entry: rempart_store::DiskEntry,
    },
    /// On this replica only, with the leader first. The image stays.
    RemoveDisk {
        disk: DiskIndex,
    },
    /// On this replica only, with the followers first: to a larger size in bytes.
    ResizeDisk {
        disk: DiskIndex,
        size: u64,
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
    ViewOpened(OpenedView),
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
