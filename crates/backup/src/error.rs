//! What ends a backup or a restore.

use crate::SourceError;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum BackupError {
    #[error("the disk cannot be read")]
    Source(#[from] SourceError),
    #[error("the repository cannot be used")]
    Repository(#[from] rempart_repository::Error),
    #[error("cannot write `{disk}` at byte {offset}")]
    Target { disk: String, offset: u64, source: std::io::Error },
    #[error("cannot {action} qemu-img: {why}")]
    Image { action: &'static str, why: String },
    #[error("cannot {action} `{path}`")]
    File { action: &'static str, path: std::path::PathBuf, source: std::io::Error },
    #[error("the guest's file system cannot be read")]
    Guest(#[source] crate::GuestError),
    #[error(transparent)]
    Freeze(#[from] crate::FreezeError),
    #[error("it was stopped")]
    Stopped,
}

impl BackupError {
    /// Whether the same backup, begun again, may well work: what it built on was removed from the repository meanwhile.
    pub fn is_stale(&self) -> bool {
        use rempart_repository::ErrorKind;
        matches!(self, BackupError::Repository(error) if error.kind == ErrorKind::Stale)
    }
}
