//! The QEMU driver.

pub mod backup;
mod machine;
mod own_memory;
mod saved_memory;

use crate::accelerator::{self, Accelerator, Probe};
use crate::command_line::{self, FirmwareFiles, Runtime, netdev_id};
use crate::definition::{CpuModel, Firmware, Nic, NicModel};
use crate::error::{Error, ErrorKind, Result};
use crate::guard::protocol::StartReport;
use crate::machine::{Adopted, FirstState, HostReport, Hypervisor, Machine, Pending, StartRequest};
use crate::process;
use crate::run_dir::{FILES_VERSION, Launch, RunDir, State, TapLaunch};
use crate::tap;
use machine::QemuMachine;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::sync::OnceCell;

/// A guard's first line is shorter.
const LONGEST_REPORT: u64 = 64 * 1024;

/// Where things are on this host and how careful to be.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// The program that becomes the guard, with its leading arguments; the driver adds `--run-dir DIR`.
    /// Usually `[current_exe, "guard"]`, after `systemd-run --scope …` where the service does not have
    /// `KillMode=process`.
    pub guard_command: Vec<OsString>,
    pub qemu_program: PathBuf,
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
    /// QEMU's own system call filter.
    pub sandbox: bool,
    /// None: probe by starting a guest.
    pub accelerator: Option<Accelerator>,
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

impl FirmwarePaths {
    /// None when a part of it is missing.
    fn variables_bytes(&self) -> Option<u64> {
        let variables = std::fs::metadata(&self.variables).ok()?;
        self.code.exists().then_some(variables.len())
    }
}

impl QemuConfig {
    /// Defaults, with a guard that is started as `guard_command --run-dir DIR`.
    pub fn new(guard_command: Vec<OsString>) -> Self {
        Self {
            guard_command,
            qemu_program: "qemu-system-x86_64".into(),
            start_deadline: Duration::from_secs(60),
            reconnect_delay: Duration::from_secs(24 * 60 * 60),
            network_gate: false,
            watchdog: None,
            run_as: None,
            firmware: FirmwarePaths::default(),
            sandbox: true,
            accelerator: None,
        }
    }
}

/// Runs machines with QEMU.
#[derive(Debug)]
pub struct Qemu {
    config: QemuConfig,
    probe: OnceCell<Probe>,
}

impl Qemu {
    pub fn new(config: QemuConfig) -> Self {
        Self { config, probe: OnceCell::new() }
    }

    /// What guests run with here, and why: asked once, by starting one.
    pub async fn accelerator(&self) -> Probe {
        if let Some(accelerator) = self.config.accelerator {
            return Probe { accelerator, reason: "configured".into() };
        }
        let probe = || accelerator::probe(&self.config.qemu_program, &CpuModel::Baseline);
        self.probe.get_or_init(probe).await.clone()
    }

    async fn start_machine(&self, request: StartRequest) -> Result<Arc<dyn Machine>> {
        let definition = &request.definition;
        definition.validate()?;
        let action = || format!("start `{}`", definition.name);
        for disk in &definition.disks {
            if !request.disks.iter().any(|export| export.disk == disk.index) {
                let detail = format!("disk {} has no export", disk.index);
                return Err(Error::new(ErrorKind::InvalidDefinition, action(), detail));
            }
        }
        let accelerator = self.accelerator().await.accelerator;
        let run_dir = RunDir::new(&request.run_dir)?;
        run_dir.create()?;
        // The guard takes it for good; this keeps the files of a running machine from being overwritten.
        let Some(lock) = run_dir.lock()? else {
            return Err(Error::new(ErrorKind::AlreadyRunning, action(), "another guard has it"));
        };
        let firmware = self.prepare_firmware(&run_dir, &request)?;
        let launch = self.launch(&run_dir, &request, accelerator, firmware);
        for stale in ["state.json", "exit.json", "qemu.log", "console.log", "console.log.1", own_memory::MARK]
        {
            run_dir.remove(stale)?;
        }
        self.give_to_user(run_dir.path())?;
        run_dir.write_launch(&launch)?;
        drop(lock);
        self.start_guard(&run_dir, &definition.name).await?;
        let state = run_dir.read_state()?;
        let gone = || {
            let end = run_dir.read_exit().ok().flatten();
            let detail = end.map_or_else(|| "it ended at once".into(), |record| record.to_string());
            Error::new(ErrorKind::NotRunning, action(), detail)
        };
        let state = state.ok_or_else(gone)?;
        match QemuMachine::connect(run_dir.clone(), state.clone(), self.config.reconnect_delay).await {
            Ok(machine) => {
                let machine = machine.ok_or_else(gone)?;
                machine.monitor_connected().await;
                Ok(machine)
            }
            Err(error) => {
                // Not a machine that the caller does not know of.
                end_leftovers(&state).await?;
                Err(error)
            }
        }
    }

    /// Puts the UEFI variables where QEMU finds them.
    fn prepare_firmware(&self, run_dir: &RunDir, request: &StartRequest) -> Result<Option<FirmwareFiles>> {
        if request.definition.firmware == Firmware::Bios {
            run_dir.remove("nvram.fd")?;
            return Ok(None);
        }
        let paths = &self.config.firmware;
        let missing = |path: &Path, error: std::io::Error| {
            let action = format!("use the UEFI firmware `{}`", path.display());
            Error::new(ErrorKind::MissingOnHost, action, error.to_string())
        };
        std::fs::metadata(&paths.code).map_err(|error| missing(&paths.code, error))?;
        let variables = match &request.nvram {
            Some(bytes) => bytes.clone(),
            None => std::fs::read(&paths.variables).map_err(|error| missing(&paths.variables, error))?,
        };
        run_dir.write("nvram.fd", &variables)?;
        let file = run_dir.file("nvram.fd");
        self.give_to_user(&file)?;
        Ok(Some(FirmwareFiles { code: paths.code.clone(), variables: file }))
    }

    fn give_to_user(&self, path: &Path) -> Result<()> {
        let Some(RunAs { uid, gid }) = self.config.run_as else { return Ok(()) };
        std::os::unix::fs::chown(path, Some(uid), Some(gid))
            .map_err(|error| Error::io(format!("give `{}` to QEMU's user", path.display()), error))
    }

    fn launch(
        &self,
        run_dir: &RunDir,
        request: &StartRequest,
        accelerator: Accelerator,
        firmware: Option<FirmwareFiles>,
    ) -> Launch {
        let definition = &request.definition;
        let runtime = Runtime {
            qemu_program: self.config.qemu_program.clone(),
            accelerator,
            run_dir: run_dir.path().into(),
            disks: request.disks.clone(),
            reconnect_delay: self.config.reconnect_delay,
            open_timeout: self.config.start_deadline,
            firmware,
            first_state: request.first_state.clone(),
            sandbox: self.config.sandbox,
        };
        // Its frames then do not pass through QEMU. Only with KVM's interrupts, and as root.
        let vhost = accelerator == Accelerator::Kvm
            && self.config.run_as.is_none()
            && Path::new("/dev/vhost-net").exists();
        let tap = |(place, nic): (usize, &Nic)| TapLaunch {
            interface: tap::interface_name(definition.uuid, place),
            bridge: nic.bridge.clone(),
            netdev: netdev_id(place),
            vhost: vhost && nic.model == NicModel::Virtio,
        };
        Launch {
            version: FILES_VERSION,
            machine: definition.name.clone(),
            command: command_line::build(definition, &runtime),
            taps: definition.nics.iter().enumerate().map(tap).collect(),
            lease: request.lease,
            guard_stop_ms: u64::try_from(request.guard_stop.as_millis()).unwrap_or(u64::MAX),
            run_vcpus: request.first_state == FirstState::Running,
            network_gate: self.config.network_gate,
            watchdog: self.config.watchdog.clone(),
            run_as: self.config.run_as.map(|user| (user.uid, user.gid)),
        }
    }

    /// Starts a guard that does not belong to this process, and waits for its report.
    async fn start_guard(&self, run_dir: &RunDir, name: &str) -> Result<()> {
        let action = || format!("start `{name}`");
        let (program, arguments) = self.config.guard_command.split_first().ok_or_else(|| {
            Error::new(ErrorKind::MissingOnHost, action(), "no guard program is configured")
        })?;
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(run_dir.file("guard.log"))
            .map_err(|error| Error::io("open the guard's log", error))?;
        let mut command = tokio::process::Command::new(program);
        command.args(arguments).arg("--run-dir").arg(run_dir.path()).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        // What systemd said to the daemon is not for the guard.
        for variable in
            ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"]
        {
            command.env_remove(variable);
        }
        // SAFETY: setsid is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                // Signals to the daemon's terminal and process group are not for the guard.
                rustix::process::setsid()?;
                Ok(())
            });
        }
        let mut guard = command.spawn().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                let detail = format!("`{}` is not there", program.to_string_lossy());
                Error::new(ErrorKind::MissingOnHost, action(), detail)
            }
            _ => Error::io("start the guard", error),
        })?;
        let stdout = guard.stdout.take().expect("it was asked for");
        let mut line = String::new();
        let mut reader = BufReader::new(stdout.take(LONGEST_REPORT));
        let read = tokio::time::timeout(self.config.start_deadline, reader.read_line(&mut line)).await;
        let failed = |detail: String| Err(Error::new(ErrorKind::FailedToStart, action(), detail));
        if read.is_err() {
            // QEMU goes with it.
            let _ = guard.start_kill();
            return Err(Error::deadline(action(), self.config.start_deadline));
        }
        match serde_json::from_str(&line) {
            Ok(StartReport::Ready) => Ok(()),
            Ok(StartReport::AlreadyRunning) => {
                Err(Error::new(ErrorKind::AlreadyRunning, action(), "another guard has it"))
            }
            Ok(StartReport::MissingOnHost { detail }) => {
                Err(Error::new(ErrorKind::MissingOnHost, action(), detail))
            }
            Ok(StartReport::Failed { detail }) => failed(detail),
            Err(_) => failed(format!("its guard said `{}`; {}", line.trim(), run_dir.log_tail("guard.log"))),
        }
    }

    async fn adopt_machine(&self, path: &Path) -> Result<Adopted> {
        let run_dir = RunDir::new(path)?;
        let Some(state) = run_dir.read_state()? else { return Ok(Adopted::Gone(run_dir.read_exit()?)) };
        match QemuMachine::connect(run_dir.clone(), state.clone(), self.config.reconnect_delay).await {
            Ok(Some(machine)) => return Ok(Adopted::Running(machine)),
            Ok(None) => {}
            // A guard that does not answer does not watch the lease either.
            Err(error) if error.kind() == ErrorKind::Deadline => {
                tracing::error!(machine = state.machine, %error, "its guard is frozen: ending it");
            }
            Err(error) => return Err(error),
        }
        // Without its guard QEMU should be dead; nobody would watch its lease.
        end_leftovers(&state).await?;
        Ok(Adopted::Gone(run_dir.read_exit()?))
    }

    async fn look_around(&self) -> Result<HostReport> {
        let ask = |arguments: &'static [&'static str]| async move {
            let asked = tokio::process::Command::new(&self.config.qemu_program)
                .args(arguments)
                .stdin(Stdio::null())
                .kill_on_drop(true)
                .output();
            let action = || format!("run `{}`", self.config.qemu_program.display());
            let deadline = Duration::from_secs(10);
            match tokio::time::timeout(deadline, asked).await {
                Err(_) => Err(Error::deadline(action(), deadline)),
                Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                    Err(Error::new(ErrorKind::MissingOnHost, action(), "QEMU is not installed"))
                }
                Ok(Err(error)) => Err(Error::io(action(), error)),
                Ok(Ok(output)) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            }
        };
        let version = ask(&["--version"]).await?;
        let machines = ask(&["-machine", "help"]).await?;
        let probe = self.accelerator().await;
        let first_word = |line: &str| line.split_whitespace().next().map(str::to_owned);
        Ok(HostReport {
            qemu_version: version.split_whitespace().nth(3).unwrap_or("unknown").to_owned(),
            accelerator: probe.accelerator.to_string(),
            accelerator_reason: probe.reason,
            machine_types: machines
                .lines()
                .filter_map(first_word)
                .filter(|word| word.starts_with("pc-q35-"))
                .collect(),
            uefi_variables_bytes: self.config.firmware.variables_bytes(),
            network_gate: guard_gate_works().await,
        })
    }
}

/// Ends what is left of a machine that has no working guard.
async fn end_leftovers(state: &State) -> Result<()> {
    for leftover in [Some(&state.guard), state.qemu.as_ref()].into_iter().flatten() {
        let opened =
            leftover.open().map_err(|error| Error::io("look for a process of the machine", error))?;
        if let Some(pidfd) = opened {
            end_process(&pidfd).await?;
        }
    }
    machine::remove_gate(&state.machine).await;
    Ok(())
}

/// Waits for a process that should end by itself, and ends it if it does not.
async fn end_process(pidfd: &OwnedFd) -> Result<()> {
    let action = "end a process of a machine without its guard";
    let patience = Duration::from_secs(1);
    if tokio::time::timeout(patience, process::ended(pidfd)).await.is_ok() {
        return Ok(());
    }
    process::signal(pidfd, rustix::process::Signal::KILL).map_err(|error| Error::io(action, error))?;
    let ended = tokio::time::timeout(5 * patience, process::ended(pidfd)).await;
    ended.map_err(|_| Error::deadline(action, 5 * patience))?.map_err(|error| Error::io(action, error))
}

/// Whether nftables takes the gate's kind of table here.
async fn guard_gate_works() -> bool {
    tokio::task::spawn_blocking(crate::guard::gate_works).await.unwrap_or(false)
}

impl Hypervisor for Qemu {
    fn start(&self, request: StartRequest) -> Pending<'_, Result<Arc<dyn Machine>>> {
        Box::pin(self.start_machine(request))
    }

    fn adopt<'a>(&'a self, run_dir: &'a Path) -> Pending<'a, Result<Adopted>> {
        Box::pin(self.adopt_machine(run_dir))
    }

    fn host(&self) -> Pending<'_, Result<HostReport>> {
        Box::pin(self.look_around())
    }

    fn try_processor<'a>(&'a self, model: &'a CpuModel) -> Pending<'a, std::result::Result<(), String>> {
        Box::pin(async move {
            let accelerator = self.accelerator().await.accelerator;
            accelerator::run_guest(&self.config.qemu_program, model, accelerator).await.map(|_| ())
        })
    }
}
