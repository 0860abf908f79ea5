//! The witness: registers, changed by compare-and-swap, on a third machine.
//!
//! The network to it loses, delays and duplicates nothing that was not sent, but answers may come late or never, and
//! a swap may land long after its author gave up. A witness started from lost or copied state is *amnesiac*: it
//! serves nobody until every replica told it what it knows.

use rempart_cluster::{ReadOutcome, SwapOutcome};
use rempart_types::{Epoch, NodeId, NodeSet, RegisterId, RegisterValue};
use std::collections::BTreeMap;

/// The state of the witness. Everything in it is durable before it answers.
#[derive(Debug)]
pub struct Witness {
    pub up: bool,
    replicas: NodeSet,
    values: BTreeMap<RegisterId, RegisterValue>,
    /// What each replica reported since the state was lost; `None` while it is sound.
    reports: Option<BTreeMap<NodeId, (Option<RegisterValue>, Epoch)>>,
    /// Every value ever held, in order.
    pub changes: Vec<RegisterValue>,
}

impl Witness {
    pub fn new(replicas: NodeSet) -> Witness {
        Witness { up: true, replicas, values: BTreeMap::new(), reports: None, changes: Vec::new() }
    }

    pub fn is_amnesiac(&self) -> bool {
        self.reports.is_some()
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
        if self.is_amnesiac() {
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
        if self.is_amnesiac() {
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
        self.values.clear();
        self.reports = (!unnoticed).then(BTreeMap::new);
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

    /// A replica tells what it knows. With the last one's word, service goes on.
    pub fn inform(&mut self, from: NodeId, known: Option<RegisterValue>, promise: Epoch) {
        let Some(reports) = &mut self.reports else { return };
        reports.insert(from, (known, promise));
        if self.replicas.iter().all(|replica| reports.contains_key(&replica)) {
            for value in self.reports.take().into_iter().flatten().filter_map(|(_, (known, _))| known) {
                let held = self.values.entry(value.register).or_insert_with(|| value.clone());
                if held.epoch < value.epoch {
                    *held = value;
                }
            }
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
        let mut witness = Witness::new(nodes.into_iter().collect());
        assert_eq!(witness.swap(RegisterId(1), None, &value(1)), SwapOutcome::Won);
        assert_eq!(witness.swap(RegisterId(1), None, &value(2)), SwapOutcome::Lost(Some(value(1))));
        witness.lose_memory(false);
        assert_eq!(witness.swap(RegisterId(1), Some(Epoch(1)), &value(2)), SwapOutcome::Amnesiac);
        witness.inform(nodes[0], Some(value(1)), Epoch(1));
        assert_eq!(witness.read(RegisterId(1)), ReadOutcome::Amnesiac);
        witness.inform(nodes[1], Some(value(3)), Epoch(4));
        assert_eq!(witness.read(RegisterId(1)), ReadOutcome::Value(Some(value(3))));
    }
}
