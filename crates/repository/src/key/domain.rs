//! Dedup domains: writers that find each other's chunks.

use super::Secret;
use crate::{ChunkId, DomainId};

/// The keys of one dedup domain: for ids of chunks, for ids of tree nodes, for index segments.
///
/// Who has them can tell whether a guessed block is in the domain's index, and sees which chunks are equal; none of them
/// opens a pack.
#[derive(Debug, Clone)]
pub struct Domain {
    id: DomainId,
    /// What the others are derived from.
    secret: Secret,
    chunk: Secret,
    node: Secret,
    index: Secret,
}

impl Domain {
    pub(super) fn new(id: DomainId, secret: Secret) -> Domain {
        Domain {
            id,
            chunk: secret.derive("rempart 2026 domain: ids of chunks", &[&id.0]),
            node: secret.derive("rempart 2026 domain: ids of tree nodes", &[&id.0]),
            index: secret.derive("rempart 2026 domain: index segments", &[&id.0]),
            secret,
        }
    }

    pub fn id(&self) -> DomainId {
        self.id
    }

    /// The id of a chunk that [is not zero](crate::is_zero). BLAKE3 covers the length, too.
    pub fn chunk_id(&self, content: &[u8]) -> ChunkId {
        ChunkId(*blake3::keyed_hash(self.chunk.bytes(), content).as_bytes())
    }

    /// The id of a tree's node, from its encoded form. Another key than for chunks: a chunk that holds a node's bytes
    /// never passes for it.
    pub fn node_id(&self, content: &[u8]) -> ChunkId {
        ChunkId(*blake3::keyed_hash(self.node.bytes(), content).as_bytes())
    }

    pub(crate) fn secret(&self) -> &Secret {
        &self.secret
    }

    pub(crate) fn index(&self) -> &Secret {
        &self.index
    }
}
