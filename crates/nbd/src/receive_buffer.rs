//! Bytes received and not yet parsed, in one fixed buffer.

use std::ops::Range;

/// Space kept free for the next receive, if moving what is left can make it.
const LOW_SPACE: usize = 64 * 1024;

pub(crate) struct ReceiveBuffer {
    bytes: Box<[u8]>,
    head: usize,
    tail: usize,
}

impl ReceiveBuffer {
    pub(crate) fn new(capacity: usize) -> ReceiveBuffer {
        ReceiveBuffer { bytes: vec![0; capacity].into_boxed_slice(), head: 0, tail: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.tail - self.head
    }

    pub(crate) fn capacity(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn unparsed(&self) -> &[u8] {
        &self.bytes[self.head..self.tail]
    }

    /// The place of the next `length` unparsed bytes, which are parsed now. They stay readable by
    /// [`ReceiveBuffer::at`] until the next call of [`ReceiveBuffer::space`].
    pub(crate) fn consume(&mut self, length: usize) -> Range<usize> {
        assert!(length <= self.len());
        let start = self.head;
        self.head += length;
        start..self.head
    }

    pub(crate) fn at(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    /// Free bytes at the end, at most `limit`.
    pub(crate) fn space(&mut self, limit: usize) -> &mut [u8] {
        if self.head == self.tail {
            (self.head, self.tail) = (0, 0);
        } else if self.head > 0 && self.bytes.len() - self.tail < LOW_SPACE.min(self.bytes.len() / 2) {
            self.bytes.copy_within(self.head..self.tail, 0);
            (self.head, self.tail) = (0, self.tail - self.head);
        }
        let end = self.bytes.len().min(self.tail.saturating_add(limit));
        &mut self.bytes[self.tail..end]
    }

    /// The first `count` bytes of the last `space` were filled.
    pub(crate) fn filled(&mut self, count: usize) {
        assert!(count <= self.bytes.len() - self.tail, "more was received than there was space for");
        self.tail += count;
    }
}

impl std::fmt::Debug for ReceiveBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReceiveBuffer({}..{} of {})", self.head, self.tail, self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against the naive twin: one flat vector.
        #[test]
        fn bytes_are_parsed_in_the_order_they_came(
            steps in proptest::collection::vec((0usize..300, 0usize..300, 1usize..200), 0..60),
        ) {
            let (mut buffer, mut naive, mut counter) = (ReceiveBuffer::new(256), Vec::new(), 0u8);
            for (received, parsed, limit) in steps {
                let space = buffer.space(limit);
                prop_assert!(space.len() <= limit);
                let count = received.min(space.len());
                for byte in &mut space[..count] {
                    counter = counter.wrapping_add(1);
                    *byte = counter;
                    naive.push(counter);
                }
                buffer.filled(count);
                prop_assert_eq!(buffer.unparsed(), &naive[..]);
                let range = buffer.consume(parsed.min(naive.len()));
                prop_assert_eq!(buffer.at(range.clone()), &naive[..range.len()]);
                naive.drain(..range.len());
                prop_assert!(buffer.len() == 256 || !buffer.space(1).is_empty(), "only a full buffer has no space");
            }
        }
    }
}
