//! Identifiers of what a repository holds.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

id! {
    /// A repository. Drawn at random when it is created.
    RepositoryId, 16
}
id! {
    /// One writer's stay in a repository. Drawn at random, never used twice.
    SessionId, 16
}
id! {
    /// A key that may write, and what it signs with.
    KeyId, 16
}
id! {
    /// A pack: the BLAKE3 of its bytes.
    PackId, 32
}
id! {
    /// A chunk of a disk, or a node of a tree: keyed BLAKE3 of its content.
    ChunkId, 32
}
