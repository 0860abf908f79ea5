//! Linux's swap space: a header in its first page, and nothing behind it that outlives the machine it was of.

use crate::disk::{Fault, Section, u32_at};

/// Pages of the architectures there are.
const PAGES: [u64; 4] = [4096, 8192, 16384, 65536];
/// What a swap space begins with is kept: by its label and UUID the guest finds it again.
const VERSION: u32 = 1;
/// Of pages that begin with a memory image's signature instead.
const HIBERNATED: [&[u8]; 4] = [b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001"];

/// What a section is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swap {
    /// From this byte on nothing counts.
    Behind(u64),
    /// It holds a sleeping machine's memory.
    Hibernated,
    No,
}

pub fn recognise(section: Section<'_>) -> Result<Swap, Fault> {
    recognise_file(section, section.len())
}

/// The same of a file of `size` bytes, of which `start` is the first piece.
pub fn recognise_file(start: Section<'_>, size: u64) -> Result<Swap, Fault> {
    for page in PAGES {
        if start.len() < page || size < 2 * page {
            break;
        }
        let signature = start.read_array::<10>(page - 10)?;
        if HIBERNATED.iter().any(|image| signature.starts_with(image)) {
            return Ok(Swap::Hibernated);
        }
        if signature != *b"SWAPSPACE2" {
            continue;
        }
        let info = start.read_array::<12>(1024)?;
        let (version, last_page) = (u32_at(&info, 0), u32_at(&info, 4));
        // A file system made over an old swap space can keep such a signature.
        let is_sound = version == VERSION && last_page > 0 && u64::from(last_page) < size / page;
        return Ok(if is_sound { Swap::Behind(page) } else { Swap::No });
    }
    Ok(Swap::No)
}
