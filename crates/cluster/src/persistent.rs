//! What a replica must remember about its promises, and the rule that nothing leaves before it is durable.

use rempart_types::{Epoch, RegisterId, RegisterValue, Term};
use serde::{Deserialize, Serialize};

/// One attempt to change the register whose outcome is not known yet: it may land at any time.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Attempt {
    /// The epoch the register must be at for it to land; `None`: it must hold nothing.
    pub expected: Option<Epoch>,
    pub value: RegisterValue,
}

/// The cluster's part of the superblock. Stored whole, replaced whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct PersistentState {
    /// The register this group lives in; `None` until it was created or found.
    pub register: Option<RegisterId>,
    /// Nobody below this epoch is followed or acknowledged any more.
    pub promise: Epoch,
    /// The last term this replica opened as primary. It is opened once; a restart needs a newer one.
    pub activated: Term,
    /// The newest value of the register this replica acted on.
    pub known: Option<RegisterValue>,
    /// Own swaps that may still land.
    pub attempts: Vec<Attempt>,
}

impl PersistentState {
    /// Attempts kept at once. A new attempt is only made for a new value; past this the last one is repeated.
    pub const MAX_ATTEMPTS: usize = 8;
}
