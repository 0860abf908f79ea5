//! Keys of a simulated world: signatures that cost nothing. Nobody here tries to forge one.

use rempart_repository::log::{Sign, Verify};
use rempart_repository::{SIGNATURE, Verifier};

/// A key pair whose public key is its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(pub u8);

impl Sign for Key {
    fn verifier(&self) -> Verifier {
        Verifier([self.0; 32])
    }

    fn sign(&self, message: &[u8]) -> [u8; SIGNATURE] {
        signature(&self.verifier(), message)
    }
}

/// Checks signatures of [`Key`]s.
#[derive(Debug, Clone, Copy)]
pub struct Check;

impl Verify for Check {
    fn holds(&self, key: &Verifier, message: &[u8], there: &[u8; SIGNATURE]) -> bool {
        signature(key, message) == *there
    }
}

fn signature(key: &Verifier, message: &[u8]) -> [u8; SIGNATURE] {
    let hash = blake3::keyed_hash(&key.0, message);
    let mut signature = [0; SIGNATURE];
    signature[..32].copy_from_slice(hash.as_bytes());
    signature
}
