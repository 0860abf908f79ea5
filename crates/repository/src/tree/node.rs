//! A node's bytes: version (1), level (1), zeroes (2), a bit a child, lowest first (32), the ids of those that are there.

use crate::ChunkId;
use crate::error::{ErrorKind, Fault};

/// Children of a node.
pub const FAN_OUT: usize = 256;
const VERSION: u8 = 1;
const HEADER: usize = 4 + FAN_OUT / 8;
const ID: usize = 32;
/// Bytes of a node's encoded form, at most.
pub const MAX_NODE: usize = HEADER + FAN_OUT * ID;

/// A node: ids of chunks at level 0, of nodes one level lower above.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub level: u8,
    pub children: Box<[ChunkId; FAN_OUT]>,
}

impl Node {
    pub fn empty(level: u8) -> Node {
        Node { level, children: Box::new([ChunkId::ZERO; FAN_OUT]) }
    }

    pub fn is_empty(&self) -> bool {
        self.last_child().is_none()
    }

    pub fn last_child(&self) -> Option<usize> {
        self.children.iter().rposition(|id| !id.is_zero())
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(MAX_NODE);
        bytes.extend_from_slice(&[VERSION, self.level, 0, 0]);
        bytes.resize(HEADER, 0);
        for (slot, id) in self.children.iter().enumerate().filter(|(_, id)| !id.is_zero()) {
            bytes[4 + slot / 8] |= 1 << (slot % 8);
            bytes.extend_from_slice(&id.0);
        }
        bytes
    }

    /// Reads what [`encode`](Self::encode) gives, and nothing else: there is one form of a node, so equal nodes are one.
    pub fn parse(bytes: &[u8], level: u8) -> Result<Node, Fault> {
        let (header, ids) = bytes.split_first_chunk::<HEADER>().ok_or(Fault::damaged("it ends too early"))?;
        match header[0] {
            VERSION => {}
            0 => return Err(Fault::damaged("its version is 0")),
            _ => {
                return Err(Fault::new(
                    ErrorKind::Newer,
                    "it was written by a newer version of this program",
                ));
            }
        }
        if header[1] != level || header[2..4] != [0, 0] {
            return Err(Fault::damaged("it is no node of the level where it is"));
        }
        let bitmap = &header[4..];
        let children: u32 = bitmap.iter().map(|byte| byte.count_ones()).sum();
        if children == 0 || ids.len() != children as usize * ID {
            return Err(Fault::damaged("its length does not fit the number of its children"));
        }
        let mut node = Node::empty(level);
        let present = (0..FAN_OUT).filter(|slot| bitmap[slot / 8] & 1 << (slot % 8) != 0);
        for (slot, id) in present.zip(ids.as_chunks::<ID>().0) {
            node.children[slot] = ChunkId(*id);
            if node.children[slot].is_zero() {
                return Err(Fault::damaged("it has a child of zeroes"));
            }
        }
        Ok(node)
    }
}
