//! A disk, and parts of it.

use std::io;
use thiserror::Error;

/// Bytes that can be read anywhere.
pub trait Disk {
    /// Bytes in all.
    fn len(&self) -> u64;

    /// Whether there is nothing on it.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset` on. Nobody asks beyond the end.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// Why something on a disk was not understood.
#[derive(Debug, Error)]
pub enum Fault {
    #[error("the disk cannot be read")]
    Read(#[from] io::Error),
    /// It is damaged, or made by somebody who wants harm.
    #[error("{0}")]
    Damaged(&'static str),
    /// It is sound, and of a kind that is not known here.
    #[error("{0}")]
    Unsupported(&'static str),
    /// It is in use: what it says of itself is not all there is to say.
    #[error("{0}")]
    InUse(&'static str),
}

impl Fault {
    pub(crate) fn damaged<T>(why: &'static str) -> Result<T, Fault> {
        Err(Fault::Damaged(why))
    }
}

/// A part of a disk: a partition. Offsets are its own.
#[derive(Clone, Copy)]
pub struct Section<'a> {
    disk: &'a dyn Disk,
    start: u64,
    len: u64,
}

impl<'a> Section<'a> {
    /// All of it.
    pub fn whole(disk: &'a dyn Disk) -> Section<'a> {
        Section { disk, start: 0, len: disk.len() }
    }

    /// `None` if it is not all on the disk.
    pub fn part(&self, start: u64, len: u64) -> Option<Section<'a>> {
        let end = start.checked_add(len)?;
        (end <= self.len).then_some(Section { disk: self.disk, start: self.start + start, len })
    }

    /// Where it begins on the disk.
    pub fn start(&self) -> u64 {
        self.start
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        let fits = offset.checked_add(buffer.len() as u64).is_some_and(|end| end <= self.len);
        if !fits {
            return Fault::damaged("it names bytes behind its end");
        }
        Ok(self.disk.read(self.start + offset, buffer)?)
    }

    pub fn read_array<const N: usize>(&self, offset: u64) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    pub fn read_vec(&self, offset: u64, len: usize) -> Result<Vec<u8>, Fault> {
        // Before the memory is asked for.
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Fault::damaged("it names bytes behind its end");
        }
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }
}

impl std::fmt::Debug for Section<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Section({}..{})", self.start, self.start + self.len)
    }
}

/// Little-endian numbers in a buffer that is known to be long enough.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
