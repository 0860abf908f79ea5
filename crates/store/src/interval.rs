//! Byte ranges and who wrote them last: newer ranges cut older ones.

use rempart_buffer::Slice;
use rempart_types::Lsn;
use std::collections::BTreeMap;

/// What a range holds.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    Data(Slice),
    Zero { punch: bool },
}

impl Content {
    /// The part from `start` to `end`, counted in bytes from the range's beginning.
    fn part(&self, start: u64, end: u64) -> Content {
        match self {
            Content::Data(slice) => Content::Data(slice.slice(start as usize..end as usize)),
            Content::Zero { punch } => Content::Zero { punch: *punch },
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub end: u64,
    pub lsn: Lsn,
    pub content: Content,
}

/// Disjoint ranges, by their start.
#[derive(Debug, Default)]
pub(crate) struct IntervalMap {
    pieces: BTreeMap<u64, Piece>,
}

impl IntervalMap {
    /// Lays a range over what is there.
    pub fn insert(&mut self, start: u64, end: u64, lsn: Lsn, content: Content) {
        debug_assert!(start < end);
        self.cut(start, end);
        self.pieces.insert(start, Piece { end, lsn, content });
    }

    /// Takes `start..end` out of what is there.
    fn cut(&mut self, start: u64, end: u64) {
        if let Some((&before, piece)) = self.pieces.range_mut(..start).next_back()
            && piece.end > start
        {
            let tail = (piece.end > end).then(|| Piece {
                end: piece.end,
                lsn: piece.lsn,
                content: piece.content.part(end - before, piece.end - before),
            });
            piece.content = piece.content.part(0, start - before);
            piece.end = start;
            if let Some(tail) = tail {
                self.pieces.insert(end, tail);
                return;
            }
        }
        while let Some((&at, piece)) = self.pieces.range(start..end).next() {
            let piece_end = piece.end;
            let piece = self.pieces.remove(&at).expect("just seen");
            if piece_end > end {
                let content = piece.content.part(end - at, piece_end - at);
                self.pieces.insert(end, Piece { end: piece_end, lsn: piece.lsn, content });
            }
        }
    }

    /// Forgets the pieces that touch `start..end` and are not newer than `applied`.
    pub fn forget(&mut self, start: u64, end: u64, applied: Lsn) {
        let first = self.first_touching(start);
        let mut at = first;
        while let Some((&key, piece)) = self.pieces.range(at..end).next() {
            if piece.lsn <= applied {
                self.pieces.remove(&key);
            }
            at = key + 1;
        }
    }

    fn first_touching(&self, start: u64) -> u64 {
        match self.pieces.range(..start).next_back() {
            Some((&before, piece)) if piece.end > start => before,
            _ => start,
        }
    }

    /// The parts of `start..end` in order: `Some(content)` where a piece is, `None` where none is.
    pub fn parts(&self, start: u64, end: u64) -> Vec<(u64, u64, Option<Content>)> {
        let mut parts = Vec::new();
        let mut at = start;
        for (&piece_start, piece) in self.pieces.range(self.first_touching(start)..end) {
            let from = piece_start.max(start);
            let to = piece.end.min(end);
            if from > at {
                parts.push((at, from, None));
            }
            parts.push((from, to, Some(piece.content.part(from - piece_start, to - piece_start))));
            at = to;
        }
        if at < end {
            parts.push((at, end, None));
        }
        parts
    }

    pub fn pieces(&self) -> impl Iterator<Item = (u64, &Piece)> {
        self.pieces.iter().map(|(&start, piece)| (start, piece))
    }

    /// All pieces in order.
    pub fn into_pieces(self) -> impl Iterator<Item = (u64, Piece)> {
        self.pieces.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_match_an_array_of_bytes(
            steps in proptest::collection::vec((0u64..60, 1u64..30, any::<bool>(), any::<bool>()), 1..40),
        ) {
            let mut map = IntervalMap::default();
            let mut naive: Vec<Option<(u64, Option<u8>)>> = vec![None; 100];
            for (index, (start, len, zero, forget)) in steps.into_iter().enumerate() {
                let (lsn, end) = (index as u64 + 1, start + len);
                if forget {
                    // As applying does: everything up to a number, wherever it is.
                    let applied = lsn / 2;
                    map.forget(0, 100, Lsn(applied));
                    for byte in &mut naive { if byte.is_some_and(|(by, _)| by <= applied) { *byte = None; } }
                }
                let data: Vec<u8> = (0..len).map(|i| (lsn * 7 + i) as u8).collect();
                let content = if zero { Content::Zero { punch: false } } else { Content::Data(Slice::copy_of(&data)) };
                map.insert(start, end, Lsn(lsn), content);
                for i in start..end { naive[i as usize] = Some((lsn, (!zero).then(|| data[(i - start) as usize]))); }
                let mut at = 0;
                for (from, to, part) in map.parts(0, 100) {
                    prop_assert_eq!(from, at);
                    for i in from..to {
                        let seen = part.as_ref().map(|content| match content {
                            Content::Data(slice) => Some(slice[(i - from) as usize]),
                            Content::Zero { .. } => None,
                        });
                        prop_assert_eq!(seen, naive[i as usize].map(|(_, byte)| byte));
                    }
                    at = to;
                }
                prop_assert_eq!(at, 100);
            }
        }
    }
}
