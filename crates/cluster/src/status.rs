//! A member's state as others see it.

use crate::FrozenWhy;
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
