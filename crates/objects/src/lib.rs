//! Objects under names, each created once and never changed: what a backup repository is made of.
//!
//! All calls block. An object is created if and only if its name is free; that is the one operation that orders
//! writers, and everything else follows from it.

pub mod bucket;
mod directory;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod memory;
mod name;
mod pages;
mod place;
mod probe;
pub mod testing;

pub use bucket::Bucket;
pub use directory::Directory;
pub use error::{Error, ErrorKind};
pub use memory::Memory;
pub use name::{InvalidName, Name};
pub use pages::pages;
pub use place::{create, open};
pub use probe::probe;

use rempart_types::WallTime;
use std::fmt::Debug;
use std::ops::Range;

/// A place that holds objects. Safe to use from several threads, processes and machines at once.
pub trait Objects: Debug + Send + Sync {
    /// Creates the object `name` of `parts`, joined, and makes it durable. [`Created::Taken`] when there is one of that
    /// name, whatever it holds; nothing is changed then.
    ///
    /// An object that was created, whose name was found taken, or that was read by [`get`](Objects::get) survives a crash
    /// of the place, whoever created it. (One of which only the length, a range or the name was seen may not.)
    ///
    /// After [`ErrorKind::Unknown`] it may be there, or come to be there at any later time. An object is never seen
    /// in part.
    fn create(&self, name: &Name, parts: &[&[u8]], retain_until: Option<WallTime>) -> Result<Created, Error>;

    /// The whole object, if it is not longer than `limit` bytes ([`ErrorKind::TooLong`]).
    fn get(&self, name: &Name, limit: u64) -> Result<Vec<u8>, Error>;

    /// Bytes `range` of the object. [`ErrorKind::TooShort`] if it ends before.
    fn get_range(&self, name: &Name, range: Range<u64>) -> Result<Vec<u8>, Error>;

    /// Length in bytes.
    fn len(&self, name: &Name) -> Result<u64, Error>;

    /// Names that start with `prefix` and sort behind `after`, in order, a page at a time: an empty page is the end.
    /// What is created or removed meanwhile may be there or not: absence is never inferred from a list.
    fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error>;

    /// Removes the object; no error if there is none. [`ErrorKind::Retained`] while it must be kept.
    fn remove(&self, name: &Name) -> Result<(), Error>;

    /// Keeps the object at least until `until`; never shortens. [`ErrorKind::Unsupported`] without object lock.
    fn retain(&self, name: &Name, until: WallTime) -> Result<(), Error>;

    /// Names that start with `prefix` and that a marker of deletion hides from lists, though the object is there: in buckets with
    /// versions somebody can put one on what must be kept. All other calls see the object all the same.
    fn hidden(&self, _prefix: &str) -> Result<Vec<Name>, Error> {
        Ok(Vec::new())
    }

    /// Takes such markers away.
    fn reveal(&self, _name: &Name) -> Result<(), Error> {
        Ok(())
    }

    /// What the place is able to do.
    fn abilities(&self) -> Abilities;

    /// Where it is, as a user would name it, without secrets.
    fn url(&self) -> String;
}

/// A place in front of another one, which does itself what it says, and has all else done.
pub trait Front: Debug + Send + Sync {
    fn behind(&self) -> &dyn Objects;

    fn create(&self, name: &Name, parts: &[&[u8]], retain_until: Option<WallTime>) -> Result<Created, Error> {
        self.behind().create(name, parts, retain_until)
    }

    fn get_range(&self, name: &Name, range: Range<u64>) -> Result<Vec<u8>, Error> {
        self.behind().get_range(name, range)
    }

    fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error> {
        self.behind().list(prefix, after)
    }

    fn remove(&self, name: &Name) -> Result<(), Error> {
        self.behind().remove(name)
    }

    fn abilities(&self) -> Abilities {
        self.behind().abilities()
    }
}

impl<T: Front> Objects for T {
    fn create(&self, name: &Name, parts: &[&[u8]], retain_until: Option<WallTime>) -> Result<Created, Error> {
        Front::create(self, name, parts, retain_until)
    }

    fn get(&self, name: &Name, limit: u64) -> Result<Vec<u8>, Error> {
        self.behind().get(name, limit)
    }

    fn get_range(&self, name: &Name, range: Range<u64>) -> Result<Vec<u8>, Error> {
        Front::get_range(self, name, range)
    }

    fn len(&self, name: &Name) -> Result<u64, Error> {
        self.behind().len(name)
    }

    fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error> {
        Front::list(self, prefix, after)
    }

    fn remove(&self, name: &Name) -> Result<(), Error> {
        Front::remove(self, name)
    }

    fn retain(&self, name: &Name, until: WallTime) -> Result<(), Error> {
        self.behind().retain(name, until)
    }

    fn hidden(&self, prefix: &str) -> Result<Vec<Name>, Error> {
        self.behind().hidden(prefix)
    }

    fn reveal(&self, name: &Name) -> Result<(), Error> {
        self.behind().reveal(name)
    }

    fn abilities(&self) -> Abilities {
        Front::abilities(self)
    }

    fn url(&self) -> String {
        self.behind().url()
    }
}

/// How a creation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    New,
    /// The name was taken.
    Taken,
}

/// An entry of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: Name,
    /// Bytes.
    pub len: u64,
}

/// What a place is able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// Objects can be kept against everybody for a time.
    pub retention: bool,
    /// Bytes an object that holds much should have: a file or a request costs something of its own.
    pub pack_len: u64,
    /// Objects that are worth creating at a time: a bucket gives each connection a part of what it can take.
    pub creates: usize,
}
