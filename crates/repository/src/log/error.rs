//! What can go wrong with a log.

use super::refusal::Refusal;
use crate::{RepositoryId, SessionId};
use thiserror::Error;

/// A log could not be read or written.
#[derive(Debug, Error)]
pub enum LogError {
    #[error("the place of the repository failed")]
    Objects(#[from] rempart_objects::Error),
    #[error("there is no repository in {url}: `{name}` is missing")]
    Missing { url: String, name: String },
    #[error("`{name}` in {url} is damaged, or of something else: {why}")]
    Damaged { url: String, name: String, why: &'static str },
    #[error("`{name}` in {url} was written by a newer version, and must not be passed over: update this one")]
    Newer { url: String, name: String },
    #[error("{url} holds repository {found}, not {expected}")]
    Foreign { url: String, expected: RepositoryId, found: RepositoryId },
    /// Not written.
    #[error("it was not written to the log")]
    Refused(#[from] Refusal),
    /// It may have been written before, and been given up since.
    #[error("session {0} is over: it was fenced")]
    SessionOver(SessionId),
    /// Not written. Others were faster each time.
    #[error("others wrote to the log {0} times in between: try again")]
    Contended(u32),
    /// It may be written, or may come to be written as long as nobody else writes anything.
    #[error("whether `{name}` was written is not known")]
    Unsettled { name: String, source: rempart_objects::Error },
}

impl LogError {
    /// Whether it may well work later without anybody mending anything.
    pub fn is_transient(&self) -> bool {
        match self {
            LogError::Objects(error) => error.is_transient(),
            LogError::Contended(_) | LogError::Unsettled { .. } => true,
            _ => false,
        }
    }
}
