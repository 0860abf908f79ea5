//! Changing chunks of a tree.

use super::resize::store;
use super::{Node, NodeSink, NodeSource, Tree, chunks_below, chunks_below_child, load};
use crate::error::ErrorKind;
use crate::key::Domain;
use crate::{ChunkId, Error};
use std::fmt;

/// A tree that is being changed, chunk after chunk in rising order. Holds the nodes of one path; writes each node that
/// changed once.
pub struct TreeUpdate<'a> {
    domain: &'a Domain,
    source: &'a dyn NodeSource,
    tree: Tree,
    /// The top node first, each the parent of the next.
    path: Vec<Place>,
    /// Chunks below it can no longer be changed.
    next: u64,
}

struct Place {
    /// As it was.
    id: ChunkId,
    node: Node,
    changed: bool,
    base: u64,
}

impl<'a> TreeUpdate<'a> {
    /// `tree` has as many chunks as the new one shall have ([`resize`](super::resize)); a first backup begins with
    /// [`Tree::zero`].
    pub fn new(domain: &'a Domain, source: &'a dyn NodeSource, tree: Tree) -> Result<TreeUpdate<'a>, Error> {
        let level = tree.level()?;
        let node = load(source, &tree.root, level, 0, &tree)?;
        let path = vec![Place { id: tree.root, node, changed: false, base: 0 }];
        Ok(TreeUpdate { domain, source, tree, path, next: 0 })
    }

    /// Says that chunk `index` is `id` now. Indexes must rise.
    pub fn set(&mut self, index: u64, id: ChunkId, sink: &mut dyn NodeSink) -> Result<(), Error> {
        if index < self.next || index >= self.tree.chunks {
            let why =
                format!("chunk {index} comes out of order, or is behind the end ({})", self.tree.chunks);
            return Err(Error::new(ErrorKind::Invalid, format!("tree {}", self.tree.root), why));
        }
        self.next = index + 1;
        loop {
            let place = self.path.last_mut().expect("the top node stays");
            let level = place.node.level;
            if index >= place.base + chunks_below(level) {
                self.leave(sink)?;
                continue;
            }
            let slot = ((index - place.base) / chunks_below_child(level)) as usize;
            let child = place.node.children[slot];
            if level == 0 {
                place.changed |= child != id;
                place.node.children[slot] = id;
                return Ok(());
            }
            let base = place.base + slot as u64 * chunks_below_child(level);
            let node = load(self.source, &child, level - 1, base, &self.tree)?;
            self.path.push(Place { id: child, node, changed: false, base });
        }
    }

    /// Puts the lowest node of the path into its parent.
    fn leave(&mut self, sink: &mut dyn NodeSink) -> Result<(), Error> {
        let place = self.path.pop().expect("only nodes that have a parent are left");
        let parent = self.path.last_mut().expect("the top node covers every chunk");
        if place.changed {
            let slot = ((place.base - parent.base) / chunks_below_child(parent.node.level)) as usize;
            let id = store(self.domain, sink, &place.node)?;
            parent.changed |= id != place.id;
            parent.node.children[slot] = id;
        }
        Ok(())
    }

    /// The tree with all its changes.
    pub fn finish(mut self, sink: &mut dyn NodeSink) -> Result<Tree, Error> {
        while self.path.len() > 1 {
            self.leave(sink)?;
        }
        let top = self.path.pop().expect("the top node stays");
        let root = if top.changed { store(self.domain, sink, &top.node)? } else { top.id };
        Ok(Tree { root, chunks: self.tree.chunks })
    }
}

impl fmt::Debug for TreeUpdate<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TreeUpdate").field("tree", &self.tree).field("next", &self.next).finish()
    }
}
