//! The data plane: one thread per group, which owns the group's engine, its journal, its NBD server and its links.

mod block_status;
mod link;
mod nbd_server;
mod spin;
mod thread;
mod view_server;
mod views;

use rempart_engine::{
    Action, Bytes, Command, CommandError, CommandOutput, Report, Role, Status, ViewId, VmAction, VmFact,
};
use rempart_transport::Connection;
use rempart_types::{NodeId, RegisterId};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;
use tokio::sync::{oneshot, watch};

pub use block_status::Since;
pub use nbd_server::export_name;
pub use thread::{GroupParams, open};
pub use view_server::{ViewServer, ViewedDisk};
pub use views::{ServedView, view_channel};

/// What the thread is told.
#[derive(Debug)]
pub enum ToGroup {
    /// A connection with a peer, its greetings exchanged. It replaces an older one.
    Link {
        peer: NodeId,
        connection: Box<Connection>,
    },
    /// No connection with this peer is wanted any more.
    Unlink {
        peer: NodeId,
    },
    Register(rempart_engine::RegisterReply),
    Vm(VmFact),
    Command {
        command: Command,
        reply: oneshot::Sender<Result<CommandOutput, CommandError>>,
    },
    Digested {
        job: rempart_engine::DigestJob,
        digests: Vec<rempart_replication::Digest>,
    },
    /// This view, which the engine opened, is read from now on.
    ServeView {
        view: ViewId,
        served: ServedView,
    },
    /// Nobody reads it any more.
    CloseView {
        view: ViewId,
    },
    ViewRead {
        view: ViewId,
        wanted: Vec<views::ExtentsWanted>,
    },
    ViewStatus {
        view: ViewId,
        wanted: views::StatusWanted,
    },
    /// End the thread without another word. Nothing acknowledged is lost.
    End,
}

/// What the thread tells.
#[derive(Debug)]
pub enum FromGroup {
    Register(rempart_engine::RegisterRequest),
    Vm(VmAction),
    Report(Report),
    LinkDown {
        peer: NodeId,
        why: String,
    },
    /// The newest definition in the log.
    Config(Bytes),
    /// The thread ended.
    Ended {
        failure: Option<String>,
    },
}

/// The control plane's end of a group's thread.
#[derive(Debug, Clone)]
pub struct GroupHandle {
    sender: mpsc::Sender<ToGroup>,
    wake: Arc<OwnedFd>,
    pub status: watch::Receiver<GroupStatus>,
}

/// A replica's figures.
#[derive(Debug, Clone)]
pub struct GroupStatus {
    pub engine: Status,
    /// The longest that a guest's write waited since the daemon started.
    pub longest_stall: Duration,
    /// Peers with a connection.
    pub connected: Vec<NodeId>,
    /// When this follower was last connected with its primary.
    pub primary_heard_unix_ms: Option<u64>,
}

impl GroupStatus {
    /// It leads, and answers its guest.
    pub fn serves(&self) -> bool {
        self.engine.role == Role::Primary && self.engine.serving
    }
}

impl GroupHandle {
    /// Does nothing when the thread has ended.
    pub fn send(&self, message: ToGroup) {
        if self.sender.send(message).is_ok() {
            let _ = rustix::io::write(self.wake.as_fd(), &1u64.to_ne_bytes());
        }
    }

    pub fn is_primary(&self) -> bool {
        matches!(self.status.borrow().engine.role, Role::Primary | Role::PrimaryFrozen)
    }

    /// Who leads, as far as this replica knows.
    pub fn primary(&self) -> Option<NodeId> {
        self.status.borrow().engine.primary
    }

    /// The register that the group lives in.
    pub fn register(&self) -> Option<RegisterId> {
        self.status.borrow().engine.register
    }

    /// A peer that holds everything, if there is one.
    pub fn in_sync_peer(&self) -> Option<NodeId> {
        self.status
            .borrow()
            .engine
            .peers
            .iter()
            .find(|peer| peer.in_sync && peer.connected)
            .map(|peer| peer.node)
    }

    pub async fn command(&self, command: Command) -> Result<CommandOutput, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.send(ToGroup::Command { command, reply });
        answer.await.unwrap_or(Err(CommandError::Aborted("the group's thread ended")))
    }
}

/// Actions that only the control plane can carry out.
fn for_control(action: Action) -> Option<FromGroup> {
    match action {
        Action::Register(request) => Some(FromGroup::Register(request)),
        Action::Vm(action) => Some(FromGroup::Vm(action)),
        Action::Report(report) => Some(FromGroup::Report(report)),
        _ => None,
    }
}
