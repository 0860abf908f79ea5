//! What differs between two trees, without reading what does not.

use super::{FAN_OUT, Node, NodeSource, Tree, chunks_below_child, load};
use crate::{ChunkId, Error};
use std::fmt;

/// A chunk that two trees do not agree on; what is behind a disk's end counts as zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    pub index: u64,
    pub old: ChunkId,
    pub new: ChunkId,
}

/// The differences of two trees, in order. Reads the nodes that differ; holds those of two paths.
pub struct Differences<'a> {
    source: &'a dyn NodeSource,
    old: Side,
    new: Side,
    path: Vec<Place>,
}

struct Side {
    tree: Tree,
    level: u8,
}

struct Place {
    old: Node,
    new: Node,
    base: u64,
    next: usize,
}

impl Side {
    fn new(tree: Tree) -> Result<Side, Error> {
        Ok(Side { tree, level: tree.level()? })
    }

    /// The node there. Above its root a tree is thought to have nodes whose first child is all there is, down to it.
    fn load(&self, source: &dyn NodeSource, id: &ChunkId, level: u8, base: u64) -> Result<Node, Error> {
        if level <= self.level {
            return load(source, id, level, base, &self.tree);
        }
        let mut node = Node::empty(level);
        node.children[0] = *id;
        Ok(node)
    }
}

impl<'a> Differences<'a> {
    pub fn new(source: &'a dyn NodeSource, old: Tree, new: Tree) -> Result<Differences<'a>, Error> {
        let (old, new) = (Side::new(old)?, Side::new(new)?);
        let level = old.level.max(new.level) + 1;
        let top = |side: &Side| {
            let mut node = Node::empty(level);
            node.children[0] = side.tree.root;
            node
        };
        let place = Place { old: top(&old), new: top(&new), base: 0, next: 0 };
        Ok(Differences { source, path: vec![place], old, new })
    }

    fn step(&mut self) -> Result<Option<Difference>, Error> {
        while let Some(place) = self.path.last_mut() {
            let level = place.old.level;
            let slot = place.next;
            if slot == FAN_OUT {
                self.path.pop();
                continue;
            }
            place.next += 1;
            let (old, new) = (place.old.children[slot], place.new.children[slot]);
            // A node's bytes tell its level, so that equal ids are equal subtrees, where both are ids of nodes that are there.
            let is_real = |side: &Side| level <= side.level + 1;
            if old == new && (old.is_zero() || is_real(&self.old) == is_real(&self.new)) {
                continue;
            }
            let base = place.base + slot as u64 * chunks_below_child(level);
            if level == 0 {
                return Ok(Some(Difference { index: base, old, new }));
            }
            let old = self.old.load(self.source, &old, level - 1, base)?;
            let new = self.new.load(self.source, &new, level - 1, base)?;
            self.path.push(Place { old, new, base, next: 0 });
        }
        Ok(None)
    }
}

impl Iterator for Differences<'_> {
    type Item = Result<Difference, Error>;

    /// After an error there is nothing more.
    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if step.is_err() {
            self.path.clear();
        }
        step.transpose()
    }
}

impl fmt::Debug for Differences<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Differences").field("old", &self.old.tree).field("new", &self.new.tree).finish()
    }
}
