//! Trees: what a disk's chunks were at one point, as a radix tree of chunk ids with 256 children a node.
//!
//! A tree is changed by writing anew what lies between a changed chunk and the root; the rest is shared with the tree
//! before. Where there are only zeroes there are no nodes.

mod difference;
mod node;
mod resize;
#[cfg(test)]
mod tests;
mod update;
mod walk;

pub use difference::{Difference, Differences};
pub(crate) use node::Node;
pub use node::{FAN_OUT, MAX_NODE};
pub use resize::resize;
pub use update::TreeUpdate;
pub use walk::{Step, Walk};

use crate::ChunkId;
use crate::error::{Error, Fault};
use serde::{Deserialize, Serialize};

/// A disk's tree: the id of its top node, and how many chunks the disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tree {
    /// [`ChunkId::ZERO`] when the disk is all zeroes.
    pub root: ChunkId,
    pub chunks: u64,
}

/// The highest level of a node: 2⁵⁶ chunks of the smallest size are more than 2⁶⁴ bytes.
const MAX_LEVEL: u8 = 6;
/// Chunks of a disk, at most.
pub const MAX_CHUNKS: u64 = chunks_below(MAX_LEVEL);

impl Tree {
    /// A disk of zeroes.
    pub const fn zero(chunks: u64) -> Tree {
        Tree { root: ChunkId::ZERO, chunks }
    }

    /// The level of its top node; nodes of level 0 hold ids of chunks.
    pub(crate) fn level(&self) -> Result<u8, Error> {
        let level = (0..=MAX_LEVEL).find(|level| self.chunks <= chunks_below(*level));
        let error =
            || Fault::damaged("it has more chunks than a disk can have").of(format!("tree {}", self.root));
        level.ok_or_else(error)
    }
}

/// Chunks below one node of that level.
const fn chunks_below(level: u8) -> u64 {
    1 << (8 * (level as u32 + 1))
}

/// Chunks below one child of a node of that level.
const fn chunks_below_child(level: u8) -> u64 {
    1 << (8 * level as u32)
}

/// Gives nodes by their ids.
pub trait NodeSource {
    /// The node's encoded form, compared with its id by whoever fetched it: as
    /// [`PackOpener::open_blob`](crate::PackOpener::open_blob) does.
    fn node(&self, id: &ChunkId) -> Result<Vec<u8>, Error>;
}

/// Takes the nodes that a new tree needs and the old one had not. A node comes before those that refer to it; one may come
/// twice, and a few may come that turn out not to be needed.
pub trait NodeSink {
    fn node(&mut self, id: ChunkId, encoded: &[u8]) -> Result<(), Error>;
}

/// The node `id` of a tree, at `level`, whose first chunk is `base`.
fn load(source: &dyn NodeSource, id: &ChunkId, level: u8, base: u64, tree: &Tree) -> Result<Node, Error> {
    if id.is_zero() {
        return Ok(Node::empty(level));
    }
    let node = Node::parse(&source.node(id)?, level);
    // Else two trees could be equal and yet different.
    let node = node.and_then(|node| match node.last_child() {
        Some(last) if base + last as u64 * chunks_below_child(level) >= tree.chunks => {
            Err(Fault::damaged("it has children behind the end of its disk"))
        }
        _ => Ok(node),
    });
    node.map_err(|fault| fault.of(format!("tree node {id}")))
}
