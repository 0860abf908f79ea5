//! Where a record stands in a group's log, and who was allowed to write it there.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A record's number in its group's log: dense, from 1. `Lsn::ZERO` is "before the first record".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Lsn(pub u64);

impl Lsn {
    pub const ZERO: Lsn = Lsn(0);

    /// The number after this one.
    #[must_use]
    pub fn next(self) -> Lsn {
        self.plus(1)
    }

    /// The number before this one; `ZERO` stays `ZERO`.
    #[must_use]
    pub fn previous(self) -> Lsn {
        Lsn(self.0.saturating_sub(1))
    }

    /// `records` further on.
    #[must_use]
    pub fn plus(self, records: u64) -> Lsn {
        Lsn(self.0.checked_add(records).expect("log numbers do not wrap"))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The register's version: every change of a register raises it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    pub const ZERO: Epoch = Epoch(0);

    #[must_use]
    pub fn next(self) -> Epoch {
        Epoch(self.0.checked_add(1).expect("epochs do not wrap"))
    }

    /// Epochs of one register, and of those it was moved to without force, share it; a forced takeover starts the next.
    pub fn generation(self) -> u64 {
        self.0 >> 32
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The right to append: the epoch the register gave, and how often its holder restarted within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Term {
    pub epoch: Epoch,
    pub incarnation: u32,
}

impl Term {
    pub const ZERO: Term = Term { epoch: Epoch::ZERO, incarnation: 0 };

    pub fn new(epoch: u64, incarnation: u32) -> Term {
        Term { epoch: Epoch(epoch), incarnation }
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.incarnation)
    }
}

/// One record, named so that it cannot be confused with a record of the same number on another branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct LogPosition {
    pub term: Term,
    pub lsn: Lsn,
}
