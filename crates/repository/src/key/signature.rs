//! Signatures of log entries and of the repository's description.

use super::Secret;
use crate::KeyId;
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use std::fmt;

/// Bytes of a signature.
pub const SIGNATURE: usize = 64;

/// Signs (Ed25519).
pub struct Signer {
    seed: Secret,
    pair: Ed25519KeyPair,
}

impl Signer {
    pub(super) fn new(seed: Secret) -> Signer {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed.bytes()).expect("any 32 bytes are a seed");
        Signer { seed, pair }
    }

    pub(super) fn seed(&self) -> &Secret {
        &self.seed
    }

    pub fn verifier(&self) -> Verifier {
        Verifier(self.pair.public_key().as_ref().try_into().expect("a public key has 32 bytes"))
    }

    pub fn id(&self) -> KeyId {
        self.verifier().id()
    }

    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE] {
        self.pair.sign(message).as_ref().try_into().expect("a signature has 64 bytes")
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.id())
    }
}

/// Checks signatures: a public key, as it came from anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verifier(pub [u8; 32]);

impl Verifier {
    pub fn id(&self) -> KeyId {
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(&self.0).as_bytes()[..16]);
        KeyId(id)
    }

    pub fn verify(&self, message: &[u8], signature: &[u8; SIGNATURE]) -> bool {
        UnparsedPublicKey::new(&ED25519, &self.0).verify(message, signature).is_ok()
    }
}
