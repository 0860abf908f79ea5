//! What backups of a repository reach.
//!
//! The local index lists every blob that there is, in the order of ids. So what is reached takes one bit for each of its
//! entries (10 MiB for 10 TiB in chunks of 128 KiB), and which packs hold what is reached is told by one pass over it. The
//! same bit tells that what is below a node was followed: what many backups share is read once. Chunks are looked for in the
//! index many together, in its order.

use super::kept::{Bits, Ranks};
use super::marks::Marks;
use super::{CollectError, Follow, Kept};
use crate::blob::{BlobKind, Decompressor};
use crate::error::Error;
use crate::index::IndexEntry;
use crate::log::{Number, Numbers, State};
use crate::tree::{FAN_OUT, Node, Tree};
use crate::{BlobReader, ChunkId, Repository};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Follows the trees of backups.
#[derive(Debug)]
pub struct Reach<'r> {
    pub(super) repository: &'r Repository,
    pub(super) reader: BlobReader,
    /// Entries of the log that are in the reader's index.
    covers: u64,
    followed: BTreeSet<u64>,
    /// Backups whose trees cannot be followed, and why: all that they claim to require is kept.
    unreadable: BTreeMap<u64, Error>,
    marks: Marks,
    decompressor: Decompressor,
    /// Packs that can be done without, those into which was put anew what is reached in them, and the pack of what lies elsewhere,
    /// whole, by the first half of its id.
    pub(super) old: Numbers,
    pub(super) new: Numbers,
    pub(super) elsewhere: HashMap<[u8; 16], Number>,
}

/// Bytes of a pack, as it is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Usage {
    pub whole: u64,
    /// Of what is reached, and lies in no newer pack.
    pub used: u64,
    /// Of what is reached, and lies in a newer pack, too.
    pub twice: u64,
}

impl<'r> Reach<'r> {
    pub fn new(repository: &'r Repository, state: &State) -> Result<Reach<'r>, Error> {
        let mut index = repository.whole_index(state)?;
        // Nearly all that is looked for is there.
        index.forget_filter();
        Ok(Reach {
            repository,
            marks: Marks::new(index.file()),
            reader: BlobReader::new(repository, state, index),
            covers: state.next(),
            followed: BTreeSet::new(),
            unreadable: BTreeMap::new(),
            decompressor: Decompressor::new(),
            old: Numbers::new(),
            new: Numbers::new(),
            elsewhere: HashMap::new(),
        })
    }

    /// Backups whose trees cannot be followed, and why. All that they claim to require is kept.
    pub(super) fn told(&self) -> BTreeMap<u64, String> {
        self.unreadable.iter().map(|(root, error)| (*root, error.to_string())).collect()
    }

    /// Whether a backup that was followed reaches the blob. All of them are [settled](Self::settle).
    pub(super) fn is_reached(&self, id: &ChunkId) -> Result<bool, Error> {
        Ok(self.reader.index().file().place_of(id)?.is_some_and(|place| self.marks.hold(place)))
    }

    /// Marks what was reached so far.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        self.marks.settle(self.reader.index().file())
    }

    /// Brings index and marks up to a state.
    fn cover(&mut self, state: &State) -> Result<(), Error> {
        if state.next() == self.covers {
            return Ok(());
        }
        self.settle()?;
        let old = self.reader.replace(state, self.repository.whole_index(state)?);
        self.reader.forget_filter();
        self.covers = state.next();
        self.marks = self.marks.moved(old.file(), self.reader.index().file())?;
        Ok(())
    }

    fn follow_root(&mut self, state: &State, root: u64) -> Result<(), Error> {
        let point = self.repository.point_of(state, root)?;
        let (trees, chunks) = point.reaches(self.repository.chunk_size());
        trees.iter().try_for_each(|tree| self.follow_tree(tree))?;
        chunks.iter().try_for_each(|chunk| self.mark_chunk(chunk))
    }

    fn follow_tree(&mut self, tree: &Tree) -> Result<(), Error> {
        let level = tree.level()?;
        if !tree.root.is_zero() && !self.marks.holds_node(self.reader.index().file(), &tree.root)? {
            self.follow_nodes(&[tree.root], level)?;
        }
        Ok(())
    }

    /// Follows nodes of one level, and marks each when all that is below it is marked, or is to be.
    fn follow_nodes(&mut self, nodes: &[ChunkId], level: u8) -> Result<(), Error> {
        let mut children = Vec::new();
        self.reader.read_all(BlobKind::Tree, nodes, &mut self.decompressor, |place, encoded| {
            let node = Node::parse(encoded, level);
            let node = node.map_err(|fault| fault.of(format!("tree node {}", nodes[place])))?;
            children.extend(node.children.iter().filter(|child| !child.is_zero()));
            Ok(())
        })?;
        if level == 0 {
            children.iter().try_for_each(|chunk| self.mark_chunk(chunk))?;
        } else {
            children.sort_unstable();
            children.dedup();
            // Those of one node lie together: a batch takes few requests.
            for batch in children.chunks(FAN_OUT) {
                let mut below = Vec::new();
                for node in batch {
                    if !self.marks.holds_node(self.reader.index().file(), node)? {
                        below.push(*node);
                    }
                }
                self.follow_nodes(&below, level - 1)?;
            }
        }
        nodes.iter().try_for_each(|node| self.marks.add_node(self.reader.index().file(), node))
    }

    fn mark_chunk(&mut self, id: &ChunkId) -> Result<(), Error> {
        if id.is_zero() { Ok(()) } else { self.marks.add_chunk(self.reader.index().file(), id) }
    }

    /// The entries of each id, and whether it is reached.
    pub(super) fn each_id(
        &self,
        mut each: impl FnMut(&[IndexEntry], bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let index = self.reader.index();
        let mut same: Vec<IndexEntry> = Vec::new();
        let mut first = 0;
        let file = index.file();
        for (place, entry) in (0..).zip(file.entries()) {
            let entry = entry.map_err(|error| file.thrown_away(error))?;
            if same.first().is_some_and(|one| one.id() != entry.id()) {
                each(&same, self.marks.hold(first))?;
                same.clear();
            }
            if same.is_empty() {
                first = place;
            }
            same.push(entry);
        }
        if same.is_empty() { Ok(()) } else { each(&same, self.marks.hold(first)) }
    }

    /// How much of each live pack is of use. What lies in several counts for the newest: it was put although the others were
    /// there, perhaps because they are damaged.
    pub(super) fn usage(&self, state: &State) -> Result<Usages, Error> {
        let mut usages = Usages::of(state);
        self.each_id(|same, reached| {
            let newest = same.iter().map(IndexEntry::pack).filter(|pack| usages.get(*pack).is_some()).max();
            for entry in same {
                let Some(usage) = usages.get_mut(entry.pack()) else { continue };
                usage.whole += entry.stored_len();
                match reached {
                    true if newest == Some(entry.pack()) => usage.used += entry.stored_len(),
                    true => usage.twice += entry.stored_len(),
                    false => {}
                }
            }
            Ok(())
        })?;
        Ok(usages)
    }
}

/// Of all live packs: 24 bytes each.
#[derive(Debug)]
pub(super) struct Usages {
    live: Ranks,
    usages: Vec<Usage>,
}

impl Usages {
    fn of(state: &State) -> Usages {
        let live = state.live();
        Usages { live: Ranks::of(&live), usages: vec![Usage::default(); live.len() as usize] }
    }

    pub fn get(&self, pack: Number) -> Option<Usage> {
        Some(self.usages[self.live.get(pack)?])
    }

    fn get_mut(&mut self, pack: Number) -> Option<&mut Usage> {
        Some(&mut self.usages[self.live.get(pack)?])
    }
}

impl Follow for Reach<'_> {
    fn follow(&mut self, state: &State, root: u64, _kept: &mut Kept) -> Result<(), CollectError> {
        self.cover(state)?;
        if !self.followed.insert(root) {
            return Ok(());
        }
        match self.follow_root(state, root) {
            Ok(()) => Ok(()),
            Err(error) if error.is_of_its_writer() => {
                self.unreadable.insert(root, error);
                Ok(())
            }
            Err(error) => {
                self.followed.remove(&root);
                Err(CollectError::Unknown { root, why: error.into() })
            }
        }
    }

    /// Keeps every copy of what is reached, but those in packs that can be done without.
    fn finish(&mut self, state: &State, kept: &mut Kept) -> Result<(), CollectError> {
        self.cover(state)?;
        self.settle()?;
        let live = Ranks::of(&state.live());
        let is_live = |pack: Number| live.get(pack).is_some();
        let mut listed = Bits::default();
        let survivors: BTreeSet<Number> = self.elsewhere.values().copied().collect();
        self.each_id(|same, reached| {
            let stays = |pack| is_live(pack) && !self.old.contains(pack);
            let other = same.first().and_then(|entry| self.elsewhere.get(&entry.id()));
            let is_elsewhere = same.iter().map(IndexEntry::pack).any(|pack| {
                stays(pack) && (self.new.contains(pack) || other.is_some_and(|other| *other == pack))
            });
            for pack in same.iter().map(IndexEntry::pack) {
                listed.insert(pack.into());
                if reached && is_live(pack) && !(is_elsewhere && self.old.contains(pack)) {
                    kept.keep(pack, self.new.contains(pack) || survivors.contains(&pack));
                }
            }
            Ok(())
        })?;
        // What is in them nobody can tell.
        let unlisted = state.required().iter().filter(|pack| !listed.contains((*pack).into())).collect();
        let unreadable = self.unreadable.keys().filter_map(|root| state.roots().get(root));
        let claimed = unreadable.fold(unlisted, |claimed: Numbers, root| claimed.union(&root.required));
        claimed.iter().filter(|pack| is_live(*pack)).for_each(|pack| kept.keep(pack, false));
        Ok(())
    }
}
