//! Reading the log: where it begins, where its head is.

use super::body::Body;
use super::codec::{Reader, Writer};
use super::entry::{self, MAX_CHECKPOINT, Meaning, Parsed};
use super::error::LogError;
use super::refusal::Remark;
use super::sign::{Sign, Verify};
use super::state::{Followed, Root, State};
use crate::bug::{Bug, planted};
use crate::copies::{self, copy_of};
use crate::{CHECKPOINTS, EntryHash, RepositoryId, SIGNATURE, Verifier};
use rempart_objects::{Created, ErrorKind, Name, Objects, pages};
use std::sync::Arc;

/// What counts for nothing is remembered, up to so many slots.
const REMARKS: usize = 10_000;
/// A checkpoint is not there any more because a newer one is: as often as that in a row, while one looks.
const CHASES: u32 = 100;
/// Bytes of a pointer to a checkpoint.
const POINTER: usize = 8 + 16 + 8 + 8 + 32;
/// Of one with its signature.
const POINTER_OBJECT: u64 = (POINTER + SIGNATURE) as u64;
const POINTER_MAGIC: [u8; 8] = *b"RMPTCPT1";
/// Who finds no answer asks again so often.
pub(super) const TRIES: u32 = 8;

/// A repository's log, read up to some entry.
#[derive(Debug)]
pub struct Log {
    pub(super) objects: Arc<dyn Objects>,
    pub(super) verify: Arc<dyn Verify>,
    pub(super) state: State,
    remarks: Vec<(u64, Remark)>,
}

/// Where a checkpoint stands. Signed, in an object of its own that is never removed, and there before any entry is removed:
/// who finds a slot empty can tell the log's head from a slot that was freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pointer {
    ordinal: u64,
    pub(super) number: u64,
    hash: EntryHash,
}

impl Log {
    /// Reads the log up to its head. `maintenance` is the key that the repository's description names.
    pub fn open(
        objects: Arc<dyn Objects>,
        verify: Arc<dyn Verify>,
        repository: RepositoryId,
        maintenance: Verifier,
    ) -> Result<Log, LogError> {
        let state = match newest_listed(&*objects, &*verify, repository, maintenance)? {
            Some(state) => state,
            None => first(&*objects, &*verify, repository, maintenance)?,
        };
        let mut log = Log { objects, verify, state, remarks: Vec::new() };
        log.refresh()?;
        Ok(log)
    }

    pub fn objects(&self) -> &Arc<dyn Objects> {
        &self.objects
    }

    /// What the entries say that were read.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Slots that were read since this was opened and count for nothing, and why.
    pub fn remarks(&self) -> &[(u64, Remark)] {
        &self.remarks
    }

    /// Reads on to the head.
    pub fn refresh(&mut self) -> Result<(), LogError> {
        loop {
            while let Some(bytes) = slot(&*self.objects, self.state.next)? {
                self.follow(&bytes)?;
            }
            // An empty slot is the head, unless it was freed: then there is a checkpoint that was not read. Asked in
            // this order, for the pointer to it is there before the slot is freed.
            if planted(Bug::EmptySlotIsHead) || !self.jump()? {
                return Ok(());
            }
        }
    }

    pub(super) fn follow(&mut self, bytes: &[u8]) -> Result<(), LogError> {
        let number = self.state.next;
        match self.state.follow(bytes, &*self.verify) {
            Followed::Applied => {}
            Followed::Ignored(remark) => {
                if self.remarks.len() < REMARKS {
                    self.remarks.push((number, remark));
                }
            }
            Followed::Newer => {
                let name = entry::name(number).to_string();
                return Err(LogError::Newer { url: self.objects.url(), name });
            }
        }
        Ok(())
    }

    /// Takes the newest checkpoint that was not read entry by entry, if there is one.
    pub(super) fn jump(&mut self) -> Result<bool, LogError> {
        let (repository, maintenance) = (self.state.repository, self.state.maintenance);
        let mut ordinal = self.state.checkpoints;
        let mut newest = None;
        for _ in 0..CHASES {
            while let Some(pointer) = self.pointer(ordinal)? {
                newest = Some(pointer);
                ordinal += 1;
            }
            let Some(pointer) = newest else { return Ok(false) };
            if let Some(state) = load(&*self.objects, &*self.verify, repository, maintenance, pointer)? {
                self.state = state;
                return Ok(true);
            }
            // It was removed, for a newer one was made meanwhile.
            if self.pointer(ordinal)?.is_none() {
                return Err(damaged(&*self.objects, &entry::name(pointer.number), "it is missing"));
            }
        }
        Err(LogError::Contended(CHASES))
    }

    pub(super) fn pointer(&self, ordinal: u64) -> Result<Option<Pointer>, LogError> {
        read_pointer(&*self.objects, &*self.verify, self.state.repository, self.state.maintenance, ordinal)
    }

    /// What a backup carries sealed.
    pub fn payload(&self, root: u64) -> Result<Vec<u8>, LogError> {
        payload(&*self.objects, &self.state, root)
    }

    /// Makes sure that whoever reads can find the newest checkpoint, twice. Only then entries before it may be removed.
    pub(super) fn publish(&self, signer: &dyn Sign) -> Result<(), LogError> {
        assert_eq!(
            signer.verifier(),
            self.state.maintenance,
            "checkpoints are signed with the maintenance key"
        );
        if let Some((number, hash)) = self.state.floor {
            let pointer = Pointer { ordinal: self.state.checkpoints - 1, number, hash };
            let (name, bytes) =
                (pointer_name(pointer.ordinal), pointer.encode(self.state.repository, signer));
            self.put_pointer(pointer, &name, &bytes)?;
            copies::put_right(&*self.objects, &copy_of(&name), &bytes)?;
        }
        self.keep_copy()
    }

    fn put_pointer(&self, pointer: Pointer, name: &Name, bytes: &[u8]) -> Result<(), LogError> {
        let mut last = None;
        for _ in 0..TRIES {
            match self.objects.create(name, &[bytes], None) {
                Ok(Created::New) => return Ok(()),
                Ok(Created::Taken) => match self.pointer(pointer.ordinal)? {
                    // Also where its copy says so: who removed a damaged one would let others see none.
                    Some(there) if there == pointer => return Ok(()),
                    Some(_) => return Err(damaged(&*self.objects, name, "it points elsewhere")),
                    // No reader believes what is not signed. Whoever put it there is in nobody's way.
                    None => self.objects.remove(name)?,
                },
                Err(error) if error.kind == ErrorKind::Unknown => last = Some(error),
                Err(error) => return Err(error.into()),
            }
        }
        match last {
            Some(source) => Err(LogError::Unsettled { name: name.to_string(), source }),
            None => Err(LogError::Contended(TRIES)),
        }
    }

    /// Has a second copy of the entry that reading begins with be there. It may be long: one that is there is not read.
    pub(super) fn keep_copy(&self) -> Result<(), LogError> {
        let beginning = Beginning::of(&self.state);
        let copy = copy_of(&entry::name(beginning.number));
        match self.objects.len(&copy) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind == ErrorKind::Missing => {}
            Err(error) => return Err(error.into()),
        }
        match slot(&*self.objects, beginning.number)? {
            Some(bytes) if beginning.is(&bytes, &*self.verify) => {
                Ok(copies::put_right(&*self.objects, &copy, &bytes)?)
            }
            // There is a newer one, or one is called for.
            _ => Ok(()),
        }
    }

    /// Whether the entry that reading begins with, or the pointer to it, is damaged, so that its copy has to stand in. Copies that are
    /// damaged are removed: publishing makes them again.
    pub(super) fn begins_damaged(&self) -> Result<bool, LogError> {
        let (copies, originals): (Vec<_>, Vec<_>) =
            damaged_beginning(self)?.into_iter().partition(|name| copies::original_of(name).is_some());
        for copy in &copies {
            copies::remove_unless_kept(&*self.objects, copy)?;
        }
        Ok(!originals.is_empty())
    }
}

/// The entry that reading begins with.
#[derive(Debug, Clone, Copy)]
struct Beginning {
    number: u64,
    /// Of a checkpoint. The first entry is known by its signature.
    hash: Option<EntryHash>,
    repository: RepositoryId,
    maintenance: Verifier,
}

impl Beginning {
    fn of(state: &State) -> Beginning {
        let (number, hash) = state.floor.map_or((0, None), |(number, hash)| (number, Some(hash)));
        Beginning { number, hash, repository: state.repository, maintenance: state.maintenance }
    }

    fn is(&self, bytes: &[u8], verify: &dyn Verify) -> bool {
        match self.hash {
            Some(hash) => entry::hash(bytes) == hash,
            None => State::begin(bytes, self.repository, verify)
                .is_ok_and(|state| state.maintenance == self.maintenance),
        }
    }
}

/// What a backup of `state` carries sealed.
pub fn payload(objects: &dyn Objects, state: &State, root: u64) -> Result<Vec<u8>, LogError> {
    payload_in(objects, state.roots.get(&root).ok_or(super::Refusal::NoSuchRoot(root))?)
}

/// What a backup carries sealed, which may be forgotten.
pub(super) fn payload_in(objects: &dyn Objects, root: &Root) -> Result<Vec<u8>, LogError> {
    let name = entry::name(root.entry);
    let bytes = slot(objects, root.entry)?.ok_or_else(|| damaged(objects, &name, "it is missing"))?;
    if entry::hash(&bytes) != root.hash {
        return Err(damaged(objects, &name, "its hash is wrong"));
    }
    match Parsed::new(&bytes).map(|parsed| parsed.meaning()) {
        Ok(Meaning::Body(Body::Commit(commit))) => Ok(commit.payload),
        Ok(Meaning::Body(Body::Undelete(undelete))) => Ok(undelete.payload),
        _ => Err(damaged(objects, &name, "it is no backup")),
    }
}

impl Pointer {
    fn encode(&self, repository: RepositoryId, signer: &dyn Sign) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.raw(&POINTER_MAGIC);
        writer.raw(&repository.0);
        writer.u64(self.ordinal);
        writer.u64(self.number);
        writer.raw(&self.hash.0);
        let signature = signer.sign(&writer.0);
        writer.raw(&signature);
        writer.0
    }

    /// `None` unless the maintenance key signed it for this place.
    fn decode(
        bytes: &[u8],
        verify: &dyn Verify,
        repository: RepositoryId,
        maintenance: Verifier,
        ordinal: u64,
    ) -> Option<Pointer> {
        let (signed, signature) = bytes.split_last_chunk()?;
        let mut reader = Reader(signed);
        let magic: [u8; 8] = reader.array()?;
        let of = RepositoryId(reader.array()?);
        let pointer =
            Pointer { ordinal: reader.u64()?, number: reader.u64()?, hash: EntryHash(reader.array()?) };
        reader.at_end()?;
        let is_here = magic == POINTER_MAGIC && of == repository && pointer.ordinal == ordinal;
        (is_here && verify.holds(&maintenance, signed, signature)).then_some(pointer)
    }
}

/// # Panics
/// If a pointer is taken for another than it was written as.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_pointer(repository: RepositoryId, signer: &dyn Sign, bytes: &[u8]) {
    for ordinal in [0, 1, u64::MAX] {
        let read = Pointer::decode(bytes, &super::Ed25519, repository, signer.verifier(), ordinal);
        if let Some(pointer) = read {
            assert_eq!(pointer.encode(repository, signer), bytes, "there is one form of a pointer");
        }
    }
}

fn pointer_name(ordinal: u64) -> Name {
    Name::new(format!("{CHECKPOINTS}{ordinal:016x}")).expect("hexadecimal digits fit a name")
}

pub(super) fn read_pointer(
    objects: &dyn Objects,
    verify: &dyn Verify,
    repository: RepositoryId,
    maintenance: Verifier,
    ordinal: u64,
) -> Result<Option<Pointer>, LogError> {
    let open = |bytes: &[u8]| Pointer::decode(bytes, verify, repository, maintenance, ordinal).ok_or(());
    match copies::read(objects, &pointer_name(ordinal), POINTER_OBJECT, open) {
        Ok(pointer) => Ok(pointer.ok()),
        Err(error) if error.kind == ErrorKind::Missing => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn listed_pointers(objects: &dyn Objects) -> Result<Vec<u64>, LogError> {
    let mut listed = Vec::new();
    for page in pages(objects, CHECKPOINTS) {
        let page = page?;
        let digits = page.iter().filter_map(|object| object.name.as_str().strip_prefix(CHECKPOINTS));
        listed.extend(digits.filter_map(|digits| u64::from_str_radix(digits, 16).ok()));
    }
    Ok(listed)
}

/// Pointers to checkpoints that are there and count for nothing: damaged with their copies, or put there by somebody who has not the
/// maintenance key.
pub(crate) fn strange_pointers(
    objects: &dyn Objects,
    verify: &dyn Verify,
    repository: RepositoryId,
    maintenance: Verifier,
) -> Result<Vec<Name>, LogError> {
    let mut strange = Vec::new();
    for ordinal in listed_pointers(objects)? {
        if read_pointer(objects, verify, repository, maintenance, ordinal)?.is_none() {
            strange.push(pointer_name(ordinal));
        }
    }
    Ok(strange)
}

/// What of that is damaged which reading begins with: the newest checkpoint and its pointer, or the first entry, and their copies.
pub(crate) fn damaged_beginning(log: &Log) -> Result<Vec<Name>, LogError> {
    let (state, verify) = (&log.state, &*log.verify);
    let beginning = Beginning::of(state);
    let mut damaged = Vec::new();
    let mut look = |name: Name, longest, is_whole: &dyn Fn(&[u8]) -> bool| {
        for name in [copy_of(&name), name] {
            match copies::fetch(&*log.objects, &name, longest) {
                Ok(bytes) if is_whole(&bytes) => {}
                Ok(_) => damaged.push(name),
                // A copy or a pointer that was not made yet, or an entry that a newer checkpoint stands for.
                Err(error) if error.kind == ErrorKind::Missing => {}
                Err(error) => return Err(LogError::from(error)),
            }
        }
        Ok(())
    };
    look(entry::name(beginning.number), MAX_CHECKPOINT, &|bytes| beginning.is(bytes, verify))?;
    if state.floor.is_some() {
        let ordinal = state.checkpoints - 1;
        look(pointer_name(ordinal), POINTER_OBJECT, &|bytes| {
            Pointer::decode(bytes, verify, state.repository, state.maintenance, ordinal).is_some()
        })?;
    }
    Ok(damaged)
}

/// The state at the newest checkpoint that a list shows. There may be newer ones: refreshing finds those.
fn newest_listed(
    objects: &dyn Objects,
    verify: &dyn Verify,
    repository: RepositoryId,
    maintenance: Verifier,
) -> Result<Option<State>, LogError> {
    let mut listed = listed_pointers(objects)?;
    if listed.is_empty() {
        // Somebody may have hidden them.
        let hidden = objects.hidden(CHECKPOINTS)?;
        let digits = hidden.iter().filter_map(|name| name.as_str().strip_prefix(CHECKPOINTS));
        listed.extend(digits.filter_map(|digits| u64::from_str_radix(digits, 16).ok()));
    }
    for ordinal in listed.into_iter().rev() {
        if let Some(pointer) = read_pointer(objects, verify, repository, maintenance, ordinal)?
            && let Some(state) = load(objects, verify, repository, maintenance, pointer)?
        {
            return Ok(Some(state));
        }
    }
    Ok(None)
}

/// `None` if the checkpoint is not there any more.
pub(super) fn load(
    objects: &dyn Objects,
    verify: &dyn Verify,
    repository: RepositoryId,
    maintenance: Verifier,
    pointer: Pointer,
) -> Result<Option<State>, LogError> {
    let name = entry::name(pointer.number);
    let open = |bytes: &[u8]| match entry::hash(bytes) == pointer.hash {
        true => State::from_checkpoint(bytes, repository, maintenance, verify),
        false => Err("its hash is wrong"),
    };
    match copies::read(objects, &name, MAX_CHECKPOINT, open) {
        Ok(state) => state.map(Some).map_err(|why| damaged(objects, &name, why)),
        Err(error) if error.kind == ErrorKind::Missing => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn first(
    objects: &dyn Objects,
    verify: &dyn Verify,
    repository: RepositoryId,
    maintenance: Verifier,
) -> Result<State, LogError> {
    let name = entry::name(0);
    let open = |bytes: &[u8]| {
        let state = State::begin(bytes, repository, verify)?;
        match state.maintenance == maintenance {
            true => Ok(state),
            false => Err("it is signed by another key than this repository's"),
        }
    };
    match copies::read(objects, &name, MAX_CHECKPOINT, open) {
        Ok(state) => state.map_err(|why| damaged(objects, &name, why)),
        Err(error) if error.kind == ErrorKind::Missing => {
            Err(LogError::Missing { url: objects.url(), name: name.to_string() })
        }
        Err(error) => Err(error.into()),
    }
}

/// What stands in a slot of the log. Of what is longer than any entry, the beginning: it is no entry, and whoever reads
/// it gets the same hash.
pub(super) fn slot(objects: &dyn Objects, number: u64) -> Result<Option<Vec<u8>>, LogError> {
    match copies::fetch(objects, &entry::name(number), MAX_CHECKPOINT) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind == ErrorKind::Missing => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn damaged(objects: &dyn Objects, name: &Name, why: &'static str) -> LogError {
    LogError::Damaged { url: objects.url(), name: name.to_string(), why }
}
