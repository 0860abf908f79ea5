//! What a replica is opened with.

use rempart_types::{GroupId, NodeId, NodeSet};

/// Who this replica is and how it is tuned.
#[derive(Debug, Clone)]
pub struct Params {
    pub node: NodeId,
    pub group: GroupId,
    /// The other nodes that may hold a replica.
    pub peers: NodeSet,
    pub replication: rempart_replication::Config,
    pub cluster: crate::pending::Config,
    /// For nonces. Different at every start, from a good source.
    pub seed: u64,
}

/// Why a replica cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("recover the group's store")]
    Store(#[from] crate::pending::StoreOpenError),
}
