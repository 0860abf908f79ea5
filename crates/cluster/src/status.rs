//! A member's state as others see it.

use crate::FrozenWhy;
use crate::member::{Member, State};
use crate::peer::Peer;
use crate::timers::Timer;
use rempart_types::{Epoch, MonotonicTime, NodeId, NodeSet, RegisterId, Term};
use std::collections::BTreeMap;

/// What a member is doing.
///
/// ```text
///             Lead (create)                 register: mine ── swap, persist ──┐
///  ┌──────┐ ───────────────────────────────────────────────────────────────┐  │
///  │ Idle │                ┌─────────┐                                     ▼  ▼
///  └──────┘ ◄── nothing ── │ Booting │ ── alone, register away ────► ┌─────────┐ ◄─┐ degrade,
///                          └────┬────┘      (incarnation + 1)        │ Leading │ ──┘ admit, re-epoch
///              register: theirs │                                    └─┬─────┬─┘
///                 or a beacon   ▼              newer epoch, tombstone  │     │ Handover
///                          ┌───────────┐ ◄─────────────────────────────┤     ▼
///           ┌────────────► │ Following │ ◄──────── swapped ─────────── │ ┌─────────────┐
///           │  a beacon    └────┬──────┘                               │ │ HandingOver │
///           │                   │ silence                              │ └─────────────┘
///           │              ┌────▼────────┐  register: member,          │   │ given up: Leading
///           ├───────────── │ Suspecting  │  promise durable            │
///           │              └────┬────────┘                             │
///           │ lost         ┌────▼────────┐ won, persisted              │
///           └───────────── │ TakingOver  │ ───────────────► Leading    │
///                          └─────────────┘   (machine waits G)         ▼
///  Forcing: like TakingOver, into a new register.   Superseded: waits for Rejoin.   Stopped, Failed: final.
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// The group does not exist yet, or not for this node.
    Idle,
    /// Started; looks at the register, listens for a primary.
    Booting,
    /// Acknowledges the primary's beacons.
    Following,
    /// Has not heard the primary for too long; reads the register.
    Suspecting,
    /// Promised a newer epoch and asks the register for the primacy.
    TakingOver,
    /// Holds the primacy. Whether it serves: `Status::frozen`, `Status::vm_may_run`.
    Leading,
    /// Holds the primacy and is giving it away.
    HandingOver,
    /// An operator orders it to lead; writes a new register.
    Forcing,
    /// The group lives on in another register.
    Superseded,
    /// By command.
    Stopped,
    /// Its disk failed and it does not lead.
    Failed,
}

/// A peer's place, as the primary sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Standing {
    /// Acknowledges and is named by the register.
    InSync,
    /// Acknowledges; the register's answer is awaited.
    Joining,
    /// Named by the register, but silent, blocking or leaving: the register is asked to drop it.
    Leaving,
    /// Catching up or away.
    Outside,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerStatus {
    pub connected: bool,
    pub standing: Standing,
    /// Caught up, but not admitted before this.
    pub held_back_until: Option<MonotonicTime>,
}

/// A member at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Status {
    pub role: Role,
    /// The register's id, when known.
    pub register: Option<RegisterId>,
    /// Led or followed.
    pub term: Option<Term>,
    pub primary: Option<NodeId>,
    pub promise: Epoch,
    /// The newest value of the register acted on.
    pub epoch: Epoch,
    pub in_sync: NodeSet,
    /// Who must acknowledge: more than `in_sync` while a swap is unsettled. Empty unless leading.
    pub acknowledgers: NodeSet,
    /// Own swaps whose outcome is not known.
    pub unsettled: usize,
    pub register_reachable: bool,
    pub frozen: Option<FrozenWhy>,
    /// `RunVm` was given and not taken back.
    pub vm_may_run: bool,
    pub lease_until: Option<MonotonicTime>,
    /// The machine may not start before this (takeover wait).
    pub vm_not_before: Option<MonotonicTime>,
    pub copy_usable: bool,
    /// As primary only.
    pub peers: BTreeMap<NodeId, PeerStatus>,
}

impl Member {
    pub fn role(&self) -> Role {
        match &self.state {
            State::Idle => Role::Idle,
            State::Booting => Role::Booting,
            State::Following(following) if following.suspecting => Role::Suspecting,
            State::Following(_) => Role::Following,
            State::Claiming(_) => Role::TakingOver,
            State::Leading(leading) if leading.handover.is_some() => Role::HandingOver,
            State::Leading(_) => Role::Leading,
            State::Forcing(_) => Role::Forcing,
            State::Superseded { .. } => Role::Superseded,
            State::Stopped => Role::Stopped,
            State::Failed { .. } => Role::Failed,
        }
    }

    /// There is a session with this peer.
    pub fn hears(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|peer| peer.session.is_some())
    }

    /// Led or followed.
    pub fn term(&self) -> Option<Term> {
        match &self.state {
            State::Following(following) => following.leader.map(|(_, term)| term),
            State::Leading(leading) => leading.opened,
            _ => None,
        }
    }

    pub fn status(&self) -> Status {
        let state = self.ledger.wanted();
        let me = self.config.me;
        let primary = match &self.state {
            State::Following(following) => following.leader.map(|(node, _)| node).or(following.primary),
            State::Leading(_) => Some(me),
            _ => None,
        };
        let known_in_sync = state.known.as_ref().map(|known| known.in_sync.clone()).unwrap_or_default();
        let (acknowledgers, frozen, in_sync) = match &self.state {
            State::Leading(leading) => (self.acknowledgers(), leading.frozen_why, known_in_sync),
            State::Following(following) if !following.in_sync.is_empty() => {
                (NodeSet::default(), None, following.in_sync.clone())
            }
            _ => (NodeSet::default(), None, known_in_sync),
        };
        Status {
            role: self.role(),
            register: state.register,
            term: self.term(),
            primary,
            promise: state.promise,
            epoch: state.known_epoch(),
            peers: self.peer_statuses(&acknowledgers),
            in_sync,
            acknowledgers,
            unsettled: state.attempts.len(),
            register_reachable: self.desk.reachable(),
            frozen,
            vm_may_run: self.machine.may_run,
            lease_until: self.machine.lease,
            vm_not_before: self.timers.at(Timer::TakeoverWait),
            copy_usable: self.copy_usable,
        }
    }

    fn peer_statuses(&self, acknowledgers: &NodeSet) -> BTreeMap<NodeId, PeerStatus> {
        if !matches!(self.state, State::Leading(_)) {
            return BTreeMap::new();
        }
        let known = self.ledger.wanted().known.as_ref();
        let status = |(&node, peer): (&NodeId, &Peer)| {
            let member = known.is_some_and(|known| known.in_sync.contains(node));
            let standing = match (member, acknowledgers.contains(node)) {
                (true, _) if peer.unfit() => Standing::Leaving,
                (true, _) => Standing::InSync,
                (false, true) => Standing::Joining,
                (false, false) => Standing::Outside,
            };
            let held = self.timers.at(Timer::Readmit(node)).filter(|_| !member && peer.caught_up);
            (node, PeerStatus { connected: peer.session.is_some(), standing, held_back_until: held })
        };
        self.peers.iter().map(status).collect()
    }
}
