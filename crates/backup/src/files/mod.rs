//! Trees of files: read one after the other by a program in the machine, and brought back.
//!
//! - [`Entry`]: what stands in a tree, and its order; pages of entries.
//! - [`Selection`], [`back_up_files`]: which files, and storing what is new of them. What this machine remembers of
//!   the backup before, so that what did not change is not read.
//! - [`FileFinder`]: single files of a point, without reading all that stands in it.
//! - [`FileReader`]: what stands in a point. [`restore_files`], [`check_files`].
//!
//! Who wrote a point may be an enemy of who reads it: nothing in it leads out of the folder that it is restored to.

mod check;
mod copy;
mod entry;
mod find;
mod known;
mod place;
mod read;
mod restore;
mod scan;
mod select;
mod store;

pub use check::{CheckedFiles, DamagedFile, check_files};
pub use copy::copy_files;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use entry::fuzz_page;
pub use entry::{Entry, Kind, Time};
pub use find::{FileFinder, Found};
pub use read::FileReader;
pub(crate) use restore::{Contents, Restore, write_at};
pub use restore::{RestoredFiles, restore_files};
pub use select::{InvalidPattern, Selection};
pub use store::{FilesJob, StoredFiles, back_up_files};

use crate::BackupError;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// An entry's path, for people.
pub(crate) fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path).escape_debug())
}

fn failed(action: &'static str, path: &[u8], source: impl Into<std::io::Error>) -> BackupError {
    let path = Path::new(OsStr::from_bytes(path)).to_owned();
    BackupError::File { action, path, source: source.into() }
}
