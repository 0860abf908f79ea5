//! What client and server say to each other: JSON over HTTP/1.1.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/health` | [`Health`] |
//! | `GET /v1/registers/<id>` | [`ReadAnswer`] |
//! | `POST /v1/registers/<id>/swap` [`SwapRequest`] | [`SwapAnswer`] |
//! | `POST /v1/registers/<id>/report` [`ReportRequest`] | [`ReportOutcome`] |
//! | `POST /v1/registers/<id>/excuse` [`ExcuseRequest`] | [`ReportOutcome`] |
//!
//! Every answer names the instance and its change counter in headers. A request may name the instance it is
//! meant for and is refused by any other; it may name the highest change counter its author saw, and an
//! instance that is behind it knows that its state went back, and becomes another instance. A refusal is status 409 with a [`Refusal`]; status 500 means that
//! the outcome is unknown.

use crate::Refusal;
use rempart_types::{Epoch, InstanceId, NodeId, NodeSet, RegisterValue};
use serde::{Deserialize, Serialize};

/// Header: the instance that answers, or that a request is meant for.
pub(crate) const INSTANCE: &str = "rempart-instance";
/// Header: how many changes the instance has made. It never goes back.
pub(crate) const CHANGES: &str = "rempart-changes";
/// Bytes of a request or an answer at most.
pub(crate) const MAX_BODY: usize = 4 * crate::MAX_VALUE_SIZE;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ReadAnswer {
    pub value: Option<RegisterValue>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SwapRequest {
    pub expected: Option<Epoch>,
    pub value: RegisterValue,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub(crate) enum SwapAnswer {
    Won,
    Lost { current: Option<RegisterValue> },
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ReportRequest {
    /// Who reports. A caller with a certificate can only speak for itself.
    pub node: NodeId,
    /// The newest value of the register that this node knows. `None`: it never saw one.
    pub value: Option<RegisterValue>,
    /// All replicas of the group, as this node knows them.
    pub replicas: NodeSet,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExcuseRequest {
    pub node: NodeId,
}

/// Where a register's recovery stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportOutcome {
    /// Whether the register serves now.
    pub serving: bool,
    /// Replicas that have yet to report.
    pub missing: NodeSet,
}

/// A witness's own word on itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    pub instance: InstanceId,
    /// The product's version.
    pub version: String,
    pub registers: u64,
    /// Registers that wait for reports.
    pub recovering: u64,
    /// Changes this instance has made; it never goes back.
    pub changes: u64,
    /// False after its storage failed, and while it shuts down.
    pub serving: bool,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RefusedAnswer {
    pub refused: Refusal,
}
