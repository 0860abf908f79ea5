//! What two members say to each other. A message belongs to the session it was sent in.

use rempart_types::{Epoch, NodeSet, RegisterId, Term};
use serde::{Deserialize, Serialize};

/// Sent between the members of one group.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Message {
    /// First in each session, both ways.
    Hello {
        /// Where the sender's group lives, or is being forced to live.
        register: Option<RegisterId>,
        /// The sender refuses every epoch below this one.
        promise: Epoch,
    },
    /// The primary of `term` is alive and can be heard.
    Beacon {
        register: RegisterId,
        term: Term,
        /// When it was sent, in nanoseconds on the sender's clock. Means nothing to anyone else: it comes back in
        /// the acknowledgement, and the lease counts from it.
        sent_ns: u64,
        in_sync: NodeSet,
    },
    /// Answers a beacon: its sender may let its machine run for a lease from `sent_ns`.
    BeaconAck { term: Term, sent_ns: u64 },
    /// Answers a beacon of a term below the promise. The primary needs a newer epoch, or was replaced.
    Nack { term: Term, promise: Epoch },
    /// The sender's disk failed, or it stops: it asks to leave the in-sync set at once.
    Leaving,
    /// The primacy was given to the receiver at `epoch`: it reads the register.
    YourTurn { epoch: Epoch },
    /// The sender led `term` and never will again in this life; its machine is stopped. Any member of the in-sync
    /// set may take over at once. (Its disk failed: it could not even record an attempt to give the primacy away.)
    StepAside { term: Term },
}
