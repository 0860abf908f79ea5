//! A hypervisor without guests: leases, events and exits in memory, for tests of what is built on it.
//!
//! A fake machine lives in its [`FakeHypervisor`], not in its handle, so that a test's "restarted daemon" can adopt
//! it. Its lease is watched by a tokio timer, against the boottime clock.

use crate::clock::boottime;
use crate::definition::{CpuModel, Disk};
use crate::error::{Error, ErrorKind, Result};
use crate::machine::{
    Adopted, DiskExport, ExitCause, ExitRecord, FirstState, HostReport, Hypervisor, KeptMemory, Lease,
    Machine, MachineEvent, MachineEvents, MachineStatus, MemoryWanted, PauseCause, Pending, RunState,
    StartRequest,
};
use rempart_types::{DiskIndex, MonotonicTime};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, watch};

const EVENT_QUEUE: usize = 64;

/// Fake machines of one host, by run directory.
#[derive(Debug, Clone, Default)]
pub struct FakeHypervisor {
    machines: Arc<Mutex<BTreeMap<PathBuf, Arc<FakeMachine>>>>,
}

/// What a fake machine does when asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FakeBehaviour {
    /// Whether the guest follows `power_down`.
    pub follows_power_down: bool,
}

#[derive(Debug)]
pub struct FakeMachine {
    request: StartRequest,
    state: Mutex<FakeState>,
    events: broadcast::Sender<MachineEvent>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct FakeState {
    lease: Lease,
    pause_cause: Option<PauseCause>,
    exit: Option<ExitRecord>,
    behaviour: FakeBehaviour,
    disks: BTreeMap<DiskIndex, u64>,
    nvram: Option<Vec<u8>>,
    kept: Vec<(String, OwnedFd)>,
    announcements: u32,
    console_far_ends: Vec<UnixStream>,
}

impl FakeHypervisor {
    pub fn new() -> Self {
        Self::default()
    }

    /// The machine in `run_dir`, for a test to look at or to hurt.
    pub fn machine(&self, run_dir: &Path) -> Option<Arc<FakeMachine>> {
        self.machines.lock().expect("no panic holds this").get(run_dir).cloned()
    }
}

impl FakeMachine {
    fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state.lock().expect("no panic holds this")
    }

    pub fn request(&self) -> &StartRequest {
        &self.request
    }

    pub fn behave(&self, behaviour: FakeBehaviour) {
        self.state().behaviour = behaviour;
    }

    /// The machine ends, as if by itself.
    pub fn end(&self, cause: ExitCause) -> ExitRecord {
        let mut state = self.state();
        let record = state.exit.get_or_insert_with(|| {
            let signal = (!matches!(cause, ExitCause::GuestShutdown)).then_some(libc::SIGKILL);
            let record =
                ExitRecord { cause, code: signal.is_none().then_some(0), signal, detail: String::new() };
            // Nobody listening is fine.
            let _ = self.events.send(MachineEvent::Exited(record.clone()));
            record
        });
        let record = record.clone();
        drop(state);
        self.changed.send_replace(());
        record
    }

    /// Puts an event in front of whoever listens.
    pub fn emit(&self, event: MachineEvent) {
        let _ = self.events.send(event);
    }

    pub fn announcements(&self) -> u32 {
        self.state().announcements
    }

    fn set_pause(&self, cause: Option<PauseCause>) {
        self.state().pause_cause = cause;
        self.emit(cause.map_or(MachineEvent::Resumed, MachineEvent::Paused));
        self.changed.send_replace(());
    }

    fn alive(&self, action: &str) -> Result<MutexGuard<'_, FakeState>> {
        let state = self.state();
        match &state.exit {
            None => Ok(state),
            Some(record) => {
                let action = format!("{action} `{}`", self.request.definition.name);
                Err(Error::new(ErrorKind::NotRunning, action, record.to_string()))
            }
        }
    }

    async fn watch_lease(self: Arc<Self>) {
        let mut changed = self.changed.subscribe();
        loop {
            changed.borrow_and_update();
            let (lease, standing) = {
                let state = self.state();
                if state.exit.is_some() {
                    return;
                }
                (state.lease, state.pause_cause.is_some())
            };
            let until = match lease {
                Lease::UntilBoottimeNs(until) if !standing => MonotonicTime(until),
                _ => MonotonicTime::FAR_FUTURE,
            };
            let now = boottime();
            if now >= until {
                self.emit(MachineEvent::LeaseExpired);
                self.set_pause(Some(PauseCause::Lease));
                continue;
            }
            // A day is as good as for ever, and within what the timer takes.
            let left = until.since(now).min(Duration::from_secs(86_400));
            tokio::select! {
                () = tokio::time::sleep(left) => {}
                _ = changed.changed() => {}
            }
        }
    }
}

fn ready<'a, T: Send + 'a>(value: T) -> Pending<'a, T> {
    Box::pin(std::future::ready(value))
}

impl Hypervisor for FakeHypervisor {
    fn start(&self, request: StartRequest) -> Pending<'_, Result<Arc<dyn Machine>>> {
        Box::pin(async move {
            request.definition.validate()?;
            let mut machines = self.machines.lock().expect("no panic holds this");
            if machines.get(&request.run_dir).is_some_and(|machine| machine.state().exit.is_none()) {
                let action = format!("start `{}`", request.definition.name);
                return Err(Error::new(ErrorKind::AlreadyRunning, action, "it runs already"));
            }
            let state = FakeState {
                lease: request.lease,
                pause_cause: (request.first_state != FirstState::Running).then_some(PauseCause::NotStarted),
                exit: None,
                behaviour: FakeBehaviour { follows_power_down: true },
                disks: request.definition.disks.iter().map(|disk| (disk.index, disk.size_bytes)).collect(),
                nvram: request.nvram.clone(),
                kept: Vec::new(),
                announcements: 0,
                console_far_ends: Vec::new(),
            };
            let machine = Arc::new(FakeMachine {
                state: Mutex::new(state),
                events: broadcast::channel(EVENT_QUEUE).0,
                changed: watch::channel(()).0,
                request: request.clone(),
            });
            machines.insert(request.run_dir, machine.clone());
            tokio::spawn(machine.clone().watch_lease());
            Ok(machine as Arc<dyn Machine>)
        })
    }

    fn adopt<'a>(&'a self, run_dir: &'a Path) -> Pending<'a, Result<Adopted>> {
        ready(Ok(match self.machine(run_dir) {
            None => Adopted::Gone(None),
            Some(machine) => {
                let exit = machine.state().exit.clone();
                match exit {
                    Some(record) => Adopted::Gone(Some(record)),
                    None => Adopted::Running(machine),
                }
            }
        }))
    }

    fn try_processor<'a>(&'a self, _: &'a CpuModel) -> Pending<'a, std::result::Result<(), String>> {
        ready(Ok(()))
    }

    fn host(&self) -> Pending<'_, Result<HostReport>> {
        ready(Ok(HostReport {
            qemu_version: "fake".into(),
            accelerator: "tcg".into(),
            accelerator_reason: "no guest runs here".into(),
            machine_types: vec![crate::definition::DEFAULT_MACHINE_TYPE.into()],
            uefi_variables_bytes: Some(540_672),
            network_gate: false,
        }))
    }
}

impl Machine for FakeMachine {
    fn name(&self) -> &str {
        &self.request.definition.name
    }

    fn run_dir(&self) -> &Path {
        &self.request.run_dir
    }

    fn guard_stop(&self) -> Result<Duration> {
        Ok(self.request.guard_stop)
    }

    fn renew(&self, lease: Lease) -> Pending<'_, Result<()>> {
        ready(self.alive("renew the lease of").map(|mut state| {
            state.lease = match (state.lease, lease) {
                (Lease::UntilBoottimeNs(old), Lease::UntilBoottimeNs(new)) => {
                    Lease::UntilBoottimeNs(old.max(new))
                }
                (_, new) => new,
            };
            self.changed.send_replace(());
        }))
    }

    fn pause(&self) -> Pending<'_, Result<()>> {
        ready(self.alive("pause").map(drop).map(|()| self.set_pause(Some(PauseCause::Request))))
    }

    fn resume(&self) -> Pending<'_, Result<()>> {
        ready(self.alive("resume").map(|state| state.lease).and_then(|lease| {
            if lease.is_over(boottime()) {
                let action = format!("resume `{}`", self.name());
                return Err(Error::new(ErrorKind::Refused, action, "its lease is over"));
            }
            self.set_pause(None);
            Ok(())
        }))
    }

    fn keep_memory(&self, wanted: MemoryWanted) -> Pending<'_, Result<KeptMemory>> {
        ready(self.alive("keep the memory of").and_then(|state| {
            let action = format!("keep the memory of `{}`", self.name());
            if state.pause_cause.is_none() {
                return Err(Error::new(ErrorKind::Refused, action, "it runs"));
            }
            let bytes = wanted.file.metadata().map_err(|error| Error::io(action, error))?.len();
            Ok(KeptMemory { bytes, description: serde_json::Value::Null })
        }))
    }

    fn stands_as_kept(&self) -> Pending<'_, Result<bool>> {
        ready(self.alive("look at").map(|state| state.pause_cause.is_some()))
    }

    fn power_down(&self, deadline: Duration) -> Pending<'_, Result<ExitRecord>> {
        Box::pin(async move {
            if self.alive("shut down")?.behaviour.follows_power_down {
                return Ok(self.end(ExitCause::GuestShutdown));
            }
            tokio::time::timeout(deadline, self.exited())
                .await
                .map_err(|_| Error::deadline(format!("shut down `{}`", self.name()), deadline))
        })
    }

    fn kill(&self) -> Pending<'_, Result<ExitRecord>> {
        ready(Ok(self.end(ExitCause::Request)))
    }

    fn exited(&self) -> Pending<'_, ExitRecord> {
        Box::pin(async move {
            let mut changed = self.changed.subscribe();
            loop {
                if let Some(record) = self.state().exit.clone() {
                    return record;
                }
                // The sender lives in self.
                let _ = changed.changed().await;
            }
        })
    }

    fn status(&self) -> Pending<'_, Result<MachineStatus>> {
        ready(self.alive("ask").map(|state| MachineStatus {
            run_state: if state.pause_cause.is_some() { RunState::Paused } else { RunState::Running },
            lease: state.lease,
            pause_cause: state.pause_cause,
            qemu_pid: 0,
            guard_pid: 0,
            gate_works: None,
        }))
    }

    fn events(&self) -> MachineEvents {
        MachineEvents::new(self.events.subscribe())
    }

    fn console(&self) -> Pending<'_, Result<UnixStream>> {
        ready(self.alive("open the console of").and_then(|mut state| {
            let (near, far) = UnixStream::pair().map_err(|error| Error::io("make a console", error))?;
            state.console_far_ends.push(far);
            Ok(near)
        }))
    }

    fn screenshot(&self) -> Pending<'_, Result<Vec<u8>>> {
        ready(self.alive("take a picture of").map(|_| b"\x89PNG\r\n\x1a\n".to_vec()))
    }

    fn attach_disk(&self, disk: Disk, _export: DiskExport) -> Pending<'_, Result<()>> {
        ready(self.alive("attach a disk to").map(|mut state| {
            state.disks.insert(disk.index, disk.size_bytes);
        }))
    }

    fn detach_disk(&self, disk: DiskIndex, _deadline: Duration) -> Pending<'_, Result<()>> {
        ready(self.alive("detach a disk from").map(|mut state| {
            state.disks.remove(&disk);
            self.emit(MachineEvent::DiskDetached(disk));
        }))
    }

    fn resize_disk(&self, disk: DiskIndex, size_bytes: u64) -> Pending<'_, Result<()>> {
        ready(self.alive("resize a disk of").map(|mut state| {
            state.disks.insert(disk, size_bytes);
        }))
    }

    fn announce(&self) -> Pending<'_, Result<()>> {
        ready(self.alive("announce").map(|mut state| state.announcements += 1))
    }

    fn nvram(&self) -> Pending<'_, Result<Option<Vec<u8>>>> {
        ready(Ok(self.state().nvram.clone()))
    }

    fn guest_agent(&self) -> Pending<'_, Result<PathBuf>> {
        let action = format!("ask the guest of `{}`", self.name());
        ready(Err(Error::new(ErrorKind::NotRunning, action, "there is none")))
    }

    fn keep_listener(&self, name: String, listener: OwnedFd) -> Pending<'_, Result<()>> {
        ready(self.alive("leave a socket with").map(|mut state| {
            state.kept.retain(|(kept, _)| *kept != name);
            state.kept.push((name, listener));
        }))
    }

    fn kept_listeners(&self) -> Pending<'_, Result<Vec<(String, OwnedFd)>>> {
        ready(self.alive("get the sockets of").and_then(|state| {
            let copy = |(name, fd): &(String, OwnedFd)| Ok((name.clone(), fd.try_clone()?));
            state
                .kept
                .iter()
                .map(copy)
                .collect::<std::io::Result<_>>()
                .map_err(|error| Error::io("copy a kept socket", error))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::{Definition, VmUuid};

    async fn started(lease: Lease) -> (FakeHypervisor, Arc<dyn Machine>) {
        let hypervisor = FakeHypervisor::new();
        let request = StartRequest {
            definition: Definition::new("fake", VmUuid(1), 64 << 20, 1),
            disks: Vec::new(),
            run_dir: "/run/fake".into(),
            nvram: None,
            lease,
            guard_stop: Duration::from_secs(1),
            first_state: FirstState::Running,
        };
        let machine = hypervisor.start(request).await.unwrap();
        (hypervisor, machine)
    }

    #[tokio::test]
    async fn a_lease_that_runs_out_pauses_until_renewed_and_resumed() {
        let (_, machine) = started(Lease::until(boottime() + Duration::from_millis(20))).await;
        let mut events = machine.events();
        while events.next().await != Some(MachineEvent::Paused(PauseCause::Lease)) {}
        assert_eq!(machine.resume().await.unwrap_err().kind(), ErrorKind::Refused);
        machine.renew(Lease::Unlimited).await.unwrap();
        assert_eq!(machine.status().await.unwrap().run_state, RunState::Paused);
        machine.resume().await.unwrap();
        assert_eq!(machine.status().await.unwrap().run_state, RunState::Running);
    }

    #[tokio::test]
    async fn a_machine_outlives_its_handle_and_is_adopted_until_it_ends() {
        let (hypervisor, machine) = started(Lease::Unlimited).await;
        drop(machine);
        let run_dir = Path::new("/run/fake");
        let Adopted::Running(machine) = hypervisor.adopt(run_dir).await.unwrap() else {
            panic!("it is lost")
        };
        hypervisor.machine(run_dir).unwrap().end(ExitCause::Crashed);
        assert_eq!(machine.exited().await.cause, ExitCause::Crashed);
        let Adopted::Gone(Some(record)) = hypervisor.adopt(run_dir).await.unwrap() else {
            panic!("it is gone")
        };
        assert_eq!(record.cause, ExitCause::Crashed);
    }

    #[tokio::test]
    async fn a_guest_that_does_not_follow_is_left_running() {
        let (hypervisor, machine) = started(Lease::Unlimited).await;
        let fake = hypervisor.machine(Path::new("/run/fake")).unwrap();
        fake.behave(FakeBehaviour { follows_power_down: false });
        let error = machine.power_down(Duration::from_millis(5)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Deadline);
        assert_eq!(machine.kill().await.unwrap().cause, ExitCause::Request);
    }
}
