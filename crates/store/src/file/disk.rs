use crate::io::{Disk, FileId, IoError, IoOp, IoOutput};
use rempart_types::DiskIndex;
use std::path::Path;

/// A group's files in one directory, locked against a second daemon. Images may be anywhere.
#[derive(Debug)]
pub struct FileDisk {}

#[allow(unused_variables, clippy::todo)]
impl FileDisk {
    /// Opens (and creates) the directory and takes its lock ([`IoErrorKind::Locked`](crate::IoErrorKind) when
    /// another process has it).
    pub fn open(directory: &Path) -> Result<FileDisk, IoError> {
        todo!()
    }
}

#[allow(unused_variables, clippy::todo)]
impl Disk for FileDisk {
    fn list(&mut self) -> Result<Vec<FileId>, IoError> {
        todo!()
    }

    fn execute(&mut self, op: &IoOp) -> Result<IoOutput, IoError> {
        todo!()
    }

    fn locate_image(&mut self, disk: DiskIndex, location: &str) {
        todo!()
    }
}
