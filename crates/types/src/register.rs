//! What a register holds: the configuration of one group, changed only by compare-and-swap.

use crate::{Epoch, Lineage, NodeId, NodeSet, Nonce, RegisterId};
use serde::{Deserialize, Serialize};

/// Why the value was written, where that changes what its readers may do.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Intent {
    /// `primary` wrote this itself, to lead or to change the in-sync set.
    Lead,
    /// `from`, drained and stable, gave the primacy away; `primary` activates on reading it, once.
    Handover { from: NodeId },
    /// This register is closed; the group's configuration lives on in `successor`.
    Tombstone { successor: RegisterId },
}

/// One version of a group's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RegisterValue {
    pub register: RegisterId,
    /// Raised by every change.
    pub epoch: Epoch,
    pub primary: NodeId,
    /// The replicas that must hold every acknowledged record. Never empty; the primary is a member.
    pub in_sync: NodeSet,
    pub intent: Intent,
    /// Tells the author of this change that it was its own.
    pub nonce: Nonce,
    /// The winner's log when it wrote this.
    pub lineage: Lineage,
}
