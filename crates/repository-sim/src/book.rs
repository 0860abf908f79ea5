//! What the world knows and no actor can: what was acknowledged, what lies in each pack, what somebody gave up.

use rempart_repository::{EntryHash, PackId, SessionId};
use rempart_types::WallTime;
use std::collections::{BTreeMap, BTreeSet};

/// A set of chunks: one bit for each of very few.
pub type Chunks = u32;

/// Chunks there are.
pub const CHUNKS: u32 = 14;

/// The chunks of a set, one by one.
pub fn each(chunks: Chunks) -> impl Iterator<Item = Chunks> {
    (0..CHUNKS).map(|bit| 1 << bit).filter(move |chunk| chunks & chunk != 0)
}

/// Bytes of a pack before its chunks: no two packs are equal.
pub const SALT: usize = 16;

/// What a payload, or a pack behind its salt, says.
pub fn chunks_in(bytes: &[u8]) -> Chunks {
    bytes.try_into().map_or(0, Chunks::from_le_bytes)
}

/// The truth.
#[derive(Debug, Default)]
pub struct Book {
    /// Backups that were acknowledged to their writers.
    pub committed: BTreeMap<u64, (EntryHash, Chunks)>,
    /// Backups that somebody set out to forget, and nobody brought back since.
    pub given_up: BTreeSet<u64>,
    /// How often somebody set out to forget something, and what that count was when it was this backup.
    pub set_out: u64,
    pub set_out_last: BTreeMap<u64, u64>,
    /// Backups that were forgotten and are there again: the hashes of their entries. Also of such whose writer does not know yet
    /// that it was through.
    pub brought_back: BTreeMap<u64, EntryHash>,
    /// Those that are about to, by who does: what came between does not count for them.
    pub forgetting: BTreeMap<usize, Vec<u64>>,
    /// What readers were told that they have in use, unless they said since that they end.
    pub in_use: BTreeMap<SessionId, Use>,
    /// Sessions that somebody set out to end, who is not their own.
    pub ended: BTreeSet<SessionId>,
    /// The bytes of packs that anybody made.
    pub packs: BTreeMap<PackId, Vec<u8>>,
    /// What an actor found that must not be.
    pub broken: Option<String>,
    /// How often what happened.
    pub met: BTreeMap<&'static str, u64>,
}

/// Backups that a session has in use.
#[derive(Debug)]
pub struct Use {
    pub roots: Vec<u64>,
    /// When its reader told so.
    pub told: WallTime,
}

impl Book {
    pub fn meet(&mut self, what: &'static str) {
        *self.met.entry(what).or_insert(0) += 1;
    }

    pub fn set_out_to_forget(&mut self, actor: usize, backups: &[u64]) {
        self.given_up.extend(backups);
        self.set_out += 1;
        self.set_out_last.extend(backups.iter().map(|backup| (*backup, self.set_out)));
        self.forgetting.insert(actor, backups.to_vec());
    }

    /// A backup is there again, by an entry that somebody began to append after `set_out` times. Who set out to forget it since, or is
    /// about to, may have done so behind that entry.
    pub fn bring_back(&mut self, backup: u64, hash: EntryHash, set_out: u64) {
        let since = self.set_out_last.get(&backup).is_some_and(|last| *last > set_out);
        if !since && !self.forgetting.values().flatten().any(|number| *number == backup) {
            self.given_up.remove(&backup);
        }
        self.brought_back.insert(backup, hash);
    }

    pub fn chunks_of(&self, pack: PackId) -> Chunks {
        self.packs.get(&pack).map_or(0, |bytes| chunks_in(&bytes[SALT..]))
    }
}
