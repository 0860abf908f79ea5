//! Leading although the register does not allow it (rule 16), and being on the other side of that.
//!
//! The old register, if it can be reached, is closed by a tombstone that names its successor; the successor is
//! then created. A crash in between is finished at the next start, by whoever forced. Epochs of the successor start
//! above everything the old register could reach: its upper half counts registers, so a term never means two logs.

use crate::member::{Member, State};
use crate::persistent::Attempt;
use crate::{Action, Condition, RefusedWhy};
use rempart_types::{Epoch, Intent, MonotonicTime, NodeSet, Nonce, RegisterId, RegisterValue, Term};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Forcing {
    target: RegisterId,
    old_register_lost: bool,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    ReadOld,
    Tombstone(Nonce),
    Create(Nonce),
}

impl Member {
    pub(crate) fn force(
        &mut self,
        confirmed_fenced: bool,
        new_register: RegisterId,
        old_register_lost: bool,
        out: &mut Vec<Action>,
    ) {
        let why = match &self.state {
            _ if !confirmed_fenced => RefusedWhy::NotConfirmed,
            State::Leading(leading) if !leading.is_cut_off() => RefusedWhy::AlreadyPrimary,
            State::Claiming(_) | State::Forcing(_) => RefusedWhy::Busy,
            _ if !self.can_lead() || matches!(self.state, State::Stopped) => RefusedWhy::CopyUnusable,
            _ if self.ledger.wanted().register == Some(new_register) => RefusedWhy::Busy,
            _ => {
                self.step_down(out);
                self.timers.retain(|timer| {
                    use crate::timers::Timer::{RegisterDeadline, RegisterRetry};
                    matches!(timer, RegisterDeadline | RegisterRetry)
                });
                self.state = State::Forcing(Forcing {
                    target: new_register,
                    old_register_lost,
                    phase: Phase::ReadOld,
                });
                return;
            }
        };
        self.refuse("force", why, out);
    }

    pub(crate) fn forcing_into(&self) -> Option<RegisterId> {
        match &self.state {
            State::Forcing(Forcing { target, phase: Phase::Create(_), .. }) => Some(*target),
            _ => None,
        }
    }

    pub(crate) fn force_on(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        self.evict_machine(out);
        let State::Forcing(forcing) = &self.state else { return };
        if !self.desk.free(&self.timers) {
            return;
        }
        match forcing.phase {
            Phase::ReadOld => {
                let register = self.register_id();
                self.desk.read(register, &self.config.timing, &mut self.timers, now, out);
            }
            Phase::Tombstone(nonce) | Phase::Create(nonce) => {
                if let Some(attempt) = self.ledger.attempt(nonce) {
                    self.desk.swap(attempt, &self.config.timing, &mut self.timers, now, out);
                }
            }
        }
    }

    /// The old register holds this.
    pub(crate) fn saw_while_forcing(&mut self, value: RegisterValue, out: &mut Vec<Action>) {
        let me = self.config.me;
        let State::Forcing(forcing) = &self.state else { return };
        if let Phase::Tombstone(_) = forcing.phase {
            // It changed since we read it: somebody lives there.
            self.refuse("force", RefusedWhy::Busy, out);
            self.state = State::Booting;
            return;
        }
        let successor = forcing.target;
        self.ledger.change().register = Some(value.register);
        self.ledger.change().record(&value, me);
        let nonce = self.draw_nonce();
        let mut tombstone = self.forced_value(value.register, nonce);
        tombstone.intent = Intent::Tombstone { successor };
        self.ledger.change().attempts.push(Attempt { expected: Some(value.epoch), value: tombstone });
        self.set_phase(Phase::Tombstone(nonce));
    }

    pub(crate) fn saw_tombstone(
        &mut self,
        value: RegisterValue,
        successor: RegisterId,
        out: &mut Vec<Action>,
    ) {
        if matches!(self.state, State::Stopped | State::Failed { .. } | State::Superseded { .. }) {
            return;
        }
        let forcing = matches!(self.state, State::Forcing(_));
        self.ledger.change().register = Some(value.register);
        self.ledger.change().record(&value, self.config.me);
        if !forcing && (value.primary != self.config.me || !self.can_lead()) {
            return self.supersede(successor, out);
        }
        // Ours, or one whose author may never have come to create the successor: create it. If it exists, its value
        // tells.
        self.step_down(out);
        let own = value.primary == self.config.me;
        let value = RegisterValue {
            register: successor,
            primary: self.config.me,
            in_sync: NodeSet::only(self.config.me),
            intent: Intent::Lead,
            // Under the author's nonce what the author created would be taken for ours.
            nonce: if own { value.nonce } else { self.draw_nonce() },
            lineage: if own { value.lineage } else { self.lineage.clone() },
            epoch: value.epoch,
        };
        self.create_successor(value);
    }

    /// The old register is out of reach, or holds nothing.
    pub(crate) fn force_without_old_register(&mut self, out: &mut Vec<Action>) {
        let State::Forcing(forcing) = &self.state else { return };
        if forcing.phase != Phase::ReadOld {
            return;
        }
        if !forcing.old_register_lost {
            self.refuse("force", RefusedWhy::RegisterOutOfReach, out);
            self.state = State::Booting;
            return;
        }
        let target = forcing.target;
        let nonce = self.draw_nonce();
        let value = self.forced_value(target, nonce);
        self.create_successor(value);
    }

    /// The old register lost its state: it takes no tombstone, as if it were out of reach for good.
    pub(crate) fn force_without_tombstone(&mut self) {
        if let State::Forcing(forcing) = &mut self.state {
            forcing.old_register_lost = true;
            // It may have forgotten since it was read.
            if let Phase::Tombstone(_) = forcing.phase {
                forcing.phase = Phase::ReadOld;
            }
        }
    }

    fn create_successor(&mut self, value: RegisterValue) {
        let (target, nonce) = (value.register, value.nonce);
        let state = self.ledger.change();
        state.promise = state.promise.max(value.epoch);
        state.attempts = vec![Attempt { expected: None, value }];
        self.state =
            State::Forcing(Forcing { target, old_register_lost: false, phase: Phase::Create(nonce) });
    }

    /// The successor holds this.
    pub(crate) fn forced(&mut self, value: RegisterValue, now: MonotonicTime, out: &mut Vec<Action>) {
        let left = self.register_id();
        let state = self.ledger.change();
        let ours = value.primary == self.config.me && state.attempt(value.nonce).is_some();
        if !ours || value.epoch <= state.activated.epoch {
            return self.supersede(value.register, out);
        }
        let (epoch, register) = (value.epoch, value.register);
        state.replace(left, value);
        out.push(Action::Report(Condition::Forced { epoch, register }));
        self.open(Term { epoch, incarnation: 0 }, now, out);
    }

    /// The group lives on elsewhere: what this replica holds may be a branch of its own.
    pub(crate) fn supersede(&mut self, successor: RegisterId, out: &mut Vec<Action>) {
        self.step_down(out);
        self.timers.retain(|_| false);
        self.desk.give_up(&mut self.timers);
        self.ledger.change().machine_is_ours = false;
        self.state = State::Superseded { successor };
        out.push(Action::Report(Condition::Superseded { successor }));
    }

    pub(crate) fn rejoin(&mut self, out: &mut Vec<Action>) {
        let State::Superseded { successor } = self.state else {
            return self.refuse("rejoin", RefusedWhy::NotSuperseded, out);
        };
        let state = self.ledger.change();
        state.register = Some(successor);
        state.known = None;
        state.attempts.clear();
        self.state = State::Booting;
    }

    fn set_phase(&mut self, next: Phase) {
        if let State::Forcing(forcing) = &mut self.state {
            forcing.phase = next;
        }
    }

    /// This replica alone, in an epoch of the next generation.
    fn forced_value(&self, register: RegisterId, nonce: Nonce) -> RegisterValue {
        let state = self.ledger.wanted();
        let highest = state
            .promise
            .max(state.known_epoch())
            .max(state.activated.epoch)
            .max(self.highest_peer_promise());
        // Should two sides be forced against each other in spite of all warnings, their terms still differ but
        // once in 65,536 times.
        let salt = u64::try_from(register.0 & 0xffff).expect("sixteen bits");
        let next = highest.generation().checked_add(1).expect("generations do not wrap");
        RegisterValue {
            register,
            epoch: Epoch((next << 32) | (salt << 16)),
            primary: self.config.me,
            in_sync: NodeSet::only(self.config.me),
            intent: Intent::Lead,
            nonce,
            lineage: self.lineage.clone(),
        }
    }
}
