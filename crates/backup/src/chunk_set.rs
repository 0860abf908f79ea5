//! A set of a disk's chunks.

use std::ops::Range;

const BITS: u64 = u64::BITS as u64;

/// Chunks of one disk, one bit each: 10 MiB for 10 TiB in chunks of 128 KiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkSet {
    words: Vec<u64>,
    disk_len: u64,
    chunk_len: u64,
}

impl ChunkSet {
    /// None of a disk of `disk_len` bytes in chunks of `chunk_len`; the last chunk may be shorter.
    pub fn none(disk_len: u64, chunk_len: u64) -> ChunkSet {
        let chunks = disk_len.div_ceil(chunk_len);
        let words = usize::try_from(chunks.div_ceil(BITS)).expect("a bit for each chunk fits into memory");
        ChunkSet { words: vec![0; words], disk_len, chunk_len }
    }

    pub fn all(disk_len: u64, chunk_len: u64) -> ChunkSet {
        let mut set = ChunkSet::none(disk_len, chunk_len);
        set.insert_bytes(0..disk_len);
        set
    }

    /// Chunks that the disk has.
    pub fn chunks(&self) -> u64 {
        self.disk_len.div_ceil(self.chunk_len)
    }

    /// Every chunk that has a byte of `bytes`; what lies past the disk's end is left out.
    pub fn insert_bytes(&mut self, bytes: Range<u64>) {
        let end = bytes.end.min(self.disk_len);
        if bytes.start >= end {
            return;
        }
        self.insert_chunks(bytes.start / self.chunk_len..end.div_ceil(self.chunk_len));
    }

    /// # Panics
    /// If the disk has not so many.
    pub fn insert_chunks(&mut self, chunks: Range<u64>) {
        assert!(chunks.end <= self.chunks(), "chunk {} of {}", chunks.end, self.chunks());
        let mut at = chunks.start;
        while at < chunks.end {
            let (word, bit) = ((at / BITS) as usize, at % BITS);
            let here = (BITS - bit).min(chunks.end - at);
            self.words[word] |= (u64::MAX >> (BITS - here)) << bit;
            at += here;
        }
    }

    /// # Panics
    /// If the disk has not so many.
    pub fn contains(&self, chunk: u64) -> bool {
        assert!(chunk < self.chunks(), "chunk {chunk} of {}", self.chunks());
        self.words[(chunk / BITS) as usize] >> (chunk % BITS) & 1 == 1
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Bytes of the disk in them.
    pub fn bytes(&self) -> u64 {
        let last = self.chunks().checked_sub(1).filter(|&last| self.contains(last));
        let missing = last.map_or(0, |last| (last + 1) * self.chunk_len - self.disk_len);
        self.count() * self.chunk_len - missing
    }

    /// Those that are in both.
    ///
    /// # Panics
    /// If they are not of the same disk.
    pub fn intersect(&mut self, other: &ChunkSet) {
        self.assert_same_disk(other);
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word &= other);
    }

    /// Those that are in either.
    ///
    /// # Panics
    /// If they are not of the same disk.
    pub fn unite(&mut self, other: &ChunkSet) {
        self.assert_same_disk(other);
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
    }

    /// Those that are not in the other.
    ///
    /// # Panics
    /// If they are not of the same disk.
    pub fn subtract(&mut self, other: &ChunkSet) {
        self.assert_same_disk(other);
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word &= !other);
    }

    fn assert_same_disk(&self, other: &ChunkSet) {
        assert_eq!((self.disk_len, self.chunk_len), (other.disk_len, other.chunk_len), "two disks' chunks");
    }

    /// The first run of chunks from `from` on, at most `longest` of them.
    pub fn next_run(&self, from: u64, longest: u64) -> Option<Range<u64>> {
        let start = self.next(from, 0)?;
        let end = self.next(start, u64::MAX).unwrap_or(self.chunks());
        Some(start..end.min(start + longest))
    }

    /// The first chunk from `from` on that is in the set (`flip` 0) or not in it (`flip` all ones).
    fn next(&self, from: u64, flip: u64) -> Option<u64> {
        let mut mask = u64::MAX << (from % BITS);
        for (index, word) in self.words.iter().enumerate().skip((from / BITS) as usize) {
            let word = (word ^ flip) & mask;
            mask = u64::MAX;
            if word != 0 {
                let found = index as u64 * BITS + u64::from(word.trailing_zeros());
                return (found < self.chunks()).then_some(found);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_byte_puts_its_chunk_in() {
        let mut set = ChunkSet::none(1000, 100);
        set.insert_bytes(99..101);
        set.insert_bytes(500..500);
        set.insert_bytes(950..5000);
        assert_eq!((0..10).filter(|&chunk| set.contains(chunk)).collect::<Vec<_>>(), [0, 1, 9]);
        assert_eq!(
            (set.next_run(0, 9), set.next_run(2, 9), set.next_run(0, 1)),
            (Some(0..2), Some(9..10), Some(0..1))
        );
    }

    #[test]
    fn the_last_chunk_may_be_short() {
        let set = ChunkSet::all(1050, 100);
        assert_eq!((set.chunks(), set.count(), set.bytes()), (11, 11, 1050));
        assert_eq!(ChunkSet::none(0, 100).next_run(0, 1), None);
        assert_eq!(ChunkSet::all(0, 100).bytes(), 0);
    }

    proptest! {
        #[test]
        fn it_is_a_set(
            chunks in 1u64..300,
            one in prop::collection::vec((0u64..400, 0u64..100), 0..8),
            other in prop::collection::vec((0u64..400, 0u64..100), 0..8),
            longest in 1u64..100,
        ) {
            let build = |ranges: &[(u64, u64)]| {
                let (mut set, mut twin) = (ChunkSet::none(chunks * 2, 2), BTreeSet::new());
                for &(start, len) in ranges {
                    set.insert_bytes(start * 2..(start + len) * 2);
                    twin.extend((start..start + len).filter(|&chunk| chunk < chunks));
                }
                (set, twin)
            };
            let (one, other) = (build(&one), build(&other));
            let (mut both, mut either) = (one.0.clone(), one.0.clone());
            both.intersect(&other.0);
            either.unite(&other.0);
            let mut less = one.0.clone();
            less.subtract(&other.0);
            let cases = [
                (&one.0, one.1.clone()),
                (&both, one.1.intersection(&other.1).copied().collect()),
                (&less, one.1.difference(&other.1).copied().collect()),
                (&either, one.1.union(&other.1).copied().collect()),
            ];
            for (set, twin) in cases {
                prop_assert_eq!(set.count(), twin.len() as u64);
                let (mut found, mut at) = (BTreeSet::new(), 0);
                while let Some(run) = set.next_run(at, longest) {
                    prop_assert!(run.start >= at && run.end > run.start && run.end - run.start <= longest);
                    at = run.end;
                    found.extend(run);
                }
                prop_assert_eq!(&found, &twin);
            }
        }
    }
}
