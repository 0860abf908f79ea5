//! The bytes of a pack's header, footer and trailer.

use crate::blob::{BlobKind, Codec, MAX_PLAIN};
use crate::error::Fault;
use crate::key::{BOX_OVERHEAD, Cipher, CipherKey, Ordinal, Secret, TAG};
use crate::wire::{Reader, Writer};
use crate::{ChunkId, DomainId, KeyId, RepositoryId};

const MAGIC: &[u8; 8] = b"RMPRPACK";
const VERSION: u16 = 1;
const END: &[u8; 4] = b"RMPE";
/// Bytes of the header before the sealed secret.
pub(super) const OPEN_HEADER: usize = 8 + 2 + 1 + 5 + 16 + 16 + 16 + 16 + 32;
/// Bytes of the sealed secret.
const SEALED_SECRET: usize = 32 + BOX_OVERHEAD;
/// Bytes of a header.
pub const PACK_HEADER: usize = OPEN_HEADER + SEALED_SECRET;
/// Bytes of a footer's entry.
pub(super) const ENTRY: usize = 32 + 1 + 1 + 4 + 4;
/// Bytes behind the footer.
pub(crate) const TRAILER: usize = 8;
/// Blobs of a pack, at most.
pub const MAX_BLOBS: usize = 1 << 16;
/// Bytes of a pack, at most.
pub const MAX_PACK: usize = 128 << 20;
/// A pack that is meant to be smaller could not hold the largest blob.
pub const MIN_PACK: usize = 2 << 20;

const BLOBS: u8 = 0;
const FOOTER: u8 = 1;

/// The start of a pack: what can be known of it without a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackHeader {
    pub cipher: Cipher,
    pub repository: RepositoryId,
    /// Who says to have written it: a hint, nothing proves it.
    pub writer: KeyId,
    /// By whose keys its ids were made.
    pub domain: DomainId,
    /// [`Recipient::id`](crate::Recipient::id) of the key its secret is sealed to.
    pub recipient: [u8; 16],
    pub(crate) salt: [u8; 32],
    pub(crate) sealed_secret: [u8; SEALED_SECRET],
}

impl PackHeader {
    /// All but the sealed secret, which is sealed with it as context.
    pub(super) fn open_part(&self) -> [u8; OPEN_HEADER] {
        let mut out = Writer::with_capacity(OPEN_HEADER);
        out.bytes(MAGIC);
        out.u16(VERSION);
        out.bytes(&[self.cipher.code()]);
        out.zeroes(5);
        out.bytes(&self.repository.0);
        out.bytes(&self.writer.0);
        out.bytes(&self.domain.0);
        out.bytes(&self.recipient);
        out.bytes(&self.salt);
        out.into_bytes().try_into().expect("the fields fill it")
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        [&self.open_part()[..], &self.sealed_secret].concat()
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<PackHeader, Fault> {
        let mut input = Reader::new(bytes);
        input.magic(MAGIC)?;
        input.version(VERSION)?;
        let [cipher] = input.array()?;
        let cipher = Cipher::from_code(cipher).ok_or(Fault::damaged("its cipher is unknown"))?;
        input.zeroes::<5>()?;
        Ok(PackHeader {
            cipher,
            repository: RepositoryId(input.array()?),
            writer: KeyId(input.array()?),
            domain: DomainId(input.array()?),
            recipient: input.array()?,
            salt: input.array()?,
            sealed_secret: input.array()?,
        })
    }

    /// The secret of the pack's key: no other header leads to it.
    pub(crate) fn key(&self, secret: &Secret) -> Secret {
        secret.derive("rempart 2026 pack key", &[&self.open_part()])
    }
}

/// A blob of a pack: what it is, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    pub id: ChunkId,
    pub kind: BlobKind,
    pub codec: Codec,
    /// Its place among the pack's blobs.
    pub ordinal: u32,
    /// Where it begins in the pack.
    pub offset: u32,
    /// Bytes in the pack.
    pub stored_len: u32,
    /// Bytes of its content.
    pub plain_len: u32,
}

impl Blob {
    /// Bytes of the pack that hold it.
    pub fn range(&self) -> std::ops::Range<u64> {
        u64::from(self.offset)..u64::from(self.offset) + u64::from(self.stored_len)
    }

    pub(super) fn nonce(&self) -> Ordinal {
        Ordinal { number: self.ordinal, space: BLOBS }
    }

    /// What is authenticated with its content: whatever the index or the footer says of a blob must be true to open it.
    pub(super) fn context(&self) -> [u8; 42] {
        let mut context = [0; 42];
        context[..4].copy_from_slice(&self.ordinal.to_le_bytes());
        context[4..36].copy_from_slice(&self.id.0);
        context[36] = self.kind.code();
        context[37] = self.codec.code();
        context[38..].copy_from_slice(&self.plain_len.to_le_bytes());
        context
    }

    /// Whether a writer may have made it, wherever the claim comes from.
    pub(crate) fn is_possible(&self) -> bool {
        let (plain, stored) = (self.plain_len as usize, self.stored_len as usize);
        let fits = match self.codec {
            Codec::Plain => stored == plain + TAG,
            Codec::Zstd => stored < plain + TAG && stored > TAG,
        };
        fits && (1..=MAX_PLAIN).contains(&plain)
            && (self.ordinal as usize) < MAX_BLOBS
            && self.offset as usize >= PACK_HEADER
            && self.offset as usize + stored <= MAX_PACK
            && !self.id.is_zero()
    }
}

/// Bytes that so many blobs need behind the last one.
pub(super) fn footer_len(blobs: usize) -> usize {
    blobs * ENTRY + TAG + TRAILER
}

/// Writes the table of `blobs`.
pub(super) fn write_footer(blobs: &[Blob], out: &mut [u8]) {
    for (blob, entry) in blobs.iter().zip(out.chunks_exact_mut(ENTRY)) {
        entry[..32].copy_from_slice(&blob.id.0);
        entry[32] = blob.kind.code();
        entry[33] = blob.codec.code();
        entry[34..38].copy_from_slice(&blob.stored_len.to_le_bytes());
        entry[38..].copy_from_slice(&blob.plain_len.to_le_bytes());
    }
}

/// Seals the footer that `out` begins with, and puts the trailer behind it: they fill `out`.
pub(crate) fn seal_footer(key: &CipherKey, out: &mut [u8]) {
    let length = out.len() - TRAILER;
    let (footer, trailer) = out.split_at_mut(length);
    key.seal_in_place(Ordinal { number: 0, space: FOOTER }, &[], footer);
    trailer[..4].copy_from_slice(&(length as u32).to_le_bytes());
    trailer[4..].copy_from_slice(END);
}

/// Bytes of the sealed footer, from the trailer.
pub(super) fn parse_trailer(trailer: &[u8; TRAILER]) -> Result<usize, Fault> {
    let length = u32::from_le_bytes([trailer[0], trailer[1], trailer[2], trailer[3]]) as usize;
    if trailer[4..] != *END {
        return Err(Fault::damaged("it does not end as a pack does"));
    }
    let entries = length.checked_sub(TAG).filter(|table| table % ENTRY == 0).map(|table| table / ENTRY);
    match entries {
        Some(1..=MAX_BLOBS) => Ok(length),
        _ => Err(Fault::damaged("its footer has an impossible length")),
    }
}

/// The blobs that a sealed footer lists; they must end where the footer begins.
pub(super) fn open_footer(key: &CipherKey, sealed: &mut [u8], begins: u64) -> Result<Vec<Blob>, Fault> {
    let footer = key
        .open_in_place(Ordinal { number: 0, space: FOOTER }, &[], sealed)
        .ok_or(Fault::damaged("its footer does not open"))?;
    let mut blobs = Vec::with_capacity(footer.len() / ENTRY);
    let mut offset = PACK_HEADER as u32;
    for (ordinal, entry) in footer.chunks_exact(ENTRY).enumerate() {
        const IMPOSSIBLE: Fault = Fault::damaged("its footer lists an impossible blob");
        let mut input = Reader::new(entry);
        let id = ChunkId(input.array()?);
        let [kind, codec] = input.array()?;
        let blob = Blob {
            id,
            kind: BlobKind::from_code(kind).ok_or(IMPOSSIBLE)?,
            codec: Codec::from_code(codec).ok_or(IMPOSSIBLE)?,
            ordinal: ordinal as u32,
            offset,
            stored_len: input.u32()?,
            plain_len: input.u32()?,
        };
        if !blob.is_possible() {
            return Err(IMPOSSIBLE);
        }
        offset += blob.stored_len;
        blobs.push(blob);
    }
    if u64::from(offset) != begins {
        return Err(Fault::damaged("its footer lists other bytes than it has"));
    }
    Ok(blobs)
}
