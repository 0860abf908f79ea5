//! What the register's value means for a replica that does not lead, and how it claims the primacy.
//!
//! | the register says | this copy | then |
//! |---|---|---|
//! | out of reach; known: me, and everyone who could matter is here, in this register, and promised no more | – | lead with incarnation + 1 |
//! | out of reach | – | ask again; follow whoever beacons |
//! | nothing, and nothing is known | – | idle until `Lead` or a beacon |
//! | nothing, or older than known | – | reported, to it too: it serves again when every replica told what it knows |
//! | tombstone | mine | finish the forced takeover |
//! | tombstone | other | superseded |
//! | primary = me, epoch never opened here | usable | open it, once (a handover, or an own swap of an earlier life) |
//! | primary = me, epoch opened before | usable | restart: swap in a newer epoch, in-sync set unchanged |
//! | primary = me | unusable, also when that turns out later | wait for another member to take over |
//! | primary = other, I am in sync, it is silent | usable | promise, then swap in {me}: takeover |
//! | primary = other | any | follow |

use crate::bug::Bug;
use crate::leading::Leading;
use crate::member::{Member, State};
use crate::persistent::Attempt;
use crate::timers::Timer;
use crate::{Action, Condition, RefusedWhy};
use rempart_types::{Epoch, Intent, MonotonicTime, NodeId, NodeSet, Nonce, RegisterId, RegisterValue, Term};

/// A swap that makes this replica the primary.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Claim {
    kind: ClaimKind,
    nonce: Nonce,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum ClaimKind {
    /// The group's first value.
    Create,
    /// The primary is silent. `vacated`: it said that its machine is stopped.
    Takeover { from: NodeId, vacated: bool },
    /// This replica is the primary and lost its memory of the term.
    Restart,
}

/// The part of a register's value that a swap decides about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) primary: NodeId,
    pub(crate) in_sync: NodeSet,
    pub(crate) intent: Intent,
    /// The new epoch must reach this.
    pub(crate) at_least: Epoch,
}

impl Member {
    pub(crate) fn boot(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        if self.timers.is_set(Timer::Start) || self.restart_without_register(now, out) {
            return;
        }
        if self.ledger.wanted().known.as_ref().is_none_or(|known| known.primary != self.config.me) {
            self.evict_machine(out);
        }
        if self.desk.free(&self.timers) {
            self.desk.read(self.register_id(), &self.config.timing, &mut self.timers, now, out);
        }
    }

    /// The register holds this value, or held it a moment ago.
    pub(crate) fn saw(&mut self, value: RegisterValue, now: MonotonicTime, out: &mut Vec<Action>) {
        if self.forcing_into() == Some(value.register) {
            return self.forced(value, now, out);
        }
        if self.moving_into() == Some(value.register) {
            return self.saw_target(value, out);
        }
        // An answer about a register this replica has left.
        if value.register != self.register_id() {
            return;
        }
        let known = self.ledger.wanted().known_epoch();
        if value.epoch < known {
            return self.register_went_back(value.register, Some(value.epoch), now, out);
        }
        if let Intent::Tombstone { successor } = value.intent {
            return self.saw_tombstone(value, successor, out);
        }
        match &self.state {
            State::Idle | State::Superseded { .. } | State::Stopped | State::Failed { .. } => {}
            State::Leading(_) => self.saw_while_leading(value, now, out),
            State::Forcing(_) => self.saw_while_forcing(value, out),
            State::Booting | State::Following(_) | State::Claiming(_) => self.decide(value, now, out),
        }
    }

    /// The register holds nothing.
    pub(crate) fn saw_nothing(&mut self, register: RegisterId, now: MonotonicTime, out: &mut Vec<Action>) {
        if self.moving_into() == Some(register) {
            return self.give_up_move(RefusedWhy::RegisterOutOfReach, out);
        }
        if register != self.register_id() {
            return;
        }
        let known = self.ledger.wanted().known_epoch();
        if known > Epoch::ZERO {
            return self.register_went_back(register, None, now, out);
        }
        match self.state {
            State::Booting => self.state = State::Idle,
            State::Forcing(_) => self.force_without_old_register(out),
            _ => {}
        }
    }

    /// Not leading: what does this value make of us?
    pub(crate) fn decide(&mut self, value: RegisterValue, now: MonotonicTime, out: &mut Vec<Action>) {
        let me = self.config.me;
        let (silent, vacated) = match &self.state {
            State::Following(following) => (following.suspecting, following.vacated),
            State::Claiming(Claim { kind: ClaimKind::Takeover { vacated, .. }, .. }) => (false, *vacated),
            _ => (false, false),
        };
        let usable = self.can_lead();
        let state = self.ledger.change();
        state.register = Some(value.register);
        state.record(&value, me);
        if value.primary == me {
            if !usable {
                if !matches!(self.state, State::Following(_)) {
                    out.push(Action::Report(Condition::CopyUnusable));
                }
                return self.follow(None, now, out);
            }
            if value.epoch > state.activated.epoch && value.epoch >= state.promise {
                let handed = matches!(value.intent, Intent::Handover { .. });
                let created = matches!(self.state, State::Claiming(Claim { kind: ClaimKind::Create, .. }));
                state.machine_is_ours |= handed || created || vacated;
                let term = Term { epoch: value.epoch, incarnation: 0 };
                return self.open(term, now, out);
            }
            return self.claim(ClaimKind::Restart, out);
        }
        let member = value.in_sync.contains(me) || self.bug(Bug::OutsiderTakesOver);
        if member && silent && usable {
            return self.claim(ClaimKind::Takeover { from: value.primary, vacated }, out);
        }
        // Somebody else than the one we listened to: nothing older is acknowledged any more.
        if let State::Following(following) = &mut self.state
            && let Some((heard, term)) = following.leader
            && heard != value.primary
            && term.epoch < value.epoch
        {
            following.leader = None;
            if following.told.take().is_some() {
                out.push(Action::StepDown);
            }
            let state = self.ledger.change();
            state.promise = state.promise.max(value.epoch);
        }
        // Nothing new: a look at the register is no sign of life of the primary.
        if let State::Following(following) = &self.state
            && !following.suspecting
            && following.primary == Some(value.primary)
        {
            return;
        }
        self.follow(Some(value.primary), now, out);
    }

    fn claim(&mut self, kind: ClaimKind, out: &mut Vec<Action>) {
        let known = self.ledger.wanted().known.clone();
        let in_sync = match (kind, &known) {
            (ClaimKind::Restart, Some(known)) => known.in_sync.clone(),
            _ => NodeSet::only(self.config.me),
        };
        let change = Change {
            primary: self.config.me,
            in_sync,
            intent: Intent::Lead,
            at_least: self.highest_peer_promise(),
        };
        let nonce = self.attempt_for(&change);
        let epoch = self.ledger.wanted().attempt(nonce).expect("just made").value.epoch;
        if let ClaimKind::Takeover { from, .. } = kind {
            // From here on no beacon of the old primary is acknowledged; the swap leaves once this is durable.
            let state = self.ledger.change();
            state.promise = state.promise.max(epoch);
            out.push(Action::Report(Condition::TakingOver { from, epoch }));
        }
        if let State::Following(following) = &self.state
            && following.told.is_some()
        {
            out.push(Action::StepDown);
        }
        let early = self.bug(Bug::WaitFromSuspicion);
        self.timers.retain(|timer| {
            matches!(timer, Timer::RegisterDeadline | Timer::RegisterRetry | Timer::Patience)
                || (early && timer == Timer::TakeoverWait)
        });
        self.state = State::Claiming(Claim { kind, nonce });
    }

    pub(crate) fn press_claim(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        let State::Claiming(claim) = &self.state else { return };
        let claim = claim.clone();
        match claim.kind {
            ClaimKind::Restart => {
                if self.restart_without_register(now, out) {
                    return;
                }
            }
            ClaimKind::Create | ClaimKind::Takeover { .. } => self.evict_machine(out),
        }
        if !self.desk.free(&self.timers) {
            return;
        }
        let attempt = self.ledger.attempt(claim.nonce);
        #[cfg(feature = "planted-bugs")]
        let attempt = if self.bug(Bug::SwapBeforePromise) {
            self.ledger.undurable_attempt(claim.nonce)
        } else {
            attempt
        };
        if let Some(attempt) = attempt {
            self.desk.swap(attempt, &self.config.timing, &mut self.timers, now, out);
        }
    }

    /// Becomes primary in `term`, which the register gave or which follows our own in its epoch. What may be
    /// appended in it waits until it is durable that it was opened.
    pub(crate) fn open(&mut self, term: Term, now: MonotonicTime, out: &mut Vec<Action>) {
        if let State::Following(following) = &self.state
            && following.told.is_some()
        {
            out.push(Action::StepDown);
        }
        let early = self.bug(Bug::WaitFromSuspicion);
        self.timers.retain(|timer| {
            matches!(timer, Timer::RegisterDeadline | Timer::RegisterRetry)
                || (early && timer == Timer::TakeoverWait)
        });
        let (forgets, hurries) = (self.bug(Bug::SameTermAgain), self.bug(Bug::NoWait));
        let state = self.ledger.change();
        assert!(term > state.activated || forgets, "a term is opened once");
        state.activated = term;
        state.promise = state.promise.max(term.epoch);
        let in_sync = state.known.as_ref().expect("the register gave it").in_sync.clone();
        assert!(in_sync.contains(self.config.me), "a primary is a member of its in-sync set");
        if !state.machine_is_ours && !hurries && !early {
            // Later than the last acknowledged beacon: none was acknowledged since the promise, before the swap.
            let reply = self.last_acknowledged.map_or(now, |at| at.max(now));
            self.timers.set(Timer::TakeoverWait, reply + self.config.timing.takeover_wait());
        }
        let outlives = self.bug(Bug::CaughtUpOutlivesTerm);
        for peer in self.peers.values_mut() {
            // Another may have led since, in these very sessions.
            peer.caught_up &= outlives;
            peer.acknowledged = None;
            peer.silent = false;
            peer.graced = false;
            peer.blocking = false;
            peer.joining = false;
        }
        self.state = State::Leading(Leading::new(in_sync));
    }

    /// The register is out of reach, but nobody can have been given the primacy since: go on in the same epoch
    /// (rule 12). Everyone named by the known value or by an own swap that may still land is this replica itself,
    /// or is connected and promised nothing newer; and no such swap gives the primacy away. Nor was anybody forced
    /// to lead while this replica was fenced (ADR 0025): the register answered in this life, or the machine was
    /// never switched off, or every other replica says that it knows of nothing.
    fn restart_without_register(&mut self, now: MonotonicTime, out: &mut Vec<Action>) -> bool {
        if self.timers.is_set(Timer::Patience) || self.desk.reachable() || !self.can_lead() {
            return false;
        }
        let me = self.config.me;
        let state = self.ledger.wanted();
        let Some(known) = &state.known else { return false };
        let forgets = self.bug(Bug::RestartForgetsAttempts);
        let named = if forgets { known.in_sync.clone() } else { self.ledger.named() };
        let confirmed = matches!(self.state, State::Claiming(_))
            || self.machine.exists == Some(true)
            || self.bug(Bug::RestartAsksNobody);
        let replicas = self.config.peers.iter().filter(|_| !confirmed);
        let all_agree = named.iter().chain(replicas).filter(|&node| node != me).all(|node| {
            self.peers
                .get(&node)
                .is_some_and(|peer| peer.session.is_some() && peer.agrees && peer.promise <= known.epoch)
        });
        let ours = known.primary == me && !matches!(known.intent, Intent::Tombstone { .. });
        if !ours || !all_agree || state.promise > known.epoch || (state.gives_away(me) && !forgets) {
            if ours && !std::mem::replace(&mut self.waits_told, true) {
                out.push(Action::Report(Condition::WaitsToLead));
            }
            return false;
        }
        let last = state.activated;
        assert!(last.epoch <= known.epoch, "opened an epoch it did not know of");
        let incarnation = if last.epoch < known.epoch {
            0
        } else if self.bug(Bug::SameTermAgain) {
            last.incarnation
        } else {
            last.incarnation + 1
        };
        let term = Term { epoch: known.epoch, incarnation };
        if forgets {
            self.ledger.change().attempts.clear();
        }
        self.open(term, now, out);
        true
    }

    pub(crate) fn create(&mut self, out: &mut Vec<Action>) {
        let why = match self.state {
            _ if self.ledger.wanted().known.is_some() => RefusedWhy::AlreadyCreated,
            _ if !self.can_lead() => RefusedWhy::CopyUnusable,
            State::Idle | State::Booting => {
                let register = self.register_id();
                self.ledger.change().register = Some(register);
                return self.claim(ClaimKind::Create, out);
            }
            State::Following(_) => RefusedWhy::AlreadyCreated,
            _ => RefusedWhy::Busy,
        };
        self.refuse("lead", why, out);
    }

    /// The nonce of an open attempt at `change`, made if there is none. Repeating the same attempt is harmless: it
    /// lands once at most.
    pub(crate) fn attempt_for(&mut self, change: &Change) -> Nonce {
        let state = self.ledger.wanted();
        let expected = state.known.as_ref().map(|known| known.epoch);
        let epoch = state.known_epoch().next().max(state.promise).max(change.at_least);
        let register = self.register_id();
        let same = state.attempts.iter().rev().find(|attempt| {
            attempt.expected == expected
                && attempt.value.register == register
                && attempt.value.primary == change.primary
                && attempt.value.in_sync == change.in_sync
                && attempt.value.intent == change.intent
                && attempt.value.epoch >= epoch
        });
        if let Some(attempt) = same {
            return attempt.value.nonce;
        }
        if state.attempts.len() >= crate::PersistentState::MAX_ATTEMPTS {
            return state.attempts.last().expect("it is full").value.nonce;
        }
        let nonce = self.draw_nonce();
        let value = RegisterValue {
            register: self.register_id(),
            epoch,
            primary: change.primary,
            in_sync: change.in_sync.clone(),
            intent: change.intent.clone(),
            nonce,
            lineage: self.lineage.clone(),
        };
        assert!(value.in_sync.contains(value.primary), "a primary is a member of its in-sync set");
        self.ledger.change().attempts.push(Attempt { expected, value });
        nonce
    }

    pub(crate) fn highest_peer_promise(&self) -> Epoch {
        self.peers.values().map(|peer| peer.promise).max().unwrap_or_default()
    }
}
