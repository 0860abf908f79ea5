//! The witness: registers, changed by compare-and-swap, on a third machine.
//!
//! The network to it loses, delays and duplicates nothing that was not sent, but answers may come late or never, and
//! a swap may land long after its author gave up. A witness started from lost or copied state is *amnesiac*: it
//! serves nobody until every replica told it what it knows.

use rempart_cluster::{ReadOutcome, SwapOutcome};
use rempart_types::{Epoch, NodeId, NodeSet, RegisterId, RegisterValue};
use std::collections::{BTreeMap, BTreeSet};

/// The state of the witness. Everything in it is durable before it answers.
#[derive(Debug)]
pub struct Witness {
    pub up: bool,
    /// While it is not up: its machine is, and says at once that nobody serves there.
    pub refuses: bool,
    values: BTreeMap<RegisterId, RegisterValue>,
    /// Registers whose value was lost at some time.
    lost: BTreeSet<RegisterId>,
    /// What each replica reported since then, by register. One is served again once every replica reported.
    reports: BTreeMap<RegisterId, BTreeMap<NodeId, (Option<RegisterValue>, Epoch)>>,
    restored: BTreeSet<RegisterId>,
    /// Every value ever held, in order.
    pub changes: Vec<RegisterValue>,
}

impl Default for Witness {
    fn default() -> Witness {
        Witness {
            up: true,
            refuses: false,
            values: BTreeMap::new(),
            lost: BTreeSet::new(),
            reports: BTreeMap::new(),
            restored: BTreeSet::new(),
            changes: Vec::new(),
        }
    }
}

impl Witness {
    /// It lost its state and serves nobody that register's value. A register that is new since then is served.
    pub fn is_amnesiac(&self, register: RegisterId) -> bool {
        self.lost.contains(&register) && !self.restored.contains(&register)
    }

    /// It lost its state and has served nobody since.
    pub fn knows_nothing(&self) -> bool {
        !self.lost.is_empty() && self.restored.is_empty()
    }

    pub fn value(&self, register: RegisterId) -> Option<&RegisterValue> {
        self.values.get(&register)
    }

    /// The value that tells who leads now, over all registers the group ever lived in.
    pub fn current(&self) -> Option<&RegisterValue> {
        let closed =
            |value: &&RegisterValue| !matches!(value.intent, rempart_types::Intent::Tombstone { .. });
        self.values.values().filter(closed).max_by_key(|value| value.epoch)
    }

    pub fn read(&self, register: RegisterId) -> ReadOutcome {
        if self.is_amnesiac(register) {
            return ReadOutcome::Amnesiac;
        }
        ReadOutcome::Value(self.values.get(&register).cloned())
    }

    pub fn swap(
        &mut self,
        register: RegisterId,
        expected: Option<Epoch>,
        value: &RegisterValue,
    ) -> SwapOutcome {
        if self.is_amnesiac(register) {
            return SwapOutcome::Amnesiac;
        }
        let held = self.values.get(&register);
        if held.map(|held| held.epoch) != expected {
            return SwapOutcome::Lost(held.cloned());
        }
        self.values.insert(register, value.clone());
        self.changes.push(value.clone());
        SwapOutcome::Won
    }

    /// Its disk is lost, or was copied from another machine: it starts anew and knows that it knows nothing.
    /// `unnoticed`: it does not know, which is a bug.
    pub fn lose_memory(&mut self, unnoticed: bool) {
        if unnoticed {
            self.lost.clear();
        } else {
            self.lost.extend(self.values.keys());
        }
        self.values.clear();
        self.reports.clear();
        self.restored.clear();
    }

    /// A bug: it answered before its last change was durable.
    pub fn forget_last(&mut self) {
        let Some(last) = self.changes.pop() else { return };
        let before = self.changes.iter().rev().find(|value| value.register == last.register);
        match before {
            Some(value) => self.values.insert(last.register, value.clone()),
            None => self.values.remove(&last.register),
        };
    }

    /// A bug: it answers reads with what it held before the last change.
    pub fn read_stale(&self, register: RegisterId) -> ReadOutcome {
        let mut held = self.changes.iter().rev().filter(|value| value.register == register);
        held.next();
        ReadOutcome::Value(held.next().cloned())
    }

    /// A replica tells what it knows, and who the others are. With the last one's word, service goes on.
    pub fn inform(
        &mut self,
        from: NodeId,
        register: RegisterId,
        known: Option<RegisterValue>,
        promise: Epoch,
        replicas: &NodeSet,
    ) {
        if !self.is_amnesiac(register) {
            return;
        }
        let reports = self.reports.entry(register).or_default();
        reports.insert(from, (known, promise));
        if replicas.iter().all(|replica| reports.contains_key(&replica)) {
            let known = std::mem::take(reports).into_values().filter_map(|(known, _)| known);
            if let Some(newest) = known.max_by_key(|value| value.epoch) {
                self.values.insert(register, newest);
            }
            self.restored.insert(register);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_types::{Intent, Lineage, Nonce};

    fn value(epoch: u64) -> RegisterValue {
        RegisterValue {
            register: RegisterId(1),
            epoch: Epoch(epoch),
            primary: NodeId(1),
            in_sync: NodeSet::only(NodeId(1)),
            intent: Intent::Lead,
            nonce: Nonce(u128::from(epoch)),
            lineage: Lineage::new(),
        }
    }

    #[test]
    fn an_amnesiac_witness_serves_nobody_until_every_replica_reported() {
        let nodes = [NodeId(1), NodeId(2)];
        let replicas: NodeSet = nodes.into_iter().collect();
        let mut witness = Witness::default();
        assert_eq!(witness.swap(RegisterId(1), None, &value(1)), SwapOutcome::Won);
        assert_eq!(witness.swap(RegisterId(1), None, &value(2)), SwapOutcome::Lost(Some(value(1))));
        witness.lose_memory(false);
        assert_eq!(witness.swap(RegisterId(1), Some(Epoch(1)), &value(2)), SwapOutcome::Amnesiac);
        witness.inform(nodes[0], RegisterId(1), Some(value(1)), Epoch(1), &replicas);
        assert_eq!(witness.read(RegisterId(1)), ReadOutcome::Amnesiac);
        witness.inform(nodes[1], RegisterId(1), Some(value(3)), Epoch(4), &replicas);
        assert_eq!(witness.read(RegisterId(1)), ReadOutcome::Value(Some(value(3))));
    }
}
