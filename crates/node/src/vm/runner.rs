//! Brings the machine on this node in line with what is wanted and allowed.
//!
//! ```text
//!             Run, wanted                    exit
//!   absent ───────────────► starting ─► running ─────► absent, and starting again while tries are left
//!      ▲                       │          │  ▲
//!      │                       │   Paused │  │ Run
//!      │     No, ShutDown      ▼          ▼  │
//!      └───────────────────────┴──────── paused
//! ```
//!
//! One that is held stands still for somebody who keeps its memory, and goes on as soon as it is held no more. Orders to
//! end it come before that.
//!
//! *Allowed* comes from the cluster core: whether this replica leads, and whether its lease may hold. *Wanted* comes
//! from the operator, through the machine's config. The lease itself is renewed beside all this, by a task that
//! nothing here can hold up.

use rempart_engine::VmFact;
use rempart_hypervisor::{
    ErrorKind, ExitCause, ExitRecord, Hypervisor, Lease, Machine, MachineEvent, RunState, StartRequest,
};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// A machine that ran this long is forgiven its earlier failures.
const GOOD_RUN: Duration = Duration::from_secs(300);

/// Between two tries to have a machine go on that does not.
const RESUME_PAUSE: Duration = Duration::from_secs(2);

/// Between its second failure and the next start; twice as long each time. What failed once is tried again at once.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// What the cluster core allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// Nothing was said since this daemon started: a machine that an earlier life left goes on under its lease.
    Undecided,
    No,
    /// In order, then by force.
    ShutDown {
        grace: Duration,
    },
    /// It may exist, with its vCPUs stopped.
    Paused,
    Run,
}

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Running,
    /// The guest is asked first, for so long; then the power is cut.
    Stopped {
        grace: Duration,
    },
}

/// What the runner is told. It always looks at the latest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    pub allowed: Allowed,
    pub wanted: Wanted,
    /// Raised to have failed starts tried again.
    pub attempt: u64,
    /// How many times the machine was ordered to end. Each order is answered by `VmFact::Stopped`.
    pub ends: u64,
    /// One that runs shall stand still for a while.
    pub held: bool,
}

impl Control {
    pub fn may_run(&self) -> bool {
        self.allowed == Allowed::Run && self.wanted == Wanted::Running
    }
}

/// What the runner tells.
#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    Fact(VmFact),
    /// The guest shut itself down: it is no longer wanted running.
    GuestShutDown,
    /// It cannot be kept running here.
    GaveUp {
        why: String,
    },
    Restarted {
        why: String,
        attempt: u32,
    },
    Machine(MachineEvent),
    StartFailed {
        why: String,
    },
}

/// What others may look at.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    pub machine: Option<Arc<dyn Machine>>,
    pub run_state: Option<RunState>,
    pub qemu_pid: Option<u32>,
    /// Why it is not kept running any more.
    pub failed: Option<String>,
    pub starting: bool,
    /// It ran, and stands still because it is held.
    pub held: bool,
}

#[derive(Debug)]
pub struct Runner {
    pub hypervisor: Arc<dyn Hypervisor>,
    /// What an earlier life of the daemon left running.
    pub adopted: Option<Arc<dyn Machine>>,
    /// The NBD server's socket, left with the guard so that QEMU finds it while no daemon is there.
    pub listener: Arc<OwnedFd>,
    pub request: Arc<dyn StartSource>,
    pub control: watch::Receiver<Control>,
    pub lease: watch::Receiver<Lease>,
    pub tell: mpsc::UnboundedSender<Told>,
    pub shown: watch::Sender<Shown>,
    /// Starts here after QEMU ended by itself, before it is given up.
    pub max_restarts: u32,
}

/// Gives the parameters of a start.
pub trait StartSource: Send + Sync + std::fmt::Debug {
    /// Everything needed for one. `None` while the daemon ends.
    fn start_request(&self, lease: Lease) -> Option<StartRequest>;
}

#[derive(Debug, Default)]
struct Tries {
    failures: u32,
    last_start: Option<Instant>,
    not_before: Option<Instant>,
    given_up: Option<u64>,
    /// `Control::ends` as of the last end that was told.
    ends_answered: u64,
}

impl Runner {
    pub async fn run(mut self) {
        let mut tries = Tries::default();
        let mut machine = self.adopted.take();
        if machine.is_none() {
            self.say(Told::Fact(VmFact::Stopped));
        }
        loop {
            machine = match machine {
                Some(machine) => self.supervise(machine, &mut tries).await,
                None => match self.absent(&mut tries).await {
                    Some(next) => next,
                    None => return,
                },
            };
        }
    }

    fn say(&self, told: Told) {
        // The listener is gone only while the daemon ends.
        let _ = self.tell.send(told);
    }

    /// No machine: starts one when it is wanted and allowed. `None` ends the runner.
    async fn absent(&mut self, tries: &mut Tries) -> Option<Option<Arc<dyn Machine>>> {
        let control = self.control.borrow_and_update().clone();
        self.shown.send_modify(|shown| {
            shown.machine = None;
            shown.run_state = None;
            shown.qemu_pid = None;
            shown.held = false;
        });
        if tries.ends_answered < control.ends {
            // Who ordered an end waits to hear of it, also when there was nothing to end. What may run again later
            // starts with new tries.
            self.say(Told::Fact(VmFact::Stopped));
            *tries = Tries { ends_answered: control.ends, ..Tries::default() };
        }
        let given_up = tries.given_up == Some(control.attempt);
        let start = control.may_run() && !given_up;
        if !start {
            return if self.control.changed().await.is_ok() { Some(None) } else { None };
        }
        if tries.given_up.take().is_some() {
            tries.failures = 0;
        }
        if let Some(at) = tries.not_before.take_if(|at| *at > Instant::now()) {
            tokio::select! {
                () = tokio::time::sleep_until(at.into()) => {}
                changed = self.control.changed() => {
                    tries.not_before = Some(at);
                    return changed.is_ok().then_some(None);
                }
            }
        }
        self.shown.send_modify(|shown| {
            shown.starting = true;
            shown.failed = None;
        });
        tries.last_start = Some(Instant::now());
        let lease = *self.lease.borrow();
        let request = self.request.start_request(lease)?;
        let started = self.hypervisor.start(request).await;
        self.shown.send_modify(|shown| shown.starting = false);
        match started {
            Ok(machine) => {
                self.leave_listener(&machine).await;
                Some(Some(machine))
            }
            Err(error) => {
                let why = format!("{error}");
                self.say(Told::StartFailed { why: why.clone() });
                self.failed(tries, why);
                Some(None)
            }
        }
    }

    async fn leave_listener(&self, machine: &Arc<dyn Machine>) {
        let kept = match self.listener.try_clone() {
            Ok(copy) => {
                machine.keep_listener(super::NBD_LISTENER.into(), copy).await.map_err(|e| e.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = kept {
            // Only a slower reconnection after a restart of the daemon is at stake.
            tracing::warn!(machine = machine.name(), error, "the guard does not keep the NBD socket");
        }
    }

    fn failed(&mut self, tries: &mut Tries, why: String) {
        if tries.last_start.is_some_and(|at| at.elapsed() >= GOOD_RUN) {
            tries.failures = 0;
        }
        tries.failures += 1;
        if tries.failures > self.max_restarts {
            tries.given_up = Some(self.control.borrow().attempt);
            self.shown.send_modify(|shown| shown.failed = Some(why.clone()));
            self.say(Told::GaveUp { why });
        } else {
            tries.not_before = match tries.failures {
                0 | 1 => None,
                more => Some(Instant::now() + RETRY_PAUSE * 2_u32.saturating_pow(more - 2)),
            };
            self.say(Told::Restarted { why, attempt: tries.failures });
        }
    }

    /// A machine is there: keeps it as it should be until it is gone.
    async fn supervise(&mut self, machine: Arc<dyn Machine>, tries: &mut Tries) -> Option<Arc<dyn Machine>> {
        let mut events = machine.events();
        let renewing = tokio::spawn(renew_leases(machine.clone(), self.lease.clone()));
        self.say(Told::Fact(VmFact::Running));
        match machine.status().await {
            Ok(status) => self.show(&machine, status.run_state, status.qemu_pid),
            Err(error) => self.broken(&machine, "ask", &error),
        }
        let record = loop {
            let control = self.control.borrow_and_update().clone();
            if let Some(record) = self.align(&machine, &control).await {
                break record;
            }
            let goes_on = control.may_run() && !control.held;
            let stands_still = goes_on && self.shown.borrow().run_state == Some(RunState::Paused);
            tokio::select! {
                // Nothing else may come that has it tried again.
                () = tokio::time::sleep(RESUME_PAUSE), if stands_still => {}
                changed = self.control.changed() => if changed.is_err() {
                    // The daemon ends; the machine goes on under its guard.
                    renewing.abort();
                    std::future::pending::<()>().await;
                },
                record = machine.exited() => break record,
                event = events.next() => match event {
                    Some(event) => self.event(event),
                    None => break machine.exited().await,
                },
            }
        };
        renewing.abort();
        self.gone(&machine, record, tries);
        None
    }

    fn event(&self, event: MachineEvent) {
        match &event {
            MachineEvent::Paused(_) => self.show_state(RunState::Paused),
            MachineEvent::Resumed => self.show_state(RunState::Running),
            // Told when it is gone.
            MachineEvent::Exited(_) => return,
            _ => {}
        }
        self.say(Told::Machine(event));
    }

    /// One step towards `control`. `Some` when the machine is gone.
    async fn align(&mut self, machine: &Arc<dyn Machine>, control: &Control) -> Option<ExitRecord> {
        let (paused, held) = {
            let shown = self.shown.borrow();
            (shown.run_state == Some(RunState::Paused), shown.held)
        };
        match (control.allowed, control.wanted) {
            (Allowed::Undecided, _) => None,
            (Allowed::No, _) => machine.kill().await.map_err(|e| self.broken(machine, "kill", &e)).ok(),
            (Allowed::ShutDown { grace }, _) | (Allowed::Run, Wanted::Stopped { grace }) => {
                if held && !grace.is_zero() {
                    // A guest that stands still does not hear that it is asked. Who holds it lets go of it now.
                    if control.held {
                        return None;
                    }
                    self.resume(machine).await;
                }
                self.stop(machine, grace).await
            }
            // Nothing is waited for: paused or not.
            (Allowed::Paused, Wanted::Stopped { grace }) if grace.is_zero() => {
                self.stop(machine, grace).await
            }
            (Allowed::Paused, _) => {
                if !paused {
                    self.pause(machine).await;
                }
                None
            }
            (Allowed::Run, Wanted::Running) if control.held => {
                if !paused && self.pause(machine).await {
                    self.shown.send_modify(|shown| shown.held = true);
                }
                None
            }
            (Allowed::Run, Wanted::Running) => {
                if paused {
                    self.resume(machine).await;
                }
                None
            }
        }
    }

    async fn pause(&self, machine: &Arc<dyn Machine>) -> bool {
        match machine.pause().await {
            Ok(()) => {
                self.show_state(RunState::Paused);
                true
            }
            Err(error) => {
                self.broken(machine, "pause", &error);
                false
            }
        }
    }

    async fn resume(&self, machine: &Arc<dyn Machine>) {
        // The guard refuses while the lease is over, so the lease that allows this goes first.
        let lease = *self.lease.borrow();
        let resumed = async {
            machine.renew(lease).await?;
            machine.resume().await
        };
        match resumed.await {
            Ok(()) => self.show_state(RunState::Running),
            Err(error) => self.broken(machine, "resume", &error),
        }
    }

    /// Asks the guest, then cuts the power. A change of what is allowed or wanted breaks it off.
    async fn stop(&mut self, machine: &Arc<dyn Machine>, grace: Duration) -> Option<ExitRecord> {
        if !grace.is_zero() && self.shown.borrow().run_state != Some(RunState::Paused) {
            let asked = tokio::select! {
                asked = machine.power_down(grace) => asked,
                _ = self.control.changed() => return None,
            };
            match asked {
                Ok(record) => return Some(record),
                Err(error) if error.kind() == ErrorKind::Deadline => {}
                Err(error) => self.broken(machine, "shut down", &error),
            }
        }
        machine.kill().await.map_err(|e| self.broken(machine, "kill", &e)).ok()
    }

    fn gone(&mut self, machine: &Arc<dyn Machine>, record: ExitRecord, tries: &mut Tries) {
        self.shown.send_modify(|shown| {
            shown.machine = None;
            shown.run_state = None;
            shown.qemu_pid = None;
            shown.held = false;
        });
        tracing::info!(machine = machine.name(), %record, "the machine is gone");
        let control = self.control.borrow().clone();
        if tries.ends_answered < control.ends {
            *tries = Tries { ends_answered: control.ends, ..Tries::default() };
        }
        self.say(Told::Fact(VmFact::Stopped));
        self.say(Told::Machine(MachineEvent::Exited(record.clone())));
        let unexpected = control.may_run();
        match record.cause {
            ExitCause::GuestShutdown if unexpected => self.say(Told::GuestShutDown),
            ExitCause::Lease | ExitCause::Request => {}
            _ if unexpected => self.failed(tries, record.to_string()),
            _ => {}
        }
    }

    fn show(&self, machine: &Arc<dyn Machine>, state: RunState, pid: u32) {
        self.shown.send_modify(|shown| {
            shown.machine = Some(machine.clone());
            shown.run_state = Some(state);
            shown.qemu_pid = Some(pid);
            shown.held = false;
            shown.failed = None;
        });
    }

    fn show_state(&self, state: RunState) {
        self.shown.send_modify(|shown| {
            shown.run_state = Some(state);
            shown.held &= state == RunState::Paused;
        });
    }

    fn broken(&self, machine: &Arc<dyn Machine>, what: &str, error: &rempart_hypervisor::Error) {
        tracing::warn!(machine = machine.name(), %error, "cannot {what} the machine");
    }
}

/// Hands every new lease to the guard, and nothing else: it must never wait for anything else.
async fn renew_leases(machine: Arc<dyn Machine>, mut lease: watch::Receiver<Lease>) {
    loop {
        let now = *lease.borrow_and_update();
        if let Err(error) = machine.renew(now).await {
            tracing::debug!(%error, "lease not renewed");
        }
        if lease.changed().await.is_err() {
            return;
        }
    }
}
