//! Why an entry may not be, and what is said about one that counts for nothing.

use super::numbers::Number;
use super::table::Content;
use crate::{KeyId, SessionId};
use std::fmt;
use thiserror::Error;

/// An entry would break a rule, as the log stands now.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error("the log was written by a newer version: update this one")]
    Newer,
    #[error("key {0} may not write here")]
    KeyUnknown(KeyId),
    #[error("key {0} may write here already")]
    KeyKnown(KeyId),
    #[error("session {0} exists already")]
    SessionKnown(SessionId),
    /// Start over: a new session, new names, everything validated.
    #[error("session {0} is over")]
    SessionOver(SessionId),
    #[error("session {0} belongs to another key")]
    NotYours(SessionId),
    #[error("`{0}` takes the maintenance key")]
    Maintenance(&'static str),
    #[error("there is nothing to do")]
    Nothing,
    #[error("{} {} was named before in this session", kind(.0), Hex(.0.hash()))]
    NamedBefore(Content),
    #[error("the log has no room for more objects")]
    TooMany,
    /// A backup was forgotten.
    #[error("there is no backup in entry {0}")]
    NoSuchRoot(u64),
    /// A backup is not to be brought back.
    #[error("the backup in entry {0} is there")]
    RootKnown(u64),
    #[error("the backup in entry {0} is in another domain")]
    OtherDomain(u64),
    /// A pack is not live, or must not be referred to from this domain.
    #[error("object {0} is not, or no longer, what is needed here")]
    NotFit(Number),
    #[error("the backup in entry {0} requires one of the objects")]
    Required(u64),
    /// Somebody reads a backup that is to be forgotten.
    #[error("the backup in entry {0} is in use by session {1}")]
    InUse(u64, SessionId),
    /// It is not to be taken for dead.
    #[error("session {0} wrote something meanwhile")]
    Spoke(SessionId),
    #[error("there is no such report in entry {0}")]
    NoSuchEntry(u64),
    #[error("the state is another")]
    OtherState,
    #[error("a log is created once")]
    Created,
}

fn kind(content: &Content) -> &'static str {
    match content {
        Content::Pack(_) => "pack",
        Content::Index(_) => "index segment",
    }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What stands in a slot and counts for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Remark {
    /// Garbage, or a damaged entry that counted once.
    #[error("not readable: {0}")]
    Unreadable(&'static str),
    /// Key and signature are right, and its writer saw another log.
    #[error("key {0} names another entry before it")]
    OtherPast(KeyId),
    #[error("key {0} signed what makes no sense")]
    Nonsense(KeyId),
    #[error("key {0} wrote what is not allowed: {1}")]
    Refused(KeyId, Refusal),
    #[error("of a kind that only a newer version knows")]
    Newer,
}

impl Remark {
    /// It cannot be told from an entry that was once acknowledged and is damaged now: a backup may be missing from view.
    /// Nothing is removed until somebody looked.
    pub fn may_have_been_an_entry(&self) -> bool {
        matches!(self, Remark::Unreadable(_))
    }
}
