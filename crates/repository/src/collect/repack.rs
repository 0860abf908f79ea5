//! Writing packs anew that are mostly waste, or many and small.

use super::reach::Usages;
use super::{CollectError, Reach, domains};
use crate::blob::{BlobKind, Compressor, Decompressor};
use crate::error::Error;
use crate::index::SegmentBuilder;
use crate::key::Domain;
use crate::log::{Content, Number, Numbers, Session, State, Status};
use crate::pack::PackBuilder;
use crate::writer::{MAX_PACK_LEN, put, put_segment};
use crate::{ChunkId, DomainId, PackId, PackName, PackOpener, Repository, WriterKey};
use rempart_buffer::BufferMut;
use rempart_types::WallTime;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// Blobs that are read at once: 8 MiB in chunks of 128 KiB.
const BATCH: usize = 64;
/// Blobs of a domain that one collection writes anew, at most: they are remembered. What is left is left for the next one.
const MOST: usize = 1 << 20;
/// Blobs that a collection need not write anew because they lie elsewhere, at most: 10 MiB. Further ones are written.
const MOST_ELSEWHERE: usize = 1 << 18;
/// A pack that is smaller than this part of a full one is small.
const SMALL: u64 = 4;

/// What was written anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rewritten {
    /// Packs whose content it was.
    pub packs: u64,
    /// Bytes that were put.
    pub bytes: u64,
}

impl Rewritten {
    pub(super) fn and(self, other: Rewritten) -> Rewritten {
        Rewritten { packs: self.packs + other.packs, bytes: self.bytes + other.bytes }
    }
}

/// Packs of which less than `percent` is of use, and small ones if those of a domain make a full one together: what is found in a
/// domain lies in its packs. Of the owner's domain first, then of those with the most waste.
pub(super) fn sparse(
    reach: &Reach<'_>,
    state: &State,
    usage: &Usages,
    percent: u8,
    now: WallTime,
) -> Vec<(DomainId, Numbers)> {
    let abilities = reach.repository.objects().abilities();
    let full = abilities.pack_len.min(MAX_PACK_LEN);
    let mut domains: BTreeMap<DomainId, Sparse> = BTreeMap::new();
    for object in state.objects() {
        let owner = state.owner(&object);
        let is_retained = abilities.retention && object.retain_until > now;
        let is_pack = object.status == Status::Live && matches!(object.content, Content::Pack(_));
        // Where nothing is reached there is nothing to write.
        let used = usage.get(object.number).filter(|usage| usage.used + usage.twice > 0);
        let Some(usage) = used.filter(|_| is_pack && owner.is_over && !is_retained) else { continue };
        let is_wasteful = u128::from(usage.used) * 100 < u128::from(usage.whole) * u128::from(percent);
        if is_wasteful || usage.whole < full / SMALL {
            let of = domains.entry(owner.domain).or_default();
            of.waste += usage.whole - usage.used;
            if is_wasteful {
                of.wasteful.push(object.number);
            } else {
                of.small.push(object.number);
                of.together += usage.used;
            }
        }
    }
    let mut chosen: Vec<(u64, DomainId, Numbers)> = domains
        .into_iter()
        .map(|(domain, mut of)| {
            if of.together >= full {
                of.wasteful.append(&mut of.small);
            }
            (of.waste, domain, of.wasteful.into_iter().collect::<Numbers>())
        })
        .filter(|(.., packs)| !packs.is_empty())
        .collect();
    domains::choose(reach.repository, &mut chosen);
    chosen.into_iter().map(|(_, domain, packs)| (domain, packs)).collect()
}

/// Of one domain.
#[derive(Default)]
struct Sparse {
    wasteful: Vec<Number>,
    small: Vec<Number>,
    /// Bytes of use in the small ones.
    together: u64,
    /// Bytes of no use in all of them.
    waste: u64,
}

/// Puts anew what is reached in packs of a domain and lies whole in no other, in a session of that domain, and makes it live.
/// From then on `reach` does without the old packs, but for those of which something could not be read.
pub(super) fn rewrite(
    reach: &mut Reach<'_>,
    session: &mut Session,
    now: WallTime,
    domain: DomainId,
    packs: &Numbers,
) -> Result<Rewritten, CollectError> {
    let repository = reach.repository;
    let mut anew = Anew::new(repository, session, now, repository.keys().owner()?.writer_in(domain));
    let mut lies_in = std::mem::take(&mut reach.elsewhere);
    let mut decompressor = Decompressor::new();
    let mut old = Vec::new();
    for number in packs.iter() {
        if anew.done.len() >= MOST {
            break;
        }
        let blobs = anew.name(number).map(|name| {
            let opener = PackOpener::fetch(&**repository.objects(), repository.opener()?, name)?;
            opener.fetch_blobs(&**repository.objects())
        });
        let blobs = match blobs {
            Some(Ok(blobs)) => blobs,
            // What it holds cannot be told: it is kept.
            Some(Err(error)) if error.is_of_its_writer() => continue,
            Some(Err(error)) => return Err(error.into()),
            None => continue,
        };
        let mut is_all = true;
        for kind in [BlobKind::Data, BlobKind::Tree] {
            let mut wanted = Vec::new();
            for blob in blobs.iter().filter(|blob| blob.kind == kind) {
                if reach.is_reached(&blob.id)? {
                    wanted.push(blob.id);
                }
            }
            for batch in wanted.chunks(BATCH) {
                let stays = |pack| !packs.contains(pack) && !reach.old.contains(pack);
                let domain = anew.writer.domain();
                let rest = elsewhere(reach, kind, batch, domain, stays, &mut lies_in, &mut decompressor)?;
                is_all &= copy(reach, kind, &rest, &mut anew, &mut decompressor)?;
            }
        }
        if is_all {
            old.push(number);
        }
    }
    let (rewritten, new) = anew.finish(old.len() as u64)?;
    reach.elsewhere = lies_in;
    reach.old = reach.old.union(&old.into_iter().collect());
    reach.new = reach.new.union(&new);
    Ok(rewritten)
}

/// Those of `ids` that lie whole in no pack of their domain that stays. Where the others do is written down.
///
/// Two backups at once may both store a blob, and a pack of which much was put anew may have been needed all the same.
fn elsewhere(
    reach: &Reach<'_>,
    kind: BlobKind,
    ids: &[ChunkId],
    domain: &Domain,
    stays: impl Fn(Number) -> bool,
    lies_in: &mut HashMap<[u8; 16], Number>,
    decompressor: &mut Decompressor,
) -> Result<Vec<ChunkId>, Error> {
    let mut located = Vec::new();
    if lies_in.len() + ids.len() <= MOST_ELSEWHERE {
        for (place, id) in ids.iter().enumerate() {
            let found = reach.reader.find_in(id, domain.id())?.into_iter();
            let other = found.filter(|found| found.blob.kind == kind && stays(found.pack));
            located.extend(other.max_by_key(|found| found.pack).map(|found| (found, place)));
        }
    }
    let mut rest: BTreeSet<usize> = (0..ids.len()).collect();
    reach.reader.read_located(located, decompressor, |pack, place, plain| {
        if plain.is_some_and(|plain| id_of(domain, kind, plain) == ids[place]) {
            rest.remove(&place);
            lies_in.insert(half(&ids[place]), pack);
        }
        Ok(())
    })?;
    Ok(rest.into_iter().map(|place| ids[place]).collect())
}

/// Whichever pack has a blob whole. False if one stays where it is: its pack is not condemned.
fn copy(
    reach: &Reach<'_>,
    kind: BlobKind,
    ids: &[ChunkId],
    anew: &mut Anew<'_>,
    decompressor: &mut Decompressor,
) -> Result<bool, Error> {
    let mut is_all = true;
    let all = reach.reader.read_all(kind, ids, decompressor, |place, plain| {
        is_all &= anew.put(kind, ids[place], plain)?;
        Ok(())
    });
    match all {
        Err(error) if error.is_of_its_writer() => {}
        ended => return ended.map(|()| is_all),
    }
    let mut plain = Vec::new();
    for id in ids {
        match reach.reader.read(kind, id, &mut plain, decompressor) {
            Ok(()) => is_all &= anew.put(kind, *id, &plain)?,
            Err(error) if error.is_of_its_writer() => is_all = false,
            Err(error) => return Err(error),
        }
    }
    Ok(is_all)
}

/// Blobs on their way into new packs: chunks and nodes each in their own.
struct Anew<'a> {
    repository: &'a Repository,
    session: &'a mut Session,
    now: WallTime,
    writer: WriterKey,
    packs: [Option<PackBuilder>; 2],
    buffer: BufferMut,
    compressor: Compressor,
    /// First halves of the ids.
    done: HashSet<[u8; 16]>,
    segment: SegmentBuilder,
    live: Vec<PackId>,
    bytes: u64,
}

impl<'a> Anew<'a> {
    fn new(
        repository: &'a Repository,
        session: &'a mut Session,
        now: WallTime,
        writer: WriterKey,
    ) -> Anew<'a> {
        Anew {
            repository,
            session,
            now,
            writer,
            packs: [None, None],
            buffer: BufferMut::default(),
            compressor: Compressor::new(),
            done: HashSet::new(),
            segment: SegmentBuilder::new(),
            live: Vec::new(),
            bytes: 0,
        }
    }

    fn name(&self, number: Number) -> Option<PackName> {
        let state = self.session.state();
        let object = state.object(number)?;
        match object.content {
            Content::Pack(pack) => Some(PackName { session: state.owner(&object).id, pack }),
            Content::Index(_) => None,
        }
    }

    /// False of what may not be put.
    fn put(&mut self, kind: BlobKind, id: ChunkId, plain: &[u8]) -> Result<bool, Error> {
        // Who wrote the old pack may have put the ids of another domain into it: they stay where they are.
        if id_of(self.writer.domain(), kind, plain) != id {
            return Ok(false);
        }
        if !self.done.insert(half(&id)) {
            return Ok(true);
        }
        let place = usize::from(kind == BlobKind::Tree);
        if self.packs[place].as_ref().is_some_and(|pack| !pack.has_room(plain.len())) {
            self.put_pack(place)?;
        }
        let pack = self.packs[place].get_or_insert_with(|| {
            let len = self.repository.objects().abilities().pack_len.min(MAX_PACK_LEN);
            PackBuilder::new(&self.writer, len, std::mem::take(&mut self.buffer))
        });
        pack.add(kind, id, plain, &mut self.compressor);
        Ok(true)
    }

    fn put_pack(&mut self, place: usize) -> Result<(), Error> {
        let Some(pack) = self.packs[place].take() else { return Ok(()) };
        let pack = pack.finish();
        put(&**self.repository.objects(), &pack.name(self.session.id()).object(), pack.bytes())?;
        self.bytes += pack.bytes().len() as u64;
        if !self.segment.has_room(pack.blobs().len()) {
            self.make_live()?;
        }
        self.segment.add(pack.id(), pack.blobs());
        self.buffer = pack.into_buffer();
        Ok(())
    }

    fn make_live(&mut self) -> Result<(), Error> {
        let builder = std::mem::take(&mut self.segment);
        if !builder.is_empty() {
            let segment = put_segment(self.repository, &self.writer, self.session.id(), builder)?;
            self.live.extend(&segment.packs);
            self.session.segment(self.now, segment)?;
        }
        Ok(())
    }

    /// The new packs.
    fn finish(mut self, old: u64) -> Result<(Rewritten, Numbers), Error> {
        (0..self.packs.len()).try_for_each(|place| self.put_pack(place))?;
        self.make_live()?;
        let (state, id) = (self.session.state(), self.session.id());
        let numbers = self.live.iter().filter_map(|pack| state.number(id, Content::Pack(*pack)));
        Ok((Rewritten { packs: old, bytes: self.bytes }, numbers.collect()))
    }
}

fn half(id: &ChunkId) -> [u8; 16] {
    id.0[..16].try_into().expect("16 bytes")
}

fn id_of(domain: &Domain, kind: BlobKind, plain: &[u8]) -> ChunkId {
    match kind {
        BlobKind::Data => domain.chunk_id(plain),
        BlobKind::Tree => domain.node_id(plain),
    }
}
