//! A replica that does not lead: it acknowledges the primary it hears, and looks at the register when it hears none.

use crate::bug::Bug;
use crate::member::{Member, State};
use crate::peer::Peer;
use crate::timers::Timer;
use crate::{Action, Condition, Message};
use rempart_types::{Epoch, MonotonicTime, NodeId, NodeSet, RegisterId, Term};

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct Following {
    /// Whom the register or a beacon named.
    pub(crate) primary: Option<NodeId>,
    /// Who was heard, in which term.
    pub(crate) leader: Option<(NodeId, Term)>,
    /// What replication was told.
    pub(crate) told: Option<Term>,
    /// The in-sync set as the primary last told it. A hint: only the register counts.
    pub(crate) in_sync: NodeSet,
    /// Nothing was heard for too long.
    pub(crate) suspecting: bool,
    /// The register may say something new.
    pub(crate) look: bool,
    /// The primary said that it stepped aside with its machine stopped, and was not heard again.
    pub(crate) vacated: bool,
    /// The newest beacon not answered yet, because the promise it needs is still being written.
    pub(crate) unanswered: Option<(NodeId, Term, u64)>,
    /// The deadline was noticed late once already: we slept, not the primary.
    graced: bool,
    suspicion_told: bool,
}

impl Member {
    /// Becomes a follower, of `primary` if it is known.
    pub(crate) fn follow(&mut self, primary: Option<NodeId>, now: MonotonicTime, out: &mut Vec<Action>) {
        if !matches!(self.state, State::Following(_)) {
            self.step_down(out);
            self.timers.retain(|timer| matches!(timer, Timer::RegisterDeadline | Timer::RegisterRetry));
            self.state = State::Following(Following::default());
        }
        let State::Following(following) = &mut self.state else { unreachable!("just set") };
        following.primary = primary;
        following.suspecting = false;
        self.timers.set(Timer::Suspect, now + self.config.timing.suspect_after);
        let check = self.config.timing.register_check;
        if !check.is_zero() {
            self.timers.set_if_idle(Timer::RegisterCheck, now + check);
        }
    }

    pub(crate) fn follow_on(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        self.evict_machine(out);
        let promise = self.ledger.promise();
        let register = self.register_id();
        let State::Following(following) = &mut self.state else { return };
        if let Some((primary, term)) = following.leader
            && following.told != Some(term)
            && promise.as_ref().is_some_and(|promise| *promise.get() <= term.epoch)
        {
            following.told = Some(term);
            out.push(Action::Follow { primary, term });
            out.push(Action::Report(Condition::Following { primary, term }));
        }
        if promise.is_some()
            && let Some((primary, term, sent_ns)) = following.unanswered.take()
        {
            self.acknowledge(primary, term, sent_ns, now, out);
        }
        let State::Following(following) = &mut self.state else { return };
        if (following.suspecting || following.look) && self.desk.free(&self.timers) {
            following.look = false;
            self.desk.read(register, &self.config.timing, &mut self.timers, now, out);
        }
    }

    pub(crate) fn suspect(&mut self, at: MonotonicTime, now: MonotonicTime, out: &mut Vec<Action>) {
        let interval = self.config.timing.beacon_interval;
        if self.bug(Bug::WaitFromSuspicion) {
            self.timers.set(Timer::TakeoverWait, now + self.config.timing.takeover_wait());
        }
        let State::Following(following) = &mut self.state else { return };
        if now.since(at) > interval && !following.graced {
            // Noticed late: beacons may be waiting behind this very turn.
            following.graced = true;
            self.timers.set(Timer::Suspect, now + interval);
            return;
        }
        following.suspecting = true;
        if let Some(primary) = following.primary
            && !following.suspicion_told
        {
            following.suspicion_told = true;
            out.push(Action::Report(Condition::PrimarySuspected { primary }));
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a beacon, taken apart")]
    pub(crate) fn beacon(
        &mut self,
        from: NodeId,
        register: RegisterId,
        term: Term,
        sent_ns: u64,
        in_sync: NodeSet,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        if matches!(self.state, State::Stopped | State::Failed { .. } | State::Superseded { .. }) {
            return;
        }
        if !Peer::may_be_told(term.epoch) {
            return self.close_session(from, "leads in an epoch that no register ever gets to", out);
        }
        let wanted = self.ledger.wanted();
        // Of the register this replica lives in. What it promised may have been to the successor.
        let known = wanted.known.as_ref().map_or(wanted.promise, |known| known.epoch);
        match wanted.register {
            Some(ours) if ours != register => {
                // A register's successor starts its epochs above everything its predecessor could reach.
                if term.epoch.generation() > known.generation() && term.epoch >= wanted.promise {
                    // Remembered: without a register to ask, a restart must not take it for the primary it was.
                    let state = self.ledger.change();
                    state.promise = state.promise.max(term.epoch);
                    self.supersede(register, out);
                }
                return;
            }
            Some(_) => {}
            None => self.ledger.change().register = Some(register),
        }
        if self.led_term().is_some_and(|led| led.epoch == term.epoch) {
            return self.close_session(from, "leads in the epoch in which this node leads", out);
        }
        let state = self.ledger.wanted();
        let leads_newer = matches!(self.state, State::Leading(_)) && term.epoch <= state.known_epoch();
        let refused = term.epoch < state.promise || leads_newer;
        let tolerated = refused && self.bug(Bug::AckAfterPromise);
        if tolerated {
            self.acknowledge(from, term, sent_ns, now, out);
            return;
        }
        if refused {
            self.nack(from, term, out);
            return;
        }
        // An older leader of a term this replica moved past in the same epoch: only its restart makes one.
        if let State::Following(Following { leader: Some((_, followed)), .. }) = &self.state
            && *followed > term
        {
            return;
        }
        // Whoever leads this epoch won it from the register: every swap of ours on an older value is dead, and if
        // this replica led or wanted to lead, it does not any more.
        let state = self.ledger.change();
        state.promise = state.promise.max(term.epoch);
        state.outdate(term.epoch);
        state.machine_is_ours = false;
        if self.led_term().is_some() {
            out.push(Action::Report(Condition::Fenced { by: from, epoch: term.epoch }));
        }
        self.follow(Some(from), now, out);
        let State::Following(following) = &mut self.state else { unreachable!("just set") };
        following.leader = Some((from, term));
        following.in_sync = in_sync;
        following.vacated = false;
        following.graced = false;
        following.suspicion_told = false;
        following.unanswered = Some((from, term, sent_ns));
    }

    fn acknowledge(
        &mut self,
        to: NodeId,
        term: Term,
        sent_ns: u64,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let Some(session) = self.peers.get(&to).and_then(|peer| peer.session) else { return };
        self.last_acknowledged = Some(now);
        out.push(Action::Send { to, session, message: Message::BeaconAck { term, sent_ns } });
    }

    fn nack(&mut self, to: NodeId, term: Term, out: &mut Vec<Action>) {
        // Until the promise is durable it could still be forgotten: say nothing.
        let Some(promise) = self.ledger.promise() else { return };
        let Some(session) = self.peers.get(&to).and_then(|peer| peer.session) else { return };
        let promise = *promise.get();
        if promise > term.epoch {
            out.push(Action::Send { to, session, message: Message::Nack { term, promise } });
        }
    }

    /// The primacy was given to this replica, they say: the register tells.
    pub(crate) fn your_turn(&mut self, epoch: Epoch) {
        let news = epoch > self.ledger.wanted().known_epoch();
        if let State::Following(following) = &mut self.state {
            following.look |= news;
        }
    }

    pub(crate) fn primary_stepped_aside(
        &mut self,
        from: NodeId,
        term: Term,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        if let State::Following(following) = &mut self.state
            && following.leader == Some((from, term))
        {
            following.vacated = true;
            following.graced = true;
            self.suspect(now, now, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Event, PersistentState, ReadOutcome, Timing};
    use rempart_types::{GroupId, SessionId};
    use std::time::Duration;

    const PRIMARY: NodeId = NodeId(1);

    /// An amnesiac register serves nobody until every replica has told what it knows: one that is content to
    /// follow must notice too.
    #[test]
    fn a_follower_informs_an_amnesiac_register() {
        let config = Config {
            me: NodeId(2),
            group: GroupId(1),
            peers: NodeSet::only(PRIMARY),
            register: RegisterId(1),
            timing: Timing::default(),
            nonce_seed: 0,
        };
        let mut member = Member::new(config, PersistentState::default(), true, MonotonicTime::ZERO);
        let mut out = Vec::new();
        let session = SessionId(1);
        member.handle(Event::PeerConnected { node: PRIMARY, session }, MonotonicTime::ZERO, &mut out);
        let mut informed = false;
        for quarter in 0..60_u32 {
            let now = MonotonicTime::ZERO + Duration::from_millis(250) * quarter;
            let message = Message::Beacon {
                register: RegisterId(1),
                term: Term::new(3, 0),
                sent_ns: now.0,
                in_sync: NodeSet::only(PRIMARY),
            };
            member.handle(Event::Message { from: PRIMARY, session, message }, now, &mut out);
            for action in std::mem::take(&mut out) {
                match action {
                    Action::Persist { receipt, .. } => {
                        member.handle(Event::Persisted { receipt }, now, &mut out)
                    }
                    Action::ReadRegister { request, .. } if quarter > 0 => {
                        let outcome = ReadOutcome::Amnesiac;
                        member.handle(Event::RegisterRead { request, outcome }, now, &mut out);
                    }
                    Action::InformRegister { .. } => informed = true,
                    _ => {}
                }
            }
        }
        assert!(informed);
        assert_eq!(member.status().primary, Some(PRIMARY), "it goes on following");
    }
}
