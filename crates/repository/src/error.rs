//! What can go wrong with what a repository holds.

use rempart_objects::{self as objects, Name};
use std::borrow::Cow;
use thiserror::Error;

/// Something that was read, or was to be written, and what is wrong with it.
#[derive(Debug, Error)]
#[error("`{object}`: {why}")]
pub struct Error {
    pub kind: ErrorKind,
    /// An object's name, or a local file's path.
    pub object: String,
    pub why: Cow<'static, str>,
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The bytes are not what was written.
    Damaged,
    /// Whole, but made with another key or passphrase.
    WrongKey,
    /// Whole, but of another repository.
    Foreign,
    /// Of a newer format than this program knows.
    Newer,
    /// A key file that others may read.
    Exposed,
    /// What the caller gave makes no sense.
    Invalid,
    /// It should be in the repository and is not.
    Missing,
    /// Not written: the log does not allow it.
    Refused,
    /// What was relied upon was removed meanwhile. Beginning again may do.
    Stale,
    /// A local file could not be read or written.
    Local,
    /// The place of the objects failed.
    Objects(objects::ErrorKind),
}

impl Error {
    pub fn new(kind: ErrorKind, object: impl ToString, why: impl Into<Cow<'static, str>>) -> Error {
        Error { kind, object: object.to_string(), why: why.into(), source: None }
    }

    /// Whether what was to be read is not there, or not what was written: trying again will not help.
    pub fn is_loss(&self) -> bool {
        use objects::ErrorKind as Place;
        let place =
            matches!(self.kind, ErrorKind::Objects(Place::Missing | Place::TooShort | Place::TooLong));
        place || matches!(self.kind, ErrorKind::Missing | ErrorKind::Damaged)
    }

    /// Whether what was to be read is lost or makes no sense, by accident or because its writer wants it so. Of what its reader
    /// has the keys for.
    pub(crate) fn is_of_its_writer(&self) -> bool {
        self.is_loss() || matches!(self.kind, ErrorKind::Foreign | ErrorKind::WrongKey | ErrorKind::Newer)
    }

    pub(crate) fn local(path: &std::path::Path, action: &'static str, source: std::io::Error) -> Error {
        let object = path.display().to_string();
        Error { kind: ErrorKind::Local, object, why: action.into(), source: Some(Box::new(source)) }
    }
}

impl From<objects::Error> for Error {
    fn from(source: objects::Error) -> Error {
        let (kind, object) = (ErrorKind::Objects(source.kind), source.name.clone());
        Error { kind, object, why: "cannot be used".into(), source: Some(Box::new(source)) }
    }
}

/// What is wrong with bytes, before it is known where they came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub kind: ErrorKind,
    pub why: &'static str,
}

impl Fault {
    pub const fn damaged(why: &'static str) -> Fault {
        Fault { kind: ErrorKind::Damaged, why }
    }

    pub const fn new(kind: ErrorKind, why: &'static str) -> Fault {
        Fault { kind, why }
    }

    pub fn of(self, object: impl ToString) -> Error {
        Error::new(self.kind, object, self.why)
    }
}

/// Gives faults the name of the object they were found in.
pub(crate) trait FoundIn<T> {
    fn found_in(self, name: &Name) -> Result<T, Error>;
}

impl<T> FoundIn<T> for Result<T, Fault> {
    fn found_in(self, name: &Name) -> Result<T, Error> {
        self.map_err(|fault| fault.of(name))
    }
}
