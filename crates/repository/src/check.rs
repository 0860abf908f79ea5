//! Holding a repository against itself, without a key: hashes, checksums and signatures.
//!
//! What cannot be seen without one: that a chunk's content is not what its id stands for, and that somebody who holds the place
//! put an older state of everything back.

use crate::error::{Error, ErrorKind};
use crate::log::{self, Content, Ed25519, Log, Object, Status};
use crate::repository::{damaged_descriptions, each_key, read_description};
use rempart_objects::{Name, Objects};
use std::sync::Arc;

/// Bytes of an object that are in memory at a time.
const PIECE: u64 = 4 << 20;

/// How many are what was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checked {
    pub packs: u64,
    /// Index segments. What one that is damaged tells of is read from the packs.
    pub segments: u64,
    /// Restore points' entries of the log.
    pub points: u64,
    /// Wrapped copies of the master key.
    pub keys: u64,
    /// Of packs and segments.
    pub bytes: u64,
}

/// Reads all that the repository of a place is made of. `tell` hears of each object that is damaged, missing or cannot be read. Fails if
/// the description or the log's beginning is: nobody can say then what belongs to the repository.
pub fn check(objects: &Arc<dyn Objects>, tell: &mut dyn FnMut(Error)) -> Result<Checked, Error> {
    let description = read_description(&**objects)?;
    for error in damaged_descriptions(&**objects, &description)? {
        tell(error);
    }
    let mut checked = Checked::default();
    each_key(&**objects, |key| {
        match key {
            Ok(_) => checked.keys += 1,
            Err(error) => tell(error),
        }
        Ok(())
    })?;
    let keys = description.keys;
    for name in log::strange_pointers(&**objects, &Ed25519, keys.repository, keys.maintenance)? {
        tell(Error::new(ErrorKind::Damaged, name, "it is no pointer that the repository's key signed"));
    }
    let open = || Log::open(objects.clone(), Arc::new(Ed25519), keys.repository, keys.maintenance);
    let log = open()?;
    for name in log::damaged_beginning(&log)? {
        tell(Error::new(ErrorKind::Damaged, name, "its bytes are not those that were written"));
    }
    for (number, remark) in log.remarks().iter().filter(|(_, remark)| remark.may_have_been_an_entry()) {
        tell(Error::new(ErrorKind::Damaged, log::name(*number), format!("it counts for nothing: {remark}")));
    }
    // Others may forget and collect meanwhile: what fails is asked for in the log as it is then.
    let mut newest: Option<Log> = None;
    let mut is_still = |is: &dyn Fn(&Log) -> bool| -> Result<bool, Error> {
        match &mut newest {
            Some(log) => log.refresh()?,
            None => newest = Some(open()?),
        }
        Ok(newest.as_ref().is_some_and(is))
    };
    let state = log.state();
    for (root, record) in state.roots() {
        match log.payload(*root) {
            Ok(_) => checked.points += 1,
            Err(error) if is_still(&|log| log.state().roots().contains_key(root))? => {
                tell(Error { object: log::name(record.entry).to_string(), ..error.into() });
            }
            Err(_) => {}
        }
    }
    for object in state.objects().filter(|object| object.status == Status::Live) {
        let name = object.content.object(state.owner(&object).id);
        let is_live = |log: &Log| {
            log.state().object(object.number).is_some_and(|now: Object| now.status == Status::Live)
        };
        match verify(&**objects, &name, object.content.hash()) {
            Ok(len) => {
                match object.content {
                    Content::Pack(_) => checked.packs += 1,
                    Content::Index(_) => checked.segments += 1,
                }
                checked.bytes += len;
            }
            Err(error) if is_still(&is_live)? => tell(error),
            Err(_) => {}
        }
    }
    Ok(checked)
}

/// Reads all of a pack or segment and compares it with the hash that is its name. Returns its length.
pub(crate) fn verify(objects: &dyn Objects, name: &Name, hash: &[u8; 32]) -> Result<u64, Error> {
    let whole = objects.len(name)?;
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < whole {
        let end = whole.min(at + PIECE);
        hasher.update(&objects.get_range(name, at..end)?);
        at = end;
    }
    if hasher.finalize().as_bytes() != hash {
        return Err(Error::new(ErrorKind::Damaged, name, "its bytes are not those its name stands for"));
    }
    Ok(whole)
}
