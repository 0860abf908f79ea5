//! A replica that holds the primacy: its term, its beacons, and what their answers tell.

use crate::bug::Bug;
use crate::handover::Handover;
use crate::member::{Member, State};
use crate::moving::Moving;
use crate::peer::Peer;
use crate::timers::Timer;
use crate::{Action, Condition, FrozenWhy, Message};
use rempart_types::{Epoch, MonotonicTime, NodeId, NodeSet, RegisterValue, Term};
use std::collections::BTreeMap;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Leading {
    /// The term replication was told to append in.
    pub(crate) opened: Option<Term>,
    /// The recovered log is committed.
    pub(crate) serving: bool,
    /// The acknowledgers replication was told.
    pub(crate) told: NodeSet,
    /// The in-sync set as last reported.
    pub(crate) in_sync: NodeSet,
    pub(crate) handover: Option<Handover>,
    pub(crate) moving: Option<Moving>,
    /// `Freeze` or `Drain` was given.
    pub(crate) frozen: bool,
    pub(crate) frozen_why: Option<FrozenWhy>,
    /// It is time to look at the register.
    pub(crate) check: bool,
}

impl Leading {
    pub(crate) fn new(in_sync: NodeSet) -> Leading {
        Leading {
            opened: None,
            serving: false,
            told: NodeSet::default(),
            in_sync,
            handover: None,
            moving: None,
            frozen: false,
            frozen_why: None,
            check: false,
        }
    }

    /// Frozen because neither a member nor the register can tell it that it still leads.
    pub(crate) fn is_cut_off(&self) -> bool {
        use FrozenWhy::{LeaseExpired, Refused, RegisterOutOfReach};
        matches!(self.frozen_why, Some(RegisterOutOfReach | Refused | LeaseExpired))
    }
}

impl Member {
    /// The term this replica leads in, as far as anybody was told.
    pub(crate) fn led_term(&self) -> Option<Term> {
        match &self.state {
            State::Leading(leading) => leading.opened,
            _ => None,
        }
    }

    /// Everyone who must acknowledge (rule 9).
    pub(crate) fn acknowledgers(&self) -> NodeSet {
        if self.bug(Bug::NoUnion) {
            return self.ledger.wanted().known.as_ref().expect("a primary knows its value").in_sync.clone();
        }
        self.ledger.named().with(self.config.me)
    }

    pub(crate) fn lead_on(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        self.open_term(now, out);
        self.note_in_sync_set(now, out);
        self.advance_handover(out);
        self.reconcile(now, out);
        self.tell_acknowledgers(now, out);
        self.run_machine(now, out);
        self.tell_frozen(out);
    }

    fn open_term(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        let acknowledgers = self.acknowledgers();
        let Some(term) = self.ledger.opened() else { return };
        let State::Leading(leading) = &mut self.state else { return };
        let term = term.into_inner();
        if leading.opened == Some(term) {
            return;
        }
        let first = leading.opened.is_none();
        let draining = leading.handover.as_ref().is_some_and(Handover::drains);
        leading.opened = Some(term);
        let before = std::mem::replace(&mut leading.told, acknowledgers.clone());
        forget_caught_up(&mut self.peers, &before, &acknowledgers);
        if first {
            out.push(Action::Activate { term, acknowledgers });
            let check = self.config.timing.register_check;
            if !check.is_zero() {
                self.timers.set(Timer::RegisterCheck, now + check);
            }
        } else {
            out.push(Action::ContinueIn { term, acknowledgers });
            if draining {
                out.push(Action::Drain { term });
            }
        }
        out.push(Action::Report(Condition::Leading { term }));
        self.tell_moved(out);
        self.watch_peers(now);
        self.beacon_due(now, out);
    }

    /// Reports who joined and who left, once it is settled.
    fn note_in_sync_set(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        if !self.ledger.settled() {
            return;
        }
        let Some(known) = &self.ledger.wanted().known else { return };
        let (epoch, current) = (known.epoch, known.in_sync.clone());
        let named = self.ledger.named();
        let State::Leading(leading) = &mut self.state else { return };
        let before = std::mem::replace(&mut leading.in_sync, current.clone());
        for node in before.iter().filter(|&node| !current.contains(node)) {
            out.push(Action::Report(Condition::Left { node, epoch }));
            if let Some(peer) = self.peers.get_mut(&node) {
                let pause = peer.left(&self.config.timing, now);
                self.timers.set(Timer::Readmit(node), now + pause);
            }
        }
        for node in current.iter().filter(|&node| !before.contains(node)) {
            out.push(Action::Report(Condition::Joined { node, epoch }));
            self.with_peer(node, |peer| {
                peer.joined_at = Some(now);
                peer.joining = false;
            });
        }
        // Blamed while it was about to join: it never was a member, so it did not leave, but it waits like one.
        for (&node, peer) in self.peers.iter_mut().filter(|(_, peer)| peer.blocking) {
            if !named.contains(node) {
                let pause = peer.left(&self.config.timing, now);
                self.timers.set(Timer::Readmit(node), now + pause);
            }
        }
        let timers = &mut self.timers;
        self.peers.retain(|&node, peer| {
            let keep = !peer.removed || named.contains(node);
            if !keep {
                timers.clear(Timer::PeerDeadline(node));
                timers.clear(Timer::Readmit(node));
            }
            keep
        });
    }

    fn tell_acknowledgers(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        let nodes = self.acknowledgers();
        let State::Leading(leading) = &mut self.state else { return };
        if leading.opened.is_none() || leading.told == nodes {
            return;
        }
        let before = std::mem::replace(&mut leading.told, nodes.clone());
        forget_caught_up(&mut self.peers, &before, &nodes);
        out.push(Action::SetAcknowledgers { nodes });
        self.watch_peers(now);
        self.renew_lease(now, out);
    }

    /// Every acknowledger must answer a beacon within the deadline.
    fn watch_peers(&mut self, now: MonotonicTime) {
        let deadline = now + self.config.timing.peer_deadline;
        for node in self.acknowledgers().others(self.config.me) {
            if self.peers.get(&node).is_none_or(|peer| !peer.silent) {
                self.timers.set_if_idle(Timer::PeerDeadline(node), deadline);
            }
        }
    }

    pub(crate) fn beacon_due(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        if self.led_term().is_none() {
            return;
        }
        let nodes: Vec<NodeId> = self.peers.keys().copied().collect();
        for node in nodes {
            self.beacon_to(node, now, out);
        }
        let alone = self.acknowledgers().len() == 1;
        if alone || self.bug(Bug::SoloLeaseWhileAdmitting) || self.bug(Bug::LeaseWithoutPeer) {
            self.renew_lease(now, out);
        }
        self.timers.set(Timer::Beacon, now + self.config.timing.beacon_interval);
    }

    pub(crate) fn beacon_to(&mut self, to: NodeId, now: MonotonicTime, out: &mut Vec<Action>) {
        let Some(term) = self.led_term() else { return };
        let Some(session) = self.peers.get(&to).and_then(|peer| peer.session) else { return };
        let in_sync = self.ledger.wanted().known.as_ref().expect("a primary knows its value").in_sync.clone();
        let message = Message::Beacon { register: self.register_id(), term, sent_ns: now.0, in_sync };
        out.push(Action::Send { to, session, message });
    }

    pub(crate) fn beacon_acknowledged(
        &mut self,
        from: NodeId,
        term: Term,
        sent_ns: u64,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let sent = MonotonicTime(sent_ns);
        if self.led_term() != Some(term) || sent > now {
            return;
        }
        let deadline = sent + self.config.timing.peer_deadline;
        let Some(peer) = self.peers.get_mut(&from) else { return };
        if peer.acknowledged.is_some_and(|before| before > sent) {
            return;
        }
        peer.acknowledged = Some(sent);
        peer.silent = false;
        peer.graced = false;
        self.timers.set(Timer::PeerDeadline(from), deadline);
        self.renew_lease(now, out);
    }

    /// It is there, but promised a newer epoch: not silent, but in need of a newer term (rule 12).
    pub(crate) fn refused_by(&mut self, node: NodeId, promise: Epoch, now: MonotonicTime) {
        let deadline = now + self.config.timing.peer_deadline;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.promised(promise);
        peer.silent = false;
        self.timers.set(Timer::PeerDeadline(node), deadline);
    }

    pub(crate) fn peer_deadline(&mut self, node: NodeId, at: MonotonicTime, now: MonotonicTime) {
        let interval = self.config.timing.beacon_interval;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if now.since(at) > interval && !peer.graced {
            // Noticed late: its answers may be waiting behind this very turn.
            peer.graced = true;
            self.timers.set(Timer::PeerDeadline(node), now + interval);
            return;
        }
        peer.silent = true;
        peer.joining = false;
    }

    pub(crate) fn blocked_by(&mut self, node: NodeId) {
        if let State::Leading(leading) = &self.state
            && leading.told.contains(node)
        {
            self.with_peer(node, |peer| {
                peer.blocking = true;
                peer.joining = false;
            });
        }
    }

    pub(crate) fn saw_while_leading(
        &mut self,
        value: RegisterValue,
        now: MonotonicTime,
        out: &mut Vec<Action>,
    ) {
        let me = self.config.me;
        let state = self.ledger.change();
        if value.epoch == state.known_epoch() {
            // Still what we know. That settles nothing: a swap of ours may be on its way (rule 9).
            return;
        }
        let mine = state.attempt(value.nonce).is_some();
        if mine && value.primary == me {
            state.record(&value, me);
            assert!(value.epoch >= state.promise, "a primary promised another's epoch");
            state.promise = value.epoch;
            state.activated = Term { epoch: value.epoch, incarnation: 0 };
            return;
        }
        if mine {
            let (to, epoch) = (value.primary, value.epoch);
            out.push(Action::Report(Condition::HandedOver { to, epoch }));
            if let Some(session) = self.peers.get(&to).and_then(|peer| peer.session) {
                out.push(Action::Send { to, session, message: Message::YourTurn { epoch } });
            }
        } else {
            out.push(Action::Report(Condition::Fenced { by: value.primary, epoch: value.epoch }));
        }
        self.step_down(out);
        self.state = State::Booting;
        self.decide(value, now, out);
    }

    /// Neither leads nor follows from here on; the machine has no business here.
    pub(crate) fn step_down(&mut self, out: &mut Vec<Action>) {
        let told = match &self.state {
            State::Leading(leading) => leading.opened.is_some(),
            State::Following(following) => following.told.is_some(),
            _ => false,
        };
        if told {
            out.push(Action::StepDown);
        }
        if matches!(self.state, State::Leading(_)) {
            self.evict_machine(out);
        }
    }

    /// The machine is gone from here and this replica cannot lead: whoever is in sync may take over at once.
    pub(crate) fn step_aside(&mut self, term: Term, out: &mut Vec<Action>) {
        self.state = State::Failed { vacate: None };
        for (&to, peer) in &self.peers {
            if let Some(session) = peer.session {
                out.push(Action::Send { to, session, message: Message::StepAside { term } });
            }
        }
    }

    fn tell_frozen(&mut self, out: &mut Vec<Action>) {
        let gives_away = self.ledger.wanted().gives_away(self.config.me);
        let away = !self.desk.reachable();
        let refused = self.highest_peer_promise() > self.ledger.wanted().known_epoch();
        let paused = self.machine.paused;
        let State::Leading(leading) = &mut self.state else { return };
        let peers = &self.peers;
        let lost = leading.told.others(self.config.me).any(|node| peers.get(&node).is_none_or(|p| p.unfit()));
        let drains = leading.handover.as_ref().is_some_and(|handover| !handover.stops_machine());
        let why = if drains || gives_away {
            Some(FrozenWhy::HandingOver)
        } else if paused {
            Some(FrozenWhy::LeaseExpired)
        } else if lost && away {
            Some(FrozenWhy::RegisterOutOfReach)
        } else if refused && away {
            Some(FrozenWhy::Refused)
        } else {
            None
        };
        let freeze = drains || gives_away;
        if leading.frozen != freeze {
            // `Drain` has frozen already.
            if !freeze {
                out.push(Action::Thaw);
            } else if !drains {
                out.push(Action::Freeze);
            }
            leading.frozen = freeze;
        }
        if leading.frozen_why != why {
            leading.frozen_why = why;
            out.push(Action::Report(why.map_or(Condition::Thawed, |why| Condition::Frozen { why })));
        }
    }
}

/// Who stops being an acknowledger may miss what comes next: it must be told anew that it is caught up.
fn forget_caught_up(peers: &mut BTreeMap<NodeId, Peer>, before: &NodeSet, now: &NodeSet) {
    for node in before.iter().filter(|&node| !now.contains(node)) {
        if let Some(peer) = peers.get_mut(&node) {
            peer.caught_up = false;
        }
    }
}
