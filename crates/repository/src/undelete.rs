//! Points that were forgotten, and bringing them back.
//!
//! Forgetting takes nothing away. As long as all packs that a point required are live, an entry of the log makes it a point
//! again; a pack that was condemned since, and is still there because its place keeps it or because nobody removed it yet, is put
//! anew before. So what is brought back is required and live as any other point's, and collections need to know nothing of it.

use crate::error::{Error, ErrorKind};
use crate::immutable::Keeper;
use crate::index::SegmentBuilder;
use crate::log::{
    Content, Forgetting, Forgotten, Log, LogError, Number, Numbers, OldPack, Refusal, Session, State, Status,
};
use crate::repository::WRITERS;
use crate::writer::{put, put_segment};
use crate::{
    CHECKPOINTS, COPIES, Description, LOG, MAX_PACK, PACKS, PackId, PackName, PackOpener, Point, Repository,
    SEGMENTS, SessionId, WRAPPED_KEYS,
};
use rempart_objects::{ErrorKind as PlaceErrorKind, Name, pages};
use rempart_types::WallTime;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// A point that was forgotten.
#[derive(Debug)]
pub struct ForgottenPoint {
    /// Its number.
    pub root: u64,
    pub point: Point,
    /// `None` if that entry is gone.
    pub by: Option<Forgetting>,
    /// Until when the place keeps all of it against everybody, as the log knows.
    pub kept_until: Option<WallTime>,
    pub remains: Remains,
    forgotten: Forgotten,
    payload: Vec<u8>,
}

/// What is left of what a point requires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remains {
    /// All that it requires is there.
    Whole,
    /// So many packs were condemned, and are there yet: they are put anew.
    Condemned { packs: u64, bytes: u64 },
    /// So many packs are not there any more.
    Removed { packs: u64, of: u64 },
    /// So many packs of a machine with a key of its own were condemned: only that key could put them anew.
    OtherDomain { packs: u64 },
}

impl Remains {
    pub fn is_good(&self) -> bool {
        matches!(self, Remains::Whole | Remains::Condemned { .. })
    }
}

/// What forgotten points there are.
#[derive(Debug, Default)]
pub struct Forgottens {
    /// In order of their numbers.
    pub points: Vec<ForgottenPoint>,
    /// Those of which nothing is left to be read, and why.
    pub unreadable: BTreeMap<u64, Error>,
}

impl Repository {
    /// Points that were forgotten, as far as the log still tells of them.
    pub fn forgotten(&self, log: &Log) -> Result<Forgottens, Error> {
        let mut found = Forgottens::default();
        // Many points require the same packs.
        let mut lens = BTreeMap::new();
        for forgotten in log.forgotten()? {
            let number = forgotten.number;
            let payload = log.forgotten_payload(&forgotten).map_err(Error::from);
            let opened = payload
                .and_then(|payload| Ok((self.open_point(number, &forgotten.root, &payload)?, payload)));
            match opened {
                Ok((point, payload)) => {
                    let remains = self.remains(&forgotten, &mut lens)?;
                    let (by, kept_until) = (forgotten.by, forgotten.root.retain_until);
                    let point =
                        ForgottenPoint { root: number, point, by, kept_until, remains, forgotten, payload };
                    found.points.push(point);
                }
                Err(error) if error.is_loss() => drop(found.unreadable.insert(number, error)),
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    fn remains(
        &self,
        forgotten: &Forgotten,
        lens: &mut BTreeMap<Number, Option<u64>>,
    ) -> Result<Remains, Error> {
        let own = self.writer().domain().id();
        let (mut removed, mut others, mut bytes) = (0, 0, 0);
        for (number, OldPack { name, domain }) in forgotten.condemned_packs() {
            let len = match lens.entry(number) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(unknown) => *unknown.insert(self.len_of(&name)?),
            };
            others += u64::from(domain != own);
            removed += u64::from(len.is_none());
            bytes += len.unwrap_or(0);
        }
        let of = forgotten.root.required.len();
        Ok(match forgotten.condemned.len() {
            0 => Remains::Whole,
            _ if removed > 0 => Remains::Removed { packs: removed, of },
            _ if others > 0 => Remains::OtherDomain { packs: others },
            packs => Remains::Condemned { packs, bytes },
        })
    }

    fn len_of(&self, pack: &PackName) -> Result<Option<u64>, Error> {
        match self.objects().len(&pack.object()) {
            Ok(len) => Ok(Some(len)),
            Err(error) if error.kind == PlaceErrorKind::Missing => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Objects of this repository that somebody hid by markers of deletion, though the place keeps them.
    pub fn hidden(&self) -> Result<Vec<Name>, Error> {
        let mut hidden = self.objects().hidden(Description::name().as_str())?;
        // What only begins like that is others'.
        hidden.retain(|name| *name == Description::name());
        for prefix in [WRAPPED_KEYS, WRITERS, LOG, CHECKPOINTS, COPIES, PACKS, SEGMENTS] {
            hidden.extend(self.objects().hidden(prefix)?);
        }
        Ok(hidden)
    }

    /// Brings points back, each under its number: all of them, or those before the one that is told of.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] if something is not there any more that a point requires, [`ErrorKind::Stale`] if a collection
    /// condemned it meanwhile: nothing of that point is brought back then.
    pub fn undelete(
        &self,
        points: &[&ForgottenPoint],
        now: WallTime,
        mut done: impl FnMut(&ForgottenPoint),
    ) -> Result<(), Error> {
        if points.is_empty() {
            return Ok(());
        }
        let mut session = Session::open(self.log()?, self.signer(), SessionId::random(), now)?;
        let there = self.packs_there(session.state())?;
        let mut undeleter = Undeleter {
            repository: self,
            session: &mut session,
            now,
            copies: BTreeMap::new(),
            there,
            keeper: Keeper::new(self),
        };
        let ended = points.iter().try_for_each(|point| {
            undeleter.bring_back(point)?;
            done(point);
            Ok(())
        });
        // One that stays open is ended by a collection.
        let _ = session.end(now);
        ended
    }

    /// Packs that the place shows, of those that the log knows. Numbers take little; names would be 100 MB in 10 TiB.
    fn packs_there(&self, state: &State) -> Result<Numbers, Error> {
        let mut there = Vec::new();
        for page in pages(&**self.objects(), PACKS) {
            let names = page?.into_iter().filter_map(|listed| PackName::parse(&listed.name));
            there.extend(names.filter_map(|name| state.number(name.session, Content::Pack(name.pack))));
        }
        Ok(there.into_iter().collect())
    }
}

/// Brings points back, within one session.
struct Undeleter<'a> {
    repository: &'a Repository,
    session: &'a mut Session,
    now: WallTime,
    /// Of packs that were condemned, by the numbers of the originals.
    copies: BTreeMap<Number, Number>,
    /// Packs that are there, but for copies.
    there: Numbers,
    keeper: Option<Keeper<'a>>,
}

impl Undeleter<'_> {
    fn bring_back(&mut self, point: &ForgottenPoint) -> Result<(), Error> {
        let ForgottenPoint { forgotten, payload, .. } = point;
        self.look(forgotten)?;
        self.put_anew(forgotten)?;
        let Undeleter { session, now, copies, keeper, .. } = self;
        let until = forgotten.root.retain_until.max(keeper.as_ref().map(Keeper::until));
        let undelete = forgotten.undelete(copies, until, payload.clone());
        let appended = session.undelete(*now, |state| {
            // Who would have it refused anyway need not keep anything.
            if let Some(keeper) = keeper.as_mut().filter(|_| is_live(state, &undelete.packs)) {
                keeper.keep(state, &undelete.packs, &[])?;
            }
            Ok::<_, Error>(undelete.clone())
        });
        appended.map(drop).map_err(|error| match error.source.as_deref().and_then(|e| e.downcast_ref()) {
            Some(LogError::Refused(Refusal::NotFit(_))) => {
                let why = "a collection condemned what it requires meanwhile: look again";
                Error { kind: ErrorKind::Stale, why: why.into(), ..error }
            }
            _ => error,
        })
    }

    /// All packs that it requires and that are live have to be there: whoever brings a point back relies on them.
    fn look(&mut self, forgotten: &Forgotten) -> Result<(), Error> {
        let state = self.session.state();
        let unseen = forgotten.root.required.difference(&self.there);
        let objects = || unseen.iter().filter_map(|number| state.object(number));
        let live = || objects().filter(|object| object.status == Status::Live);
        for object in live() {
            let Content::Pack(pack) = object.content else { continue };
            // No list tells that something is not there.
            let name = PackName { session: state.owner(&object).id, pack };
            if self.repository.len_of(&name)?.is_none() && !state.is_named_again(&object) {
                let why = format!("it is not there any more, and point {} requires it", forgotten.number);
                return Err(Error::new(ErrorKind::Missing, name.object(), why));
            }
        }
        self.there = self.there.union(&live().map(|object| object.number).collect());
        Ok(())
    }

    /// Puts condemned packs anew, byte for byte, and makes them live.
    fn put_anew(&mut self, forgotten: &Forgotten) -> Result<(), Error> {
        let objects = &**self.repository.objects();
        let own = self.repository.writer().domain().id();
        let id = self.session.id();
        let (mut builder, mut put_here) = (SegmentBuilder::new(), Vec::new());
        for (number, old) in forgotten.condemned_packs() {
            if self.copies.contains_key(&number) {
                continue;
            }
            if old.domain != own {
                let why = "it was condemned, and only the key of the machine that stored it could do so anew";
                return Err(Error::new(ErrorKind::Missing, old.name.object(), why));
            }
            let bytes = objects.get(&old.name.object(), MAX_PACK as u64)?;
            if PackId(blake3::hash(&bytes).into()) != old.name.pack {
                let why = "its bytes are not those its name stands for";
                return Err(Error::new(ErrorKind::Damaged, old.name.object(), why));
            }
            let copy = PackName { session: id, pack: old.name.pack };
            put(objects, &copy.object(), &bytes)?;
            let blobs = PackOpener::fetch(objects, self.repository.opener()?, copy)?.fetch_blobs(objects)?;
            if !builder.has_room(blobs.len()) {
                self.make_live(std::mem::take(&mut builder), &mut put_here)?;
            }
            builder.add(copy.pack, &blobs);
            put_here.push((number, copy));
        }
        self.make_live(builder, &mut put_here)
    }

    fn make_live(&mut self, builder: SegmentBuilder, put: &mut Vec<(Number, PackName)>) -> Result<(), Error> {
        if builder.is_empty() {
            return Ok(());
        }
        let segment = put_segment(self.repository, self.repository.writer(), self.session.id(), builder)?;
        self.session.segment(self.now, segment)?;
        let state = self.session.state();
        for (old, name) in put.drain(..) {
            // It is told as not live if somebody ended this session meanwhile.
            self.copies.extend(state.number(name.session, Content::Pack(name.pack)).map(|new| (old, new)));
        }
        Ok(())
    }
}

fn is_live(state: &State, packs: &Numbers) -> bool {
    packs.iter().all(|pack| state.object(pack).is_some_and(|object| object.status == Status::Live))
}
