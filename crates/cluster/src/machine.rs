//! The virtual machine on this node: whether it may run, and until when its lease holds (rules 19, 20).

use crate::Action;
use crate::bug::Bug;
use crate::member::{Member, State};
use crate::timers::Timer;
use rempart_types::MonotonicTime;

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Machine {
    /// Whether a process of it is on this node; `None` until somebody looked.
    pub(crate) exists: Option<bool>,
    /// `RunVm` was given and not taken back.
    pub(crate) may_run: bool,
    /// Its lease ended: the vCPUs are stopped until there is another.
    pub(crate) paused: bool,
    /// It was told to go.
    evicted: bool,
    /// The lease as given to the guard. It holds while `Timer::Lease` runs.
    pub(crate) lease: Option<MonotonicTime>,
    /// The oldest acknowledgement the lease rests on.
    basis: Option<MonotonicTime>,
}

impl Machine {
    pub(crate) fn appeared(&mut self) {
        self.exists = Some(true);
        self.evicted = false;
    }

    pub(crate) fn vanished(&mut self) {
        self.exists = Some(false);
    }
}

impl Member {
    /// The machine has no business on this node.
    pub(crate) fn evict_machine(&mut self, out: &mut Vec<Action>) {
        self.revoke_machine(Action::KillVm, out);
    }

    /// Takes the permission to run back, and ends what runs.
    pub(crate) fn revoke_machine(&mut self, order: Action, out: &mut Vec<Action>) {
        let machine = &mut self.machine;
        let present = machine.exists != Some(false);
        if machine.may_run || (present && !machine.evicted) {
            out.push(order);
            machine.evicted = true;
            // What was allowed to run may have been started without our having been told yet.
            if machine.may_run {
                machine.exists = None;
            }
        }
        machine.may_run = false;
        machine.paused = false;
        machine.lease = None;
        machine.basis = None;
        self.timers.clear(Timer::Lease);
    }

    /// Lets the machine run when everything that could forbid it is over.
    pub(crate) fn run_machine(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        let State::Leading(leading) = &self.state else { return };
        let Some(term) = leading.opened else { return };
        let held = leading.handover.is_some()
            || (self.ledger.wanted().gives_away(self.config.me) && !self.bug(Bug::SourceTakesBack));
        if self.machine.may_run || !leading.serving || held || self.timers.is_set(Timer::TakeoverWait) {
            return;
        }
        if !self.timers.is_set(Timer::Lease) {
            self.renew_lease(now, out);
        }
        if !self.timers.is_set(Timer::Lease) {
            return;
        }
        self.machine.may_run = true;
        self.machine.evicted = false;
        self.machine.paused = false;
        self.ledger.change().machine_is_ours = true;
        out.push(Action::RunVm { term });
    }

    /// Moves the lease on as far as the acknowledgements reach.
    ///
    /// With members beside this one, it reaches one lease from the oldest of their newest acknowledged beacons:
    /// none of them can have asked for the primacy before that. Alone it reaches one lease from now, without the
    /// register: nobody else may take over but by an operator who confirmed that this machine is fenced, and the
    /// only swap that could change it is our own, before which the other counts as a member (ADR 0020).
    pub(crate) fn renew_lease(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        let State::Leading(leading) = &self.state else { return };
        // While older leases may still run, so does somebody else's machine.
        if leading.opened.is_none() || leading.handover.is_some() || self.timers.is_set(Timer::TakeoverWait) {
            return;
        }
        let mut members = self.acknowledgers();
        if self.bug(Bug::SoloLeaseWhileAdmitting) {
            members = self.ledger.wanted().known.as_ref().expect("a primary knows its value").in_sync.clone();
        }
        if self.bug(Bug::LeaseWithoutPeer) {
            members = rempart_types::NodeSet::only(self.config.me);
        }
        let mut basis = Some(now);
        for node in members.others(self.config.me) {
            let acknowledged = self.peers.get(&node).and_then(|peer| peer.acknowledged);
            basis = basis.and_then(|basis| acknowledged.map(|at| basis.min(at)));
        }
        let Some(basis) = basis else { return };
        let until = basis + self.config.timing.lease;
        if until <= now || self.machine.lease.is_some_and(|lease| until < lease) {
            return;
        }
        self.machine.lease = Some(until);
        self.machine.basis = Some(basis);
        self.timers.set(Timer::Lease, until);
        out.push(Action::RenewLease { until });
        if self.machine.paused {
            self.machine.paused = false;
            out.push(Action::ResumeVm);
        }
    }

    pub(crate) fn lease_ended(&mut self, out: &mut Vec<Action>) {
        // The acknowledgements it rested on are used up.
        if let Some(basis) = self.machine.basis.take() {
            for peer in self.peers.values_mut() {
                peer.acknowledged = peer.acknowledged.filter(|&at| at > basis);
            }
        }
        self.machine.lease = None;
        if self.machine.may_run && !self.machine.paused {
            self.machine.paused = true;
            out.push(Action::PauseVm);
        }
    }
}
