//! What is said between the two processes: as in [`leave_out`](crate::leave_out), with more than one question.
//!
//! | from | what |
//! |---|---|
//! | parent | first: how many bytes there are |
//! | parent | a [`Request`], its length before it |
//! | child | offset and length of bytes it wants; or `u64::MAX` and a [`Reply`], its length before it |
//! | parent | 1 and the bytes; or 0: they cannot be read |

use rempart_guest_fs::Volume;
use rempart_guest_fs::files::{Attributes, Content, Extended, FileSystemKind, Name};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Files are named by the numbers that their file system has for them; the root is 0.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// What is on the disk of that number; each disk has these bytes of all that there are.
    Volumes(Vec<Range<u64>>, usize),
    /// Read them as such a file system.
    Open(FileSystemKind),
    Attributes(u64),
    /// The file of that name in a folder.
    Find(u64, Vec<u8>),
    List(u64),
    Content(u64),
    Target(u64),
    Extended(u64),
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Volumes(Vec<Volume>),
    Opened,
    Attributes(Attributes),
    Found(Option<(u64, Attributes)>),
    Names(Vec<Name>),
    Content(Content),
    Target(Vec<u8>),
    Extended(Extended),
}

/// Or why not.
pub type Reply = Result<Answer, String>;
