//! The crate's one error.

use rempart_types::{InstanceId, NodeId, NodeSet};
use serde::{Deserialize, Serialize};
use std::error::Error as StdError;
use std::fmt;

/// Why a register declined, for good: repeating the request changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Refusal {
    /// The value breaks a rule; the text says which.
    Invalid(String),
    /// The caller is not in the register's in-sync set, so it may not change it.
    NotAMember(Option<NodeId>),
    /// The caller is no node of this cluster, or the register's server belongs to another cluster.
    WrongCluster,
    /// Our certificate was refused, or theirs was; the text says why.
    Certificate(String),
    /// The witness's state is another than the one this client knows: it was replaced, copied or restored.
    /// Every replica must report to it first.
    OtherInstance(InstanceId),
    /// The register's state is not trusted until these replicas have reported.
    Recovering { missing: NodeSet },
    /// A bound was reached: size of a value, number of registers.
    TooLarge(String),
    /// The server does not understand the request.
    BadRequest(String),
    /// The server's storage failed or is shutting down; it has not applied the request.
    NotServing(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Invalid(why) => write!(f, "the value is invalid: {why}"),
            Refusal::NotAMember(Some(node)) => write!(f, "node {node} is not in the in-sync set"),
            Refusal::NotAMember(None) => f.write_str("the caller is not a node"),
            Refusal::WrongCluster => f.write_str("the witness belongs to another cluster"),
            Refusal::Certificate(why) => write!(f, "a certificate was refused: {why}"),
            Refusal::OtherInstance(instance) => {
                write!(f, "the witness has other state than before (instance {instance})")
            }
            Refusal::Recovering { missing } => {
                f.write_str("the witness waits for reports from ")?;
                for (index, node) in missing.iter().enumerate() {
                    write!(f, "{}{node}", if index == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
            Refusal::TooLarge(why) => write!(f, "too large: {why}"),
            Refusal::BadRequest(why) => write!(f, "the request makes no sense: {why}"),
            Refusal::NotServing(why) => write!(f, "not serving: {why}"),
        }
    }
}

/// What a caller may conclude.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request never left, or never arrived: certainly not applied.
    Unreachable,
    /// The request may have been applied, or may be applied later.
    Unknown,
    /// The register declined: certainly not applied.
    Refused(Refusal),
}

/// Why there is no answer, or a negative one.
#[derive(Debug)]
pub struct RegisterError {
    kind: ErrorKind,
    doing: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl RegisterError {
    pub fn new(kind: ErrorKind, doing: impl Into<String>) -> RegisterError {
        RegisterError { kind, doing: doing.into(), source: None }
    }

    pub fn refused(refusal: Refusal, doing: impl Into<String>) -> RegisterError {
        RegisterError::new(ErrorKind::Refused(refusal), doing)
    }

    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> RegisterError {
        self.source = Some(source.into());
        self
    }

    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    pub fn refusal(&self) -> Option<&Refusal> {
        match &self.kind {
            ErrorKind::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// False means that the swap may have been applied, or still may be: settle it before acting on it.
    pub fn certainly_not_applied(&self) -> bool {
        self.kind != ErrorKind::Unknown
    }
}

impl fmt::Display for RegisterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: ", self.doing)?;
        match &self.kind {
            ErrorKind::Unreachable => f.write_str("it is out of reach"),
            ErrorKind::Unknown => f.write_str("no answer came, so the outcome is unknown"),
            ErrorKind::Refused(refusal) => refusal.fmt(f),
        }
    }
}

impl StdError for RegisterError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}
