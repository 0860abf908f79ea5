//! One disk as a ring of record slots, read and written past the page cache.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use lab_guest::record::{self, RECORD_BYTES, Record, Slot};
use lab_guest::ring;

/// `O_DIRECT` on x86-64 Linux.
const O_DIRECT: i32 = 0o40000;
/// Of `linux/fs.h`; each takes a pointer to the first byte and how many they are.
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127F;

unsafe extern "C" {
    fn ioctl(file: i32, request: u64, ...) -> i32;
}

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

    /// What it is long now: it may have grown.
    pub fn measure(&mut self) -> io::Result<u64> {
        self.file.seek(SeekFrom::End(0))
    }

    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Returns when they are written, durable or not.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.order(BLKDISCARD, offset, bytes)
    }

    pub fn write_zeroes(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.order(BLKZEROOUT, offset, bytes)
    }

    fn order(&self, request: u64, offset: u64, bytes: u64) -> io::Result<()> {
        let range = [offset, bytes];
        // SAFETY: both requests read two 64-bit numbers from the pointer, which are there for as long as the call lasts.
        match unsafe { ioctl(self.file.as_raw_fd(), request, range.as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub fn read(&self, slot: u64, buffer: &mut Aligned) -> io::Result<Slot> {
        self.file.read_exact_at(buffer, slot * RECORD_BYTES as u64)?;
        Ok(record::decode(buffer))
    }

    /// Writes a slot and returns when it is durable.
    pub fn write(&self, slot: u64, buffer: &Aligned) -> io::Result<()> {
        self.file.write_all_at(buffer, slot * RECORD_BYTES as u64)?;
        self.file.sync_data()
    }

    pub fn newest(&self, slots: u64, buffer: &mut Aligned) -> io::Result<Option<Record>> {
        ring::newest(slots, |slot| self.read(slot, buffer).map(Slot::record))
    }
}

/// Memory, aligned as `O_DIRECT` needs it.
#[derive(Debug)]
pub struct Aligned {
    memory: *mut u8,
    layout: Layout,
}

impl Aligned {
    /// A slot's worth.
    pub fn slot() -> Aligned {
        Aligned::new(RECORD_BYTES)
    }

    pub fn new(bytes: usize) -> Aligned {
        assert!(bytes > 0);
        let layout = Layout::from_size_align(bytes, RECORD_BYTES).expect("a record is a power of two");
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        assert!(!memory.is_null(), "out of memory");
        Aligned { memory, layout }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.memory, self.layout) }
    }
}

impl Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: so many initialised bytes, borrowed as long as self is.
        unsafe { std::slice::from_raw_parts(self.memory, self.layout.size()) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.memory, self.layout.size()) }
    }
}
