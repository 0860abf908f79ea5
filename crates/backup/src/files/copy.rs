//! Files of one repository into another, whatever its keys.

use super::store::Growing;
use crate::{BackupError, Progress};
use rempart_repository::{
    BackupWriter, BlobReader, BlobWriter, ChunkId, Decompressor, FileTree, HowRead, Step, Tree, Walk,
};

/// Chunks that are read at once.
const TOGETHER: usize = 64;

/// Stores what is new of a point's files. They keep their chunks, whatever the size of those of disks is.
pub fn copy_files(
    writer: &BackupWriter,
    from: &BlobReader,
    files: &FileTree,
    progress: &Progress,
) -> Result<FileTree, BackupError> {
    let new_before = writer.new_bytes();
    let mut blobs = writer.blobs();
    let pages = copy_tree(writer, from, files.pages, &mut blobs, progress)?;
    let contents = copy_tree(writer, from, files.contents, &mut blobs, progress)?;
    let starts = copy_chunks(from, &files.starts.0, &mut blobs, progress)?;
    blobs.finish()?;
    let new = writer.new_bytes() - new_before;
    let how = HowRead { read: files.bytes, new, ..files.how.clone() };
    Ok(FileTree { pages, contents, starts: (starts, files.starts.1), how, ..files.clone() })
}

fn copy_tree(
    writer: &BackupWriter,
    from: &BlobReader,
    tree: Tree,
    blobs: &mut BlobWriter<'_>,
    progress: &Progress,
) -> Result<Tree, BackupError> {
    let mut copied = Growing::new(writer, tree.chunks)?;
    let mut walk = Walk::new(from, tree)?.filter_map(|step| match step {
        Ok(Step::Chunk { index, id }) => Some(Ok((index, id))),
        Ok(Step::Node { .. }) => None,
        Err(error) => Some(Err(error)),
    });
    loop {
        let some = walk.by_ref().take(TOGETHER).collect::<Result<Vec<(u64, ChunkId)>, _>>()?;
        if some.is_empty() {
            return copied.finish(blobs);
        }
        let ids: Vec<ChunkId> = some.iter().map(|(_, id)| *id).collect();
        let new = copy_chunks(from, &ids, blobs, progress)?;
        for ((index, _), id) in some.into_iter().zip(new) {
            copied.set(index, id, blobs)?;
        }
    }
}

/// Their ids there.
fn copy_chunks(
    from: &BlobReader,
    ids: &[ChunkId],
    blobs: &mut BlobWriter<'_>,
    progress: &Progress,
) -> Result<Vec<ChunkId>, BackupError> {
    if progress.is_stopped() {
        return Err(BackupError::Stopped);
    }
    let mut new = vec![ChunkId::ZERO; ids.len()];
    from.read_many(ids, &mut Decompressor::new(), |place, plain| {
        new[place] = blobs.chunk(plain)?;
        progress.add(plain.len() as u64);
        Ok(())
    })?;
    Ok(new)
}
