//! What must hold in every world.

use crate::PersistentState;
use crate::model::world::{Node, Vm, World, id};
use rempart_types::{Epoch, Intent, NodeId, NodeSet, RegisterValue, Term};
use std::collections::BTreeMap;

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Violation {
    /// I1: a replica that may lead next lacks a record that a flush covered.
    FlushLost {
        node: NodeId,
        holds: usize,
        flushed: usize,
    },
    /// I2: the register does not name whoever leads, or another replica was forced to lead instead.
    LeadsUninvited {
        node: NodeId,
        term: Term,
    },
    /// I2: the register's new primary was not in sync.
    OutsiderLeads {
        node: NodeId,
        epoch: Epoch,
    },
    /// I2: a term was opened twice.
    TermTwice {
        term: Term,
    },
    /// I2: a promise was forgotten, or used before it was durable.
    PromiseUndone {
        node: NodeId,
    },
    /// I6: without loss of power, a record the guest saw was undone.
    CommittedUndone {
        node: NodeId,
    },
    /// What the guest saw flushed is not what the primary's log says.
    HistoryChanged {
        node: NodeId,
    },
    /// A copy that is not whole leads.
    UnusableLeads {
        node: NodeId,
    },
    TwoMachines {
        first: NodeId,
        second: NodeId,
    },
    /// I7: everything was healed, and yet nobody leads with everybody in sync.
    Stuck {
        why: String,
    },
    /// An assertion of the member itself.
    Assertion {
        message: String,
    },
}

/// What an onlooker remembers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct Ghost {
    /// The records that an acknowledged flush covered.
    pub(super) flushed: Vec<Term>,
    /// The records whose writes were acknowledged.
    pub(super) committed: Vec<Term>,
    pub(super) power_was_lost: bool,
    terms: BTreeMap<Term, u8>,
    /// Who may lead in each epoch of the register.
    primaries: BTreeMap<Epoch, NodeId>,
    promises: BTreeMap<u8, Epoch>,
}

impl Ghost {
    /// A swap leaves: for a takeover, its promise must be on disk; for all, that it may be under way.
    pub(super) fn swap_sent(
        &mut self,
        me: u8,
        value: &RegisterValue,
        persisted: &PersistentState,
    ) -> Result<(), Violation> {
        let led_by_other = persisted.known.as_ref().is_none_or(|known| known.primary != id(me));
        // By force nothing is promised to a register that is closed.
        let closes = matches!(value.intent, Intent::Tombstone { .. });
        let takes_over = led_by_other && !closes && value.primary == id(me) && value.epoch > Epoch(1);
        let recorded = persisted.attempts.iter().any(|attempt| attempt.value.nonce == value.nonce);
        if (takes_over && persisted.promise < value.epoch) || !recorded {
            return Err(Violation::PromiseUndone { node: id(me) });
        }
        if takes_over {
            self.promised(me, value.epoch);
        }
        Ok(())
    }

    pub(super) fn promised(&mut self, me: u8, promise: Epoch) {
        let told = self.promises.entry(me).or_default();
        *told = promise.max(*told);
    }

    pub(super) fn promise_survived(&self, me: u8, persisted: Epoch) -> Result<(), Violation> {
        if self.promises.get(&me).is_some_and(|&told| told > persisted) {
            return Err(Violation::PromiseUndone { node: id(me) });
        }
        Ok(())
    }

    pub(super) fn landed(
        &mut self,
        before: Option<&RegisterValue>,
        value: &RegisterValue,
    ) -> Result<(), Violation> {
        if matches!(value.intent, Intent::Tombstone { .. }) {
            return Ok(());
        }
        self.primaries.insert(value.epoch, value.primary);
        let invited = before.is_none_or(|before| before.in_sync.contains(value.primary));
        if !invited {
            return Err(Violation::OutsiderLeads { node: value.primary, epoch: value.epoch });
        }
        Ok(())
    }

    pub(super) fn opened(&mut self, me: u8, term: Term, usable: bool) -> Result<(), Violation> {
        if !usable {
            return Err(Violation::UnusableLeads { node: id(me) });
        }
        let newest = self.primaries.last_key_value().map_or(0, |(epoch, _)| epoch.generation());
        if self.primaries.get(&term.epoch) != Some(&id(me)) || term.epoch.generation() < newest {
            return Err(Violation::LeadsUninvited { node: id(me), term });
        }
        if self.terms.insert(term, me).is_some() {
            return Err(Violation::TermTwice { term });
        }
        Ok(())
    }

    /// The machine runs on this log now.
    pub(super) fn serves(&self, node: &Node) -> Result<(), Violation> {
        let node_id = node.member.as_ref().map_or(NodeId(0), |member| member.config.me);
        if !node.usable {
            return Err(Violation::UnusableLeads { node: node_id });
        }
        if !node.log.starts_with(&self.flushed) {
            return Err(Violation::HistoryChanged { node: node_id });
        }
        if !self.power_was_lost && !node.log.starts_with(&self.committed) {
            return Err(Violation::CommittedUndone { node: node_id });
        }
        Ok(())
    }
}

impl World {
    /// The guest is told what is committed and stable by now, and everything is looked at.
    pub(super) fn check(&mut self) -> Result<(), Violation> {
        for me in 0..self.nodes.len() as u8 {
            let (Some(committed), Some(stable)) = (self.committed(me), self.stable(me)) else { continue };
            let node = &self.nodes[usize::from(me)];
            let lead = node.lead.as_ref().expect("it has watermarks");
            if !lead.serving || lead.flow == crate::model::world::Flow::Frozen {
                continue;
            }
            let ghost = &mut self.ghost;
            grow(&mut ghost.flushed, &node.log[..stable], me)?;
            if ghost.power_was_lost {
                ghost.committed.clear();
            } else {
                grow(&mut ghost.committed, &node.log[..committed], me)?;
            }
        }
        self.check_next_leaders()?;
        self.check_machines()
    }

    fn check_next_leaders(&self) -> Result<(), Violation> {
        let in_sync = self.present_register().as_ref().map(|value| value.in_sync.clone()).unwrap_or_default();
        for (index, node) in self.nodes.iter().enumerate() {
            let me = id(u8::try_from(index).expect("few nodes"));
            if in_sync.contains(me) && !node.log[..node.durable].starts_with(&self.ghost.flushed) {
                let flushed = self.ghost.flushed.len();
                return Err(Violation::FlushLost { node: me, holds: node.durable, flushed });
            }
        }
        Ok(())
    }

    fn check_machines(&self) -> Result<(), Violation> {
        let mut running = self.nodes.iter().zip(0u8..).filter(|(node, _)| node.vm == Vm::Running);
        if let (Some((_, first)), Some((_, second))) = (running.next(), running.next()) {
            return Err(Violation::TwoMachines { first: id(first), second: id(second) });
        }
        Ok(())
    }

    pub(super) fn everybody(&self) -> NodeSet {
        (0..self.nodes.len() as u8).map(id).collect()
    }
}

/// The guest was told more; what it was told before must not have changed.
fn grow(seen: &mut Vec<Term>, log: &[Term], me: u8) -> Result<(), Violation> {
    let shared = seen.len().min(log.len());
    if seen[..shared] != log[..shared] {
        return Err(Violation::HistoryChanged { node: id(me) });
    }
    if log.len() > seen.len() {
        *seen = log.to_vec();
    }
    Ok(())
}
