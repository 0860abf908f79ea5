//! Moving a group to another register while its primary leads alone: from a file on one machine to a witness.
//!
//! | step | a crash after it |
//! |---|---|
//! | the attempt to create the target is durable | the old register still counts; the attempt is forgotten |
//! | the target holds our value | the old register still counts; the target is ours, and a next try swaps over it |
//! | the target's id, value and term are durable | the target counts; nobody asks the old register any more |
//!
//! Nobody but this replica is named by either register, so nobody can be given the primacy by the one that does not
//! count. Epochs go on: those of the target are above all that the old register gave.

use crate::member::{Member, State};
use crate::persistent::Attempt;
use crate::{Action, Condition, RefusedWhy};
use rempart_types::{Epoch, Intent, MonotonicTime, NodeSet, Nonce, RegisterId, RegisterValue, Term};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Moving {
    target: RegisterId,
    /// What an earlier try left in the target.
    found: Option<Epoch>,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    /// Nothing of this move can land yet.
    Decided,
    Create(Nonce),
    /// Done once it is durable.
    Moved,
}

impl Member {
    pub(crate) fn move_register(&mut self, to: RegisterId, out: &mut Vec<Action>) {
        let old = self.register_id();
        let alone = self.peers.is_empty() && self.acknowledgers_if_leading() == NodeSet::only(self.config.me);
        let settled = self.ledger.wanted().attempts.is_empty();
        let why = match &mut self.state {
            State::Leading(leading) if leading.opened.is_some() => {
                if leading.moving.is_some() || leading.handover.is_some() || !settled {
                    RefusedWhy::Busy
                } else if !alone {
                    RefusedWhy::NotAlone
                } else if to == old {
                    RefusedWhy::AlreadyCreated
                } else {
                    leading.moving = Some(Moving { target: to, found: None, phase: Phase::Decided });
                    return;
                }
            }
            _ => RefusedWhy::NotPrimary,
        };
        self.refuse("move register", why, out);
    }

    fn acknowledgers_if_leading(&self) -> NodeSet {
        if matches!(self.state, State::Leading(_)) { self.acknowledgers() } else { NodeSet::default() }
    }

    fn moving(&mut self) -> Option<&mut Moving> {
        match &mut self.state {
            State::Leading(leading) => leading.moving.as_mut(),
            _ => None,
        }
    }

    /// The register whose answers belong to a move.
    pub(crate) fn moving_into(&self) -> Option<RegisterId> {
        match &self.state {
            State::Leading(leading) => leading.moving.as_ref().map(|moving| moving.target),
            _ => None,
        }
    }

    /// True while a move keeps the register as it is. The desk is free.
    pub(crate) fn move_on(&mut self, now: MonotonicTime, out: &mut Vec<Action>) -> bool {
        let Some(moving) = self.moving() else { return false };
        let (target, found) = (moving.target, moving.found);
        match moving.phase {
            Phase::Decided => {
                let nonce = self.draw_nonce();
                let state = self.ledger.wanted();
                let epoch =
                    state.known_epoch().next().max(state.promise).max(found.map_or(Epoch::ZERO, Epoch::next));
                let value = RegisterValue {
                    register: target,
                    epoch,
                    primary: self.config.me,
                    in_sync: NodeSet::only(self.config.me),
                    intent: Intent::Lead,
                    nonce,
                    lineage: self.lineage.clone(),
                };
                self.ledger.change().attempts.push(Attempt { expected: found, value });
                self.moving().expect("it moves").phase = Phase::Create(nonce);
            }
            Phase::Create(nonce) => {
                if let Some(attempt) = self.ledger.attempt(nonce) {
                    self.desk.swap(attempt, &self.config.timing, &mut self.timers, now, out);
                }
            }
            Phase::Moved => {}
        }
        true
    }

    /// The target holds this.
    pub(crate) fn saw_target(&mut self, value: RegisterValue, out: &mut Vec<Action>) {
        let me = self.config.me;
        let ours = self.ledger.wanted().attempt(value.nonce).is_some();
        let state = self.ledger.change();
        if ours {
            assert!(value.epoch > state.activated.epoch, "a move goes on to newer epochs");
            state.register = Some(value.register);
            state.promise = state.promise.max(value.epoch);
            state.activated = Term { epoch: value.epoch, incarnation: 0 };
            state.known = Some(value);
            state.attempts.clear();
            self.moving().expect("an answer to a move").phase = Phase::Moved;
            return;
        }
        let earlier_try = value.primary == me
            && value.in_sync == NodeSet::only(me)
            && !matches!(value.intent, Intent::Tombstone { .. });
        if !earlier_try {
            return self.give_up_move(RefusedWhy::RegisterTaken, out);
        }
        state.attempts.clear();
        let moving = self.moving().expect("an answer to a move");
        moving.found = Some(value.epoch);
        moving.phase = Phase::Decided;
    }

    /// Stays where it is. Should the attempt land after all, it makes a register that nobody but a next try knows.
    pub(crate) fn give_up_move(&mut self, why: RefusedWhy, out: &mut Vec<Action>) {
        if self.moving().is_none_or(|moving| moving.phase == Phase::Moved) {
            return;
        }
        self.ledger.change().attempts.clear();
        if let State::Leading(leading) = &mut self.state {
            leading.moving = None;
        }
        self.refuse("move register", why, out);
    }

    /// The term that the target gave is open, so everything about it is durable.
    pub(crate) fn tell_moved(&mut self, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        let Some(Moving { target, .. }) = leading.moving.take_if(|moving| moving.phase == Phase::Moved)
        else {
            return;
        };
        let epoch = self.ledger.wanted().known_epoch();
        out.push(Action::Report(Condition::RegisterMoved { epoch, register: target }));
    }
}
