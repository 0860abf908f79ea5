//! Reading all of a point's files, and going on where one cannot be read.

use super::FileReader;
use super::entry::Kind;
use super::read::is_possible;
use crate::restore::{check_kept, is_of_the_place};
use crate::{BackupError, Progress};
use rempart_repository::{
    BlobKind, BlobReader, ChunkId, ChunkSize, Decompressor, Error, ErrorKind, FileTree,
};
use std::ops::ControlFlow;

/// What a check found.
#[derive(Debug, Default)]
pub struct CheckedFiles {
    pub entries: u64,
    /// Bytes that are what was backed up, holes among them.
    pub sound: u64,
    pub damaged: Vec<DamagedFile>,
    /// The chunks that are missing or damaged.
    pub chunks: Vec<ChunkId>,
}

/// A file that cannot be restored whole, or entries that are not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedFile {
    pub path: Vec<u8>,
    pub why: String,
}

/// Reads every chunk of the files. Where it is not known any more at which chunk a page's files begin, those are not looked at.
///
/// # Errors
/// If the place of the repository fails.
pub fn check_files(
    reader: &BlobReader,
    tree: &FileTree,
    progress: &Progress,
) -> Result<CheckedFiles, BackupError> {
    let mut checked = CheckedFiles::default();
    let files = match FileReader::new(reader, tree) {
        Ok(files) => files,
        Err(error) if is_of_the_place(&error) => return Err(error.into()),
        Err(error) => {
            let why = format!("none of its files is known: {error}");
            checked.damaged.push(DamagedFile { path: Vec::new(), why });
            if let Some(size) = is_possible(tree).then(|| ChunkSize::new(tree.chunk_size).ok()).flatten() {
                checked.chunks = check_kept(reader, size, &tree.starts)?.chunks;
            }
            return Ok(checked);
        }
    };
    let (mut plain, mut decompressor) = (Vec::new(), Decompressor::new());
    let (mut lost, mut lost_pages) = (Vec::new(), Vec::new());
    let mut each = |entry: super::Entry, first| {
        if progress.is_stopped() {
            return Err(BackupError::Stopped);
        }
        checked.entries += 1;
        let Kind::File { size } = entry.kind else { return Ok(ControlFlow::Continue(())) };
        let mut refusal = None;
        for chunk in files.chunks(size, first)? {
            let read = chunk.and_then(|(_, id, len)| {
                let read = files.reader().read(BlobKind::Data, &id, &mut plain, &mut decompressor);
                match read {
                    Ok(()) if plain.len() != len => {
                        Err(Error::new(ErrorKind::Damaged, id, "it is not as long as its place in the file"))
                    }
                    Ok(()) => Ok(len),
                    Err(error) => {
                        lost.push(id);
                        Err(error)
                    }
                }
            });
            match read {
                Ok(len) => progress.add(len as u64),
                Err(error) if is_of_the_place(&error) => return Err(error.into()),
                Err(error) => refusal = Some(error.to_string()),
            }
        }
        match refusal {
            None => checked.sound += size,
            Some(why) => checked.damaged.push(DamagedFile { path: entry.path, why }),
        }
        Ok(ControlFlow::Continue(()))
    };
    files.pages(&mut each, |page| {
        if is_of_the_place(&page.why) {
            return Err(page.why.into());
        }
        lost_pages.push(page);
        Ok(())
    })?;
    for page in lost_pages {
        let why = format!("files behind this one are not known: {}", page.why);
        checked.damaged.push(DamagedFile { path: page.behind, why });
        lost.extend(page.page);
    }
    checked.chunks = lost;
    Ok(checked)
}
