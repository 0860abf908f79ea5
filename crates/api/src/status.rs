use crate::Error;
use rempart_types::{GroupId, NodeId};
use serde::{Deserialize, Serialize};

/// What `GET /v1/status` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub node: NodeStatus,
    pub vms: Vec<VmStatus>,
    #[serde(default)]
    pub unopened: Vec<UnopenedVm>,
}

/// One that is recorded on this node and could not be opened: this copy serves nobody until a daemon opens it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnopenedVm {
    pub name: String,
    pub error: Error,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub id: NodeId,
    pub name: String,
    pub version: String,
    pub cluster: Option<String>,
    /// `kvm` or `tcg`, and why.
    pub accelerator: String,
    pub accelerator_reason: String,
    pub uptime_s: u64,
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    Stopped,
    Starting,
    Running,
    /// Its vCPUs are stopped: the lease ran out, or an operator asked.
    Paused,
    Stopping,
    /// It should run here but does not; `conditions` says why.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaRole {
    Primary,
    Secondary,
    /// Between roles: reading the register, recovering, taking over.
    Undecided,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    Info,
    Warning,
    Critical,
}

/// Something an operator should know, true now or at `since_unix_ms`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    pub severity: Severity,
    pub text: String,
    pub since_unix_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    pub name: String,
    pub connected: bool,
    pub in_sync: bool,
    /// `probing`, `log`, `extents`, `streaming` …
    pub phase: String,
    /// Log bytes that it does not have yet.
    pub lag_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncStatus {
    pub bytes_sent: u64,
    /// Of the extents found to differ so far.
    pub bytes_changed: u64,
    /// Of the disks looked at so far, of `bytes_total`.
    pub bytes_examined: u64,
    pub bytes_total: u64,
    pub running: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    pub name: String,
    pub group: GroupId,
    pub state: VmState,
    pub role: ReplicaRole,
    /// The node that leads, as far as this one knows.
    pub primary: Option<String>,
    pub epoch: u64,
    pub in_sync: Vec<String>,
    /// Every acknowledged write is on two nodes.
    pub mirrored: bool,
    /// Guest writes wait: no acknowledgement is allowed now.
    pub frozen: bool,
    pub protected_by: Vec<String>,
    pub peers: Vec<PeerStatus>,
    pub lag_bytes: u64,
    pub journal_bytes: u64,
    /// Log that this node's images do not have yet.
    pub unapplied_bytes: u64,
    pub resync: Option<ResyncStatus>,
    pub longest_stall_ms: u64,
    pub qemu_pid: Option<u32>,
    pub conditions: Vec<Condition>,
    /// What happened lately, oldest first.
    pub events: Vec<Condition>,
}
