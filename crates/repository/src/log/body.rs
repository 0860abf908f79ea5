//! What an entry says.

use super::codec::{Reader, Writer};
use super::numbers::Numbers;
use crate::{ChainId, DomainId, KeyId, PackId, SegmentId, SessionId, Verifier, WrappedKeyId};
use rempart_types::WallTime;

/// Packs and index segments that one entry makes live, at most.
pub const MAX_OBJECTS: usize = 16 * 1024;
/// Roots that one entry forgets, at most.
pub const MAX_ROOTS: usize = 16 * 1024;
/// Bytes of what an entry carries sealed, at most.
pub const MAX_PAYLOAD: usize = 1024 * 1024;
/// Bytes of what came of a boot, at most: each checkpoint has those of all backups.
pub const MAX_BOOT: usize = 16 * 1024;

/// One change of the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// The first entry: whose repository this is.
    Create(Create),
    /// A key may write from now on, into one domain.
    Key(Key),
    /// A key may write no more; its sessions are over.
    Revoke(KeyId),
    /// A writer is here. Every later entry is written within a session. What is put in it is in the domain of its key, or in this
    /// one: the maintenance key may name any.
    Session(Option<DomainId>),
    /// Packs, and the index segments that lead to them, are live.
    Segment(Segment),
    /// A backup.
    Commit(Commit),
    /// Packs and index segments are no longer live. For good.
    Condemn(Condemn),
    /// Another session is over, whether its writer knows or not.
    Fence(SessionId),
    /// This session is over.
    End,
    /// Backups are given up, by their entries' numbers.
    Forget(Vec<u64>),
    /// Condemned objects were seen absent.
    Gone(Numbers),
    /// Somebody who can decrypt found that these packs hold what they say: other domains may refer to them.
    Verified(Numbers),
    /// What was found damaged; earlier entries of this kind that are settled by it.
    Damaged(Damaged),
    /// Backups are in use by this session, as long as it is open: nobody forgets them. The newest entry of a session counts.
    Read(Read),
    /// What came of starting a backup's machine. The newest entry of a backup counts, as long as the backup is there.
    Boot(Boot),
    /// A wrapped copy of the master key counts as removed: whoever would remove another one must find a third that stays.
    RemoveKey(WrappedKeyId),
    /// A backup that was forgotten is there again, under the number that it had.
    Undelete(Undelete),
    /// All of the above, folded. Entries before this one may be removed, but for those in which backups stand.
    Checkpoint(Checkpoint),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// The key that may do everything, and that signed this.
    pub maintenance: Verifier,
    /// The dedup domain of whoever holds that key.
    pub domain: DomainId,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub public: Verifier,
    pub domain: DomainId,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Segment {
    pub packs: Vec<PackId>,
    pub indexes: Vec<SegmentId>,
}

/// A backup. It requires what [`Commit::base`] requires when this is appended, [`Commit::packs`], and all packs of
/// [`Commit::segment`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    pub chain: ChainId,
    /// The backup that this one continues. It may be forgotten by now.
    pub parent: Option<u64>,
    /// What became live with it.
    pub segment: Segment,
    /// A backup whose packs this one requires, too.
    pub base: Option<u64>,
    /// Live packs that it requires besides.
    pub packs: Numbers,
    /// As its writer wished; the place keeps it.
    pub retain_until: Option<WallTime>,
    /// The trees of its disks and all that is told of them: opaque here.
    pub payload: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condemn {
    pub objects: Numbers,
    /// Whoever wrote this followed the trees of all backups: those that claim to require a condemned pack reach
    /// nothing that lies there only. If not set, no backup may require any of them.
    pub followed: bool,
    /// Live packs that hold again what was reached in the condemned ones. The backups that claimed those
    /// require these.
    pub survivors: Numbers,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    pub settles: Vec<u64>,
    pub payload: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Entries of backups, in ascending order.
    pub roots: Vec<u64>,
    /// Who reads them: opaque here.
    pub payload: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// The entry of the backup.
    pub root: u64,
    /// What came of it: opaque here.
    pub payload: Vec<u8>,
}

/// A backup that was forgotten, with all that its first entry said of it: that one may be freed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undelete {
    /// The number of the entry that committed it, which is the backup's.
    pub root: u64,
    pub chain: ChainId,
    pub parent: Option<u64>,
    pub domain: DomainId,
    /// The key that committed it, and when.
    pub key: KeyId,
    pub written: WallTime,
    /// Live packs that hold what it reaches.
    pub packs: Numbers,
    pub retain_until: Option<WallTime>,
    pub payload: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// How many there were before it.
    pub ordinal: u64,
    /// [`State`](super::State), encoded.
    pub state: Vec<u8>,
}

/// Numbers of the kinds in the header.
mod kind {
    pub const CREATE: u16 = 1;
    pub const KEY: u16 = 2;
    pub const REVOKE: u16 = 3;
    pub const SESSION: u16 = 4;
    pub const SEGMENT: u16 = 5;
    pub const COMMIT: u16 = 6;
    pub const CONDEMN: u16 = 7;
    pub const FENCE: u16 = 8;
    pub const END: u16 = 9;
    pub const FORGET: u16 = 10;
    pub const GONE: u16 = 11;
    pub const VERIFIED: u16 = 12;
    pub const DAMAGED: u16 = 13;
    pub const CHECKPOINT: u16 = 14;
    pub const READ: u16 = 15;
    pub const REMOVE_KEY: u16 = 16;
    pub const BOOT: u16 = 17;
    pub const UNDELETE: u16 = 18;
}

/// Whether this version knows the kind.
pub(super) fn is_known(kind: u16) -> bool {
    (kind::CREATE..=kind::UNDELETE).contains(&kind)
}

impl Body {
    pub(super) fn kind(&self) -> u16 {
        match self {
            Body::Create(_) => kind::CREATE,
            Body::Key(_) => kind::KEY,
            Body::Revoke(_) => kind::REVOKE,
            Body::Session(_) => kind::SESSION,
            Body::Segment(_) => kind::SEGMENT,
            Body::Commit(_) => kind::COMMIT,
            Body::Condemn(_) => kind::CONDEMN,
            Body::Fence(_) => kind::FENCE,
            Body::End => kind::END,
            Body::Forget(_) => kind::FORGET,
            Body::Gone(_) => kind::GONE,
            Body::Verified(_) => kind::VERIFIED,
            Body::Damaged(_) => kind::DAMAGED,
            Body::Read(_) => kind::READ,
            Body::RemoveKey(_) => kind::REMOVE_KEY,
            Body::Boot(_) => kind::BOOT,
            Body::Undelete(_) => kind::UNDELETE,
            Body::Checkpoint(_) => kind::CHECKPOINT,
        }
    }

    /// What a person calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Body::Create(_) => "create",
            Body::Key(_) => "key",
            Body::Revoke(_) => "revoke",
            Body::Session(_) => "session",
            Body::Segment(_) => "segment",
            Body::Commit(_) => "commit",
            Body::Condemn(_) => "condemn",
            Body::Fence(_) => "fence",
            Body::End => "end",
            Body::Forget(_) => "forget",
            Body::Gone(_) => "gone",
            Body::Verified(_) => "verified",
            Body::Damaged(_) => "damaged",
            Body::Read(_) => "read",
            Body::RemoveKey(_) => "remove-key",
            Body::Boot(_) => "boot",
            Body::Undelete(_) => "undelete",
            Body::Checkpoint(_) => "checkpoint",
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        match self {
            Body::Create(create) => {
                writer.raw(&create.maintenance.0);
                writer.raw(&create.domain.0);
            }
            Body::Key(key) => {
                writer.raw(&key.public.0);
                writer.raw(&key.domain.0);
            }
            Body::Revoke(key) => writer.raw(&key.0),
            Body::Session(domain) => domain.iter().for_each(|domain| writer.raw(&domain.0)),
            Body::End => {}
            Body::Segment(segment) => segment.encode(&mut writer),
            Body::Commit(commit) => commit.encode(&mut writer),
            Body::Condemn(condemn) => {
                writer.u8(condemn.followed.into());
                condemn.objects.encode(&mut writer);
                condemn.survivors.encode(&mut writer);
            }
            Body::Fence(session) => writer.raw(&session.0),
            Body::Forget(roots) => writer.list(roots, |writer, root| writer.short(*root)),
            Body::Gone(objects) | Body::Verified(objects) => objects.encode(&mut writer),
            Body::Damaged(damaged) => {
                writer.list(&damaged.settles, |writer, entry| writer.short(*entry));
                writer.bytes(&damaged.payload);
            }
            Body::Read(read) => read.encode(&mut writer),
            Body::RemoveKey(key) => writer.raw(&key.0),
            Body::Boot(boot) => {
                writer.short(boot.root);
                writer.bytes(&boot.payload);
            }
            Body::Undelete(undelete) => undelete.encode(&mut writer),
            Body::Checkpoint(checkpoint) => {
                writer.short(checkpoint.ordinal);
                writer.raw(&checkpoint.state);
            }
        }
        writer.0
    }

    /// `None` if the bytes are not the one encoding of a body of that kind.
    pub(super) fn decode(kind: u16, bytes: &[u8]) -> Option<Body> {
        let mut reader = Reader(bytes);
        let reader = &mut reader;
        let body = match kind {
            kind::CREATE => Body::Create(Create {
                maintenance: Verifier(reader.array()?),
                domain: DomainId(reader.array()?),
            }),
            kind::KEY => {
                Body::Key(Key { public: Verifier(reader.array()?), domain: DomainId(reader.array()?) })
            }
            kind::REVOKE => Body::Revoke(KeyId(reader.array()?)),
            kind::SESSION if reader.0.is_empty() => Body::Session(None),
            kind::SESSION => Body::Session(Some(DomainId(reader.array()?))),
            kind::SEGMENT => Body::Segment(Segment::decode(reader)?),
            kind::COMMIT => Body::Commit(Commit::decode(reader)?),
            kind::CONDEMN => {
                let followed = reader.bool()?;
                let objects = Numbers::decode(reader)?;
                let survivors = Numbers::decode(reader)?;
                Body::Condemn(Condemn { objects, followed, survivors })
            }
            kind::FENCE => Body::Fence(SessionId(reader.array()?)),
            kind::END => Body::End,
            kind::FORGET => Body::Forget(reader.list(MAX_ROOTS, Reader::short)?),
            kind::GONE => Body::Gone(Numbers::decode(reader)?),
            kind::VERIFIED => Body::Verified(Numbers::decode(reader)?),
            kind::DAMAGED => {
                let settles = reader.list(MAX_ROOTS, Reader::short)?;
                Body::Damaged(Damaged { settles, payload: reader.bytes(MAX_PAYLOAD)?.to_vec() })
            }
            kind::READ => Body::Read(Read::decode(reader)?),
            kind::REMOVE_KEY => Body::RemoveKey(WrappedKeyId(reader.array()?)),
            kind::BOOT => {
                Body::Boot(Boot { root: reader.short()?, payload: reader.bytes(MAX_BOOT)?.to_vec() })
            }
            kind::UNDELETE => Body::Undelete(Undelete::decode(reader)?),
            kind::CHECKPOINT => {
                let ordinal = reader.short()?;
                let state = reader.take(reader.0.len())?.to_vec();
                Body::Checkpoint(Checkpoint { ordinal, state })
            }
            _ => return None,
        };
        reader.at_end()?;
        Some(body)
    }
}

impl Segment {
    pub fn is_empty(&self) -> bool {
        self.packs.is_empty() && self.indexes.is_empty()
    }

    fn encode(&self, writer: &mut Writer) {
        writer.list(&self.packs, |writer, pack| writer.raw(&pack.0));
        writer.list(&self.indexes, |writer, index| writer.raw(&index.0));
    }

    fn decode(reader: &mut Reader<'_>) -> Option<Segment> {
        let packs = reader.list(MAX_OBJECTS, |reader| reader.array().map(PackId))?;
        let indexes = reader.list(MAX_OBJECTS, |reader| reader.array().map(SegmentId))?;
        Some(Segment { packs, indexes })
    }
}

impl Read {
    pub(super) fn encode(&self, writer: &mut Writer) {
        writer.list(&self.roots, |writer, root| writer.short(*root));
        writer.bytes(&self.payload);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Option<Read> {
        let roots = reader.list(MAX_ROOTS, Reader::short)?;
        Some(Read { roots, payload: reader.bytes(MAX_PAYLOAD)?.to_vec() })
    }
}

impl Commit {
    fn encode(&self, writer: &mut Writer) {
        writer.raw(&self.chain.0);
        writer.optional(self.parent);
        self.segment.encode(writer);
        writer.optional(self.base);
        self.packs.encode(writer);
        writer.optional(self.retain_until.map(|time| time.0));
        writer.bytes(&self.payload);
    }

    fn decode(reader: &mut Reader<'_>) -> Option<Commit> {
        Some(Commit {
            chain: ChainId(reader.array()?),
            parent: reader.optional()?,
            segment: Segment::decode(reader)?,
            base: reader.optional()?,
            packs: Numbers::decode(reader)?,
            retain_until: reader.optional()?.map(WallTime),
            payload: reader.bytes(MAX_PAYLOAD)?.to_vec(),
        })
    }
}

impl Undelete {
    fn encode(&self, writer: &mut Writer) {
        writer.short(self.root);
        writer.raw(&self.chain.0);
        writer.optional(self.parent);
        writer.raw(&self.domain.0);
        writer.raw(&self.key.0);
        writer.short(self.written.0);
        self.packs.encode(writer);
        writer.optional(self.retain_until.map(|time| time.0));
        writer.bytes(&self.payload);
    }

    fn decode(reader: &mut Reader<'_>) -> Option<Undelete> {
        Some(Undelete {
            root: reader.short()?,
            chain: ChainId(reader.array()?),
            parent: reader.optional()?,
            domain: DomainId(reader.array()?),
            key: KeyId(reader.array()?),
            written: WallTime(reader.short()?),
            packs: Numbers::decode(reader)?,
            retain_until: reader.optional()?.map(WallTime),
            payload: reader.bytes(MAX_PAYLOAD)?.to_vec(),
        })
    }
}
