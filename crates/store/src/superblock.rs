//! The superblock: what must be known before the journal is read.

use rempart_types::{RegisterId, Term};

/// What to change; `None` leaves a field as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SuperblockChange {
    /// The highest term this replica promised. Never falls.
    pub promise: Option<Term>,
    pub register: Option<RegisterId>,
    /// The cluster core's own state (open attempts, incarnations), opaque here; at most 16 KiB.
    pub control: Option<Vec<u8>>,
    /// True: images found changed behind our back were compared, and are trusted again.
    pub images_trusted: bool,
}
