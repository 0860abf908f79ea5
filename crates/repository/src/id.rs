//! Identifiers of what a repository holds.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// A text that is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is no identifier: lowercase hexadecimal digits of the right number are")]
pub struct ParseIdError(String);

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

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<$name, ParseIdError> {
                let decoded = data_encoding::HEXLOWER.decode(text.as_bytes()).ok();
                decoded
                    .and_then(|bytes| bytes.try_into().ok())
                    .map($name)
                    .ok_or_else(|| ParseIdError(text.to_owned()))
            }
        }
    };
}

macro_rules! random {
    ($name:ident) => {
        impl $name {
            pub fn random() -> $name {
                $name(crate::key::random())
            }
        }
    };
}

id! {
    /// A repository. Drawn at random when it is created.
    RepositoryId, 16
}
random!(RepositoryId);
id! {
    /// One writer's stay in a repository. Drawn at random, never used twice.
    SessionId, 16
}
random!(SessionId);
id! {
    /// A key that may write, and what it signs with: the first half of its public key's BLAKE3.
    KeyId, 16
}
id! {
    /// Writers that share their chunks. Drawn at random.
    DomainId, 16
}
random!(DomainId);
id! {
    /// A wrapped copy of the master key. Drawn at random.
    WrappedKeyId, 16
}
random!(WrappedKeyId);
id! {
    /// A pack: the BLAKE3 of its bytes.
    PackId, 32
}
id! {
    /// An index segment as it is stored: the BLAKE3 of its bytes.
    SegmentId, 32
}
id! {
    /// A chunk of a disk, or a node of a tree: keyed BLAKE3 of its content.
    ChunkId, 32
}
id! {
    /// What a line of backups is of: one virtual machine, or one machine's agent.
    ChainId, 16
}
random!(ChainId);
id! {
    /// An entry of the log: the BLAKE3 of its bytes.
    EntryHash, 32
}
