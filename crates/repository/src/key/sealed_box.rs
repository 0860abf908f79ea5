//! Boxes that anybody can close and one key opens: HPKE (RFC 9180) in base mode.

use super::Secret;
use crate::RepositoryId;
use aws_lc_rs::agreement::{PrivateKey, X25519};
use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_CHACHA20_POLY1305 as SUITE;
use rustls::crypto::hpke::{EncapsulatedSecret, Hpke, HpkePrivateKey, HpkePublicKey};
use zeroize::Zeroizing;

/// Bytes that a box adds: the encapsulated key and the tag.
pub const BOX_OVERHEAD: usize = 32 + 16;

/// What a box is for: one made for a purpose does not open for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BoxPurpose {
    PackSecret,
    Commit,
    /// The name of whoever has a writer's key.
    WriterName,
    Reader,
    Boot,
}

impl BoxPurpose {
    fn info(self, repository: &RepositoryId) -> Vec<u8> {
        let name: &[u8] = match self {
            BoxPurpose::PackSecret => b"rempart pack secret 1",
            BoxPurpose::Commit => b"rempart commit 1",
            BoxPurpose::WriterName => b"rempart writer name 1",
            BoxPurpose::Reader => b"rempart reader 1",
            BoxPurpose::Boot => b"rempart boot 1",
        };
        [name, &repository.0].concat()
    }
}

/// The public key of a repository: what it is given can be read by who holds the master key, and by nobody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipient(pub [u8; 32]);

impl Recipient {
    /// Names the key in a pack's header, so that a new key can be told from the one it replaced.
    pub fn id(&self) -> [u8; 16] {
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(&self.0).as_bytes()[..16]);
        id
    }

    /// The encapsulated key, the encrypted `plain`, the tag. `context` is needed to open it and not part of it.
    pub(super) fn seal(
        &self,
        repository: &RepositoryId,
        purpose: BoxPurpose,
        context: &[u8],
        plain: &[u8],
    ) -> Vec<u8> {
        let (key, sealed) = SUITE
            .seal(&purpose.info(repository), context, plain, &HpkePublicKey(self.0.to_vec()))
            .expect("the key was made by the same library");
        [key.0, sealed].concat()
    }
}

/// Opens boxes.
#[derive(Debug)]
pub(super) struct RecipientSecret(Secret);

impl RecipientSecret {
    /// Any 32 bytes are an X25519 private key.
    pub fn new(secret: Secret) -> RecipientSecret {
        RecipientSecret(secret)
    }

    pub fn public(&self) -> Recipient {
        let key = PrivateKey::from_private_key(&X25519, self.0.bytes()).expect("32 bytes are a private key");
        let public = key.compute_public_key().expect("every private key has a public one");
        Recipient(public.as_ref().try_into().expect("it has 32 bytes"))
    }

    pub fn open(
        &self,
        repository: &RepositoryId,
        purpose: BoxPurpose,
        context: &[u8],
        sealed: &[u8],
    ) -> Option<Zeroizing<Vec<u8>>> {
        let (key, sealed) = sealed.split_at_checked(32)?;
        let secret = HpkePrivateKey::from(self.0.bytes().to_vec());
        SUITE
            .open(&EncapsulatedSecret(key.to_vec()), &purpose.info(repository), context, sealed, &secret)
            .ok()
            .map(Zeroizing::new)
    }
}
