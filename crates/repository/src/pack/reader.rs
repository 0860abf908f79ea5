//! Reading packs: with a key, and without.

use super::format::{self, Blob, MAX_PACK, PACK_HEADER, PackHeader, TRAILER};
use crate::blob::{BlobKind, Codec, Decompressor};
use crate::error::{Error, ErrorKind, Fault, FoundIn};
use crate::key::{BoxPurpose, Cipher, CipherKey, Domain, Opener, Secret};
use crate::names::PackName;
use rempart_objects::Objects;

/// Opens the blobs of one pack. About 300 bytes: many may be kept.
#[derive(Debug, Clone)]
pub struct PackOpener {
    name: PackName,
    cipher: Cipher,
    key: Secret,
    domain: Domain,
}

impl PackOpener {
    /// Reads the header and opens the pack's secret.
    pub fn fetch(objects: &dyn Objects, opener: &Opener, name: PackName) -> Result<PackOpener, Error> {
        let header = objects.get_range(&name.object(), 0..PACK_HEADER as u64)?;
        Self::new(opener, name, &header)
    }

    /// From at least the first [`PACK_HEADER`] bytes of the pack.
    pub fn new(opener: &Opener, name: PackName, bytes: &[u8]) -> Result<PackOpener, Error> {
        Self::parse(opener, name, bytes).found_in(&name.object())
    }

    pub(crate) fn parse(opener: &Opener, name: PackName, bytes: &[u8]) -> Result<PackOpener, Fault> {
        let header = PackHeader::parse(bytes)?;
        let public = opener.public();
        if header.repository != public.repository {
            return Err(Fault::new(ErrorKind::Foreign, "it is a pack of another repository"));
        }
        if header.recipient != public.recipient.id() {
            return Err(Fault::new(ErrorKind::WrongKey, "it was sealed to another key"));
        }
        let secret = opener
            .open(BoxPurpose::PackSecret, &header.open_part(), &header.sealed_secret)
            .ok_or(Fault::damaged("its header does not open"))?;
        let secret =
            <[u8; 32]>::try_from(secret.as_slice()).map_err(|_| Fault::damaged("its secret is none"))?;
        let key = header.key(&Secret::new(secret));
        Ok(PackOpener { name, cipher: header.cipher, key, domain: opener.domain(header.domain) })
    }

    pub fn name(&self) -> &PackName {
        &self.name
    }

    /// The keys by which its ids were made.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Opens the bytes `blob.range()` of the pack into `plain`, which has [`Blob::plain_len`] bytes, and checks them
    /// against the blob's id: whoever wrote the pack may have lied.
    pub fn open_blob(
        &self,
        blob: &Blob,
        stored: &[u8],
        plain: &mut [u8],
        decompressor: &mut Decompressor,
    ) -> Result<(), Error> {
        self.try_open_blob(blob, stored, plain, decompressor).map_err(|fault| {
            let why = format!("blob {} ({}): {}", blob.ordinal, blob.id, fault.why);
            Error::new(fault.kind, self.name.object(), why)
        })
    }

    fn try_open_blob(
        &self,
        blob: &Blob,
        stored: &[u8],
        plain: &mut [u8],
        decompressor: &mut Decompressor,
    ) -> Result<(), Fault> {
        const CHANGED: Fault = Fault::damaged("it is not what was written");
        if !blob.is_possible() || stored.len() != blob.stored_len as usize {
            return Err(Fault::damaged("there is no such blob"));
        }
        assert_eq!(plain.len(), blob.plain_len as usize, "the caller made room for the content");
        let key = CipherKey::new(self.cipher, &self.key);
        match blob.codec {
            Codec::Plain => {
                key.open_into(blob.nonce(), &blob.context(), stored, plain).ok_or(CHANGED)?;
            }
            Codec::Zstd => {
                let compressed = stored.len() - crate::key::TAG;
                decompressor.compressed.resize(compressed, 0);
                key.open_into(blob.nonce(), &blob.context(), stored, &mut decompressor.compressed)
                    .ok_or(CHANGED)?;
                decompressor.decompress(plain)?;
            }
        }
        let id = match blob.kind {
            BlobKind::Data => self.domain.chunk_id(plain),
            BlobKind::Tree => self.domain.node_id(plain),
        };
        if id != blob.id {
            return Err(Fault::damaged("its content is not what its id says; its writer lied"));
        }
        Ok(())
    }

    /// The blobs of the pack, from its footer.
    pub fn fetch_blobs(&self, objects: &dyn Objects) -> Result<Vec<Blob>, Error> {
        let name = self.name.object();
        let whole = objects.len(&name)?;
        let least = (PACK_HEADER + TRAILER) as u64;
        if !(least..=MAX_PACK as u64).contains(&whole) {
            return Err(Error::new(ErrorKind::Damaged, name, "it has an impossible length"));
        }
        let trailer = objects.get_range(&name, whole - TRAILER as u64..whole)?;
        let trailer = trailer.as_slice().try_into().map_err(|_| Fault::damaged("it ends too early"));
        let footer = trailer.and_then(format::parse_trailer).found_in(&name)? as u64;
        let end = whole - TRAILER as u64;
        let Some(begins) = end.checked_sub(footer).filter(|begins| *begins >= PACK_HEADER as u64) else {
            return Err(Error::new(ErrorKind::Damaged, name, "its footer has an impossible length"));
        };
        let mut sealed = objects.get_range(&name, begins..end)?;
        format::open_footer(&self.key(), &mut sealed, begins).found_in(&name)
    }

    /// The blobs of the pack, all of whose bytes are at hand.
    pub fn blobs(&self, bytes: &[u8]) -> Result<Vec<Blob>, Error> {
        self.parse_blobs(bytes).found_in(&self.name.object())
    }

    pub(crate) fn parse_blobs(&self, bytes: &[u8]) -> Result<Vec<Blob>, Fault> {
        const TOO_SHORT: Fault = Fault::damaged("it ends too early");
        if bytes.len() > MAX_PACK {
            return Err(Fault::damaged("it is longer than a pack can be"));
        }
        let (rest, trailer) = bytes.split_last_chunk().ok_or(TOO_SHORT)?;
        let footer = format::parse_trailer(trailer)?;
        let begins =
            rest.len().checked_sub(footer).filter(|begins| *begins >= PACK_HEADER).ok_or(TOO_SHORT)?;
        format::open_footer(&self.key(), &mut rest[begins..].to_vec(), begins as u64)
    }

    fn key(&self) -> CipherKey {
        CipherKey::new(self.cipher, &self.key)
    }
}
