//! What can go wrong with an object.

use crate::Name;
use thiserror::Error;

/// A call that failed: what was tried, on what, why.
#[derive(Debug, Error)]
#[error("{action} {}", whereabouts(name, place))]
pub struct Error {
    pub kind: ErrorKind,
    /// A verb phrase: "read", "create".
    pub action: &'static str,
    /// The object, or the prefix; empty if it is about the place as a whole.
    pub name: String,
    /// [`Objects::url`](crate::Objects::url).
    pub place: String,
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// What a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no such object.
    Missing,
    /// It is longer than the caller takes.
    TooLong,
    /// It ends before the range asked for.
    TooShort,
    /// Whether it was done, or will be, is not known. Repeating the same request is safe.
    Unknown,
    /// Not done; the place cannot be reached, is overloaded, or did not answer in time. Worth repeating later.
    Unavailable,
    /// Not allowed: credentials, permissions.
    Denied,
    /// No room.
    Full,
    /// It must be kept for some time yet.
    Retained,
    /// The place has no such ability.
    Unsupported,
    /// An answer that makes no sense, or an I/O error: repeating will not help.
    Failed,
}

impl Error {
    pub fn new(
        kind: ErrorKind,
        action: &'static str,
        name: &Name,
        place: String,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error { kind, action, name: name.to_string(), place, source: source.into() }
    }

    /// About the place as a whole.
    pub fn at_place(
        kind: ErrorKind,
        action: &'static str,
        place: String,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error { kind, action, name: String::new(), place, source: source.into() }
    }

    /// Whether the same request may succeed later without anybody mending anything.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, ErrorKind::Unknown | ErrorKind::Unavailable)
    }
}

fn whereabouts(name: &str, place: &str) -> String {
    if name.is_empty() { place.to_owned() } else { format!("`{name}` in {place}") }
}
