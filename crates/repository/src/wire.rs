//! Fixed-width fields, little-endian: how every format here is written, and read without trust.

use crate::error::{ErrorKind, Fault};

pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub fn with_capacity(bytes: usize) -> Writer {
        Writer(Vec::with_capacity(bytes))
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn zeroes(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, 0);
    }

    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (array, rest) = self.0.split_first_chunk().ok_or(Fault::damaged("it ends too early"))?;
        self.0 = rest;
        Ok(*array)
    }

    pub fn u16(&mut self) -> Result<u16, Fault> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Fault> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn magic(&mut self, magic: &[u8; 8]) -> Result<(), Fault> {
        if self.array()? == *magic {
            return Ok(());
        }
        Err(Fault::damaged("it does not start as its kind does"))
    }

    /// The newest version that is known here.
    pub fn version(&mut self, newest: u16) -> Result<u16, Fault> {
        match self.u16()? {
            0 => Err(Fault::damaged("its version is 0")),
            known if known <= newest => Ok(known),
            _ => Err(Fault::new(ErrorKind::Newer, "it was written by a newer version of this program")),
        }
    }

    pub fn zeroes<const N: usize>(&mut self) -> Result<(), Fault> {
        if self.array()? == [0; N] {
            return Ok(());
        }
        Err(Fault::damaged("a reserved byte is not zero"))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
