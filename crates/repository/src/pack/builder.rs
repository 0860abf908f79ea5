//! Filling a pack.

use super::format::{self, Blob, MAX_BLOBS, MAX_PACK, MIN_PACK, OPEN_HEADER, PACK_HEADER, PackHeader};
use crate::blob::{BlobKind, Codec, Compressor, MAX_PLAIN};
use crate::key::{BoxPurpose, Cipher, CipherKey, Secret, TAG, random};
use crate::names::PackName;
use crate::{ChunkId, PackId, SessionId, WriterKey};
use rempart_buffer::BufferMut;
use std::fmt;

/// A pack that is being filled. Its secret lives here only, and goes with it: nothing is ever added to a pack later, and a
/// second attempt at the same blobs is another pack.
pub struct PackBuilder {
    /// As long as the pack may become; the first `at` bytes are written. Begins a page: a directory takes it past the page
    /// cache.
    buffer: BufferMut,
    at: usize,
    key: CipherKey,
    /// Of all that is written.
    hasher: blake3::Hasher,
    blobs: Vec<Blob>,
}

impl PackBuilder {
    /// A pack of at most `limit` bytes, or what is nearest to that a pack can be. `buffer` is used again
    /// ([`Pack::into_buffer`]), or empty.
    pub fn new(writer: &WriterKey, limit: u64, buffer: BufferMut) -> PackBuilder {
        let secret = Secret::random();
        let public = writer.public();
        let mut header = PackHeader {
            cipher: Cipher::preferred(),
            repository: public.repository,
            writer: writer.signer().id(),
            domain: writer.domain().id(),
            recipient: public.recipient.id(),
            salt: random(),
            sealed_secret: [0; PACK_HEADER - OPEN_HEADER],
        };
        let sealed = writer.seal(BoxPurpose::PackSecret, &header.open_part(), secret.bytes());
        header.sealed_secret = sealed.try_into().expect("a sealed secret has one length");
        Self::with_header(&header, &secret, limit, buffer)
    }

    pub(crate) fn with_header(
        header: &PackHeader,
        secret: &Secret,
        limit: u64,
        mut buffer: BufferMut,
    ) -> PackBuilder {
        buffer.resize(limit.clamp(MIN_PACK as u64, MAX_PACK as u64) as usize);
        buffer[..PACK_HEADER].copy_from_slice(&header.encode());
        let mut hasher = blake3::Hasher::new();
        hasher.update(&buffer[..PACK_HEADER]);
        let key = CipherKey::new(header.cipher, &header.key(secret));
        PackBuilder { buffer, at: PACK_HEADER, key, hasher, blobs: Vec::new() }
    }

    /// Whether a blob with so much content fits for certain.
    pub fn has_room(&self, plain_len: usize) -> bool {
        self.blobs.len() < MAX_BLOBS
            && self.at + plain_len + TAG + format::footer_len(self.blobs.len() + 1) <= self.buffer.len()
    }

    /// Compresses if that pays, encrypts and adds a blob.
    ///
    /// # Panics
    /// If there is no [room](Self::has_room), if it is empty or longer than a chunk may be, or if its id is the reserved
    /// one.
    pub fn add(&mut self, kind: BlobKind, id: ChunkId, plain: &[u8], compressor: &mut Compressor) -> Blob {
        assert!(self.has_room(plain.len()), "the caller asked for room");
        assert!((1..=MAX_PLAIN).contains(&plain.len()) && !id.is_zero(), "there is something to store");
        let out = &mut self.buffer[self.at..];
        // Ids look random: trying to compress nodes is a waste.
        let compressed = match kind {
            BlobKind::Data => compressor.compress(plain, out),
            BlobKind::Tree => None,
        };
        let stored_len = compressed.unwrap_or(plain.len()) + TAG;
        let blob = Blob {
            id,
            kind,
            codec: if compressed.is_some() { Codec::Zstd } else { Codec::Plain },
            ordinal: self.blobs.len() as u32,
            offset: self.at as u32,
            stored_len: stored_len as u32,
            plain_len: plain.len() as u32,
        };
        let out = &mut out[..stored_len];
        match blob.codec {
            Codec::Plain => self.key.seal_into(blob.nonce(), &blob.context(), plain, out),
            Codec::Zstd => self.key.seal_in_place(blob.nonce(), &blob.context(), out),
        }
        // Hashed while it is still in the processor's cache.
        self.hasher.update(out);
        self.at += stored_len;
        self.blobs.push(blob);
        blob
    }

    /// What was added so far.
    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }

    /// Bytes the pack would have now.
    pub fn len(&self) -> u64 {
        (self.at + format::footer_len(self.blobs.len())) as u64
    }

    pub fn is_empty(&self) -> bool {
        self.blobs.is_empty()
    }

    /// The finished pack: bytes that never change again.
    ///
    /// # Panics
    /// If nothing was added.
    pub fn finish(mut self) -> Pack {
        assert!(!self.is_empty(), "a pack holds something");
        let whole = self.len() as usize;
        self.buffer.resize(whole);
        let out = &mut self.buffer[self.at..];
        format::write_footer(&self.blobs, out);
        format::seal_footer(&self.key, out);
        self.hasher.update(out);
        Pack { id: PackId(*self.hasher.finalize().as_bytes()), bytes: self.buffer, blobs: self.blobs }
    }
}

impl fmt::Debug for PackBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackBuilder").field("blobs", &self.blobs.len()).field("len", &self.len()).finish()
    }
}

/// A finished pack. A retry sends these same bytes again, or what is in it is packed anew.
pub struct Pack {
    id: PackId,
    bytes: BufferMut,
    blobs: Vec<Blob>,
}

impl Pack {
    pub fn id(&self) -> PackId {
        self.id
    }

    /// Where it lies when `session` wrote it.
    pub fn name(&self, session: SessionId) -> PackName {
        PackName { session, pack: self.id }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }

    /// Memory for the next one.
    pub fn into_buffer(self) -> BufferMut {
        self.bytes
    }
}

impl fmt::Debug for Pack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (blobs, bytes) = (self.blobs.len(), self.bytes.len());
        f.debug_struct("Pack").field("id", &self.id).field("blobs", &blobs).field("len", &bytes).finish()
    }
}
