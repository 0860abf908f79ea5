//! One disk as a ring of record slots, read and written past the page cache.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use lab_guest::record::{self, RECORD_BYTES, Record, Slot};
use lab_guest::ring;

/// `O_DIRECT` on x86-64 Linux.
const O_DIRECT: i32 = 0o40000;

#[derive(Debug)]
pub struct Disk {
    file: File,
    pub bytes: u64,
}

impl Disk {
    pub fn open(path: &str) -> io::Result<Disk> {
        let mut file = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(path)?;
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok(Disk { file, bytes })
    }

    pub fn read(&self, slot: u64, buffer: &mut SlotBuffer) -> io::Result<Slot> {
        self.file.read_exact_at(buffer, slot * RECORD_BYTES as u64)?;
        Ok(record::decode(buffer))
    }

    /// Writes a slot and returns when it is durable.
    pub fn write(&self, slot: u64, buffer: &SlotBuffer) -> io::Result<()> {
        self.file.write_all_at(buffer, slot * RECORD_BYTES as u64)?;
        self.file.sync_data()
    }

    pub fn newest(&self, slots: u64, buffer: &mut SlotBuffer) -> io::Result<Option<Record>> {
        ring::newest(slots, |slot| self.read(slot, buffer).map(Slot::record))
    }
}

/// One slot's worth of memory, aligned as `O_DIRECT` needs it.
#[derive(Debug)]
pub struct SlotBuffer(*mut u8);

const LAYOUT: Layout = match Layout::from_size_align(RECORD_BYTES, RECORD_BYTES) {
    Ok(layout) => layout,
    Err(_) => panic!("a record is a power of two"),
};

impl SlotBuffer {
    pub fn new() -> SlotBuffer {
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(LAYOUT) };
        assert!(!memory.is_null(), "out of memory");
        SlotBuffer(memory)
    }
}

impl Drop for SlotBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.0, LAYOUT) }
    }
}

impl Deref for SlotBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: RECORD_BYTES initialised bytes, borrowed as long as self is.
        unsafe { std::slice::from_raw_parts(self.0, RECORD_BYTES) }
    }
}

impl DerefMut for SlotBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.0, RECORD_BYTES) }
    }
}
