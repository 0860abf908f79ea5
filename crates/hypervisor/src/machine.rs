//! The traits the daemon is written against, and the words they use.

use crate::definition::{CpuModel, Definition};
use crate::error::Result;
use rempart_types::{DiskIndex, MonotonicTime};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::broadcast;

/// A future behind a pointer, so that the traits can be used as objects.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What runs machines on this host.
pub trait Hypervisor: Send + Sync + fmt::Debug {
    /// Starts a machine under a guard of its own. When it returns, QEMU has opened every disk and the lease is
    /// being watched. The NBD exports must be served before and during the call.
    fn start(&self, request: StartRequest) -> Pending<'_, Result<Arc<dyn Machine>>>;

    /// Finds the machine that an earlier life of this daemon started in `run_dir`. One that is found without its
    /// guard, or with one that does not answer, is killed, and reported gone. Its disks need not be served yet.
    fn adopt<'a>(&'a self, run_dir: &'a Path) -> Pending<'a, Result<Adopted>>;

    /// What this host offers: for the preflight of `protect`, and for `doctor`.
    fn host(&self) -> Pending<'_, Result<HostReport>>;

    /// Whether a guest with this processor runs here: starts a small one. The error says why not.
    fn try_processor<'a>(&'a self, model: &'a CpuModel) -> Pending<'a, std::result::Result<(), String>>;
}

/// A running machine. Dropping the handle changes nothing: the machine goes on under its guard.
pub trait Machine: Send + Sync + fmt::Debug {
    fn name(&self) -> &str;

    fn run_dir(&self) -> &Path;

    /// W, as its guard was started with.
    fn guard_stop(&self) -> Result<Duration>;

    /// Moves the end of the lease to a later time; an earlier one changes nothing. It does not resume a machine
    /// that the end of the lease paused. Returns when the guard has confirmed.
    fn renew(&self, lease: Lease) -> Pending<'_, Result<()>>;

    /// Pauses the vCPUs. Returns when they stand still.
    fn pause(&self) -> Pending<'_, Result<()>>;

    /// Lets the vCPUs run. Refused while the lease is over.
    fn resume(&self) -> Pending<'_, Result<()>>;

    /// Writes the memory and devices of a machine that was paused, and stands still. Afterwards, whatever came of it, and
    /// also when this is dropped, only [`Machine::resume`] has it go on, which ends what is left of this first.
    fn keep_memory(&self, wanted: MemoryWanted) -> Pending<'_, Result<KeptMemory>>;

    /// Whether it has stood still since its memory was kept.
    fn stands_as_kept(&self) -> Pending<'_, Result<bool>>;

    /// Asks the guest to shut down and waits at most `deadline` for the machine to be gone. A guest that did not
    /// follow is left running, with [`crate::ErrorKind::Deadline`]; `kill` is the caller's to decide.
    fn power_down(&self, deadline: Duration) -> Pending<'_, Result<ExitRecord>>;

    /// Takes the machine away, now. Works on a frozen QEMU and with a dead guard. Returns when it is gone.
    fn kill(&self) -> Pending<'_, Result<ExitRecord>>;

    /// Waits until the machine is gone, for whatever reason.
    fn exited(&self) -> Pending<'_, ExitRecord>;

    fn status(&self) -> Pending<'_, Result<MachineStatus>>;

    /// Everything from now on.
    fn events(&self) -> MachineEvents;

    /// The serial console. One reader at a time: a second waits for the first to hang up.
    fn console(&self) -> Pending<'_, Result<UnixStream>>;

    /// The screen as a PNG.
    fn screenshot(&self) -> Pending<'_, Result<Vec<u8>>>;

    /// Plugs in a disk. It must be in the definition of the next start too: that is the caller's.
    fn attach_disk(&self, disk: crate::definition::Disk, export: DiskExport) -> Pending<'_, Result<()>>;

    /// Asks the guest to give up a disk and waits at most `deadline` for it to do so.
    fn detach_disk(&self, disk: DiskIndex, deadline: Duration) -> Pending<'_, Result<()>>;

    /// Tells the guest the new size. The export must have it already, and have hung up on QEMU since.
    fn resize_disk(&self, disk: DiskIndex, size_bytes: u64) -> Pending<'_, Result<()>>;

    /// Sends gratuitous ARP and the like from every NIC, so that switches learn where the machine is now.
    fn announce(&self) -> Pending<'_, Result<()>>;

    /// The UEFI variables as they are now; None for a BIOS machine.
    fn nvram(&self) -> Pending<'_, Result<Option<Vec<u8>>>>;

    /// The host's end of the guest agent's channel. Refused while nothing in the guest has opened the other.
    fn guest_agent(&self) -> Pending<'_, Result<PathBuf>>;

    /// Has the guard hold a listening socket for the daemon's next life. QEMU then reconnects to it at once,
    /// and waits in its backlog while no daemon is there.
    fn keep_listener(&self, name: String, listener: OwnedFd) -> Pending<'_, Result<()>>;

    /// The listening sockets an earlier life left with the guard.
    fn kept_listeners(&self) -> Pending<'_, Result<Vec<(String, OwnedFd)>>>;
}

/// What [`Hypervisor::start`] needs to know beyond the definition. All paths are this node's.
#[derive(Debug, Clone)]
pub struct StartRequest {
    pub definition: Definition,
    /// One for each disk of the definition.
    pub disks: Vec<DiskExport>,
    /// The machine's own directory, made if missing. Sockets are in it, so its path must be short (≤ 80 bytes).
    pub run_dir: PathBuf,
    /// The UEFI variables to start with. None: the firmware's factory state.
    pub nvram: Option<Vec<u8>>,
    pub lease: Lease,
    /// W: the guard's time to stop the vCPUs after the end of the lease.
    pub guard_stop: Duration,
    pub first_state: FirstState,
}

/// How to keep a machine's memory.
#[derive(Debug)]
pub struct MemoryWanted {
    pub file: std::fs::File,
    /// The file gets no larger.
    pub most_bytes: u64,
    /// It takes no longer. What would is given up as soon as that shows.
    pub limit: Duration,
}

/// The stream that QEMU's `-incoming` reads: a machine's memory and devices.
#[derive(Debug, Clone, PartialEq)]
pub struct KeptMemory {
    pub bytes: u64,
    /// What QEMU tells of the machine, with its command line.
    pub description: serde_json::Value,
}

/// Where a disk's bytes are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskExport {
    pub disk: DiskIndex,
    pub socket: PathBuf,
    pub export_name: String,
}

/// Until when the vCPUs may run, on CLOCK_BOOTTIME.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lease {
    /// A machine without a peer: nobody could take over, so nothing stops it.
    Unlimited,
    UntilBoottimeNs(u64),
}

impl Lease {
    pub fn until(time: MonotonicTime) -> Self {
        Self::UntilBoottimeNs(time.0)
    }

    pub fn is_over(self, now: MonotonicTime) -> bool {
        match self {
            Self::Unlimited => false,
            Self::UntilBoottimeNs(until) => now.0 >= until,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstState {
    Running,
    /// vCPUs stand still until `resume`.
    Paused,
    /// Waits for a live switchover on this QEMU migration address, and then stands still.
    Incoming(String),
}

/// What [`Hypervisor::adopt`] found.
#[derive(Debug, Clone)]
pub enum Adopted {
    Running(Arc<dyn Machine>),
    /// Nothing runs. The record is of the last life, if it left one.
    Gone(Option<ExitRecord>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineStatus {
    pub run_state: RunState,
    pub lease: Lease,
    /// Why the vCPUs stand still, if they do.
    pub pause_cause: Option<PauseCause>,
    pub qemu_pid: u32,
    pub guard_pid: u32,
    /// None: no gate was asked for. Otherwise whether it works.
    pub gate_works: Option<bool>,
}

/// Whether the vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    Starting,
    Running,
    /// Asked to stop, not confirmed yet.
    Pausing,
    Paused,
    Exited,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseCause {
    /// `pause` was asked for.
    Request,
    /// The lease ran out.
    Lease,
    /// Not started yet.
    NotStarted,
    /// QEMU stopped them itself: an I/O error, or a person at its monitor.
    Qemu,
}

#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum MachineEvent {
    Paused(PauseCause),
    Resumed,
    /// The lease ran out; the guard is stopping the machine.
    LeaseExpired,
    /// The machine is gone. The last event.
    Exited(ExitRecord),
    /// The guest, or someone, reset it. It goes on.
    Reset {
        by_guest: bool,
    },
    /// It is about to go away.
    ShuttingDown {
        by_guest: bool,
    },
    GuestPanicked,
    /// An I/O error that QEMU was told of. `stopped` machines wait for `resume`, which tries again.
    IoError {
        disk: Option<DiskIndex>,
        write: bool,
        stopped: bool,
        reason: String,
    },
    /// The guest gave up a disk.
    DiskDetached(DiskIndex),
    /// The network gate could not be refreshed: the machine's frames are dropped from now on.
    GateFailed(String),
    /// Some event of QEMU's that has no name here.
    Other {
        name: String,
    },
    /// The reader was slow and this many events are lost: ask for the status.
    Missed(u64),
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub cause: ExitCause,
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// The last that QEMU said on stderr, if it failed.
    #[serde(default)]
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitCause {
    /// The guest shut down. It wants to stay off.
    GuestShutdown,
    /// `kill` or a monitor's `quit`.
    Request,
    /// The lease ran out and the vCPUs could not be shown to stand still.
    Lease,
    /// QEMU did not come up.
    FailedToStart,
    /// QEMU ended without being asked to: killed from outside, or its own crash. To be started again.
    Crashed,
    /// Its guard died, so it had to.
    GuardDied,
}

impl fmt::Display for ExitRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.cause {
            ExitCause::GuestShutdown => "the guest shut down",
            ExitCause::Request => "stopped on request",
            ExitCause::Lease => "killed at the end of its lease",
            ExitCause::FailedToStart => "QEMU did not start",
            ExitCause::Crashed => "QEMU ended by itself",
            ExitCause::GuardDied => "its guard died",
        })?;
        match (self.code, self.signal) {
            (_, Some(signal)) => write!(f, " (signal {signal})")?,
            (Some(code), None) if code != 0 => write!(f, " (status {code})")?,
            _ => {}
        }
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

/// What this host can do for a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    pub qemu_version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why that one, for people.
    pub accelerator_reason: String,
    pub machine_types: Vec<String>,
    /// Size of a machine's UEFI variables. None: there is no UEFI firmware here.
    pub uefi_variables_bytes: Option<u64>,
    /// Whether the kernel-timed network gate works here.
    pub network_gate: bool,
}

/// A machine's events, in order, from a bounded queue.
#[derive(Debug)]
pub struct MachineEvents {
    receiver: broadcast::Receiver<MachineEvent>,
}

impl MachineEvents {
    pub(crate) fn new(receiver: broadcast::Receiver<MachineEvent>) -> Self {
        Self { receiver }
    }

    /// The next one; None after the machine is gone and its handle dropped.
    pub async fn next(&mut self) -> Option<MachineEvent> {
        match self.receiver.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(count)) => Some(MachineEvent::Missed(count)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}
