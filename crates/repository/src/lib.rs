//! A repository of backups: chunks of disks in packs, trees of chunks, and one log that orders everything.

mod id;

pub use id::{ChunkId, KeyId, PackId, RepositoryId, SessionId};
