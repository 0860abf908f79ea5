//! What of a machine's disks is left out of its backup, and restored as zeroes: swap and free space, by what the guest's own file
//! systems say.
//!
//! They are the guest's, so another process reads them: one that can do nothing but ask for bytes and answer. Where it fails,
//! is too slow or finds nothing it understands, everything is backed up.

mod confine;
mod parent;
pub(crate) mod protocol;

pub use confine::answer;
pub(crate) use confine::confine;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use parent::fuzz as fuzz_survey;
pub use parent::{Found, LookLimits, look_confined};
pub use rempart_guest_fs::{LeftOut, Reason, Remark, Wanted};

use crate::ChunkSet;
use rempart_repository::{ChunkSize, Excluded};

/// Ranges of one disk, at most: they lie in the point's log entry. The longest are taken.
const MOST_RANGES: usize = 10_000;

/// Whole chunks of a disk of `size` bytes that hold nothing else than what may be left out.
pub fn whole_chunks(found: &[LeftOut], size: u64, chunk_size: ChunkSize) -> Vec<Excluded> {
    let chunk_len = u64::from(chunk_size.bytes());
    let mut whole: Vec<Excluded> = Vec::new();
    for LeftOut { range, reason } in found {
        let start = range.start.div_ceil(chunk_len) * chunk_len;
        // The last chunk is as long as what is left for it.
        let end = if range.end >= size { size } else { range.end / chunk_len * chunk_len };
        if start < end {
            whole.push(Excluded { offset: start, len: end - start, reason: name(*reason).to_owned() });
        }
    }
    if whole.len() > MOST_RANGES {
        whole.sort_unstable_by_key(|one| std::cmp::Reverse(one.len));
        whole.truncate(MOST_RANGES);
    }
    whole.sort_unstable_by_key(|one| one.offset);
    whole
}

fn name(reason: Reason) -> &'static str {
    match reason {
        Reason::Swap => "swap",
        Reason::PageFile => "page-file",
        Reason::FreeSpace => "free-space",
    }
}

/// The chunks of what was left out of a disk of `size` bytes.
pub(crate) fn chunks(left_out: &[Excluded], size: u64, chunk_len: u64) -> ChunkSet {
    let mut chunks = ChunkSet::none(size, chunk_len);
    for Excluded { offset, len, .. } in left_out {
        chunks.insert_bytes((*offset).min(size)..offset.saturating_add(*len).min(size));
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_chunks_are_left_out() {
        let chunk_size = ChunkSize::new(64 << 10).expect("a size");
        let chunk = 64 << 10;
        let size = 10 * chunk + 100;
        let found = |start, end| LeftOut { range: start..end, reason: Reason::Swap };
        let whole = |start, end| {
            let whole = whole_chunks(&[found(start, end)], size, chunk_size);
            whole.first().map(|one| (one.offset, one.offset + one.len))
        };
        assert_eq!(whole(0, 3 * chunk), Some((0, 3 * chunk)));
        assert_eq!(whole(1, 3 * chunk - 1), Some((chunk, 2 * chunk)));
        assert_eq!(whole(1, 2 * chunk - 1), None);
        assert_eq!(whole(9 * chunk + 5, size), Some((10 * chunk, size)));
        assert_eq!(whole(9 * chunk, size - 1), Some((9 * chunk, 10 * chunk)));
        let all = whole_chunks(&[found(0, chunk), found(9 * chunk, size)], size, chunk_size);
        let chunks = chunks(&all, size, chunk);
        assert!([0, 9, 10].into_iter().all(|chunk| chunks.contains(chunk)) && chunks.count() == 3);
    }
}
