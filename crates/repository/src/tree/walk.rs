//! Reading a tree in order.

use super::{FAN_OUT, Node, NodeSource, Tree, chunks_below, chunks_below_child, load};
use crate::{ChunkId, Error};
use std::fmt;
use std::ops::Range;

/// What a walk meets. Zeroes are passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A node that will be entered next, unless [`Walk::pass_over`] is called first.
    Node {
        id: ChunkId,
        level: u8,
        first_chunk: u64,
    },
    Chunk {
        index: u64,
        id: ChunkId,
    },
}

/// Goes through the nodes and chunks of a tree, in order. Holds the nodes of one path.
pub struct Walk<'a> {
    source: &'a dyn NodeSource,
    tree: Tree,
    wanted: Range<u64>,
    path: Vec<Place>,
    /// Told, and not entered yet: id, level, first chunk.
    announced: Option<(ChunkId, u8, u64)>,
}

struct Place {
    node: Node,
    base: u64,
    next: usize,
}

impl<'a> Walk<'a> {
    pub fn new(source: &'a dyn NodeSource, tree: Tree) -> Result<Walk<'a>, Error> {
        Walk::range(source, tree, 0..tree.chunks)
    }

    /// Only what lies within those chunks.
    pub fn range(source: &'a dyn NodeSource, tree: Tree, wanted: Range<u64>) -> Result<Walk<'a>, Error> {
        let level = tree.level()?;
        let wanted = wanted.start..wanted.end.min(tree.chunks);
        let mut top = Node::empty(level);
        top.children[0] = tree.root;
        let mut walk = Walk { source, tree, wanted, path: Vec::new(), announced: None };
        if !tree.root.is_zero() && !walk.wanted.is_empty() {
            // A place above the root, so that the root is met like any other node.
            walk.path.push(Place { node: Node { level: level + 1, ..top }, base: 0, next: 0 });
        }
        Ok(walk)
    }

    /// Leaves out what is below the node that was told last.
    pub fn pass_over(&mut self) {
        self.announced = None;
    }

    fn step(&mut self) -> Result<Option<Step>, Error> {
        if let Some((id, level, base)) = self.announced.take() {
            let node = load(self.source, &id, level, base, &self.tree)?;
            let next = self.wanted.start.saturating_sub(base) / chunks_below_child(level);
            self.path.push(Place { node, base, next: next as usize });
        }
        while let Some(place) = self.path.last_mut() {
            let level = place.node.level;
            let slot = place.next;
            let base = place.base + slot as u64 * chunks_below_child(level);
            if slot == FAN_OUT || base >= self.wanted.end {
                self.path.pop();
                continue;
            }
            place.next += 1;
            let id = place.node.children[slot];
            if id.is_zero() {
                continue;
            }
            if level == 0 {
                return Ok(Some(Step::Chunk { index: base, id }));
            }
            debug_assert!(base + chunks_below(level - 1) > self.wanted.start);
            self.announced = Some((id, level - 1, base));
            return Ok(Some(Step::Node { id, level: level - 1, first_chunk: base }));
        }
        Ok(None)
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Step, Error>;

    /// An error is of the node that was told last; what comes then is behind it.
    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

impl fmt::Debug for Walk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walk").field("tree", &self.tree).field("wanted", &self.wanted).finish()
    }
}
