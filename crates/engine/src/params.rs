//! What a replica is opened with.

/// Who this replica is and how it is tuned.
#[derive(Debug, Clone)]
pub struct Params {
    /// This node, its group and peers, the register and the times of the cluster.
    pub cluster: rempart_cluster::Config,
    pub replication: rempart_replication::Config,
}

/// Why a replica cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("recover the group's store")]
    Store(#[from] crate::pending::StoreOpenError),
}
