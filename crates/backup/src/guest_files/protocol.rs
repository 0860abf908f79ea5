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

/// What the parent looks at before it believes it.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_reply(size: u64, bytes: &[u8]) {
    let reply: Result<Reply, _> = postcard::from_bytes(bytes);
    match reply {
        Ok(Ok(Answer::Volumes(volumes))) => {
            for map in volumes.into_iter().filter_map(|volume| volume.map).filter(|map| map.is_sound(size)) {
                let len = map.len();
                let within = |(at, len): (u64, usize)| at + len as u64 <= size;
                assert!(
                    map.pieces(len / 2, 512.min(len - len / 2) as usize).into_iter().all(within),
                    "{map:?}"
                );
            }
        }
        Ok(Ok(Answer::Content(content))) => {
            let _ = content.is_sound(size);
        }
        _ => {}
    }
}
