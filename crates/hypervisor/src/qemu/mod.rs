//! The QEMU driver.

use crate::error::Result;
use crate::machine::{Adopted, HostReport, Hypervisor, Machine, Pending, StartRequest};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Where things are on this host and how careful to be.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// The program that becomes the guard, with its leading arguments; the driver adds `--run-dir DIR`.
    /// Usually `[current_exe, "guard"]`, after `systemd-run --scope …` where the service does not have
    /// `KillMode=process`.
    pub guard_command: Vec<OsString>,
    pub qemu_program: PathBuf,
    /// W: the guard's time to stop the vCPUs after the end of the lease.
    pub guard_stop: Duration,
    /// How long QEMU may take to come up, its disks included.
    pub start_deadline: Duration,
    /// How long QEMU holds a guest's I/O while no daemon answers, before the machine is paused with an I/O error.
    pub reconnect_delay: Duration,
    /// Close the machine's network by a kernel timer when nobody renews the lease.
    pub network_gate: bool,
    /// A hardware watchdog for the guard to pet, e.g. `/dev/watchdog0`.
    pub watchdog: Option<PathBuf>,
    /// Run QEMU as this user and group instead of the daemon's.
    pub run_as: Option<RunAs>,
    pub firmware: FirmwarePaths,
    /// None: probe by starting a guest.
    pub accelerator: Option<crate::accelerator::Accelerator>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunAs {
    pub uid: u32,
    pub gid: u32,
}

/// UEFI firmware images.
#[derive(Debug, Clone)]
pub struct FirmwarePaths {
    pub code: PathBuf,
    /// The variables' factory state.
    pub variables: PathBuf,
}

impl Default for FirmwarePaths {
    fn default() -> Self {
        Self {
            code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
            variables: "/usr/share/OVMF/OVMF_VARS_4M.fd".into(),
        }
    }
}

impl QemuConfig {
    /// Defaults, with a guard that is started as `guard_command --run-dir DIR`.
    pub fn new(guard_command: Vec<OsString>) -> Self {
        Self {
            guard_command,
            qemu_program: "qemu-system-x86_64".into(),
            guard_stop: Duration::from_secs(1),
            start_deadline: Duration::from_secs(60),
            reconnect_delay: Duration::from_secs(24 * 60 * 60),
            network_gate: false,
            watchdog: None,
            run_as: None,
            firmware: FirmwarePaths::default(),
            accelerator: None,
        }
    }
}

/// Runs machines with QEMU.
#[derive(Debug)]
pub struct Qemu {
    #[allow(dead_code)]
    config: QemuConfig,
}

impl Qemu {
    pub fn new(config: QemuConfig) -> Self {
        Self { config }
    }
}

impl Hypervisor for Qemu {
    fn start(&self, _request: StartRequest) -> Pending<'_, Result<Arc<dyn Machine>>> {
        unimplemented!()
    }

    fn adopt<'a>(&'a self, _run_dir: &'a Path) -> Pending<'a, Result<Adopted>> {
        unimplemented!()
    }

    fn host(&self) -> Pending<'_, Result<HostReport>> {
        unimplemented!()
    }
}
