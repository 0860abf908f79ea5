//! What can go wrong between the daemon, a guard and QEMU.

use crate::definition::InvalidDefinition;
use std::fmt;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of a failure, for code that decides what to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The definition cannot describe a machine.
    InvalidDefinition,
    /// A program, device, bridge or firmware that is needed is not on this host.
    MissingOnHost,
    /// Another guard already runs this machine.
    AlreadyRunning,
    /// The machine, or its guard, is gone.
    NotRunning,
    /// QEMU did not come up; the detail holds the last it said.
    FailedToStart,
    /// No answer in time. What was asked may still happen.
    Deadline,
    /// QEMU or the guard answered with an error.
    Refused,
    /// The other side broke the protocol, or speaks another version of it.
    Protocol,
    /// The operating system refused.
    Io,
}

/// A failure: what was attempted, on which machine, and why it did not work.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    action: String,
    detail: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// `action` is a verb phrase that completes "cannot …"; `detail` says why not.
    pub fn new(kind: ErrorKind, action: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { kind, action: action.into(), detail: detail.into(), source: None }
    }

    pub(crate) fn io(action: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        let source = source.into();
        Self {
            kind: ErrorKind::Io,
            action: action.into(),
            detail: source.to_string(),
            source: Some(Box::new(source)),
        }
    }

    pub(crate) fn deadline(action: impl Into<String>, waited: std::time::Duration) -> Self {
        Self::new(ErrorKind::Deadline, action, format!("no answer within {} ms", waited.as_millis()))
    }

    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Why it did not work, without what was attempted.
    pub fn detail(&self) -> &str {
        &self.detail
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.action, self.detail)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<InvalidDefinition> for Error {
    fn from(invalid: InvalidDefinition) -> Self {
        Self {
            kind: ErrorKind::InvalidDefinition,
            action: "use this definition".into(),
            detail: invalid.to_string(),
            source: Some(Box::new(invalid)),
        }
    }
}
