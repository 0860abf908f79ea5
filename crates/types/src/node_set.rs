use crate::NodeId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// A small ordered set of nodes, such as an in-sync set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct NodeSet(BTreeSet<NodeId>);

impl NodeSet {
    pub fn only(node: NodeId) -> NodeSet {
        NodeSet(BTreeSet::from([node]))
    }

    pub fn contains(&self, node: NodeId) -> bool {
        self.0.contains(&node)
    }

    pub fn insert(&mut self, node: NodeId) -> bool {
        self.0.insert(node)
    }

    pub fn remove(&mut self, node: NodeId) -> bool {
        self.0.remove(&node)
    }

    #[must_use]
    pub fn with(&self, node: NodeId) -> NodeSet {
        let mut set = self.clone();
        set.insert(node);
        set
    }

    #[must_use]
    pub fn without(&self, node: NodeId) -> NodeSet {
        let mut set = self.clone();
        set.remove(node);
        set
    }

    #[must_use]
    pub fn union(&self, other: &NodeSet) -> NodeSet {
        NodeSet(self.0.union(&other.0).copied().collect())
    }

    pub fn is_subset(&self, other: &NodeSet) -> bool {
        self.0.is_subset(&other.0)
    }

    pub fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.0.iter().copied()
    }

    /// Every member but `node`.
    pub fn others(&self, node: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        self.iter().filter(move |&member| member != node)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<NodeId> for NodeSet {
    fn from_iter<I: IntoIterator<Item = NodeId>>(nodes: I) -> NodeSet {
        NodeSet(nodes.into_iter().collect())
    }
}
