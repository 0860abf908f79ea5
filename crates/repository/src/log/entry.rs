//! One entry: a header, a body, a signature over both.

use super::body::{self, Body};
use super::codec::{Reader, Writer};
use super::sign::{Sign, Verify};
use crate::{EntryHash, KeyId, LOG, RepositoryId, SIGNATURE, SessionId, Verifier};
use rempart_objects::Name;
use rempart_types::WallTime;

const MAGIC: [u8; 8] = *b"RMPTLOG1";
/// Kinds may be added under the same number; whatever else changes raises it.
const VERSION: u16 = 1;
/// Who does not know the kind may go on as if the entry were not there.
const SKIPPABLE: u16 = 1;
/// Bytes of the header.
const HEADER: usize = 8 + 2 + 2 + 2 + 2 + 16 + 8 + 32 + 16 + 16 + 8 + 4;

/// Bytes of an entry that is no checkpoint, at most.
pub(super) const MAX_ENTRY: u64 = 4 * 1024 * 1024;
/// Bytes of a checkpoint, at most: two million packs take half.
pub(super) const MAX_CHECKPOINT: u64 = 128 * 1024 * 1024;

/// Where an entry stands and who wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub repository: RepositoryId,
    /// Its number; the object is `log/<number>`.
    pub number: u64,
    /// The hash of the entry before; zeroes for the first.
    pub previous: EntryHash,
    /// Zeroes for the first.
    pub session: SessionId,
    pub key: KeyId,
    /// As the writer's clock told it. Orders nothing.
    pub written: WallTime,
}

/// The object that entry `number` is.
pub fn name(number: u64) -> Name {
    Name::new(format!("{LOG}{number:016x}")).expect("hexadecimal digits fit a name")
}

/// The number that an object's name stands for.
pub fn number_of(name: &Name) -> Option<u64> {
    let digits = name.as_str().strip_prefix(LOG).filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}

pub(super) fn hash(bytes: &[u8]) -> EntryHash {
    EntryHash(blake3::hash(bytes).into())
}

/// The bytes of the object.
pub(super) fn encode(header: &Header, body: &Body, signer: &dyn Sign) -> Vec<u8> {
    assert_eq!(signer.verifier().id(), header.key, "an entry is signed by the key that it names");
    let encoded = body.encode();
    let mut writer = Writer(Vec::with_capacity(HEADER + encoded.len() + SIGNATURE));
    writer.raw(&MAGIC);
    writer.u16(VERSION);
    writer.u16(body.kind());
    writer.u16(0);
    writer.u16(0);
    writer.raw(&header.repository.0);
    writer.u64(header.number);
    writer.raw(&header.previous.0);
    writer.raw(&header.session.0);
    writer.raw(&header.key.0);
    writer.u64(header.written.0);
    writer.u32(u32::try_from(encoded.len()).expect("a body is bounded"));
    debug_assert_eq!(writer.0.len(), HEADER);
    writer.raw(&encoded);
    let signature = signer.sign(&writer.0);
    writer.raw(&signature);
    writer.0
}

/// Bytes that were taken apart, and not believed yet.
#[derive(Debug)]
pub(super) struct Parsed<'a> {
    pub header: Header,
    kind: u16,
    flags: u16,
    body: &'a [u8],
    signed: &'a [u8],
    signature: [u8; SIGNATURE],
}

/// What the body of a signed entry is to this version.
#[derive(Debug)]
pub(super) enum Meaning {
    Body(Body),
    /// A kind of a newer version.
    Newer {
        skippable: bool,
    },
    /// Signed, and yet no body of its kind.
    Nonsense,
}

impl<'a> Parsed<'a> {
    /// `Err` says what is wrong.
    pub fn new(bytes: &'a [u8]) -> Result<Parsed<'a>, &'static str> {
        let (signed, signature) = bytes.split_last_chunk().ok_or("it is too short")?;
        let mut reader = Reader(signed);
        if reader.array() != Some(MAGIC) {
            return Err("it does not begin like one");
        }
        if reader.u16().ok_or("it is too short")? != VERSION {
            return Err("its version is not known");
        }
        let parsed = Parsed::after_version(&mut reader, signed, *signature);
        parsed.ok_or("its length is not what its header says")
    }

    fn after_version(
        reader: &mut Reader<'a>,
        signed: &'a [u8],
        signature: [u8; SIGNATURE],
    ) -> Option<Parsed<'a>> {
        let kind = reader.u16()?;
        let flags = reader.u16()?;
        let _reserved = reader.u16()?;
        let header = Header {
            repository: RepositoryId(reader.array()?),
            number: reader.u64()?,
            previous: EntryHash(reader.array()?),
            session: SessionId(reader.array()?),
            key: KeyId(reader.array()?),
            written: WallTime(reader.u64()?),
        };
        let len = reader.u32()? as usize;
        let body = reader.take(len)?;
        reader.at_end()?;
        Some(Parsed { header, kind, flags, body, signed, signature })
    }

    pub fn is_signed_by(&self, key: &Verifier, verify: &dyn Verify) -> bool {
        key.id() == self.header.key && verify.holds(key, self.signed, &self.signature)
    }

    pub fn meaning(&self) -> Meaning {
        if !body::is_known(self.kind) {
            return Meaning::Newer { skippable: self.flags & SKIPPABLE != 0 };
        }
        match Body::decode(self.kind, self.body) {
            Some(body) if matches!(body, Body::Checkpoint(_)) || self.signed.len() as u64 <= MAX_ENTRY => {
                Meaning::Body(body)
            }
            _ => Meaning::Nonsense,
        }
    }
}
