use crate::Error;
use serde::{Deserialize, Serialize};

/// A job's number, given by one daemon and forgotten when it restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JobId(pub u64);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum JobState {
    Running,
    Done {
        #[serde(default)]
        result: serde_json::Value,
    },
    Failed {
        error: Error,
    },
}

/// How far a job is. `total` of 0 means not known yet.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    pub phase: String,
    pub done_bytes: u64,
    pub total_bytes: u64,
    /// Of what was done, what a repository did not have yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_bytes: Option<u64>,
}

/// Work that outlasts one request. `GET /v1/jobs/{id}` tells how far it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub id: JobId,
    pub what: String,
    pub progress: Progress,
    #[serde(flatten)]
    pub state: JobState,
}
