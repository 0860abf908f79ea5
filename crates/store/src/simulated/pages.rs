//! A file's bytes in pages that copies share until one of them changes: worlds copy whole disks, and change little.

use std::sync::Arc;

const PAGE: usize = 4096;

/// Bytes of a file. A page that was never written is zero and takes no room.
#[derive(Debug, Clone, Default)]
pub(super) struct Pages {
    len: usize,
    pages: Vec<Option<Arc<[u8; PAGE]>>>,
}

impl Pages {
    pub fn zeroed(len: usize) -> Pages {
        let mut pages = Pages::default();
        pages.resize(len);
        pages
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn resize(&mut self, len: usize) {
        let cut = len.next_multiple_of(PAGE).min(self.len);
        if len < cut {
            self.zero(len, cut - len);
        }
        self.pages.resize(len.div_ceil(PAGE), None);
        self.len = len;
    }

    /// Overwrites what is at `offset`; the file grows as far as needed.
    pub fn write(&mut self, mut offset: usize, mut data: &[u8]) {
        if self.len < offset + data.len() {
            self.resize(offset + data.len());
        }
        while !data.is_empty() {
            let (index, at) = (offset / PAGE, offset % PAGE);
            let count = data.len().min(PAGE - at);
            let (now, rest) = data.split_at(count);
            match <&[u8; PAGE]>::try_from(now) {
                Ok(whole) => self.pages[index] = Some(Arc::new(*whole)),
                Err(_) => {
                    let page = self.pages[index].get_or_insert_with(|| Arc::new([0; PAGE]));
                    Arc::make_mut(page)[at..at + count].copy_from_slice(now);
                }
            }
            (offset, data) = (offset + count, rest);
        }
    }

    /// Zeroes what is there; never grows the file.
    pub fn zero(&mut self, offset: usize, len: usize) {
        let end = (offset + len).min(self.len);
        let mut offset = offset;
        while offset < end {
            let (index, at) = (offset / PAGE, offset % PAGE);
            let count = (end - offset).min(PAGE - at);
            if count == PAGE {
                self.pages[index] = None;
            } else if let Some(page) = &mut self.pages[index] {
                Arc::make_mut(page)[at..at + count].fill(0);
            }
            offset += count;
        }
    }

    /// Fills `out`, which is zero, with what is at `offset`, as far as the file goes.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        let count = out.len().min(self.len.saturating_sub(offset));
        let mut done = 0;
        while done < count {
            let (index, at) = ((offset + done) / PAGE, (offset + done) % PAGE);
            let now = (count - done).min(PAGE - at);
            if let Some(page) = &self.pages[index] {
                out[done..done + now].copy_from_slice(&page[at..at + now]);
            }
            done += now;
        }
    }

    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    pub fn byte_mut(&mut self, offset: usize) -> Option<&mut u8> {
        if offset >= self.len {
            return None;
        }
        let page = self.pages[offset / PAGE].get_or_insert_with(|| Arc::new([0; PAGE]));
        Some(&mut Arc::make_mut(page)[offset % PAGE])
    }

    /// Becomes as `other` is in the pages of this range, and as long.
    pub fn take_over(&mut self, other: &Pages, offset: usize, len: usize) {
        self.pages.resize(other.pages.len(), None);
        self.len = other.len;
        let last = (offset + len).div_ceil(PAGE).min(self.pages.len());
        for index in offset / PAGE..last {
            self.pages[index].clone_from(&other.pages[index]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn like_a_vector_of_bytes(
            steps in proptest::collection::vec((0usize..4, 0usize..20_000, 0usize..9_000, 1u8..), 1..30)
        ) {
            let (mut pages, mut bytes) = (Pages::default(), Vec::<u8>::new());
            let mut copies = Vec::new();
            for (kind, offset, len, value) in steps {
                match kind {
                    0 => {
                        pages.write(offset, &vec![value; len]);
                        bytes.resize(bytes.len().max(offset + len), 0);
                        bytes[offset..offset + len].fill(value);
                    }
                    1 => {
                        pages.zero(offset, len);
                        let end = (offset + len).min(bytes.len());
                        if offset < end {
                            bytes[offset..end].fill(0);
                        }
                    }
                    2 => {
                        pages.resize(offset);
                        bytes.resize(offset, 0);
                    }
                    _ => copies.push((pages.clone(), bytes.clone())),
                }
                prop_assert_eq!(pages.to_vec(), bytes.clone());
            }
            for (pages, bytes) in copies {
                prop_assert_eq!(pages.to_vec(), bytes);
            }
        }
    }
}
