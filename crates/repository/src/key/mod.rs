//! Keys: the master key and how it is unlocked, what is derived from it, and keys that only write.
//!
//! ```text
//! passphrase ── argon2id ──┐
//! key file ────────────────┴─ keys/<id> ── master key ─┬─ X25519 pair: opens pack secrets and commits
//!                                                      ├─ Ed25519 maintenance key
//!                                                      └─ one secret a dedup domain ─┬─ ids of chunks
//!                                                                                    ├─ ids of tree nodes
//!                                                                                    └─ index segments
//! a writer's key: public keys · one domain's secret · an Ed25519 key of its own
//! ```

mod cipher;
mod domain;
mod file;
mod ring;
mod sealed_box;
mod secret;
mod signature;
pub(crate) mod text;
mod wrapped;

pub use cipher::Cipher;
pub(crate) use cipher::{CipherKey, Ordinal, TAG};
pub use domain::Domain;
pub use file::{AnyKey, KeyFile};
pub use ring::{KeyRing, MasterKey, Opener, PublicKeys, WriterKey, WriterName};
pub use sealed_box::{BOX_OVERHEAD, BoxPurpose, Recipient};
pub(crate) use secret::{Secret, random};
pub use signature::{SIGNATURE, Signer, Verifier};
pub use wrapped::{PassphraseCost, Unlock, WRAPPED_KEYS, WrappedBy, WrappedKey};
