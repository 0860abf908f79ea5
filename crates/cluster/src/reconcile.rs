//! The primary compares the register with what it should say, and swaps until they agree.
//!
//! There is no list of procedures: degrading, admitting, taking a newer epoch after a refusal, settling an unknown
//! outcome and giving the primacy away are all "the value should be another one". An attempt whose outcome is not
//! known counts as a difference too, so it is superseded by the next swap (rule 9).

use crate::bug::Bug;
use crate::claim::Change;
use crate::member::{Member, State};
use crate::timers::Timer;
use crate::{Action, Condition};
use rempart_types::{Intent, MonotonicTime, NodeId, NodeSet};

impl Member {
    pub(crate) fn reconcile(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        if self.led_term().is_none() {
            return;
        }
        self.tell_held_back(out);
        let named = self.ledger.named();
        if !self.bug(Bug::JoinOutlivesAttempt) {
            for (&node, peer) in &mut self.peers {
                peer.joining &= named.contains(node);
            }
        }
        if !self.desk.free(&self.timers) || self.move_on(now, out) {
            return;
        }
        let change = self.wanted_value();
        let state = self.ledger.wanted();
        let known = state.known.as_ref().expect("a primary knows its value");
        let refused = change.at_least > known.epoch;
        let differs = change.primary != known.primary || change.in_sync != known.in_sync;
        if !differs && !refused && state.attempts.is_empty() {
            return self.look_at_register(now, out);
        }
        // From this instant on, before anything is sent, everyone it names must acknowledge.
        let known_members = known.in_sync.clone();
        let nonce = self.attempt_for(&change);
        for node in change.in_sync.iter().filter(|&node| !known_members.contains(node)) {
            self.with_peer(node, |peer| peer.joining = true);
        }
        if let Some(attempt) = self.ledger.attempt(nonce) {
            self.desk.swap(attempt, &self.config.timing, &mut self.timers, now, out);
        }
    }

    /// What the register should say, by what is known now.
    fn wanted_value(&self) -> Change {
        let me = self.config.me;
        let in_sync = self.wanted_in_sync_set();
        let at_least = self.highest_peer_promise();
        if let State::Leading(leading) = &self.state
            && let Some(to) = leading.handover.as_ref().and_then(|handover| handover.swaps_to())
            && in_sync.contains(to)
        {
            return Change { primary: to, in_sync, intent: Intent::Handover { from: me }, at_least };
        }
        Change { primary: me, in_sync, intent: Intent::Lead, at_least }
    }

    fn wanted_in_sync_set(&self) -> NodeSet {
        let known = self.ledger.wanted().known.as_ref().expect("a primary knows its value");
        let stays =
            |node: NodeId| node == self.config.me || self.peers.get(&node).is_some_and(|peer| !peer.unfit());
        let joins = |node: NodeId| !known.in_sync.contains(node) && self.may_join(node);
        let staying = known.in_sync.iter().filter(|&node| stays(node));
        staying.chain(self.peers.keys().copied().filter(|&node| joins(node))).collect()
    }

    /// This node may be made a member (rule 13), now or still.
    fn may_join(&self, node: NodeId) -> bool {
        let State::Leading(leading) = &self.state else { return false };
        let Some(peer) = self.peers.get(&node) else { return false };
        let fit = peer.session.is_some() && peer.acknowledged.is_some() && !peer.unfit();
        // Only while an attempt names it: then it has acknowledged everything since it was caught up.
        if peer.joining {
            return fit;
        }
        let holds_all = peer.caught_up || self.bug(Bug::AdmitEarly);
        let quiet = leading.serving && leading.handover.is_none() && self.ledger.wanted().attempts.is_empty();
        fit && holds_all && quiet && !self.timers.is_set(Timer::Readmit(node))
    }

    fn tell_held_back(&mut self, out: &mut Vec<Action>) {
        let Some(known) = &self.ledger.wanted().known else { return };
        for (&node, peer) in &mut self.peers {
            if !known.in_sync.contains(node)
                && peer.caught_up
                && !peer.held_back_told
                && let Some(until) = self.timers.at(Timer::Readmit(node))
            {
                peer.held_back_told = true;
                out.push(Action::Report(Condition::JoinHeldBack { node, until }));
            }
        }
    }

    /// Nothing to change: look, now and then, whether the register is there and still says what we know.
    fn look_at_register(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        let register = self.register_id();
        let interval = self.config.timing.register_check;
        // Once out of reach it is asked until it is back, so that its loss is over as soon as it is.
        let away = !self.desk.reachable();
        let State::Leading(leading) = &mut self.state else { return };
        if leading.check || away {
            leading.check = false;
            if !interval.is_zero() {
                self.timers.set(Timer::RegisterCheck, now + interval);
            }
            self.desk.read(register, &self.config.timing, &mut self.timers, now, out);
        }
    }

    pub(crate) fn check_register(&mut self, now: MonotonicTime) {
        match &mut self.state {
            State::Leading(leading) => leading.check = true,
            // A register that lost its state waits for every replica's word, also for those who need nothing of it.
            State::Following(following) => {
                following.look = true;
                self.timers.set(Timer::RegisterCheck, now + self.config.timing.register_check);
            }
            _ => {}
        }
    }

    pub(crate) fn remove_peer(&mut self, node: NodeId) {
        self.config.peers.remove(node);
        if matches!(self.state, State::Leading(_)) {
            // It leaves the in-sync set first; then it is forgotten.
            self.with_peer(node, |peer| peer.removed = true);
        } else {
            self.peers.remove(&node);
        }
    }
}
