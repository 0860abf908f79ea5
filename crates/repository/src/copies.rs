//! Second copies of what nobody can read a repository without: the description, and the entry that reading the log begins with,
//! with the pointer to it.
//!
//! A copy has the bytes of its object, and is believed for the same reason. It stands in for an object that is there and
//! damaged, not for one that is missing: what is missing may have been removed, as freed slots of the log are. (The
//! description is never removed: its copy stands in for a missing one, too.)

use crate::COPIES;
use crate::bug::{Bug, planted};
use rempart_objects::{Created, Error, ErrorKind, Name, Objects};

/// Attempts to make one.
const TRIES: u32 = 8;
/// Bytes of an object that are in memory at a time while it is compared.
const PIECE: usize = 4 << 20;

/// Where the copy of an object lies.
pub(crate) fn copy_of(name: &Name) -> Name {
    Name::new(format!("{COPIES}{name}")).expect("names of a repository's beginning are short")
}

/// The object that a copy is of. `None` if the name is no copy's.
pub(crate) fn original_of(copy: &Name) -> Option<Name> {
    Name::new(copy.as_str().strip_prefix(COPIES)?).ok()
}

/// What `open` makes of an object or, where it finds that damaged, of its copy. The inner error is of the object itself.
pub(crate) fn read<T, E>(
    objects: &dyn Objects,
    name: &Name,
    longest: u64,
    mut open: impl FnMut(&[u8]) -> Result<T, E>,
) -> Result<Result<T, E>, Error> {
    let opened = open(&fetch(objects, name, longest)?);
    let Err(why) = opened else { return Ok(opened) };
    if planted(Bug::CopyNotRead) {
        return Ok(Err(why));
    }
    match fetch(objects, &copy_of(name), longest) {
        Ok(bytes) => Ok(open(&bytes).map_err(|_| why)),
        Err(error) if error.kind == ErrorKind::Missing => Ok(Err(why)),
        Err(error) => Err(error),
    }
}

/// All of an object; of one that is longer than `longest`, the beginning, so that whoever reads it finds it damaged.
pub(crate) fn fetch(objects: &dyn Objects, name: &Name, longest: u64) -> Result<Vec<u8>, Error> {
    match objects.get(name, longest) {
        Err(error) if error.kind == ErrorKind::TooLong => objects.get_range(name, 0..longest + 1),
        fetched => fetched,
    }
}

/// Whether it was removed: what is under object lock stays until that is over.
pub(crate) fn remove_unless_kept(objects: &dyn Objects, name: &Name) -> Result<bool, Error> {
    match objects.remove(name) {
        Ok(()) => Ok(true),
        Err(error) if error.kind == ErrorKind::Retained => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether an object has that content.
fn is_there(objects: &dyn Objects, name: &Name, bytes: &[u8]) -> Result<bool, Error> {
    if objects.len(name)? != bytes.len() as u64 {
        return Ok(false);
    }
    let mut at = 0;
    for piece in bytes.chunks(PIECE) {
        let end = at + piece.len() as u64;
        if objects.get_range(name, at..end)? != piece {
            return Ok(false);
        }
        at = end;
    }
    Ok(true)
}

/// Has an object be whole, of which `bytes` is known to be the content. One that nobody misses while it is removed and made anew: a
/// copy, or what its copy stands in for. What is damaged and kept by the place stays as it is.
pub(crate) fn put_right(objects: &dyn Objects, name: &Name, bytes: &[u8]) -> Result<(), Error> {
    let mut last = None;
    for _ in 0..TRIES {
        match objects.create(name, &[bytes], None) {
            Ok(Created::New) => return Ok(()),
            Ok(Created::Taken) => {}
            Err(error) if error.kind == ErrorKind::Unknown => {
                last = Some(error);
                continue;
            }
            Err(error) => return Err(error),
        }
        match is_there(objects, name, bytes) {
            Ok(true) => return Ok(()),
            Ok(false) if remove_unless_kept(objects, name)? => {}
            Ok(false) => return Ok(()),
            // Somebody else is at it.
            Err(error) if error.kind == ErrorKind::Missing => {}
            Err(error) => return Err(error),
        }
    }
    last.map_or(Ok(()), Err)
}
