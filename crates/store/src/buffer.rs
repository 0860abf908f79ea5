//! Page-aligned bytes, filled once by one owner and then shared without copying.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

/// Alignment of every buffer, and the unit the journal is padded to.
pub const PAGE_SIZE: usize = 4096;

/// An extent's size where memory is counted.
pub(crate) const EXTENT_BYTES: usize = rempart_types::EXTENT_SIZE as usize;

/// Bytes owned by one writer: zeroed at first, aligned to [`PAGE_SIZE`].
pub struct BufferMut {
    bytes: NonNull<u8>,
    capacity: usize,
    len: usize,
    /// Bytes from here on may hold what an earlier use left, and are zeroed when the length reaches them.
    stale_from: usize,
}

// SAFETY: the allocation is owned by this value alone and holds plain bytes.
unsafe impl Send for BufferMut {}
// SAFETY: shared access only reads plain bytes.
unsafe impl Sync for BufferMut {}

impl BufferMut {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> BufferMut {
        BufferMut::with_capacity(len, len)
    }

    /// `len` zero bytes, with room to grow to `capacity` without moving.
    pub fn with_capacity(len: usize, capacity: usize) -> BufferMut {
        let capacity = round(capacity.max(len));
        if let Some(bytes) = take_spare(capacity) {
            let mut buffer = BufferMut { bytes, capacity, len: 0, stale_from: 0 };
            buffer.resize(len);
            return buffer;
        }
        let layout = layout(capacity);
        // SAFETY: the layout's size is at least one page.
        let bytes = unsafe { alloc_zeroed(layout) };
        let bytes = NonNull::new(bytes).unwrap_or_else(|| handle_alloc_error(layout));
        BufferMut { bytes, capacity, len, stale_from: capacity }
    }

    /// `len` bytes that the caller overwrites, all of them: what is in them is left from an earlier use in
    /// this process.
    pub fn for_overwrite(len: usize) -> BufferMut {
        let capacity = round(len);
        if let Some(bytes) = take_spare(capacity) {
            return BufferMut { bytes, capacity, len, stale_from: len };
        }
        BufferMut::with_capacity(len, capacity)
    }

    pub fn from_slice(bytes: &[u8]) -> BufferMut {
        let mut buffer = BufferMut::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Grows (the new bytes are zero unless written before) or shrinks.
    pub fn resize(&mut self, len: usize) {
        if len > self.capacity {
            let mut larger = BufferMut::with_capacity(len, len.max(self.capacity * 2));
            larger[..self.len].copy_from_slice(self);
            *self = larger;
        }
        let stale = self.stale_from;
        self.len = len;
        if len > stale {
            self[stale..].fill(0);
            self.stale_from = len;
        }
    }

    /// Makes it shareable and read-only.
    pub fn freeze(self) -> Buffer {
        Buffer(Arc::new(self))
    }
}

/// Capacities are whole pages, and above 16 pages few different ones, so that spares fit often.
fn round(capacity: usize) -> usize {
    let pages = capacity.div_ceil(PAGE_SIZE).max(1);
    let pages = if pages > 16 { pages.next_multiple_of(pages.next_power_of_two() / 8) } else { pages };
    pages * PAGE_SIZE
}

/// Bytes of spare allocations a thread keeps. Fresh memory costs a page fault per page, several times the
/// price of filling it: a data path that allocates every batch anew spends most of its time there.
const SPARE_BYTES: usize = 16 * 1024 * 1024;

struct Spares {
    by_capacity: BTreeMap<usize, Vec<NonNull<u8>>>,
    bytes: usize,
    limit: usize,
}

impl Default for Spares {
    fn default() -> Spares {
        Spares { by_capacity: BTreeMap::new(), bytes: 0, limit: SPARE_BYTES }
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        for (&capacity, spares) in &self.by_capacity {
            for bytes in spares {
                // SAFETY: every spare was allocated with this layout and has no other owner.
                unsafe { dealloc(bytes.as_ptr(), layout(capacity)) };
            }
        }
    }
}

thread_local! {
    static SPARES: RefCell<Spares> = RefCell::default();
}

fn take_spare(capacity: usize) -> Option<NonNull<u8>> {
    SPARES
        .try_with(|spares| {
            let mut spares = spares.borrow_mut();
            let bytes = spares.by_capacity.get_mut(&capacity)?.pop()?;
            spares.bytes -= capacity;
            Some(bytes)
        })
        .ok()
        .flatten()
}

/// Gives the calling thread's spare allocations back: for a thread that has nothing to do for some time.
pub(crate) fn release_spares() {
    let _ = SPARES.try_with(|spares| drop(spares.take()));
}

/// The calling thread keeps no spare allocations from now on: it frees what others allocate.
pub(crate) fn keep_no_spares() {
    release_spares();
    let _ = SPARES.try_with(|spares| spares.borrow_mut().limit = 0);
}

/// True if the allocation was kept.
fn keep_spare(bytes: NonNull<u8>, capacity: usize) -> bool {
    SPARES
        .try_with(|spares| {
            let mut spares = spares.borrow_mut();
            let room = spares.bytes + capacity <= spares.limit;
            if room {
                spares.bytes += capacity;
                spares.by_capacity.entry(capacity).or_default().push(bytes);
            }
            room
        })
        .unwrap_or(false)
}

fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity, PAGE_SIZE).expect("a buffer's size fits the address space")
}

impl Drop for BufferMut {
    fn drop(&mut self) {
        if !keep_spare(self.bytes, self.capacity) {
            // SAFETY: allocated in `with_capacity` with this very layout, and nobody else has it.
            unsafe { dealloc(self.bytes.as_ptr(), layout(self.capacity)) }
        }
    }
}

impl Deref for BufferMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len <= capacity` initialised bytes that this value owns.
        unsafe { slice::from_raw_parts(self.bytes.as_ptr(), self.len) }
    }
}

impl DerefMut for BufferMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access unique.
        unsafe { slice::from_raw_parts_mut(self.bytes.as_ptr(), self.len) }
    }
}

impl fmt::Debug for BufferMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufferMut({} bytes)", self.len)
    }
}

/// Shared read-only bytes. Cloning shares.
#[derive(Clone)]
pub struct Buffer(Arc<BufferMut>);

impl Buffer {
    /// All of it.
    pub fn whole(&self) -> Slice {
        self.slice(0..self.len())
    }

    /// # Panics
    /// If `range` is not inside the buffer.
    pub fn slice(&self, range: Range<usize>) -> Slice {
        assert!(range.start <= range.end && range.end <= self.len(), "a slice inside its buffer");
        Slice { buffer: self.clone(), start: range.start, len: range.end - range.start }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len())
    }
}

/// A part of a shared buffer, which it keeps alive.
#[derive(Clone)]
pub struct Slice {
    buffer: Buffer,
    start: usize,
    len: usize,
}

impl Slice {
    /// A copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Slice {
        BufferMut::from_slice(bytes).freeze().whole()
    }

    /// A part of this part.
    ///
    /// # Panics
    /// If `range` is not inside the slice.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Slice {
        assert!(range.start <= range.end && range.end <= self.len, "a slice inside its slice");
        Slice { buffer: self.buffer.clone(), start: self.start + range.start, len: range.end - range.start }
    }

    /// True when `next` follows this slice in the same buffer, so that both are one slice.
    pub(crate) fn joins(&self, next: &Slice) -> bool {
        Arc::ptr_eq(&self.buffer.0, &next.buffer.0) && self.start + self.len == next.start
    }

    pub(crate) fn extend(&mut self, next: &Slice) {
        debug_assert!(self.joins(next));
        self.len += next.len;
    }
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.start..self.start + self.len]
    }
}

impl fmt::Debug for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slice({} bytes)", self.len)
    }
}

impl PartialEq for Slice {
    fn eq(&self, other: &Slice) -> bool {
        **self == **other
    }
}

impl Eq for Slice {}

/// Bytes of all these together.
pub(crate) fn total_len(data: &[Slice]) -> usize {
    data.iter().map(|slice| slice.len()).sum()
}

/// True when every byte is zero: such an extent needs no space.
pub fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: any byte pattern is a valid u64; `align_to` splits the slice correctly.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    head.iter().all(|&b| b == 0) && words.iter().all(|&w| w == 0) && tail.iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_keeps_the_bytes_and_the_alignment() {
        let mut buffer = BufferMut::from_slice(b"rempart");
        buffer.resize(3 * PAGE_SIZE);
        assert_eq!(&buffer[..7], b"rempart");
        assert!(is_zero(&buffer[7..]));
        assert_eq!(buffer.as_ptr() as usize % PAGE_SIZE, 0);
        let shared = buffer.freeze();
        assert_eq!(&*shared.slice(2..7).slice(1..3), b"pa");
    }

    #[test]
    fn reused_memory_reads_as_zero() {
        for capacity in [PAGE_SIZE, 5 * PAGE_SIZE, 40 * PAGE_SIZE] {
            let mut first = BufferMut::zeroed(capacity);
            first.fill(0xee);
            drop(first);
            let mut second = BufferMut::with_capacity(100, capacity);
            assert!(is_zero(&second));
            second.resize(capacity - 7);
            assert!(is_zero(&second));
            second.resize(10);
            second.resize(capacity);
            assert!(is_zero(&second));
        }
    }

    #[test]
    fn released_spares_are_gone() {
        drop(BufferMut::zeroed(5 * PAGE_SIZE));
        assert!(SPARES.with_borrow(|spares| spares.bytes) > 0);
        release_spares();
        assert_eq!(SPARES.with_borrow(|spares| (spares.bytes, spares.by_capacity.len())), (0, 0));
        keep_no_spares();
        drop(BufferMut::zeroed(5 * PAGE_SIZE));
        assert_eq!(SPARES.with_borrow(|spares| spares.bytes), 0);
    }

    #[test]
    fn one_set_bit_is_not_zero() {
        for at in [0, 1, 7, 8, 4095] {
            let mut buffer = BufferMut::zeroed(4096);
            assert!(is_zero(&buffer));
            buffer[at] = 1;
            assert!(!is_zero(&buffer));
        }
    }
}
