//! Segments: what a writer tells others of the packs it stored.
//!
//! A plain header, then the ids of the packs and the sorted entries, as one stream in sealed blocks. Their key comes from
//! the domain's and from the header, which says how many there are: nothing can be left out, added or moved.

use super::entry::{ENTRY, IndexEntry};
use crate::error::{Error, ErrorKind, Fault, FoundIn};
use crate::key::{Cipher, CipherKey, Domain, Ordinal, Secret, TAG, WriterKey, random};
use crate::names::SegmentName;
use crate::pack::{Blob, MAX_BLOBS};
use crate::wire::{Reader, Writer};
use crate::{DomainId, PackId, RepositoryId, SegmentId, SessionId};
use rempart_objects::Objects;
use std::fmt;

const MAGIC: &[u8; 8] = b"RMPINDEX";
const VERSION: u16 = 1;
const HEADER: usize = 8 + 2 + 1 + 5 + 16 + 16 + 32 + 4 + 4;
const PACK: usize = 32;
/// Bytes that are sealed together.
const BLOCK: usize = 64 << 10;
/// Entries of a segment, at most: 8 MiB, or 32 GiB of a disk in chunks of 128 KiB.
pub const MAX_SEGMENT_ENTRIES: usize = 1 << 18;
/// Packs of a segment, at most.
const MAX_PACKS: usize = 1 << 16;
/// Bytes of a segment, at most.
const MAX_SEGMENT: u64 = sealed_len(MAX_PACKS, MAX_SEGMENT_ENTRIES) as u64;

const _: () = assert!(MAX_BLOBS <= MAX_SEGMENT_ENTRIES);

const fn sealed_len(packs: usize, entries: usize) -> usize {
    let plain = packs * PACK + entries * ENTRY;
    HEADER + plain + plain.div_ceil(BLOCK) * TAG
}

/// A segment that is being collected. Any pack of the writer fits in an empty one.
#[derive(Debug, Default)]
pub struct SegmentBuilder {
    packs: Vec<PackId>,
    entries: Vec<IndexEntry>,
}

impl SegmentBuilder {
    pub fn new() -> SegmentBuilder {
        SegmentBuilder::default()
    }

    /// Whether a pack of so many blobs can be added.
    pub fn has_room(&self, blobs: usize) -> bool {
        self.packs.len() < MAX_PACKS && self.entries.len() + blobs <= MAX_SEGMENT_ENTRIES
    }

    /// # Panics
    /// If there is no [room](Self::has_room).
    pub fn add(&mut self, pack: PackId, blobs: &[Blob]) {
        assert!(self.has_room(blobs.len()), "the caller asked for room");
        let number = self.packs.len() as u32;
        self.packs.push(pack);
        self.entries.extend(blobs.iter().map(|blob| IndexEntry::new(number, blob)));
    }

    /// Adds what another segment tells of the packs that `keep` keeps, if there is room for all of it; else it is left as
    /// it was.
    pub(crate) fn add_segment(&mut self, segment: &Segment, keep: impl Fn(&PackId) -> bool) -> bool {
        if self.packs.len() + segment.packs.len() > MAX_PACKS
            || self.entries.len() + segment.entries.len() > MAX_SEGMENT_ENTRIES
        {
            return false;
        }
        let mut numbers = vec![None; segment.packs.len()];
        for (pack, number) in segment.packs.iter().zip(&mut numbers).filter(|(pack, _)| keep(pack)) {
            *number = Some(self.packs.len() as u32);
            self.packs.push(*pack);
        }
        let kept =
            segment.entries.iter().filter_map(|entry| Some(entry.with_pack(numbers[entry.pack() as usize]?)));
        self.entries.extend(kept);
        true
    }

    /// The packs so far, in the order they were added.
    pub fn packs(&self) -> &[PackId] {
        &self.packs
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// # Panics
    /// If nothing was added.
    pub fn seal(self, writer: &WriterKey) -> SealedSegment {
        self.seal_with(writer.public().repository, writer.domain(), Cipher::preferred(), random())
    }

    pub(crate) fn seal_with(
        mut self,
        repository: RepositoryId,
        domain: &Domain,
        cipher: Cipher,
        salt: [u8; 32],
    ) -> SealedSegment {
        assert!(!self.is_empty(), "a segment holds something");
        self.entries.sort_unstable();
        let header = SegmentHeader {
            cipher,
            repository,
            domain: domain.id(),
            salt,
            packs: self.packs.len(),
            entries: self.entries.len(),
        };
        let mut plain = Vec::with_capacity(self.packs.len() * PACK + self.entries.len() * ENTRY);
        self.packs.iter().for_each(|pack| plain.extend_from_slice(&pack.0));
        self.entries.iter().for_each(|entry| plain.extend_from_slice(entry.bytes()));
        let bytes = header.seal(domain, &plain);
        SealedSegment { id: SegmentId(*blake3::hash(&bytes).as_bytes()), packs: self.packs, bytes }
    }
}

/// A segment as it is stored.
pub struct SealedSegment {
    id: SegmentId,
    packs: Vec<PackId>,
    bytes: Vec<u8>,
}

impl SealedSegment {
    /// Where it lies when `session` wrote it.
    pub fn name(&self, session: SessionId) -> SegmentName {
        SegmentName { session, segment: self.id }
    }

    /// The packs it is about: those its log entry makes live.
    pub fn packs(&self) -> &[PackId] {
        &self.packs
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for SealedSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (id, packs) = (self.id, self.packs.len());
        f.debug_struct("SealedSegment").field("id", &id).field("packs", &packs).finish()
    }
}

#[derive(Debug)]
pub(crate) struct SegmentHeader {
    pub cipher: Cipher,
    pub repository: RepositoryId,
    pub domain: DomainId,
    pub salt: [u8; 32],
    pub packs: usize,
    pub entries: usize,
}

impl SegmentHeader {
    fn encode(&self) -> [u8; HEADER] {
        let mut out = Writer::with_capacity(HEADER);
        out.bytes(MAGIC);
        out.u16(VERSION);
        out.bytes(&[self.cipher.code()]);
        out.zeroes(5);
        out.bytes(&self.repository.0);
        out.bytes(&self.domain.0);
        out.bytes(&self.salt);
        out.u32(self.packs as u32);
        out.u32(self.entries as u32);
        out.into_bytes().try_into().expect("the fields fill it")
    }

    /// From at least the header of a segment of `whole` bytes.
    fn parse(bytes: &[u8], whole: usize) -> Result<SegmentHeader, Fault> {
        let mut input = Reader::new(bytes);
        input.magic(MAGIC)?;
        input.version(VERSION)?;
        let [cipher] = input.array()?;
        let cipher = Cipher::from_code(cipher).ok_or(Fault::damaged("its cipher is unknown"))?;
        input.zeroes::<5>()?;
        let (repository, domain) = (RepositoryId(input.array()?), DomainId(input.array()?));
        let salt = input.array()?;
        let (packs, entries) = (input.u32()? as usize, input.u32()? as usize);
        if !(1..=MAX_PACKS).contains(&packs) || !(1..=MAX_SEGMENT_ENTRIES).contains(&entries) {
            return Err(Fault::damaged("it lists an impossible number of packs or blobs"));
        }
        if whole != sealed_len(packs, entries) {
            return Err(Fault::damaged("its length is not that of what it lists"));
        }
        Ok(SegmentHeader { cipher, repository, domain, salt, packs, entries })
    }

    /// The segment: this header, and what it is the header of.
    pub fn seal(&self, domain: &Domain, plain: &[u8]) -> Vec<u8> {
        let mut bytes = self.encode().to_vec();
        bytes.resize(sealed_len(self.packs, self.entries), 0);
        let key = self.key(domain);
        let sealed = bytes[HEADER..].chunks_mut(BLOCK + TAG);
        for (number, (plain, sealed)) in plain.chunks(BLOCK).zip(sealed).enumerate() {
            key.seal_into(ordinal(number), &[], plain, sealed);
        }
        bytes
    }

    /// What opens it, if it is of this repository and the domain's keys are at hand.
    fn opener(
        &self,
        repository: &RepositoryId,
        domain_of: impl FnOnce(DomainId) -> Option<Domain>,
    ) -> Result<CipherKey, Fault> {
        if self.repository != *repository {
            return Err(Fault::new(ErrorKind::Foreign, "it is a segment of another repository"));
        }
        let domain = domain_of(self.domain).filter(|domain| domain.id() == self.domain);
        let unknown = Fault::new(ErrorKind::WrongKey, "it is of a domain whose key is not here");
        Ok(self.key(&domain.ok_or(unknown)?))
    }

    /// Opens whole blocks, with `len` bytes in them, from the first on.
    fn open(&self, key: &CipherKey, sealed: &[u8], len: usize) -> Result<Vec<u8>, Fault> {
        let mut plain = vec![0; len];
        let sealed = sealed.chunks(BLOCK + TAG);
        for (number, (plain, sealed)) in plain.chunks_mut(BLOCK).zip(sealed).enumerate() {
            key.open_into(ordinal(number), &[], sealed, plain).ok_or(Fault::damaged("it does not open"))?;
        }
        Ok(plain)
    }

    fn key(&self, domain: &Domain) -> CipherKey {
        let secret: Secret = domain.index().derive("rempart 2026 index segment key", &[&self.encode()]);
        CipherKey::new(self.cipher, &secret)
    }
}

fn pack_ids(bytes: &[u8]) -> Vec<PackId> {
    bytes.as_chunks::<PACK>().0.iter().map(|id| PackId(*id)).collect()
}

fn ordinal(block: usize) -> Ordinal {
    Ordinal { number: block as u32, space: 0 }
}

/// A segment that was read: bytes until its domain is known, then what it lists.
#[derive(Debug)]
pub struct Segment {
    packs: Vec<PackId>,
    entries: Vec<IndexEntry>,
}

impl Segment {
    /// Reads the object. `domain_of` gives the keys of a domain, if they are at hand: `|id| Some(opener.domain(id))`, or a
    /// writer's own.
    pub fn fetch(
        objects: &dyn Objects,
        repository: &RepositoryId,
        domain_of: impl FnOnce(DomainId) -> Option<Domain>,
        name: &SegmentName,
    ) -> Result<Segment, Error> {
        let bytes = objects.get(&name.object(), MAX_SEGMENT)?;
        Self::open(repository, domain_of, name, &bytes)
    }

    /// Opens what lies under `name`.
    pub fn open(
        repository: &RepositoryId,
        domain_of: impl FnOnce(DomainId) -> Option<Domain>,
        name: &SegmentName,
        bytes: &[u8],
    ) -> Result<Segment, Error> {
        let object = name.object();
        if blake3::hash(bytes) != name.segment.0 {
            return Err(Error::new(
                ErrorKind::Damaged,
                object,
                "its bytes are not those its name stands for",
            ));
        }
        Self::parse(repository, domain_of, bytes).found_in(&object)
    }

    pub(crate) fn parse(
        repository: &RepositoryId,
        domain_of: impl FnOnce(DomainId) -> Option<Domain>,
        bytes: &[u8],
    ) -> Result<Segment, Fault> {
        let header = SegmentHeader::parse(bytes, bytes.len())?;
        let key = header.opener(repository, domain_of)?;
        let plain = header.open(&key, &bytes[HEADER..], header.packs * PACK + header.entries * ENTRY)?;
        let (packs, entries) = plain.split_at(header.packs * PACK);
        let packs = pack_ids(packs);
        let parse = |bytes| IndexEntry::parse(bytes).filter(|entry| (entry.pack() as usize) < header.packs);
        let entries: Option<Vec<_>> = entries.as_chunks::<ENTRY>().0.iter().map(parse).collect();
        match entries {
            Some(entries) if entries.is_sorted() => Ok(Segment { packs, entries }),
            Some(_) => Err(Fault::damaged("its entries are out of order")),
            None => Err(Fault::damaged("it lists an impossible blob")),
        }
    }

    /// Reads of a segment of `len` bytes only which packs it is about.
    pub(crate) fn fetch_packs(
        objects: &dyn Objects,
        repository: &RepositoryId,
        domain_of: impl FnOnce(DomainId) -> Option<Domain>,
        name: &SegmentName,
        len: u64,
    ) -> Result<Vec<PackId>, Error> {
        let object = name.object();
        if !((HEADER + TAG) as u64..=MAX_SEGMENT).contains(&len) {
            return Err(Error::new(ErrorKind::Damaged, object, "it has an impossible length"));
        }
        // Few have more packs than the first block has room for.
        let mut bytes = objects.get_range(&object, 0..len.min((HEADER + BLOCK + TAG) as u64))?;
        let header = SegmentHeader::parse(&bytes, len as usize).found_in(&object)?;
        let key = header.opener(repository, domain_of).found_in(&object)?;
        let plain = header.packs * PACK + header.entries * ENTRY;
        let wanted = plain.min((header.packs * PACK).next_multiple_of(BLOCK));
        let (have, want) = (bytes.len() as u64, HEADER + wanted + wanted.div_ceil(BLOCK) * TAG);
        if have < want as u64 {
            bytes.extend(objects.get_range(&object, have..want as u64)?);
        }
        let opened = header.open(&key, &bytes[HEADER..want], wanted).found_in(&object)?;
        Ok(pack_ids(&opened[..header.packs * PACK]))
    }

    /// The packs it is about, by the numbers its entries use.
    pub fn packs(&self) -> &[PackId] {
        &self.packs
    }

    /// Its entries, in order.
    pub fn entries(&self) -> &[IndexEntry] {
        &self.entries
    }
}
