//! What waits to be sent: small pieces gathered in one arena, large ones shared, zeroes not stored at all.

use bytes::{Buf, Bytes};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Shared buffers up to this size are cheaper to copy than to send as a slice of their own.
const INLINE_BYTES: usize = 512;
/// Sent bytes the arena keeps before it moves the rest down.
const RECLAIM_BYTES: usize = 256 * 1024;
/// Capacity the arena keeps when all is sent.
const KEPT_CAPACITY: usize = 1024 * 1024;

static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

#[derive(Debug)]
enum Segment {
    /// The next so many bytes of the arena.
    Arena(usize),
    Shared(Bytes),
    Zeroes(u64),
}

/// A first-in first-out queue of bytes, read as slices for a vectored write.
#[derive(Debug, Default)]
pub(crate) struct OutputQueue {
    arena: Vec<u8>,
    /// Bytes of the arena that are sent.
    arena_head: usize,
    segments: VecDeque<Segment>,
    queued: u64,
}

impl OutputQueue {
    /// Bytes not yet sent.
    pub(crate) fn queued(&self) -> u64 {
        self.queued
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.arena.extend_from_slice(bytes);
            self.grew(bytes.len());
        }
    }

    pub(crate) fn push_shared(&mut self, bytes: Bytes) {
        if bytes.len() <= INLINE_BYTES {
            self.push(&bytes);
        } else {
            self.queued += bytes.len() as u64;
            self.segments.push_back(Segment::Shared(bytes));
        }
    }

    pub(crate) fn push_zeroes(&mut self, length: u64) {
        if length > 0 {
            self.queued += length;
            self.segments.push_back(Segment::Zeroes(length));
        }
    }

    /// Queues `length` zero bytes that the caller overwrites.
    pub(crate) fn push_space(&mut self, length: usize) -> &mut [u8] {
        let start = self.arena.len();
        self.arena.resize(start + length, 0);
        if length > 0 {
            self.grew(length);
        }
        &mut self.arena[start..]
    }

    /// Takes back the last `length` bytes, which `push` or `push_space` queued and nothing has sent.
    pub(crate) fn take_back(&mut self, length: usize) {
        if length == 0 {
            return;
        }
        let Some(Segment::Arena(last)) = self.segments.back_mut() else {
            unreachable!("only bytes of the arena are taken back");
        };
        *last -= length;
        if *last == 0 {
            self.segments.pop_back();
        }
        self.arena.truncate(self.arena.len() - length);
        self.queued -= length as u64;
    }

    fn grew(&mut self, length: usize) {
        self.queued += length as u64;
        match self.segments.back_mut() {
            Some(Segment::Arena(last)) => *last += length,
            _ => self.segments.push_back(Segment::Arena(length)),
        }
    }

    /// Fills `slices` from the front with what waits, and says how many it filled.
    pub(crate) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let (mut filled, mut arena) = (0, self.arena_head);
        for segment in &self.segments {
            if filled == slices.len() {
                break;
            }
            match segment {
                Segment::Arena(length) => {
                    slices[filled] = IoSlice::new(&self.arena[arena..arena + length]);
                    arena += length;
                    filled += 1;
                }
                Segment::Shared(bytes) => {
                    slices[filled] = IoSlice::new(bytes);
                    filled += 1;
                }
                Segment::Zeroes(length) => {
                    let mut left = *length;
                    while left > 0 && filled < slices.len() {
                        let part = left.min(ZEROES.len() as u64);
                        slices[filled] = IoSlice::new(&ZEROES[..part as usize]);
                        left -= part;
                        filled += 1;
                    }
                }
            }
        }
        filled
    }

    /// Drops the first `count` bytes: they are sent.
    pub(crate) fn sent(&mut self, count: usize) {
        assert!(count as u64 <= self.queued, "more was sent than was queued");
        self.queued -= count as u64;
        let mut left = count;
        while left > 0 {
            let segment = self.segments.front_mut().expect("queued bytes have a segment");
            let (taken, finished) = match segment {
                Segment::Arena(length) => {
                    let taken = left.min(*length);
                    *length -= taken;
                    self.arena_head += taken;
                    (taken, *length == 0)
                }
                Segment::Shared(bytes) => {
                    let taken = left.min(bytes.len());
                    bytes.advance(taken);
                    (taken, bytes.is_empty())
                }
                Segment::Zeroes(length) => {
                    let taken = (left as u64).min(*length);
                    *length -= taken;
                    (taken as usize, *length == 0)
                }
            };
            left -= taken;
            if finished {
                self.segments.pop_front();
            }
        }
        if self.segments.is_empty() {
            self.arena.clear();
            self.arena.shrink_to(KEPT_CAPACITY);
            self.arena_head = 0;
        } else if self.arena_head > RECLAIM_BYTES && self.arena_head * 2 > self.arena.len() {
            self.arena.drain(..self.arena_head);
            self.arena_head = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Push(usize),
        Shared(usize),
        Zeroes(u64),
        SpaceTakenBack(usize),
        Sent(usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0usize..2000).prop_map(Step::Push),
            (0usize..4000).prop_map(Step::Shared),
            (0u64..200_000).prop_map(Step::Zeroes),
            (0usize..2000).prop_map(Step::SpaceTakenBack),
            (1usize..8, 0usize..400_000).prop_map(|(slices, bytes)| Step::Sent(slices, bytes)),
        ]
    }

    #[test]
    fn a_queue_that_never_runs_empty_forgets_what_is_sent() {
        let (mut queue, mut expected) = (OutputQueue::default(), 0u32);
        for number in 0..200_000u32 {
            queue.push(&number.to_be_bytes());
            if number < 1000 {
                continue;
            }
            let mut slices = [IoSlice::new(&[])];
            queue.slices(&mut slices);
            assert_eq!(slices[0][..4], expected.to_be_bytes());
            queue.sent(4);
            expected += 1;
        }
        assert_eq!(queue.queued(), 4000);
        assert!(queue.arena.len() < 4 * RECLAIM_BYTES, "the arena is {} bytes", queue.arena.len());
    }

    proptest! {
        /// Against the naive twin: one flat vector.
        #[test]
        fn bytes_leave_in_the_order_they_came(steps in proptest::collection::vec(step(), 0..60)) {
            let (mut queue, mut naive, mut counter) = (OutputQueue::default(), Vec::new(), 0u8);
            let mut fresh = |length: usize| -> Vec<u8> {
                (0..length).map(|_| { counter = counter.wrapping_add(1); counter }).collect()
            };
            for step in steps {
                match step {
                    Step::Push(length) => { let b = fresh(length); queue.push(&b); naive.extend(b); }
                    Step::Shared(length) => { let b = fresh(length); naive.extend(&b); queue.push_shared(b.into()); }
                    Step::Zeroes(length) => { queue.push_zeroes(length); naive.extend(vec![0; length as usize]); }
                    Step::SpaceTakenBack(length) => { queue.push_space(length).fill(7); queue.take_back(length); }
                    Step::Sent(count, bytes) => {
                        let mut slices = vec![IoSlice::new(&[]); count];
                        let filled = queue.slices(&mut slices);
                        let seen: Vec<u8> = slices[..filled].iter().flat_map(|s| s.to_vec()).collect();
                        prop_assert_eq!(&seen[..], &naive[..seen.len()]);
                        prop_assert!(naive.is_empty() || !seen.is_empty());
                        let sent = bytes.min(seen.len());
                        queue.sent(sent);
                        naive.drain(..sent);
                    }
                }
                prop_assert_eq!(queue.queued(), naive.len() as u64);
            }
        }
    }
}
