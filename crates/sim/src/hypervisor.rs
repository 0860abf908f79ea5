//! The machine's process on a node: launched, adopted, paused, ended, and watched by its guard.

use crate::coverage::Kind;
use crate::faults::Planted;
use crate::machine::Machine;
use crate::world::{DaemonEvent, Event, World};
use rempart_engine::{VmAction, VmFact};
use std::time::Duration;

impl World {
    pub(crate) fn vm_action(&mut self, node: usize, action: VmAction) {
        if !matches!(action, VmAction::RenewLease { .. }) {
            self.tell(|| format!("node {node}: VM {action:?}"));
        }
        if self.options.planted == Some(Planted::KillIgnored)
            && matches!(action, VmAction::Kill | VmAction::ShutDown)
        {
            return self.tell_daemon(node, Duration::from_millis(1), DaemonEvent::Vm(VmFact::Stopped));
        }
        self.nodes[node].vm_may_run = match action {
            VmAction::Run { .. } | VmAction::Resume => true,
            VmAction::RenewLease { .. } => self.nodes[node].vm_may_run,
            VmAction::Pause | VmAction::ShutDown | VmAction::Kill => false,
        };
        match action {
            VmAction::Run { .. } => self.run_machine(node),
            VmAction::RenewLease { until } => {
                self.nodes[node].lease = Some(until);
                let Some(machine) = &mut self.nodes[node].machine else { return };
                if machine.guard.lease_until.is_none_or(|lease| lease < until) {
                    machine.guard.lease_until = Some(until);
                    self.set_guard_timer(node);
                    self.wake_guest(node);
                }
            }
            VmAction::Pause => {
                if let Some(machine) = &mut self.nodes[node].machine {
                    machine.paused = true;
                }
            }
            VmAction::Resume => {
                match &mut self.nodes[node].machine {
                    Some(machine) => machine.paused = false,
                    None => self.run_machine(node),
                }
                self.wake_guest(node);
            }
            VmAction::ShutDown => {
                self.nodes[node].lease = None;
                // In order takes a while; the guest's last requests are part of it.
                let delay = self.rng.duration(Duration::from_millis(1)..Duration::from_millis(300));
                match &self.nodes[node].machine {
                    Some(machine) => {
                        let nonce = machine.nonce;
                        self.after(delay, Event::GuardKills { node, nonce });
                    }
                    None => self.tell_daemon(node, Duration::ZERO, DaemonEvent::Vm(VmFact::Stopped)),
                }
            }
            VmAction::Kill => {
                self.nodes[node].lease = None;
                self.end_machine(node);
                self.tell_daemon(node, Duration::from_millis(1), DaemonEvent::Vm(VmFact::Stopped));
            }
        }
    }

    fn run_machine(&mut self, node: usize) {
        let dying = self.nodes[node].machine.as_ref().is_some_and(|machine| machine.stopped_by_guard);
        if dying {
            // Its guard already stopped it: it cannot be kept, so it is ended and a new one starts.
            self.end_machine(node);
        }
        if self.nodes[node].machine.is_some() {
            self.reached("VM adopted");
            self.wake_guest(node);
        } else {
            self.nonces += 1;
            let workload = self.setup.workload(&mut self.rng);
            let mut machine = Machine::new(self.nonces, workload);
            let nonce = machine.nonce;
            // The daemon hands its guard the lease it has.
            machine.guard.lease_until = self.nodes[node].lease;
            self.nodes[node].machine = Some(machine);
            self.set_guard_timer(node);
            let delay = self.rng.duration(Duration::from_millis(20)..Duration::from_millis(150));
            self.after(delay, Event::Boot { node, nonce });
        }
        self.tell_daemon(node, Duration::from_millis(1), DaemonEvent::Vm(VmFact::Running));
    }

    fn machine(&mut self, node: usize, nonce: u64) -> Option<&mut Machine> {
        self.nodes[node].machine.as_mut().filter(|machine| machine.nonce == nonce)
    }

    pub(crate) fn machine_boots(&mut self, node: usize, nonce: u64) {
        if self.nodes[node].frozen {
            return self.after(Duration::from_millis(50), Event::Boot { node, nonce });
        }
        let Some(machine) = self.machine(node, nonce) else { return };
        machine.booted = true;
        self.tell(|| format!("node {node}: VM process {nonce} booted"));
        self.reached("VM booted");
        self.after(Duration::ZERO, Event::Reconnect { node, nonce });
        self.wake_guest(node);
    }

    /// The guard sets its own timer, on its node's clock, and is a little late as every process is.
    pub(crate) fn set_guard_timer(&mut self, node: usize) {
        let stop = self.setup.timing.guard_stop;
        let sleeps = self.options.planted == Some(Planted::GuardSleeps);
        let late = if sleeps { stop * 4 } else { self.rng.duration(Duration::ZERO..stop / 2) };
        let Some(machine) = &mut self.nodes[node].machine else { return };
        let Some(until) = machine.guard.lease_until else { return };
        machine.guard.timer += 1;
        let (nonce, timer) = (machine.nonce, machine.guard.timer);
        let at = self.nodes[node].clock.moment_of(until) + late;
        let delay = at.since(self.now());
        self.after(delay, Event::Guard { node, nonce, timer });
    }

    pub(crate) fn guard_rings(&mut self, node: usize, nonce: u64, timer: u64) {
        let now = self.now();
        let reading = self.nodes[node].clock.reading(now);
        let ignores = self.options.planted == Some(Planted::GuardIgnoresLease);
        let frozen_node = self.nodes[node].frozen;
        let Some(machine) = self.machine(node, nonce) else { return };
        if frozen_node || machine.guard.frozen {
            return; // It looks again when it is continued.
        }
        let expired = machine.guard.lease_until.is_some_and(|until| until <= reading);
        if machine.guard.timer != timer || !expired || machine.stopped_by_guard || ignores {
            return;
        }
        machine.stopped_by_guard = true;
        self.tell(|| format!("node {node}: guard stops VM process {nonce}: its lease ran out"));
        self.reached("guard stopped the VM");
        let delay = self.rng.duration(Duration::from_millis(10)..Duration::from_secs(2));
        self.after(delay, Event::GuardKills { node, nonce });
    }

    pub(crate) fn guard_kills(&mut self, node: usize, nonce: u64) {
        if self.nodes[node].frozen {
            return self.after(Duration::from_millis(50), Event::GuardKills { node, nonce });
        }
        if self.machine(node, nonce).is_some() {
            self.end_machine(node);
            self.tell_daemon(node, Duration::from_millis(1), DaemonEvent::Vm(VmFact::Stopped));
            self.plan_start_again(node);
        }
    }

    /// The process is gone; its connection closes and its requests with it.
    pub(crate) fn end_machine(&mut self, node: usize) {
        let Some(machine) = self.nodes[node].machine.take() else { return };
        self.tell(|| format!("node {node}: VM process {} ended", machine.nonce));
        if let Some(life) = machine.life {
            let now = self.now();
            self.history.machine_died(life, now);
        }
        self.abandon(node, machine.connection.sent);
    }

    /// QEMU dies under its guard.
    pub(crate) fn kill_machine(&mut self, node: usize) {
        if self.nodes[node].machine.is_some() {
            self.coverage.count(Kind::Fault, "QEMU killed");
            self.end_machine(node);
            self.tell_daemon(node, Duration::from_millis(20), DaemonEvent::Vm(VmFact::Stopped));
            self.plan_start_again(node);
        }
    }

    /// The permission to run holds until it is taken back: a process that died is started again.
    fn plan_start_again(&mut self, node: usize) {
        if let Some(daemon) = &self.nodes[node].daemon {
            let life = daemon.life;
            let delay = self.rng.duration(Duration::from_millis(100)..Duration::from_secs(1));
            self.after(delay, Event::StartAgain { node, life });
        }
    }

    pub(crate) fn start_again(&mut self, node: usize, life: u64) {
        let state = &self.nodes[node];
        let Some(daemon) = state.daemon.as_ref().filter(|daemon| daemon.life == life) else { return };
        if daemon.frozen {
            return self.after(Duration::from_millis(100), Event::StartAgain { node, life });
        }
        if state.vm_may_run && state.machine.is_none() {
            self.reached("VM started again");
            self.run_machine(node);
        }
    }

    /// The guard of `node` is stopped by a signal, or continued.
    pub(crate) fn freeze_guard(&mut self, node: usize, frozen: bool) {
        if let Some(machine) = &mut self.nodes[node].machine {
            machine.guard.frozen = frozen;
            if !frozen {
                self.set_guard_timer(node);
            }
        }
    }

    /// Whether the machine on `node` executes instructions right now.
    pub(crate) fn machine_runs(&self, node: usize) -> bool {
        let node = &self.nodes[node];
        node.powered && !node.frozen && node.machine.as_ref().is_some_and(Machine::runs)
    }
}
