//! What ties a witness's state to its place: this machine, this file.

use sha2::{Digest, Sha256};
use std::fs;
use std::io;
use std::os::linux::fs::MetadataExt;
use std::path::Path;

/// A hash of the machine's id and of the state file's inode number and time of birth.
///
/// A copy of the file, on this machine or another, has another inode or another birth; so has one that a
/// backup brought back. A move within its file system and a reboot change nothing. An image of the whole
/// disk that is put back cannot be told from the original: that is what the change counter in each answer, and
/// the replicas' reports, are for.
pub(crate) fn of(state_file: &Path) -> io::Result<String> {
    let machine = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let metadata = fs::metadata(state_file)?;
    let born = metadata.created().ok().and_then(|born| born.duration_since(std::time::UNIX_EPOCH).ok());
    let mut hash = Sha256::new();
    hash.update(b"rempart witness state\0");
    hash.update(machine.trim().as_bytes());
    hash.update(metadata.st_ino().to_le_bytes());
    hash.update(born.unwrap_or_default().as_nanos().to_le_bytes());
    let mut text = String::with_capacity(64);
    for byte in hash.finalize() {
        use std::fmt::Write;
        write!(text, "{byte:02x}").expect("a string takes all");
    }
    Ok(text)
}
