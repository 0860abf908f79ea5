//! Facts on their way from one core to another.

use crate::Bytes;
use crate::compare::CompareMessage;
use rempart_store::{Batch, StoreEvent};
use rempart_types::{NodeId, SessionId};

/// A fact for one core. They are handed over in the order in which they came up, one at a time.
#[derive(Debug)]
pub(crate) enum Work {
    Store(StoreEvent),
    Cluster(rempart_cluster::Event),
    Replication(rempart_replication::Event, Beside),
    Compare {
        peer: NodeId,
        session: SessionId,
        message: CompareMessage,
    },
    /// Close the open batch.
    Seal,
}

/// Guest bytes beside an event of replication: what its actions refer to.
#[derive(Debug)]
pub(crate) enum Beside {
    Nothing,
    /// What came with a peer's message.
    Payload(Bytes),
    Batches(Vec<Batch>),
    /// Extents to be sent, in order.
    Extents(Vec<Bytes>),
}

impl Beside {
    /// The bytes of part `index`, as a message carries them.
    pub fn part(&self, index: usize) -> Vec<Bytes> {
        match self {
            Beside::Nothing => panic!("an action refers to bytes, but none came with the event"),
            Beside::Payload(bytes) => vec![bytes.clone()],
            Beside::Batches(batches) => vec![batches[index].as_slice().into_bytes()],
            Beside::Extents(extents) => extents.clone(),
        }
    }
}
