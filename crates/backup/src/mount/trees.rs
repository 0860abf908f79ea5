//! Files that were read within a machine: entries of a tree, as FUSE wants to have them.

use super::guests::{ROOT, beside, file_type, shape};
use super::{PointFiles, SECTOR};
use crate::files::{Entry, FileFinder, Found, Kind};
use crate::{DiskReader, ReadError};
use fuser::{Errno, FileAttr, FileType, INodeNo};
use rempart_guest_fs::files::{Attributes, Kind as Shape};
use rempart_repository::Error;

impl PointFiles {
    /// What is in a folder by that name. `at` is any number of the same tree.
    pub(super) fn child(
        &self,
        at: INodeNo,
        files: &FileFinder,
        folder: u64,
        name: &[u8],
    ) -> Result<FileAttr, Errno> {
        let mut path = self.path_of(files, folder)?;
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(name);
        let lost = |error| self.lost(files, error);
        let mut found = files.find(&path).map_err(lost)?.ok_or(Errno::ENOENT)?;
        if let Kind::Again { of } = &found.entry.kind {
            // One file, whatever it is called by. A name of a name, or of a folder, only an enemy writes.
            let first = files.find(of).map_err(lost)?;
            let is_file = |first: &Found| matches!(first.entry.kind, Kind::File { .. });
            found = first.filter(is_file).ok_or(Errno::EIO)?;
        }
        Ok(attributes(beside(at, found.number)?, &found.entry))
    }

    pub(super) fn attributes_of(
        &self,
        ino: INodeNo,
        files: &FileFinder,
        file: u64,
    ) -> Result<FileAttr, Errno> {
        let entry = files.get(file).map_err(|error| self.lost(files, error))?;
        Ok(attributes(ino, &entry))
    }

    pub(super) fn target(&self, files: &FileFinder, file: u64) -> Result<Vec<u8>, Errno> {
        match files.get(file).map_err(|error| self.lost(files, error))?.kind {
            Kind::Link { target } => Ok(target),
            _ => Err(Errno::EINVAL),
        }
    }

    /// What could not be read when it was backed up cannot be read here.
    pub(super) fn content(&self, files: &FileFinder, file: u64) -> Result<DiskReader, Errno> {
        files.content(file).map_err(|error| self.lost(files, error))?.ok_or(Errno::EIO)
    }

    pub(super) fn children_of(
        &self,
        at: INodeNo,
        files: &FileFinder,
        folder: u64,
    ) -> Result<Vec<(INodeNo, FileType, Vec<u8>)>, Errno> {
        let path = self.path_of(files, folder)?;
        let children = files.children(&path).map_err(|error| self.lost(files, error))?;
        if children.is_empty() && folder != ROOT {
            // What is not known is not nothing.
            let entry = files.get(folder).map_err(|error| self.lost(files, error))?;
            entry.unread.map_or(Ok(()), |_| Err(Errno::EIO))?;
        }
        let begin = if path.is_empty() { 0 } else { path.len() + 1 };
        let named = children.into_iter().map(|Found { number, mut entry }| {
            let kind = file_type(shape_of(&entry.kind));
            Ok((beside(at, number)?, kind, entry.path.split_off(begin)))
        });
        named.collect()
    }

    fn path_of(&self, files: &FileFinder, folder: u64) -> Result<Vec<u8>, Errno> {
        if folder == ROOT {
            return Ok(Vec::new());
        }
        match files.get(folder).map_err(|error| self.lost(files, error))? {
            Entry { kind: Kind::Folder, path, .. } => Ok(path),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn lost(&self, files: &FileFinder, source: Error) -> Errno {
        let what = format!("a part of the files of `{}`", files.name());
        self.unreadable(&ReadError { what, start: 0, end: 0, source })
    }
}

/// What was not even known when it was backed up is shown as a file that nobody can read.
fn shape_of(kind: &Kind) -> Shape {
    match kind {
        Kind::Folder => Shape::Folder,
        Kind::File { .. } | Kind::Again { .. } | Kind::Unknown => Shape::File,
        Kind::Link { .. } => Shape::Link,
        Kind::CharacterDevice { .. } => Shape::CharacterDevice,
        Kind::BlockDevice { .. } => Shape::BlockDevice,
        Kind::Pipe => Shape::Pipe,
        Kind::Socket => Shape::Socket,
    }
}

fn attributes(ino: INodeNo, entry: &Entry) -> FileAttr {
    let (size, device) = match &entry.kind {
        Kind::File { size } => (*size, (0, 0)),
        Kind::Link { target } => (target.len() as u64, (0, 0)),
        Kind::CharacterDevice { major, minor } | Kind::BlockDevice { major, minor } => (0, (*major, *minor)),
        _ => (0, (0, 0)),
    };
    let shape = shape(
        ino,
        &Attributes {
            kind: shape_of(&entry.kind),
            size,
            mode: entry.mode,
            owner: entry.owner,
            group: entry.group,
            modified: (entry.modified.seconds, entry.modified.nanoseconds),
            links: 1,
            device,
        },
    );
    // What may have holes says so by having fewer blocks than bytes: who copies it asks where they are then.
    let blocks = size.div_ceil(SECTOR);
    FileAttr { blocks: if size > 4096 { blocks - 1 } else { blocks }, ..shape }
}
