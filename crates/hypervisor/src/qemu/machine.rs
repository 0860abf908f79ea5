//! A running QEMU, through its guard and its monitor.

use crate::command_line::{disk_device_options, disk_id, disk_node, disk_node_options, disk_of};
use crate::definition::{Disk, DiskBus};
use crate::error::{Error, ErrorKind, Result};
use crate::guard::client::GuardClient;
use crate::guard::protocol::{Command, GuardEvent, Outcome};
use crate::machine::{
    DiskExport, ExitCause, ExitRecord, KeptMemory, Lease, Machine, MachineEvent, MachineEvents,
    MachineStatus, MemoryWanted, Pending,
};
use crate::process::{self, ProcessIdentity};
use crate::qemu::own_memory;
use crate::qmp::client::Heard;
use crate::qmp::{self, Event};
use crate::run_dir::{RunDir, State};
use rempart_types::DiskIndex;
use rustix::process::Signal;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinHandle;

/// Events a slow listener may fall behind.
const EVENT_QUEUE: usize = 256;

/// The guard only looks something up, or sets it.
const GUARD_DEADLINE: Duration = Duration::from_secs(2);
/// QEMU stops its vCPUs within milliseconds, if it can.
const PAUSE_DEADLINE: Duration = Duration::from_secs(10);
/// It waits for I/O of before the pause, if there is any.
const RESUME_DEADLINE: Duration = Duration::from_secs(30);
/// QEMU has connected again and knows the new size within this time.
const RESIZE_DEADLINE: Duration = Duration::from_secs(5);
const RESIZE_RETRY: Duration = Duration::from_millis(100);
/// For the guard to kill, before this process does it.
const KILL_PATIENCE: Duration = Duration::from_millis(500);
/// For QEMU to follow its guard.
const FOLLOW_PATIENCE: Duration = Duration::from_secs(1);
/// Between two tries to reach the guard or the monitor of a QEMU that is alive.
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// The monitor's answer waits for QEMU's main loop, which may wait for a disk.
const MONITOR_DEADLINE: Duration = Duration::from_secs(10);

/// The console's log is cut when it is longer.
const LONGEST_CONSOLE_LOG: u64 = 8 << 20;
const LOG_CHECK_INTERVAL: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct QemuMachine {
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 3],
}

#[derive(Debug)]
struct Shared {
    name: String,
    run_dir: RunDir,
    qemu: ProcessIdentity,
    guard: ProcessIdentity,
    qemu_pidfd: OwnedFd,
    guard_client: Mutex<Arc<GuardClient>>,
    monitor: watch::Sender<Option<qmp::Client>>,
    events: broadcast::Sender<MachineEvent>,
    exit: watch::Sender<Option<ExitRecord>>,
    reconnect_delay: Duration,
    /// This process wants it gone.
    kill_asked: AtomicBool,
}

impl QemuMachine {
    /// Connects to a guard that is known to run. None: it, or its QEMU, is gone.
    pub(super) async fn connect(
        run_dir: RunDir,
        state: State,
        reconnect_delay: Duration,
    ) -> Result<Option<Arc<Self>>> {
        let Some(qemu) = state.qemu else { return Ok(None) };
        let (client, guard_events) =
            match GuardClient::connect(&run_dir.file("guard.sock"), CONNECT_DEADLINE).await {
                Ok(connected) => connected,
                Err(error) if error.kind() == ErrorKind::NotRunning => return Ok(None),
                Err(error) => return Err(error),
            };
        let opened = qemu.open().map_err(|error| Error::io("open QEMU's process", error))?;
        let Some(qemu_pidfd) = opened else { return Ok(None) };
        let shared = Arc::new(Shared {
            name: client.machine().to_owned(),
            run_dir,
            qemu,
            guard: state.guard,
            qemu_pidfd,
            guard_client: Mutex::new(Arc::new(client)),
            monitor: watch::channel(None).0,
            events: broadcast::channel(EVENT_QUEUE).0,
            exit: watch::channel(None).0,
            reconnect_delay,
            kill_asked: AtomicBool::new(false),
        });
        let tasks = [
            tokio::spawn(shared.clone().follow_guard(guard_events)),
            tokio::spawn(shared.clone().follow_monitor()),
            tokio::spawn(shared.clone().cut_console_log()),
        ];
        Ok(Some(Arc::new(Self { shared, tasks })))
    }

    /// Waits a moment for the monitor, so that no event of the machine's first second is missed. It goes without.
    pub(super) async fn monitor_connected(&self) {
        let _ = tokio::time::timeout(FOLLOW_PATIENCE, self.shared.monitor("start")).await;
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Shared {
    fn action(&self, verb: &str) -> String {
        format!("{verb} `{}`", self.name)
    }

    fn emit(&self, event: MachineEvent) {
        // Nobody listening is fine.
        let _ = self.events.send(event);
    }

    fn gone(&self) -> Option<ExitRecord> {
        self.exit.borrow().clone()
    }

    fn finish(&self, mut record: ExitRecord) {
        if record.cause == ExitCause::Crashed && self.kill_asked.load(Ordering::Relaxed) {
            // All that its guard saw was a signal.
            record.cause = ExitCause::Request;
            record.detail.clear();
        }
        let first = self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            if first {
                *exit = Some(record.clone());
            }
            first
        });
        if first {
            self.emit(MachineEvent::Exited(record));
        }
    }

    async fn exited(&self) -> ExitRecord {
        let mut exit = self.exit.subscribe();
        let record = exit.wait_for(Option::is_some).await.expect("the sender is in self");
        record.clone().expect("waited for it")
    }

    async fn guard(&self, verb: &str, command: Command, deadline: Duration) -> Result<Outcome> {
        self.guard_with_fds(verb, command, &[], deadline).await.map(|(outcome, _)| outcome)
    }

    async fn guard_with_fds(
        &self,
        verb: &str,
        command: Command,
        fds: &[OwnedFd],
        deadline: Duration,
    ) -> Result<(Outcome, Vec<OwnedFd>)> {
        if let Some(record) = self.gone() {
            return Err(Error::new(ErrorKind::NotRunning, self.action(verb), record.to_string()));
        }
        let client = self.guard_client.lock().expect("no panic holds this").clone();
        client.request(verb, command, fds, deadline).await
    }

    async fn monitor(&self, verb: &str) -> Result<qmp::Client> {
        let mut monitor = self.monitor.subscribe();
        tokio::select! {
            connected = tokio::time::timeout(MONITOR_DEADLINE, monitor.wait_for(Option::is_some)) => {
                let client = connected.map_err(|_| Error::deadline(self.action(verb), MONITOR_DEADLINE))?;
                Ok(client.expect("the sender is in self").clone().expect("waited for it"))
            }
            record = self.exited() => {
                Err(Error::new(ErrorKind::NotRunning, self.action(verb), record.to_string()))
            }
        }
    }

    /// Hands on what the guard tells, and finds out what became of the machine when the guard falls silent.
    async fn follow_guard(self: Arc<Self>, mut events: mpsc::Receiver<GuardEvent>) {
        loop {
            match events.recv().await {
                Some(GuardEvent::Exited(record)) => {
                    self.guard_left().await;
                    return self.finish(record);
                }
                Some(GuardEvent::Paused(cause)) => self.emit(MachineEvent::Paused(cause)),
                Some(GuardEvent::Resumed) => self.emit(MachineEvent::Resumed),
                Some(GuardEvent::LeaseExpired) => self.emit(MachineEvent::LeaseExpired),
                Some(GuardEvent::GateFailed(why)) => self.emit(MachineEvent::GateFailed(why)),
                None => match self.find_guard().await {
                    Some(again) => {
                        events = again;
                        self.emit(MachineEvent::Missed(0));
                    }
                    None => return self.finish(self.orphan_record().await),
                },
            }
        }
    }

    /// The guard told of QEMU's end and has only to put its things away. Whoever hears that the machine is gone may
    /// start it again at once, and is refused while the old guard still holds the directory.
    async fn guard_left(&self) {
        if let Ok(Some(guard)) = self.guard.open() {
            let _ = tokio::time::timeout(FOLLOW_PATIENCE, process::ended(&guard)).await;
        }
    }

    /// Connects again to a guard that hung up but lives; None if it is gone.
    async fn find_guard(&self) -> Option<mpsc::Receiver<GuardEvent>> {
        loop {
            // A zombie still has its number, but nobody listens any more.
            match GuardClient::connect(&self.run_dir.file("guard.sock"), CONNECT_DEADLINE).await {
                Ok((client, events)) => {
                    *self.guard_client.lock().expect("no panic holds this") = Arc::new(client);
                    return Some(events);
                }
                Err(error) if error.kind() == ErrorKind::NotRunning => return None,
                Err(error) => tracing::warn!(machine = self.name, %error, "the guard does not answer"),
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    /// The guard is gone: makes sure that QEMU is, and says how it ended.
    async fn orphan_record(&self) -> ExitRecord {
        let ended = process::ended(&self.qemu_pidfd);
        if tokio::time::timeout(FOLLOW_PATIENCE, ended).await.is_err() {
            // The kernel should have done it.
            tracing::error!(machine = self.name, "QEMU outlived its guard: killing it");
            self.kill_directly().await;
        }
        remove_gate(&self.name).await;
        match self.run_dir.read_exit() {
            Ok(Some(record)) => record,
            _ => ExitRecord {
                // A guard that could not be asked is killed after its QEMU: that is no death of its own.
                cause: match self.kill_asked.load(Ordering::Relaxed) {
                    true => ExitCause::Request,
                    false => ExitCause::GuardDied,
                },
                code: None,
                signal: Some(libc::SIGKILL),
                detail: String::new(),
            },
        }
    }

    /// Kills QEMU without the guard and waits for its end.
    async fn kill_directly(&self) {
        if let Err(error) = process::signal(&self.qemu_pidfd, Signal::KILL) {
            tracing::error!(machine = self.name, %error, "cannot kill QEMU");
        }
        if let Err(error) = process::ended(&self.qemu_pidfd).await {
            tracing::error!(machine = self.name, %error, "cannot wait for QEMU's end");
        }
    }

    async fn kill(&self) -> ExitRecord {
        if let Some(record) = self.gone() {
            return record;
        }
        self.kill_asked.store(true, Ordering::Relaxed);
        // Not answering is an answer.
        let _ = self.guard("kill", Command::Kill, KILL_PATIENCE).await;
        if let Ok(record) = tokio::time::timeout(KILL_PATIENCE, self.exited()).await {
            return record;
        }
        tracing::warn!(machine = self.name, "the guard does not kill QEMU: doing it without");
        self.kill_directly().await;
        if let Ok(record) = tokio::time::timeout(FOLLOW_PATIENCE, self.exited()).await {
            return record;
        }
        // A guard that is frozen would only come back to an empty house.
        if let Ok(Some(guard)) = self.guard.open() {
            let _ = process::signal(&guard, Signal::KILL);
            let _ = process::ended(&guard).await;
        }
        remove_gate(&self.name).await;
        self.finish(ExitRecord {
            cause: ExitCause::Request,
            code: None,
            signal: Some(libc::SIGKILL),
            detail: String::new(),
        });
        self.exited().await
    }

    /// Keeps a connection to QEMU's monitor and hands its events on. It may take until a disk answers.
    async fn follow_monitor(self: Arc<Self>) {
        while self.gone().is_none() {
            match qmp::Client::connect(&self.run_dir.file("qmp.sock"), Duration::from_secs(60)).await {
                Ok(client) => {
                    let mut events = client.events();
                    self.monitor.send_replace(Some(client));
                    while let Some(heard) = events.next().await {
                        self.emit_heard(heard);
                    }
                    self.monitor.send_replace(None);
                }
                Err(error) => tracing::debug!(machine = self.name, %error, "QEMU's monitor is not there"),
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    fn emit_heard(&self, heard: Heard) {
        self.emit(match heard {
            Heard::Missed(count) => MachineEvent::Missed(count),
            // The guard tells these, with their causes.
            Heard::Event(Event::Stop | Event::Resume) => return,
            Heard::Event(Event::Shutdown { by_guest, .. }) => MachineEvent::ShuttingDown { by_guest },
            Heard::Event(Event::Reset { by_guest }) => MachineEvent::Reset { by_guest },
            Heard::Event(Event::GuestPanicked) => MachineEvent::GuestPanicked,
            Heard::Event(Event::BlockIoError { device, node_name, write, action, reason }) => {
                let disk = disk_of(&device).or_else(|| disk_of(&node_name));
                MachineEvent::IoError { disk, write, stopped: action == "stop", reason }
            }
            Heard::Event(Event::DeviceDeleted { device }) => match device.as_deref().and_then(disk_of) {
                Some(disk) => MachineEvent::DiskDetached(disk),
                None => return,
            },
            Heard::Event(Event::Other { name, .. }) => MachineEvent::Other { name },
        });
    }

    /// QEMU appends to the log for ever; the latest part is enough.
    async fn cut_console_log(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOG_CHECK_INTERVAL).await;
            let (log, old) = (self.run_dir.file("console.log"), self.run_dir.file("console.log.1"));
            let cut = move || -> std::io::Result<()> {
                if std::fs::metadata(&log)?.len() > LONGEST_CONSOLE_LOG {
                    std::fs::copy(&log, old)?;
                    // QEMU opened it for appending, so it goes on at the new end.
                    std::fs::OpenOptions::new().write(true).open(&log)?.set_len(0)?;
                }
                Ok(())
            };
            if let Ok(Err(error)) = tokio::task::spawn_blocking(cut).await {
                tracing::debug!(machine = self.name, %error, "cannot cut the console's log");
            }
        }
    }

    async fn screenshot(&self) -> Result<Vec<u8>> {
        let file = self.run_dir.file("screen.png");
        self.monitor("take a picture of").await?.screendump(&file).await?;
        let picture = tokio::fs::read(&file)
            .await
            .map_err(|error| Error::io(self.action("take a picture of"), error))?;
        self.run_dir.remove("screen.png")?;
        Ok(picture)
    }

    async fn attach_disk(&self, disk: Disk, export: DiskExport) -> Result<()> {
        let verb = "attach a disk to";
        if disk.bus != DiskBus::VirtioBlk || disk.index != export.disk {
            let detail = "only virtio disks can be plugged in, each with its own export";
            return Err(Error::new(ErrorKind::InvalidDefinition, self.action(verb), detail));
        }
        let monitor = self.monitor(verb).await?;
        let open_timeout = Duration::from_secs(10);
        monitor.blockdev_add(disk_node_options(&export, self.reconnect_delay, open_timeout)).await?;
        if let Err(error) = monitor.device_add(disk_device_options(&disk, None)).await {
            // Without its device, the node is of no use to anybody.
            let _ = monitor.blockdev_del(&disk_node(disk.index)).await;
            return Err(error);
        }
        Ok(())
    }

    /// QEMU's NBD client learns a size when it connects, and refuses to be told of a larger one before that.
    async fn resize_disk(&self, disk: DiskIndex, size_bytes: u64) -> Result<()> {
        let monitor = self.monitor("resize a disk of").await?;
        let node = disk_node(disk);
        let end = tokio::time::Instant::now() + RESIZE_DEADLINE;
        loop {
            monitor.touch(&node).await?;
            match monitor.block_resize(&node, size_bytes).await {
                Err(_) if tokio::time::Instant::now() < end => tokio::time::sleep(RESIZE_RETRY).await,
                result => return result,
            }
        }
    }

    async fn detach_disk(&self, disk: DiskIndex, deadline: Duration) -> Result<()> {
        let verb = "detach a disk from";
        let monitor = self.monitor(verb).await?;
        let mut events = monitor.events();
        let id = disk_id(disk);
        monitor.device_del(&id).await?;
        let let_go = events.wait_for(|event| match event {
            Event::DeviceDeleted { device } if device.as_deref() == Some(&id) => Some(()),
            _ => None,
        });
        match tokio::time::timeout(deadline, let_go).await {
            Err(_) => Err(Error::deadline(self.action(verb), deadline)),
            Ok(None) => Err(Error::new(ErrorKind::NotRunning, self.action(verb), "QEMU closed its monitor")),
            Ok(Some(())) => monitor.blockdev_del(&disk_node(disk)).await,
        }
    }
}

/// What a guard that was killed could not take away. Its TAPs went with QEMU.
pub(super) async fn remove_gate(machine: &str) {
    let machine = machine.to_owned();
    // It runs a program, and waits for it.
    let _ = tokio::task::spawn_blocking(move || crate::guard::remove_gate(&machine)).await;
}

impl Machine for QemuMachine {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn run_dir(&self) -> &Path {
        self.shared.run_dir.path()
    }

    fn guard_stop(&self) -> Result<Duration> {
        Ok(Duration::from_millis(self.shared.run_dir.read_launch()?.guard_stop_ms))
    }

    fn renew(&self, lease: Lease) -> Pending<'_, Result<()>> {
        Box::pin(async move {
            let command = Command::Renew { lease };
            self.shared.guard("renew the lease of", command, GUARD_DEADLINE).await.map(drop)
        })
    }

    fn pause(&self) -> Pending<'_, Result<()>> {
        Box::pin(async move { self.shared.guard("pause", Command::Pause, PAUSE_DEADLINE).await.map(drop) })
    }

    fn resume(&self) -> Pending<'_, Result<()>> {
        Box::pin(async move {
            if own_memory::is_marked(&self.shared.run_dir) {
                own_memory::end(&self.shared.monitor("resume").await?, &self.shared.run_dir).await?;
            }
            self.shared.guard("resume", Command::Resume, RESUME_DEADLINE).await.map(drop)
        })
    }

    fn keep_memory(&self, wanted: MemoryWanted) -> Pending<'_, Result<KeptMemory>> {
        Box::pin(async move {
            let monitor = self.shared.monitor("keep the memory of").await?;
            own_memory::save(&monitor, &self.shared.run_dir, wanted).await
        })
    }

    fn stands_as_kept(&self) -> Pending<'_, Result<bool>> {
        Box::pin(async move { own_memory::stands_as_kept(&self.shared.monitor("look at").await?).await })
    }

    fn power_down(&self, deadline: Duration) -> Pending<'_, Result<ExitRecord>> {
        Box::pin(async move {
            if let Some(record) = self.shared.gone() {
                return Ok(record);
            }
            self.shared.guard("shut down", Command::PowerDown, GUARD_DEADLINE).await?;
            tokio::time::timeout(deadline, self.shared.exited())
                .await
                .map_err(|_| Error::deadline(self.shared.action("shut down"), deadline))
        })
    }

    fn kill(&self) -> Pending<'_, Result<ExitRecord>> {
        Box::pin(async move { Ok(self.shared.kill().await) })
    }

    fn exited(&self) -> Pending<'_, ExitRecord> {
        Box::pin(self.shared.exited())
    }

    fn status(&self) -> Pending<'_, Result<MachineStatus>> {
        Box::pin(async move {
            match self.shared.guard("ask", Command::Status, GUARD_DEADLINE).await? {
                Outcome::Status(status) => Ok(MachineStatus {
                    run_state: status.run_state,
                    lease: status.lease,
                    pause_cause: status.pause_cause,
                    qemu_pid: self.shared.qemu.pid,
                    guard_pid: self.shared.guard.pid,
                    gate_works: status.gate_works,
                }),
                _ => Err(Error::new(
                    ErrorKind::Protocol,
                    self.shared.action("ask"),
                    "it did not tell its status",
                )),
            }
        })
    }

    fn events(&self) -> MachineEvents {
        MachineEvents::new(self.shared.events.subscribe())
    }

    fn console(&self) -> Pending<'_, Result<UnixStream>> {
        Box::pin(async move {
            UnixStream::connect(self.shared.run_dir.file("console.sock"))
                .await
                .map_err(|error| Error::io(self.shared.action("open the console of"), error))
        })
    }

    fn screenshot(&self) -> Pending<'_, Result<Vec<u8>>> {
        Box::pin(self.shared.screenshot())
    }

    fn attach_disk(&self, disk: Disk, export: DiskExport) -> Pending<'_, Result<()>> {
        Box::pin(self.shared.attach_disk(disk, export))
    }

    fn detach_disk(&self, disk: DiskIndex, deadline: Duration) -> Pending<'_, Result<()>> {
        Box::pin(self.shared.detach_disk(disk, deadline))
    }

    fn resize_disk(&self, disk: DiskIndex, size_bytes: u64) -> Pending<'_, Result<()>> {
        Box::pin(self.shared.resize_disk(disk, size_bytes))
    }

    fn announce(&self) -> Pending<'_, Result<()>> {
        Box::pin(async move { self.shared.monitor("announce").await?.announce_self().await })
    }

    fn nvram(&self) -> Pending<'_, Result<Option<Vec<u8>>>> {
        Box::pin(async move {
            match tokio::fs::read(self.shared.run_dir.file("nvram.fd")).await {
                Ok(bytes) => Ok(Some(bytes)),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(Error::io(self.shared.action("read the firmware variables of"), error)),
            }
        })
    }

    fn guest_agent(&self) -> Pending<'_, Result<PathBuf>> {
        Box::pin(async move {
            let monitor = self.shared.monitor("ask the guest of").await?;
            if monitor.is_open_in_guest("agent").await? {
                return Ok(self.shared.run_dir.file("agent.sock"));
            }
            let detail = "nothing in it has opened the guest agent's channel: the agent is not installed, or does not run";
            Err(Error::new(ErrorKind::NotRunning, self.shared.action("ask the guest of"), detail))
        })
    }

    fn keep_listener(&self, name: String, listener: OwnedFd) -> Pending<'_, Result<()>> {
        Box::pin(async move {
            let kept = self.shared.guard_with_fds(
                "leave a socket with",
                Command::Keep { name },
                std::slice::from_ref(&listener),
                GUARD_DEADLINE,
            );
            kept.await.map(drop)
        })
    }

    fn kept_listeners(&self) -> Pending<'_, Result<Vec<(String, OwnedFd)>>> {
        Box::pin(async move {
            let asked = self.shared.guard_with_fds("get the sockets of", Command::Kept, &[], GUARD_DEADLINE);
            match asked.await? {
                (Outcome::Kept(names), fds) if names.len() == fds.len() => {
                    Ok(names.into_iter().zip(fds).collect())
                }
                _ => {
                    let action = self.shared.action("get the sockets of");
                    Err(Error::new(ErrorKind::Protocol, action, "names and descriptors do not match"))
                }
            }
        })
    }
}
