//! What a checker says when a promise broke.

use std::fmt;

/// Which promise broke: the invariants of the design by number, and the promises made to users in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Promise {
    /// I1: a write covered by an acknowledged flush is in the log or image of every in-sync member.
    FlushedIsKept,
    /// I2: only an in-sync member leads, one primary a term, and no promise is undone.
    OnePrimary,
    /// I2 bis: at no moment do two of the machine's processes run where users could see both.
    OneVm,
    /// I3: every image with its redo is a prefix of the one history.
    PrefixOfHistory,
    /// I4: what is reported as changed covers what really changed.
    ChangesReported,
    /// I5: after quiescing, the in-sync images are equal byte for byte.
    ImagesEqual,
    /// I6: reads return what the machine's own history allows; nothing it saw is undone.
    ReadsConsistent,
    /// I7: with both nodes up and the register reachable, someone leads.
    SomeoneLeads,
    /// Once every fault is healed the pair mirrors again, in bounded time.
    Converges,
    /// No request of the guest waits longer than the failure table says.
    BoundedStall,
    /// A corrupted replica is refused, never served; and no other is.
    DamageRefused,
    /// The core asserted: its own state contradicts itself.
    CoreAssertion,
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Promise::FlushedIsKept => "I1 flushed data is kept",
            Promise::OnePrimary => "I2 one primary",
            Promise::OneVm => "I2 bis one running VM",
            Promise::PrefixOfHistory => "I3 prefix of one history",
            Promise::ChangesReported => "I4 changes are reported",
            Promise::ImagesEqual => "I5 images equal",
            Promise::ReadsConsistent => "I6 reads consistent",
            Promise::SomeoneLeads => "I7 someone leads",
            Promise::Converges => "converges after healing",
            Promise::BoundedStall => "bounded stall",
            Promise::DamageRefused => "damage is refused",
            Promise::CoreAssertion => "assertion in a core",
        })
    }
}

/// A broken promise, with what a person needs to see how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub promise: Promise,
    pub detail: String,
}

impl Violation {
    pub fn new(promise: Promise, detail: impl Into<String>) -> Violation {
        Violation { promise, detail: detail.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.promise, self.detail)
    }
}

impl std::error::Error for Violation {}
