//! Giving the primacy away in order (rule 15): stop the machine, drain, one swap.
//!
//! The destination opens the epoch when it reads it, without waiting: no machine runs here by then. So until the
//! swap is settled the machine stays off here, and it comes back only by another swap.

use crate::bug::Bug;
use crate::member::{Member, State};
use crate::timers::Timer;
use crate::{Action, Condition, HandoverFailure, RefusedWhy};
use rempart_types::{MonotonicTime, NodeId, Term};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Handover {
    to: NodeId,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    StopMachine,
    Drain,
    Swap,
}

impl Handover {
    pub(crate) fn stops_machine(&self) -> bool {
        self.phase == Phase::StopMachine
    }

    pub(crate) fn drains(&self) -> bool {
        self.phase == Phase::Drain
    }

    pub(crate) fn swaps_to(&self) -> Option<NodeId> {
        (self.phase == Phase::Swap).then_some(self.to)
    }
}

impl Member {
    pub(crate) fn start_handover(&mut self, to: NodeId, now: MonotonicTime, out: &mut Vec<Action>) {
        let state = self.ledger.wanted();
        let settled = state.attempts.is_empty();
        let in_sync = state.known.as_ref().is_some_and(|known| known.in_sync.contains(to));
        let fit = self.peers.get(&to).is_some_and(|peer| peer.session.is_some() && !peer.unfit());
        let State::Leading(leading) = &mut self.state else {
            return self.refuse("handover", RefusedWhy::NotPrimary, out);
        };
        let why = if to == self.config.me || !in_sync || !fit {
            RefusedWhy::PeerNotInSync
        } else if !leading.serving || !settled || leading.handover.is_some() {
            RefusedWhy::Busy
        } else {
            leading.handover = Some(Handover { to, phase: Phase::StopMachine });
            self.timers.set(Timer::Handover, now + self.config.timing.handover_deadline);
            if !self.bug(Bug::HandoverWithMachine) {
                self.revoke_machine(Action::ShutDownVm, out);
            }
            return;
        };
        self.refuse("handover", why, out);
    }

    pub(crate) fn advance_handover(&mut self, out: &mut Vec<Action>) {
        let gone = self.machine.exists == Some(false) || self.bug(Bug::HandoverWithMachine);
        let State::Leading(leading) = &mut self.state else { return };
        let (Some(handover), Some(term)) = (&mut leading.handover, leading.opened) else { return };
        if self.peers.get(&handover.to).is_none_or(|peer| peer.unfit()) {
            return self.give_up_handover(HandoverFailure::DestinationLost, out);
        }
        if handover.phase == Phase::StopMachine && gone {
            handover.phase = Phase::Drain;
            out.push(Action::Drain { term });
        }
    }

    pub(crate) fn drained(&mut self, term: Term) {
        if let State::Leading(leading) = &mut self.state
            && leading.opened == Some(term)
            && let Some(handover) = &mut leading.handover
            && handover.phase == Phase::Drain
        {
            handover.phase = Phase::Swap;
        }
    }

    pub(crate) fn handover_too_late(&mut self, out: &mut Vec<Action>) {
        self.give_up_handover(HandoverFailure::Deadline, out);
    }

    /// If its swap may be under way, the machine stays off and nothing is appended until another swap settled it.
    fn give_up_handover(&mut self, why: HandoverFailure, out: &mut Vec<Action>) {
        let State::Leading(leading) = &mut self.state else { return };
        if let Some(handover) = leading.handover.take() {
            self.timers.clear(Timer::Handover);
            out.push(Action::Report(Condition::HandoverFailed { to: handover.to, why }));
        }
    }
}
