//! Blobs: chunks and tree nodes on their way into a pack and back, compressed where that pays.

use crate::error::Fault;
use std::fmt;
use zstd_safe::{CCtx, CParameter, DCtx};

/// Bytes of a blob's content, at most: the largest chunk.
pub(crate) const MAX_PLAIN: usize = 1 << 20;
/// Level 1 is the fastest; a higher one would make the processor, not the place, what a backup waits for.
const LEVEL: i32 = 1;
/// A compressed blob is at least this part of its content smaller, or it is stored as it is.
const LEAST_SAVING: usize = 32;
/// Places of a blob that are tried before all of it is compressed, and bytes of each in relation to the whole.
const PROBES: usize = 16;
const PROBED_PART: usize = 16;
/// Below it, trying costs as much as doing.
const SMALLEST_PROBED: usize = 16 << 10;

/// What a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlobKind {
    /// A chunk of a disk.
    Data,
    /// A node of a tree.
    Tree,
}

impl BlobKind {
    pub(crate) fn code(self) -> u8 {
        match self {
            BlobKind::Data => 0,
            BlobKind::Tree => 1,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<BlobKind> {
        match code {
            0 => Some(BlobKind::Data),
            1 => Some(BlobKind::Tree),
            _ => None,
        }
    }
}

/// How a blob's content is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As it is.
    Plain,
    Zstd,
}

impl Codec {
    pub(crate) fn code(self) -> u8 {
        match self {
            Codec::Plain => 0,
            Codec::Zstd => 1,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Codec> {
        match code {
            0 => Some(Codec::Plain),
            1 => Some(Codec::Zstd),
            _ => None,
        }
    }
}

/// A worker's compressor: its tables are made once.
pub struct Compressor {
    context: CCtx<'static>,
    sample: Vec<u8>,
    compressed: Vec<u8>,
}

impl Compressor {
    pub fn new() -> Compressor {
        let mut context = CCtx::create();
        context.set_parameter(CParameter::CompressionLevel(LEVEL)).expect("level 1 is one of zstd's");
        Compressor { context, sample: Vec::new(), compressed: Vec::new() }
    }

    /// Bytes of `plain` compressed into the start of `out`, which is at least as long; `None` if that is not worth it. What
    /// `out` holds then is of no meaning.
    pub fn compress(&mut self, plain: &[u8], out: &mut [u8]) -> Option<usize> {
        if plain.len() >= SMALLEST_PROBED && !self.looks_compressible(plain) {
            return None;
        }
        let limit = plain.len() - plain.len().div_ceil(LEAST_SAVING);
        // Too small an output is how zstd is told to give up, at the latest at the limit.
        self.context.compress2(&mut out[..limit], plain).ok()
    }

    /// Compresses a few pieces from all over `plain`, together. Each is cut off from what it could be matched with, so a
    /// little saving there promises more.
    fn looks_compressible(&mut self, plain: &[u8]) -> bool {
        let stride = plain.len() / PROBES;
        let piece = stride / PROBED_PART;
        self.sample.clear();
        for probe in plain.chunks_exact(stride).take(PROBES) {
            self.sample.extend_from_slice(&probe[..piece]);
        }
        let limit = self.sample.len() - self.sample.len() / 64;
        self.compressed.resize(limit, 0);
        self.context.compress2(&mut self.compressed[..], &self.sample).is_ok()
    }
}

impl Default for Compressor {
    fn default() -> Compressor {
        Compressor::new()
    }
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Compressor")
    }
}

/// A worker's decompressor.
pub struct Decompressor {
    context: DCtx<'static>,
    /// What was decrypted and is still compressed.
    pub(crate) compressed: Vec<u8>,
}

impl Decompressor {
    pub fn new() -> Decompressor {
        Decompressor { context: DCtx::create(), compressed: Vec::new() }
    }

    /// Fills `plain`, exactly, from the compressed bytes.
    pub(crate) fn decompress(&mut self, plain: &mut [u8]) -> Result<(), Fault> {
        match self.context.decompress(plain, &self.compressed) {
            Ok(length) if length == plain.len() => Ok(()),
            _ => Err(Fault::damaged("its content does not decompress to its length")),
        }
    }
}

impl Default for Decompressor {
    fn default() -> Decompressor {
        Decompressor::new()
    }
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decompressor")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    fn stored(plain: &[u8]) -> Option<usize> {
        let mut out = vec![0; plain.len()];
        let length = Compressor::new().compress(plain, &mut out)?;
        let mut decompressor = Decompressor::new();
        decompressor.compressed = out[..length].to_vec();
        let mut again = vec![0; plain.len()];
        decompressor.decompress(&mut again).expect("whole");
        assert_eq!(again, plain);
        for wrong in [plain.len() - 1, plain.len() + 1] {
            assert!(decompressor.decompress(&mut vec![0; wrong]).is_err());
        }
        Some(length)
    }

    #[test]
    fn only_what_gets_smaller_is_compressed() {
        for length in [1, 2, 100, 4096, 65536, MAX_PLAIN] {
            assert_eq!(stored(&noise(length)), None, "{length}");
        }
        for length in [4096, 16384, 65536, 262144, MAX_PLAIN, 65536 + 512] {
            let stored = stored(&vec![7; length]).expect("worth it");
            assert!(stored < length / 32, "{stored} of {length}");
        }
    }

    #[test]
    fn a_blob_that_is_partly_noise_is_compressed() {
        let mut plain = noise(262144);
        for part in plain.chunks_exact_mut(65536) {
            part[..16384].fill(b'x');
        }
        let length = stored(&plain).expect("worth it");
        assert!((180_000..200_000).contains(&length), "{length}");
    }
}
