//! `repository`: what the repository is, in plain text, signed by its owner.

use crate::chunk::ChunkSize;
use crate::error::{Error, ErrorKind, Fault, FoundIn};
use crate::key::{KeyRing, PublicKeys, Recipient, SIGNATURE, Verifier};
use crate::wire::{Reader, Writer};
use crate::{MasterKey, RepositoryId};
use rempart_objects::Name;
use rempart_types::WallTime;

const MAGIC: &[u8; 8] = b"RMPREPOS";
const VERSION: u16 = 1;
/// What is signed.
const SIGNED: usize = 8 + 2 + 2 + 4 + 16 + 8 + 8 + 32 + 32;
/// Bytes of the object.
const WHOLE: usize = SIGNED + SIGNATURE;

/// What everybody who uses a repository must agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    pub keys: PublicKeys,
    pub chunk_size: ChunkSize,
    /// When it was made, by the clock of who made it.
    pub created: WallTime,
    /// How long the place keeps every object against everybody, in milliseconds; 0: not at all.
    pub kept_ms: u64,
    signature: [u8; SIGNATURE],
}

impl Description {
    /// Bytes of the object.
    pub const LEN: u64 = WHOLE as u64;

    pub fn new(ring: &KeyRing, chunk_size: ChunkSize, created: WallTime, kept_ms: u64) -> Description {
        let mut description =
            Description { keys: *ring.public(), chunk_size, created, kept_ms, signature: [0; SIGNATURE] };
        description.signature = ring.maintenance().sign(&description.signed());
        description
    }

    /// The name of the object.
    pub fn name() -> Name {
        Name::new("repository").expect("a word is a name")
    }

    fn signed(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(WHOLE);
        out.bytes(MAGIC);
        out.u16(VERSION);
        out.u16(0);
        out.u32(self.chunk_size.bytes());
        out.bytes(&self.keys.repository.0);
        out.u64(self.created.0);
        out.u64(self.kept_ms);
        out.bytes(&self.keys.recipient.0);
        out.bytes(&self.keys.maintenance.0);
        out.into_bytes()
    }

    /// The bytes of the object.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.signed();
        bytes.extend_from_slice(&self.signature);
        bytes
    }

    /// Reads the object. That its signature fits proves it whole, not that it is the one that is meant: a writer compares
    /// [`Description::keys`] with those of its own key, an owner calls [`Description::unlock`].
    pub fn decode(bytes: &[u8]) -> Result<Description, Error> {
        Self::parse(bytes).found_in(&Self::name())
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Description, Fault> {
        let mut input = Reader::new(bytes);
        input.magic(MAGIC)?;
        input.version(VERSION)?;
        input.zeroes::<2>()?;
        let chunk_size =
            ChunkSize::new(input.u32()?).map_err(|_| Fault::damaged("its chunk size is none"))?;
        let repository = RepositoryId(input.array()?);
        let created = WallTime(input.u64()?);
        let kept_ms = input.u64()?;
        let keys = PublicKeys {
            repository,
            recipient: Recipient(input.array()?),
            maintenance: Verifier(input.array()?),
        };
        let signature = input.array()?;
        if !input.is_empty() || !keys.maintenance.verify(&bytes[..SIGNED], &signature) {
            return Err(Fault::damaged("its signature does not fit"));
        }
        Ok(Description { keys, chunk_size, created, kept_ms, signature })
    }

    /// The keys of this repository. [`ErrorKind::Foreign`] if `master` is that of another.
    pub fn unlock(&self, master: MasterKey) -> Result<KeyRing, Error> {
        let ring = KeyRing::new(self.keys.repository, master);
        if *ring.public() == self.keys {
            return Ok(ring);
        }
        let why = "the key opens another repository than this";
        Err(Error::new(ErrorKind::Foreign, Self::name(), why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_seen() {
        let ring = KeyRing::new(RepositoryId([1; 16]), MasterKey::new([2; 32]));
        let description = Description::new(&ring, ChunkSize::DEFAULT, WallTime(3), 4);
        let bytes = description.encode();
        assert_eq!(bytes.len() as u64, Description::LEN);
        assert_eq!(Description::decode(&bytes).expect("whole"), description);
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let error = Description::decode(&changed).expect_err("damaged");
            assert!(matches!(error.kind, ErrorKind::Damaged | ErrorKind::Newer), "{bit}: {error}");
        }
        for length in 0..bytes.len() {
            assert!(Description::decode(&bytes[..length]).is_err());
        }
        assert!(Description::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
    }

    #[test]
    fn a_key_of_another_repository_is_told() {
        let ring = KeyRing::new(RepositoryId([1; 16]), MasterKey::new([2; 32]));
        let description = Description::new(&ring, ChunkSize::DEFAULT, WallTime(3), 4);
        assert_eq!(description.unlock(MasterKey::new([2; 32])).expect("its own").public(), &description.keys);
        let error = description.unlock(MasterKey::new([3; 32])).expect_err("another's");
        assert_eq!(error.kind, ErrorKind::Foreign);
    }
}
