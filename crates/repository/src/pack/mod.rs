//! Packs: many blobs in one object, each encrypted on its own, with a table of them at the end.
//!
//! ```text
//! header (plain: whose, which cipher, the sealed secret) · blob 0 · blob 1 · … · footer (sealed) · trailer
//! ```
//!
//! The key of a pack comes from a secret that is drawn for it alone and from its header, so that a changed header opens
//! nothing. Blob n is sealed with n as its nonce. A pack is named by the hash of its bytes: who has no key can still tell
//! whether it is whole.

mod builder;
mod format;
mod reader;
#[cfg(test)]
mod tests;

pub use builder::{Pack, PackBuilder};
pub use format::{Blob, MAX_BLOBS, MAX_PACK, MIN_PACK, PACK_HEADER, PackHeader};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use format::{TRAILER, seal_footer};
pub use reader::PackOpener;
