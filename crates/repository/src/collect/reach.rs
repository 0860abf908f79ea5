//! What backups of a repository reach.
//!
//! The local index lists every blob that there is, in the order of ids. So what is reached takes one bit for each of its
//! entries (10 MiB for 10 TiB in chunks of 128 KiB), and which packs hold what is reached is told by one pass over it. The
//! same bit tells that what is below a node was followed: what many backups share is read once.

use super::kept::Bits;
use super::{CollectError, Follow, Kept};
use crate::blob::{BlobKind, Decompressor};
use crate::error::{Error, ErrorKind};
use crate::index::{IndexEntry, LocalIndex};
use crate::log::{Number, Numbers, State, Status};
use crate::tree::{FAN_OUT, Node, Tree};
use crate::{BlobReader, ChunkId, Repository};
use std::collections::{BTreeMap, BTreeSet};

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
    /// Places in the index of the first entry of each id that is reached.
    marks: Bits,
    decompressor: Decompressor,
    /// Packs that were to be rewritten, and those that hold what was reached in them.
    pub(super) old: Numbers,
    pub(super) new: Numbers,
}

/// Bytes of a pack, as it is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Usage {
    pub whole: u64,
    /// Of what is reached, and lies in no newer pack.
    pub used: u64,
}

impl<'r> Reach<'r> {
    pub fn new(repository: &'r Repository, state: &State) -> Result<Reach<'r>, Error> {
        Ok(Reach {
            repository,
            reader: BlobReader::new(repository, state, repository.index(state)?),
            covers: state.next(),
            followed: BTreeSet::new(),
            unreadable: BTreeMap::new(),
            marks: Bits::default(),
            decompressor: Decompressor::new(),
            old: Numbers::new(),
            new: Numbers::new(),
        })
    }

    /// Backups whose trees cannot be followed, and why. All that they claim to require is kept.
    pub(super) fn told(&self) -> BTreeMap<u64, String> {
        self.unreadable.iter().map(|(root, error)| (*root, error.to_string())).collect()
    }

    /// Whether a backup that was followed reaches the blob.
    pub(super) fn is_reached(&self, id: &ChunkId) -> Result<bool, Error> {
        Ok(self.reader.index().place_of(id)?.is_some_and(|place| self.marks.contains(place)))
    }

    /// Brings index and marks up to a state.
    fn cover(&mut self, state: &State) -> Result<(), Error> {
        if state.next() == self.covers {
            return Ok(());
        }
        let old = self.reader.replace(state, self.repository.index(state)?);
        self.covers = state.next();
        self.marks = moved(&self.marks, &old, &self.reader.index())?;
        Ok(())
    }

    fn follow_root(&mut self, state: &State, root: u64) -> Result<(), Error> {
        let point = self.repository.point_of(state, root)?;
        let (trees, chunks) = point.reaches(self.repository.chunk_size());
        trees.iter().try_for_each(|tree| self.follow_tree(tree))?;
        chunks.iter().try_for_each(|chunk| self.mark(chunk))
    }

    fn follow_tree(&mut self, tree: &Tree) -> Result<(), Error> {
        let level = tree.level()?;
        if !tree.root.is_zero() && !self.is_reached(&tree.root)? {
            self.follow_nodes(&[tree.root], level)?;
        }
        Ok(())
    }

    /// Follows nodes of one level, and marks each when all that is below it is marked.
    fn follow_nodes(&mut self, nodes: &[ChunkId], level: u8) -> Result<(), Error> {
        let mut children = Vec::new();
        self.reader.read_all(BlobKind::Tree, nodes, &mut self.decompressor, |place, encoded| {
            let node = Node::parse(encoded, level);
            let node = node.map_err(|fault| fault.of(format!("tree node {}", nodes[place])))?;
            children.extend(node.children.iter().filter(|child| !child.is_zero()));
            Ok(())
        })?;
        if level == 0 {
            children.iter().try_for_each(|chunk| self.mark(chunk))?;
        } else {
            children.sort_unstable();
            children.dedup();
            // Those of one node lie together: a batch takes few requests.
            for batch in children.chunks(FAN_OUT) {
                let mut below = Vec::new();
                for node in batch {
                    if !self.is_reached(node)? {
                        below.push(*node);
                    }
                }
                self.follow_nodes(&below, level - 1)?;
            }
        }
        nodes.iter().try_for_each(|node| self.mark(node))
    }

    /// What no pack has needs no pack to be kept.
    fn mark(&mut self, id: &ChunkId) -> Result<(), Error> {
        if !id.is_zero()
            && let Some(place) = self.reader.index().place_of(id)?
        {
            self.marks.insert(place);
        }
        Ok(())
    }

    /// The entries of each id, and whether it is reached.
    pub(super) fn each_id(
        &self,
        mut each: impl FnMut(&[IndexEntry], bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let index = self.reader.index();
        let mut same: Vec<IndexEntry> = Vec::new();
        let mut first = 0;
        for (place, entry) in (0..).zip(index.entries()) {
            let entry = entry?;
            if same.first().is_some_and(|one| one.id() != entry.id()) {
                each(&same, self.marks.contains(first))?;
                same.clear();
            }
            if same.is_empty() {
                first = place;
            }
            same.push(entry);
        }
        if same.is_empty() { Ok(()) } else { each(&same, self.marks.contains(first)) }
    }

    /// How much of each pack is of use. What lies in several counts for the newest: it was put although the others were
    /// there, perhaps because they are damaged.
    pub(super) fn usage(&self) -> Result<BTreeMap<Number, Usage>, Error> {
        let mut usage: BTreeMap<Number, Usage> = BTreeMap::new();
        self.each_id(|same, reached| {
            for entry in same {
                usage.entry(entry.pack()).or_default().whole += entry.stored_len();
            }
            let newest = same.iter().max_by_key(|entry| entry.pack()).filter(|_| reached);
            if let Some(newest) = newest {
                usage.entry(newest.pack()).or_default().used += newest.stored_len();
            }
            Ok(())
        })?;
        Ok(usage)
    }
}

/// The marks of one index as those of another.
fn moved(marks: &Bits, from: &LocalIndex, to: &LocalIndex) -> Result<Bits, Error> {
    let mut new = Bits::default();
    let mut candidates = (0..).zip(to.entries());
    let mut candidate: Option<(u64, IndexEntry)> = None;
    for (place, entry) in (0..).zip(from.entries()) {
        let entry = entry?;
        if !marks.contains(place) {
            continue;
        }
        while candidate.is_none_or(|(_, candidate)| candidate.id() < entry.id()) {
            let Some((place, next)) = candidates.next() else { return Ok(new) };
            candidate = Some((place, next?));
        }
        if let Some((place, _)) = candidate.filter(|(_, candidate)| candidate.id() == entry.id()) {
            new.insert(place);
        }
    }
    Ok(new)
}

impl Follow for Reach<'_> {
    fn follow(&mut self, state: &State, root: u64, _kept: &mut Kept) -> Result<(), CollectError> {
        self.cover(state)?;
        if !self.followed.insert(root) {
            return Ok(());
        }
        match self.follow_root(state, root) {
            Ok(()) => Ok(()),
            Err(error) if error.is_loss() || error.kind == ErrorKind::Newer => {
                self.unreadable.insert(root, error);
                Ok(())
            }
            Err(error) => {
                self.followed.remove(&root);
                Err(CollectError::Unknown { root, why: error.into() })
            }
        }
    }

    /// Keeps every copy of what is reached, but those whose content was put anew for this.
    fn finish(&mut self, state: &State, kept: &mut Kept) -> Result<(), CollectError> {
        self.cover(state)?;
        let is_live = |pack: Number| state.object(pack).is_some_and(|object| object.status == Status::Live);
        let mut listed = Bits::default();
        self.each_id(|same, reached| {
            let is_anew = same.iter().any(|entry| self.new.contains(entry.pack()));
            for pack in same.iter().map(IndexEntry::pack) {
                listed.insert(pack.into());
                if reached && is_live(pack) && !(is_anew && self.old.contains(pack)) {
                    kept.keep(pack, self.new.contains(pack));
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
