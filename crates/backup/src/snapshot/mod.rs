//! Snapshots of what a machine has in use, by the programs of who keeps it: what is read is then of one instant.

mod btrfs;
mod lvm;

pub(crate) use btrfs::SubvolumeSnapshot;
pub use lvm::VolumeSnapshot;

use crate::BackupError;
use std::io;
use std::path::Path;
use std::process::{Command, Output};

fn run(program: &str, arguments: &[String]) -> io::Result<Output> {
    // Its messages are read, and LVM complains of descriptors that it did not open.
    Command::new(program).args(arguments).env("LC_ALL", "C").env("LVM_SUPPRESS_FD_WARNINGS", "1").output()
}

fn checked(output: Output) -> io::Result<Output> {
    match output.status.success() {
        true => Ok(output),
        false => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

fn failed(of: &Path, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> BackupError {
    BackupError::File { action: "take a snapshot of", path: of.to_owned(), source: io::Error::other(why) }
}
