//! Telling who reads in order: what follows is then read before it is asked for.

use std::ops::Range;

/// Readers of one disk that are told apart.
const STREAMS: usize = 8;
/// With many requests in flight they come a little out of order.
const OUT_OF_ORDER: u64 = 8;
/// Chunks in order before anything is read ahead.
const CERTAIN: u32 = 2;

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// The chunk behind the last that was read.
    next: u64,
    /// How often it went on from there.
    steps: u32,
    /// The chunk behind the last that was ordered.
    ahead: u64,
}

/// Where those who read a disk are.
#[derive(Debug)]
pub(super) struct Streams {
    /// The one that was seen last is the last.
    seen: Vec<Stream>,
    /// Chunks that are read ahead, at most.
    most: u64,
}

impl Streams {
    pub fn new(most: u64) -> Streams {
        Streams { seen: Vec::with_capacity(STREAMS), most }
    }

    /// Somebody reads these chunks. Gives those to be read ahead, which may go past the disk's end.
    pub fn read(&mut self, chunks: Range<u64>) -> Option<Range<u64>> {
        if self.most == 0 {
            return None;
        }
        let near = |stream: &Stream| stream.next.abs_diff(chunks.start) <= OUT_OF_ORDER;
        let Some(place) = self.seen.iter().rposition(near) else {
            if self.seen.len() == STREAMS {
                self.seen.remove(0);
            }
            self.seen.push(Stream { next: chunks.end, steps: 0, ahead: chunks.end });
            return None;
        };
        let mut stream = self.seen.remove(place);
        let goes_on = chunks.end > stream.next;
        if goes_on {
            stream.next = chunks.end;
            stream.steps = stream.steps.saturating_add(1);
        }
        let wanted = (goes_on && stream.steps >= CERTAIN).then(|| {
            let window = self.most.min(2 << (stream.steps - CERTAIN).min(32));
            (stream.ahead.max(stream.next)..stream.next + window, window)
        });
        // Half a window at a time: what lies together is read at once.
        let wanted = wanted.filter(|(range, window)| range.end.saturating_sub(range.start) > window / 2);
        let wanted = wanted.map(|(range, _)| range);
        if let Some(range) = &wanted {
            stream.ahead = range.end;
        }
        self.seen.push(stream);
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_is_ordered_once_and_ever_more_of_it() {
        let mut streams = Streams::new(16);
        let ordered: Vec<_> = (0..40).map(|chunk| streams.read(chunk..chunk + 1)).collect();
        let ranges: Vec<Range<u64>> = ordered.into_iter().flatten().collect();
        assert_eq!(ranges[0], 3..5, "two steps after the first");
        assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start), "{ranges:?}");
        let most = ranges.iter().map(|range| range.end - range.start).max().unwrap();
        assert!((9..=16).contains(&most), "more than half a window, and no more than one: {most}");
        assert!(ranges.last().unwrap().end > 40);
    }

    #[test]
    fn many_small_reads_of_one_chunk_are_one_step() {
        let mut streams = Streams::new(16);
        assert!((0..100).all(|_| streams.read(7..8).is_none()));
        assert_eq!(streams.read(8..9), None);
        assert!((0..100).all(|_| streams.read(8..9).is_none()));
        assert_eq!(streams.read(9..10), Some(10..12));
    }

    #[test]
    fn two_that_take_turns_are_told_apart_and_one_who_jumps_gets_nothing() {
        let mut streams = Streams::new(16);
        let mut ahead = [0, 0];
        for step in 0..20 {
            for (reader, start) in [0, 100_000].into_iter().enumerate() {
                ahead[reader] += usize::from(streams.read(start + step..start + step + 1).is_some());
            }
        }
        assert!(ahead[0] >= 3 && ahead[0] == ahead[1], "{ahead:?}");
        assert!((0..50).all(|jump| streams.read(jump * 777..jump * 777 + 1).is_none()));
        assert_eq!(Streams::new(0).read(0..1), None);
    }

    #[test]
    fn requests_a_little_out_of_order_are_one_reader() {
        let mut streams = Streams::new(64);
        let ordered = [0, 2, 1, 4, 3, 6, 5, 8, 7].map(|chunk| streams.read(chunk..chunk + 1));
        assert!(ordered.iter().flatten().count() >= 2, "{ordered:?}");
    }
}
