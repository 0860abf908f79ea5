//! A disk that grew or shrank.

use super::{FAN_OUT, Node, NodeSink, NodeSource, Tree, chunks_below, chunks_below_child, load};
use crate::key::Domain;
use crate::{ChunkId, Error};

/// The tree of the same disk with another number of chunks: what is new is zero, what was behind the end is gone. Reads and
/// writes the nodes along the end.
pub fn resize(
    domain: &Domain,
    source: &dyn NodeSource,
    sink: &mut dyn NodeSink,
    old: Tree,
    chunks: u64,
) -> Result<Tree, Error> {
    let new = Tree { root: old.root, chunks };
    let (from, to) = (old.level()?, new.level()?);
    if old.root.is_zero() || old.chunks == chunks {
        return Ok(new);
    }
    let mut root = old.root;
    if chunks < old.chunks {
        for level in (to + 1..=from).rev() {
            root = load(source, &root, level, 0, &old)?.children[0];
        }
        root = cut(domain, source, sink, (&old, chunks), (root, to, 0))?;
    }
    for level in from + 1..=to {
        let mut node = Node::empty(level);
        node.children[0] = root;
        root = store(domain, sink, &node)?;
    }
    Ok(Tree { root, chunks })
}

/// Gives `node` to the sink; its id.
pub(super) fn store(domain: &Domain, sink: &mut dyn NodeSink, node: &Node) -> Result<ChunkId, Error> {
    if node.is_empty() {
        return Ok(ChunkId::ZERO);
    }
    let encoded = node.encode();
    let id = domain.node_id(&encoded);
    sink.node(id, &encoded)?;
    Ok(id)
}

/// The subtree `id` of `old`, at `level` from chunk `base` on, without what is at `chunks` and behind.
fn cut(
    domain: &Domain,
    source: &dyn NodeSource,
    sink: &mut dyn NodeSink,
    (old, chunks): (&Tree, u64),
    (id, level, base): (ChunkId, u8, u64),
) -> Result<ChunkId, Error> {
    if id.is_zero() || base >= chunks {
        return Ok(ChunkId::ZERO);
    }
    if base + chunks_below(level) <= chunks {
        return Ok(id);
    }
    let mut node = load(source, &id, level, base, old)?;
    let before = node.clone();
    let span = chunks_below_child(level);
    let end = (chunks - base).div_ceil(span) as usize;
    node.children[end.min(FAN_OUT)..].fill(ChunkId::ZERO);
    if level > 0 {
        let place = (node.children[end - 1], level - 1, base + (end as u64 - 1) * span);
        node.children[end - 1] = cut(domain, source, sink, (old, chunks), place)?;
    }
    if node == before { Ok(id) } else { store(domain, sink, &node) }
}
