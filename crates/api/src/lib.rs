//! The daemon's API: request and response types, and a client.
//!
//! The daemon serves HTTP/1.1 with JSON bodies on a unix socket that only its owner may open. Paths start with
//! `/v1`. An answer other than 2xx carries an [`Error`]. Byte counts and durations end in their unit.

pub mod client;
mod cluster;
mod error;
mod job;
mod restore;
mod schedule;
mod status;
mod stream;
mod view;
mod vm;

pub use client::Client;
pub use cluster::{
    ClusterCreate, JoinRequest, Member, MemberRole, Members, RevokeRequest, Token, TokenRequest,
};
pub use error::{Error, ErrorKind};
pub use job::{Job, JobId, JobState, Progress};
pub use restore::{
    OpenRestore, RestoreDisk, RestoreMessage, RestoreOnto, RestoreReady, RestoreRequest, RestoreTarget,
    UnfinishedRestore,
};
pub use schedule::{
    BackupRun, EndedBy, LastBoot, MachineBackup, MachineOutcome, MachineProgress, RunResult, RunTrigger,
    Schedule, ScheduledMachine,
};
pub use status::{
    Condition, NodeStatus, PeerStatus, ReplicaRole, ResyncStatus, Severity, Status, UnopenedVm, VmState,
    VmStatus,
};
pub use view::{
    Changes, Consistency, ConsistencyLevel, DiskThen, Freeze, MemoryRequest, OpenView, View, ViewDisk,
    ViewMemory, ViewMessage, ViewPosition, ViewRequest,
};
pub use vm::{
    Comparison, DiskAdd, DiskResize, DiskSource, FailoverMode, FailoverRequest, Firmware, ForcedLoss,
    ImportRequest, Nic, ProtectRequest, RejoinRequest, StopRequest, VmDetail, VmDisk,
};
