//! What is said between the two processes, in native byte order: both are one program on one machine.
//!
//! | from | what |
//! |---|---|
//! | parent | first: [`Question`] as JSON, its length before it |
//! | child | offset and length of bytes it wants, of the disks one behind the other; or `u64::MAX` and the length of its answer, then that, as JSON |
//! | parent | 1 and the bytes; or 0: they cannot be read |

use rempart_guest_fs::Wanted;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::ops::Range;

/// What is asked of who looks at the disks of a machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct Question {
    pub wanted: Wanted,
    /// Of each disk, in bytes.
    pub sizes: Vec<u64>,
}

/// Where disks of these sizes lie, one behind the other; none if they are too large for that.
pub fn places(sizes: &[u64]) -> Option<Vec<Range<u64>>> {
    let mut start = 0u64;
    let place = |size: &u64| {
        let place = start..start.checked_add(*size)?;
        start = place.end;
        Some(place)
    };
    sizes.iter().map(place).collect()
}

/// In place of an offset: what follows is the answer.
pub const ANSWER: u64 = u64::MAX;
/// Bytes asked for at once, and of an answer, at most.
pub const LONGEST: u64 = 128 << 20;

pub fn read_number(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

pub fn write_number(to: &mut impl Write, number: u64) -> io::Result<()> {
    to.write_all(&number.to_ne_bytes())
}

pub fn read_text(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let len = read_number(from)?;
    if len > LONGEST {
        return Err(io::Error::other("it is too long"));
    }
    let mut text = vec![0; len as usize];
    from.read_exact(&mut text)?;
    Ok(text)
}

pub fn write_text(to: &mut impl Write, text: &[u8]) -> io::Result<()> {
    write_number(to, text.len() as u64)?;
    to.write_all(text)
}

/// The child's question for bytes of the disk, and the answer to it.
pub fn fetch(from: &mut impl Read, to: &mut impl Write, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    write_number(to, offset)?;
    write_number(to, buffer.len() as u64)?;
    to.flush()?;
    match read_number(from)? {
        1 => from.read_exact(buffer),
        _ => Err(io::Error::other("the parent could not read it")),
    }
}
