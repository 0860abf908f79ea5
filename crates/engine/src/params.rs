//! What a replica is opened with.

/// Who this replica is and how it is tuned.
#[derive(Debug, Clone)]
pub struct Params {
    /// This node, its group and peers, the register and the times of the cluster.
    pub cluster: rempart_cluster::Config,
    pub replication: rempart_replication::Config,
    pub store: rempart_store::OpenOptions,
}

/// Why a replica cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("recover the group's store")]
    Store(#[source] rempart_store::OpenError),
    /// The control state in the superblock is of another version or another program.
    #[error("the superblock's control state is unknown")]
    Control,
}
