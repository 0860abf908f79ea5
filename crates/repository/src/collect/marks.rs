//! What is marked as reached: a bit for each entry of the local index.

use super::kept::Bits;
use super::pending::Pending;
use crate::ChunkId;
use crate::error::Error;
use crate::index::LocalIndex;

/// Chunks that are looked for together, in the order of the index, which is read once for them: 1.5 GiB in a file beside it.
const TOGETHER: u64 = 96 << 20;

/// Marks of the entries of one index. A blob's is that of the first entry of its id.
#[derive(Debug)]
pub(super) struct Marks {
    places: Bits,
    /// Chunks that are reached, and not looked for yet.
    pending: Pending,
    together: u64,
    /// Chunks that were pending are lost.
    failed: bool,
}

impl Marks {
    pub fn new(index: &LocalIndex) -> Marks {
        Marks { places: Bits::default(), pending: Pending::new(index), together: TOGETHER, failed: false }
    }

    /// Whether a node is marked. Nodes are marked at once, chunks a batch at a time.
    pub fn holds_node(&self, index: &LocalIndex, id: &ChunkId) -> Result<bool, Error> {
        Ok(index.place_of(id)?.is_some_and(|place| self.places.contains(place)))
    }

    /// Marks a node. What no pack has needs no pack to be kept.
    pub fn add_node(&mut self, index: &LocalIndex, id: &ChunkId) -> Result<(), Error> {
        if let Some(place) = index.place_of(id)? {
            self.places.insert(place);
        }
        Ok(())
    }

    /// Marks a chunk, at the latest when all are [settled](Self::settle).
    pub fn add_chunk(&mut self, index: &LocalIndex, id: &ChunkId) -> Result<(), Error> {
        self.pending.push(id)?;
        if self.pending.len() >= self.together { self.settle(index) } else { Ok(()) }
    }

    /// Looks for the chunks that are pending.
    ///
    /// # Errors
    /// Never a loss: what is pending may be of any backup that was followed, so that no collection can go on without it.
    pub fn settle(&mut self, index: &LocalIndex) -> Result<(), Error> {
        let pending = std::mem::replace(&mut self.pending, Pending::new(index));
        let places = &mut self.places;
        let settled = pending.find(index, |place| places.insert(place));
        self.failed |= settled.is_err();
        settled.map_err(|error| index.thrown_away(error))
    }

    /// Whether the entry at `place`, the first of its id, is marked.
    ///
    /// # Panics
    /// If chunks are pending, or could not be looked for: what was taken for unreached would be removed.
    pub fn hold(&self, place: u64) -> bool {
        assert!(self.pending.len() == 0 && !self.failed, "all chunks were looked for");
        self.places.contains(place)
    }

    /// Those of one index as those of another.
    pub fn moved(&self, from: &LocalIndex, to: &LocalIndex) -> Result<Marks, Error> {
        let mut new = Marks::new(to);
        let mut cursor = to.cursor();
        for (place, entry) in (0..).zip(from.entries()) {
            let entry = entry.map_err(|error| from.thrown_away(error))?;
            if self.hold(place)
                && let Some(place) = cursor.place_of(&entry.id()).map_err(|error| to.thrown_away(error))?
            {
                new.places.insert(place);
            }
        }
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::index::tests::{REPOSITORY, id, local};
    use std::os::unix::fs::FileExt;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    const COUNT: u64 = 2000;

    /// Marks that settle now and then, of chunks in no order, many of them twice and some of them nowhere.
    fn marked(index: &LocalIndex, together: u64, piece: usize) -> Result<Marks, Error> {
        let mut marks = Marks::new(index);
        (marks.together, marks.pending) = (together, Pending::new(index).with_pieces_of(piece, 2));
        for number in (0..3 * COUNT).map(|number| number * 7919 % COUNT * 2 % 4999) {
            marks.add_chunk(index, &id(number))?;
        }
        marks.settle(index)?;
        Ok(marks)
    }

    #[test]
    fn what_is_reached_is_marked_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let index = local(&folder.path().join("index"), COUNT);
        let reached: Vec<u64> = (0..COUNT).map(|number| number * 2 % 4999).collect();
        for (together, piece) in [(u64::MAX, 1 << 20), (u64::MAX, 5), (500, 3), (u64::MAX, 1), (1, 1)] {
            let marks = marked(&index, together, piece).expect("marks");
            for number in 0..COUNT {
                let is_reached = index.place_of(&id(number)).expect("whole").map(|place| marks.hold(place));
                let expected = is_reached.map(|_| reached.contains(&number));
                assert_eq!(is_reached, expected, "chunk {number}, {together} together");
            }
            // And so it is in an index that has more, and one that has less.
            for (other, count) in [("more", COUNT + 500), ("less", COUNT - 500)] {
                let other = local(&folder.path().join(other), count);
                let moved = marks.moved(&index, &other).expect("moves");
                for number in 0..COUNT + 500 {
                    let is_reached =
                        other.place_of(&id(number)).expect("whole").map(|place| moved.hold(place));
                    let expected = is_reached.map(|_| number < COUNT && reached.contains(&number));
                    assert_eq!(is_reached, expected, "chunk {number}");
                }
            }
        }
    }

    /// Whose chunks are pending is not known: that the index is damaged is no loss of one backup.
    #[test]
    fn nothing_is_told_unreached_while_chunks_are_pending_or_lost() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("index");
        let index = local(&path, COUNT);
        let mut marks = Marks::new(&index);
        marks.add_chunk(&index, &id(1)).expect("pends");
        catch_unwind(AssertUnwindSafe(|| marks.hold(0))).expect_err("a chunk is pending");
        let file = std::fs::File::options().write(true).open(&path).expect("opens");
        file.write_all_at(&[0xff; 64], 4096 * 4).expect("damages");
        let settled = (2..COUNT).try_for_each(|number| marks.add_chunk(&index, &id(number)));
        let error = settled.and_then(|()| marks.settle(&index)).expect_err("a block is damaged");
        assert!(!error.is_loss() && error.to_string().contains("begin again"), "{error}");
        catch_unwind(AssertUnwindSafe(|| marks.hold(0))).expect_err("chunks are lost");
        assert_eq!(LocalIndex::open(&path, &REPOSITORY).expect_err("thrown away").kind, ErrorKind::Local);
    }
}
