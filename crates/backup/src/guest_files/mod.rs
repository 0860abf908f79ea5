//! The files inside the disks of restore points.
//!
//! - [`GuestReaders`]: the processes that read guests' file systems, one for each. They can do nothing but ask for bytes of
//!   their volume and answer.
//! - [`GuestDisks`]: the disks of a point, and their volumes. [`GuestVolume`]: one of these, and its files.
//! - [`read_files`]: what such a process does.
//!
//! A file system that kills its reader, keeps it busy or has it answer nonsense is an error of itself alone.

mod blocks;
mod child;
mod process;
mod protocol;
mod restore;
mod volume;

pub use blocks::FileContent;
pub use child::read_files;
pub use process::{GuestError, ReadLimits};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use protocol::fuzz_reply;
pub use restore::{list_guest_files, restore_guest_files};
pub use volume::{GuestDisks, GuestReaders, GuestVolume, Looked};

/// The number that stands for the root of every file system.
pub const ROOT: u64 = 0;
