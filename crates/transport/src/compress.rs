//! When to compress a payload. Guest data is often incompressible, and a fast link beats any compressor,
//! so a sample decides for each payload, and a run of failures makes even the sampling rare.

use bytes::Bytes;

/// Whether payloads are compressed on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// For links faster than about 2 Gb/s.
    #[default]
    Off,
    /// Each payload of some size is sampled, and compressed if that looks worth it.
    Sampled,
}

/// Smaller payloads are sent as they are.
const SMALLEST: usize = 4096;
/// How much of a payload is tried first.
const SAMPLE: usize = 8192;
/// After so many payloads in a row that did not shrink, only every so many-th is tried.
const PATIENCE: u32 = 8;

/// The running decision of one connection.
#[derive(Debug, Default)]
pub(crate) struct Compressor {
    policy: Compression,
    failures: u32,
}

impl Compressor {
    pub(crate) fn new(policy: Compression) -> Compressor {
        Compressor { policy, failures: 0 }
    }

    /// The compressed payload, if it is noticeably smaller.
    pub(crate) fn compress(&mut self, payload: &[u8]) -> Option<Bytes> {
        if self.policy == Compression::Off || payload.len() < SMALLEST {
            return None;
        }
        if self.failures >= PATIENCE && !self.failures.is_multiple_of(PATIENCE) {
            self.failures = self.failures.wrapping_add(1);
            return None;
        }
        let compressed = try_compress(payload);
        self.failures = if compressed.is_some() { 0 } else { self.failures.saturating_add(1) };
        compressed
    }
}

fn try_compress(payload: &[u8]) -> Option<Bytes> {
    if payload.len() > 2 * SAMPLE {
        // From the middle: payloads often begin with headers that compress well.
        let middle = (payload.len() - SAMPLE) / 2;
        if !pays(lz4_flex::block::compress(&payload[middle..middle + SAMPLE]).len(), SAMPLE) {
            return None;
        }
    }
    let compressed = lz4_flex::block::compress(payload);
    pays(compressed.len(), payload.len()).then(|| compressed.into())
}

/// A quarter must go.
fn pays(compressed: usize, whole: usize) -> bool {
    compressed <= whole / 4 * 3
}
