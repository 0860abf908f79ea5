//! Who wrote an entry.

use crate::{KeyRing, SIGNATURE, Signer, Verifier, WriterKey};
use std::fmt::Debug;

/// Signs entries.
pub trait Sign: Debug + Send + Sync {
    fn verifier(&self) -> Verifier;

    fn sign(&self, message: &[u8]) -> [u8; SIGNATURE];
}

impl Sign for Signer {
    fn verifier(&self) -> Verifier {
        self.verifier()
    }

    fn sign(&self, message: &[u8]) -> [u8; SIGNATURE] {
        self.sign(message)
    }
}

impl Sign for WriterKey {
    fn verifier(&self) -> Verifier {
        self.signer().verifier()
    }

    fn sign(&self, message: &[u8]) -> [u8; SIGNATURE] {
        self.signer().sign(message)
    }
}

impl Sign for KeyRing {
    fn verifier(&self) -> Verifier {
        self.maintenance().verifier()
    }

    fn sign(&self, message: &[u8]) -> [u8; SIGNATURE] {
        self.maintenance().sign(message)
    }
}

/// Checks signatures. A trait, so that a simulation of very many entries need not spend its time on curves.
pub trait Verify: Debug + Send + Sync {
    fn holds(&self, key: &Verifier, message: &[u8], signature: &[u8; SIGNATURE]) -> bool;
}

/// Ed25519, as every repository uses it.
#[derive(Debug, Clone, Copy)]
pub struct Ed25519;

impl Verify for Ed25519 {
    fn holds(&self, key: &Verifier, message: &[u8], signature: &[u8; SIGNATURE]) -> bool {
        key.verify(message, signature)
    }
}
