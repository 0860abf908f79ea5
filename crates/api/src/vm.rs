use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    #[default]
    Bios,
    Uefi,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSource {
    /// Absolute path on the node.
    pub path: PathBuf,
    /// Use this raw file in place instead of copying it.
    pub adopt: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    pub bridge: String,
    /// Drawn from the locally administered range when absent.
    #[serde(default)]
    pub mac: Option<String>,
}

/// `POST /v1/vms`: answers a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportRequest {
    pub name: String,
    pub disks: Vec<DiskSource>,
    pub memory_bytes: u64,
    pub cpus: u32,
    #[serde(default)]
    pub cpu_model: Option<String>,
    #[serde(default)]
    pub nics: Vec<Nic>,
    #[serde(default)]
    pub firmware: Firmware,
    /// UEFI variables to start from; a fresh set when absent.
    #[serde(default)]
    pub nvram: Option<PathBuf>,
    #[serde(default)]
    pub autostart: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDisk {
    pub index: u16,
    pub path: PathBuf,
    pub size_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmDetail {
    pub status: crate::VmStatus,
    pub memory_bytes: u64,
    pub cpus: u32,
    pub cpu_model: String,
    pub machine: String,
    pub firmware: Firmware,
    pub nics: Vec<Nic>,
    pub disks: Vec<VmDisk>,
    pub autostart: bool,
    pub console: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StopRequest {
    /// Cut the power instead of asking the guest to shut down.
    #[serde(default)]
    pub force: bool,
    /// How long the guest may take to shut down.
    #[serde(default)]
    pub timeout_s: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectRequest {
    pub peer: String,
    /// The job ends only when every write is on both nodes.
    #[serde(default)]
    pub wait: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverMode {
    /// Shut down there, hand over, boot here. Nothing is lost.
    Planned,
    /// Take over without the primary's consent.
    Force,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverRequest {
    pub mode: FailoverMode,
    /// The operator has made sure that the other side cannot run the VM.
    #[serde(default)]
    pub confirm_fenced: bool,
}

/// What a forced takeover would give up. Told before it is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForcedLoss {
    /// Last contact with the primary.
    pub last_contact_unix_ms: Option<u64>,
    pub copy_epoch: u64,
    pub group_epoch: Option<u64>,
    pub text: String,
}

/// On a copy that a forced takeover elsewhere left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejoinRequest {
    /// What only this copy holds may be overwritten.
    pub confirm: bool,
    /// Without saving it aside first.
    pub discard: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskAdd {
    pub source: Option<DiskSource>,
    /// Size of a new, empty disk, when there is no source.
    pub size_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskResize {
    pub size_bytes: u64,
}

/// The result of `compare`: both copies, at one log position.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    pub lsn: u64,
    pub compared_bytes: u64,
    pub different_extents: u64,
    /// Up to a hundred of them: disk and offset.
    pub first_differences: Vec<(u16, u64)>,
}
