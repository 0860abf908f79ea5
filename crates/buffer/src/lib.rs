//! Page-aligned bytes, filled once by one owner and then shared without copying: from the socket to the journal,
//! the image and the peer.

use bytes::Bytes;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::slice;

/// Alignment of every buffer, and the unit the journal is padded to.
pub const PAGE_SIZE: usize = 4096;

/// Bytes owned by one writer: zeroed at first, aligned to [`PAGE_SIZE`].
pub struct BufferMut {
    bytes: NonNull<u8>,
    capacity: usize,
    len: usize,
    /// Bytes from here on may hold what an earlier use left, and are zeroed when the length reaches them.
    stale_from: usize,
    /// Bytes that were ever written: the others may not be looked at. At least `len` and `stale_from`.
    initialised: usize,
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
        // Fresh memory is not touched before it is used: a peer that announces much costs nothing yet.
        let Spare { bytes, initialised } = take_spare(capacity).unwrap_or_else(|| allocate(capacity));
        let mut buffer = BufferMut { bytes, capacity, len: 0, stale_from: 0, initialised };
        buffer.resize(len);
        buffer
    }

    /// `len` bytes that the caller overwrites, all of them: what is in them may be left from an earlier use.
    pub fn for_overwrite(len: usize) -> BufferMut {
        let mut buffer = BufferMut::with_capacity(0, len);
        buffer.zero(buffer.initialised, len);
        (buffer.len, buffer.stale_from) = (len, len);
        buffer
    }

    pub fn from_slice(bytes: &[u8]) -> BufferMut {
        let mut buffer = BufferMut::for_overwrite(bytes.len());
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
        self.zero(self.stale_from, len);
        self.stale_from = self.stale_from.max(len);
        self.len = len;
    }

    /// Zeroes `from..to`, if that is not empty; `from` is at most `initialised`.
    fn zero(&mut self, from: usize, to: usize) {
        assert!(from <= self.initialised && to <= self.capacity, "zeroes within the buffer");
        if from < to {
            // SAFETY: within the allocation, which this value owns; writing needs nothing initialised.
            unsafe { self.bytes.add(from).write_bytes(0, to - from) };
            self.initialised = self.initialised.max(to);
        }
    }

    /// Grows by a copy of `more`.
    pub fn extend_from_slice(&mut self, more: &[u8]) {
        let end = self.len + more.len();
        if end > self.capacity {
            self.resize(end);
            self[end - more.len()..].copy_from_slice(more);
            return;
        }
        // SAFETY: the capacity holds it, and `more` cannot lie in memory that `&mut self` owns.
        unsafe { self.bytes.add(self.len).copy_from_nonoverlapping(NonNull::from(more).cast(), more.len()) };
        self.len = end;
        self.stale_from = self.stale_from.max(end);
        self.initialised = self.initialised.max(end);
    }

    /// Makes it shareable and read-only.
    pub fn freeze(self) -> Buffer {
        Buffer(self.into())
    }
}

impl Default for BufferMut {
    /// Nothing, and room for nothing.
    fn default() -> BufferMut {
        BufferMut::zeroed(0)
    }
}

impl AsRef<[u8]> for BufferMut {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<BufferMut> for Bytes {
    /// Nothing is copied, and the bytes stay where they are.
    fn from(buffer: BufferMut) -> Bytes {
        Bytes::from_owner(buffer)
    }
}

/// Large buffers are of huge pages, where the system has them: to the disk such a buffer is one piece, not hundreds.
/// Twice the memory for a little over half a huge page, and a fifth less processor time for each byte that is written.
const HUGE_PAGE: usize = 2 * 1024 * 1024;

/// Capacities are whole pages, and above 16 pages few different ones, so that spares fit often.
fn round(capacity: usize) -> usize {
    if capacity > HUGE_PAGE / 2 {
        return capacity.next_multiple_of(HUGE_PAGE);
    }
    let pages = capacity.div_ceil(PAGE_SIZE);
    let pages = if pages > 16 { pages.next_multiple_of(pages.next_power_of_two() / 8) } else { pages };
    pages * PAGE_SIZE
}

/// Bytes of spare allocations a thread keeps: about what it can have waiting for the images, for all that comes
/// back at once. Fresh memory costs a page fault per page, several times the price of filling it: a data path
/// that allocates every batch anew spends most of its time there.
const SPARE_BYTES: usize = 64 * 1024 * 1024;

/// An allocation without a user.
struct Spare {
    bytes: NonNull<u8>,
    initialised: usize,
}

struct Spares {
    by_capacity: BTreeMap<usize, Vec<Spare>>,
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
            for spare in spares {
                // SAFETY: every spare was allocated with this layout and has no other owner.
                unsafe { dealloc(spare.bytes.as_ptr(), layout(capacity)) };
            }
        }
    }
}

thread_local! {
    static SPARES: RefCell<Spares> = RefCell::default();
}

/// Nothing is allocated for nothing.
fn allocate(capacity: usize) -> Spare {
    let layout = layout(capacity);
    if capacity == 0 {
        return Spare { bytes: NonNull::dangling(), initialised: 0 };
    }
    // SAFETY: the layout's size is at least one page.
    let bytes = unsafe { alloc(layout) };
    let bytes = NonNull::new(bytes).unwrap_or_else(|| handle_alloc_error(layout));
    if capacity >= HUGE_PAGE {
        // Only a wish: without huge pages it works as well, and slower.
        // SAFETY: it changes how this allocation, which nobody else has, is backed, and not what it holds.
        unsafe { libc::madvise(bytes.as_ptr().cast(), capacity, libc::MADV_HUGEPAGE) };
    }
    Spare { bytes, initialised: 0 }
}

fn take_spare(capacity: usize) -> Option<Spare> {
    SPARES
        .try_with(|spares| {
            let mut spares = spares.borrow_mut();
            let spare = spares.by_capacity.get_mut(&capacity)?.pop()?;
            spares.bytes -= capacity;
            Some(spare)
        })
        .ok()
        .flatten()
}

/// Gives the calling thread's spare allocations back: for a thread that has nothing to do for some time.
pub fn release_spares() {
    let _ = SPARES.try_with(|spares| {
        let limit = spares.borrow().limit;
        drop(spares.take());
        spares.borrow_mut().limit = limit;
    });
}

/// The calling thread keeps no spare allocations from now on: it frees what others allocate.
pub fn keep_no_spares() {
    release_spares();
    let _ = SPARES.try_with(|spares| spares.borrow_mut().limit = 0);
}

/// True if the allocation was kept.
fn keep_spare(spare: Spare, capacity: usize) -> bool {
    SPARES.try_with(|spares| spares.borrow_mut().keep(spare, capacity)).unwrap_or(false)
}

impl Spares {
    /// What is freed now is what will be asked for next: others make room for it.
    fn keep(&mut self, spare: Spare, capacity: usize) -> bool {
        if capacity > self.limit {
            return false;
        }
        while self.bytes + capacity > self.limit {
            let others =
                self.by_capacity.iter_mut().filter(|(size, spares)| **size != capacity && !spares.is_empty());
            let Some((&size, spares)) = others.max_by_key(|(size, spares)| **size * spares.len()) else {
                return false;
            };
            let other = spares.pop().expect("not empty");
            self.bytes -= size;
            // SAFETY: every spare was allocated with this layout and has no other owner.
            unsafe { dealloc(other.bytes.as_ptr(), layout(size)) };
        }
        self.bytes += capacity;
        self.by_capacity.entry(capacity).or_default().push(spare);
        true
    }
}

fn layout(capacity: usize) -> Layout {
    let align = if capacity >= HUGE_PAGE { HUGE_PAGE } else { PAGE_SIZE };
    Layout::from_size_align(capacity, align).expect("a buffer's size fits the address space")
}

impl Drop for BufferMut {
    fn drop(&mut self) {
        let spare = Spare { bytes: self.bytes, initialised: self.initialised };
        if self.capacity > 0 && !keep_spare(spare, self.capacity) {
            // SAFETY: allocated by `allocate` with this very layout, and nobody else has it.
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
pub struct Buffer(Bytes);

impl Buffer {
    /// Shares `bytes` if they begin at a multiple of [`PAGE_SIZE`], else a copy of them.
    pub fn adopt(bytes: Bytes) -> Buffer {
        if bytes.as_ptr().addr().is_multiple_of(PAGE_SIZE) {
            return Buffer(bytes);
        }
        BufferMut::from_slice(&bytes).freeze()
    }

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
    pub fn joins(&self, next: &Slice) -> bool {
        let (this, that) = (&self.buffer.0, &next.buffer.0);
        this.as_ptr() == that.as_ptr() && this.len() == that.len() && self.start + self.len == next.start
    }

    /// Adds what [joins](Slice::joins) it.
    pub fn extend(&mut self, next: &Slice) {
        debug_assert!(self.joins(next));
        self.len += next.len;
    }

    /// The same bytes, not copied.
    pub fn into_bytes(self) -> Bytes {
        self.buffer.0.slice(self.start..self.start + self.len)
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
pub fn total_len(data: &[Slice]) -> usize {
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
    fn extending_goes_on_where_the_bytes_end_and_leaves_zeroes_behind_it() {
        let mut stale = BufferMut::for_overwrite(2 * PAGE_SIZE);
        stale.fill(0xee);
        drop(stale);
        let mut buffer = BufferMut::with_capacity(0, 2 * PAGE_SIZE);
        buffer.extend_from_slice(&[1; 100]);
        buffer.extend_from_slice(&[2; PAGE_SIZE]);
        assert_eq!((buffer[99], buffer[100], buffer.len(), buffer.capacity()), (1, 2, 4196, 2 * PAGE_SIZE));
        buffer.resize(2 * PAGE_SIZE);
        assert!(is_zero(&buffer[4196..]));
        // Beyond its capacity it moves.
        buffer.extend_from_slice(&[3; PAGE_SIZE]);
        assert_eq!((buffer[99], buffer[4195], buffer[8191], buffer[8192]), (1, 2, 0, 3));
    }

    /// What was received in part is kept as a spare, too.
    #[test]
    fn memory_that_was_never_written_is_zeroed_before_it_is_shown() {
        let mut part = BufferMut::with_capacity(0, 7 * PAGE_SIZE);
        part.extend_from_slice(&[1; 100]);
        drop(part);
        let whole = BufferMut::for_overwrite(7 * PAGE_SIZE);
        assert_eq!((whole[0], whole[99]), (1, 1), "used again");
        assert!(is_zero(&whole[100..]));
        assert_eq!(whole.initialised, 7 * PAGE_SIZE);
    }

    #[test]
    fn nothing_is_allocated_for_nothing() {
        let mut buffer = BufferMut::zeroed(0);
        assert_eq!(buffer.capacity(), 0);
        buffer.extend_from_slice(&[]);
        assert!(buffer.is_empty());
        buffer.extend_from_slice(b"more");
        assert_eq!(&*buffer, b"more");
    }

    #[test]
    fn only_bytes_that_begin_a_page_are_shared() {
        let bytes = Bytes::from(BufferMut::from_slice(&[7; 3 * PAGE_SIZE]));
        let at = bytes.as_ptr();
        assert_eq!(Buffer::adopt(bytes.clone()).as_ptr(), at);
        assert_eq!(
            Buffer::adopt(bytes.slice(PAGE_SIZE..)).whole().into_bytes().as_ptr(),
            at.wrapping_add(PAGE_SIZE)
        );
        let copy = Buffer::adopt(bytes.slice(512..));
        assert_eq!(copy.as_ptr().addr() % PAGE_SIZE, 0);
        assert_eq!(*copy, bytes[512..]);
    }

    #[test]
    fn slices_join_only_within_one_buffer() {
        let buffer = BufferMut::from_slice(&[1; PAGE_SIZE]).freeze();
        let other = BufferMut::from_slice(&[1; PAGE_SIZE]).freeze();
        let mut first = buffer.slice(0..512);
        assert!(first.joins(&buffer.slice(512..1024)));
        assert!(!first.joins(&buffer.slice(1024..1536)));
        assert!(!first.joins(&other.slice(512..1024)));
        first.extend(&buffer.slice(512..1024));
        assert_eq!(first.into_bytes().len(), 1024);
    }

    #[test]
    fn what_was_freed_last_pushes_other_sizes_out() {
        SPARES.with_borrow_mut(|spares| spares.limit = 8 * PAGE_SIZE);
        let small: Vec<_> = (0..8).map(|_| BufferMut::zeroed(PAGE_SIZE)).collect();
        drop(small);
        assert_eq!(SPARES.with_borrow(|spares| spares.bytes), 8 * PAGE_SIZE);
        drop(BufferMut::zeroed(6 * PAGE_SIZE));
        let kept =
            |capacity| SPARES.with_borrow(|spares| spares.by_capacity.get(&capacity).map_or(0, Vec::len));
        assert_eq!((kept(PAGE_SIZE), kept(6 * PAGE_SIZE)), (2, 1));
        // Its own size has no room left: it is freed.
        drop((BufferMut::zeroed(6 * PAGE_SIZE), BufferMut::zeroed(6 * PAGE_SIZE)));
        assert_eq!((kept(PAGE_SIZE), kept(6 * PAGE_SIZE)), (0, 1));
        drop(BufferMut::zeroed(9 * PAGE_SIZE));
        assert_eq!(SPARES.with_borrow(|spares| spares.bytes), 6 * PAGE_SIZE);
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
    fn large_buffers_are_of_whole_huge_pages() {
        for (len, capacity) in
            [(17, 4096), (1 << 20, 1 << 20), ((1 << 20) + 4096, HUGE_PAGE), (5 << 20, 6 << 20)]
        {
            let buffer = BufferMut::for_overwrite(len);
            assert_eq!((buffer.len(), buffer.capacity()), (len, capacity));
            let aligned_to = if capacity < HUGE_PAGE { PAGE_SIZE } else { HUGE_PAGE };
            assert_eq!(buffer.as_ptr().addr() % aligned_to, 0);
        }
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
