//! What stands in a point's files.

use super::entry::{Entry, decode_page, is_below, order};
use crate::BackupError;
use rempart_repository::{
    BlobKind, BlobReader, ChunkId, Decompressor, Error, ErrorKind, FileTree, Step, Walk,
};
use std::cmp::Ordering;
use std::ops::ControlFlow;

/// Bytes of chunks, of the sizes that repositories have.
const CHUNK_SIZES: std::ops::RangeInclusive<u32> = 64 << 10..=1 << 20;
/// Pages, at most: their starts are in memory.
const MAX_PAGES: u64 = 1 << 22;

/// Reads the files of a point.
#[derive(Debug)]
pub struct FileReader<'r> {
    reader: &'r BlobReader,
    tree: FileTree,
    /// The first chunk of content of each page.
    starts: Vec<u64>,
}

/// A page that cannot be read: entries behind this path are not known.
#[derive(Debug)]
pub(super) struct LostPage {
    pub behind: Vec<u8>,
    pub page: Option<ChunkId>,
    pub why: Error,
}

/// Whether a tree's numbers fit each other.
pub(super) fn is_possible(tree: &FileTree) -> bool {
    let (chunks, len) = &tree.starts;
    tree.pages.chunks <= MAX_PAGES
        && *len == tree.pages.chunks * 8
        && CHUNK_SIZES.contains(&tree.chunk_size)
        && chunks.len() as u64 <= len.div_ceil(u64::from(*CHUNK_SIZES.start()))
}

impl<'r> FileReader<'r> {
    pub fn new(reader: &'r BlobReader, tree: &FileTree) -> Result<FileReader<'r>, Error> {
        let damaged = |why: &'static str| Error::new(ErrorKind::Damaged, "files", why);
        let (chunks, len) = &tree.starts;
        if !is_possible(tree) {
            return Err(damaged("they are no tree of files"));
        }
        let (mut bytes, mut plain, mut decompressor) = (Vec::new(), Vec::new(), Decompressor::new());
        for chunk in chunks {
            if chunk.is_zero() {
                // Pages before the first content.
                let end = (len - bytes.len() as u64).min(tree.chunk_size.into()) as usize + bytes.len();
                bytes.resize(end, 0);
                continue;
            }
            reader.read(BlobKind::Data, chunk, &mut plain, &mut decompressor)?;
            bytes.extend_from_slice(&plain);
            if bytes.len() as u64 > *len {
                break;
            }
        }
        let (starts, rest) = bytes.as_chunks::<8>();
        if bytes.len() as u64 != *len || !rest.is_empty() {
            return Err(damaged("their pages are not as many as there should be"));
        }
        let starts = starts.iter().map(|start| u64::from_le_bytes(*start)).collect();
        Ok(FileReader { reader, tree: tree.clone(), starts })
    }

    pub fn tree(&self) -> &FileTree {
        &self.tree
    }

    pub fn reader(&self) -> &'r BlobReader {
        self.reader
    }

    /// Gives each entry in order, and the number of the first chunk of its content.
    ///
    /// # Errors
    /// If a page cannot be read.
    pub fn entries<E: From<Error>>(
        &self,
        mut each: impl FnMut(Entry, u64) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        self.pages(&mut each, |lost| Err(lost.why.into()))
    }

    /// The same; `lost` says whether to go on behind a page that cannot be read.
    pub(super) fn pages<E: From<Error>>(
        &self,
        each: &mut dyn FnMut(Entry, u64) -> Result<ControlFlow<()>, E>,
        mut lost: impl FnMut(LostPage) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut plain, mut decompressor) = (Vec::new(), Decompressor::new());
        let mut last: Vec<u8> = Vec::new();
        let mut expected = 0;
        for step in Walk::new(self.reader, self.tree.pages)? {
            let (index, page) = match step {
                Ok(Step::Chunk { index, id }) => (index, id),
                Ok(Step::Node { .. }) => continue,
                Err(why) => return lost(LostPage { behind: last, page: None, why }),
            };
            let object = format!("page {index} of the files");
            let damaged = |why: &'static str| Error::new(ErrorKind::Damaged, &object, why);
            let skipped = index != expected;
            expected = index + 1;
            let read = self.reader.read(BlobKind::Data, &page, &mut plain, &mut decompressor);
            let entries = read.and_then(|()| decode_page(&object, &plain)).and_then(|entries| {
                let first = entries.first().expect("no page is empty");
                if !last.is_empty() && order(&last, &first.path) != Ordering::Less {
                    return Err(damaged("it is not behind the one before"));
                }
                Ok(entries)
            });
            let entries = match entries {
                Ok(entries) if !skipped => entries,
                Ok(_) => {
                    let why = damaged("the one before it is missing");
                    lost(LostPage { behind: last.clone(), page: None, why })?;
                    continue;
                }
                Err(why) => {
                    lost(LostPage { behind: last.clone(), page: Some(page), why })?;
                    continue;
                }
            };
            let mut first = self.starts[index as usize];
            for entry in entries {
                last.clone_from(&entry.path);
                let chunks = entry.chunks(self.tree.chunk_size);
                let next = first.checked_add(chunks).filter(|next| *next <= self.tree.contents.chunks);
                let Some(next) = next else {
                    return Err(damaged("its files hold more than there is").into());
                };
                if each(entry, first)?.is_break() {
                    return Ok(());
                }
                first = next;
            }
        }
        Ok(())
    }

    /// Entries of a folder, or one file: those at `wanted`, and below it. An empty path is that of the root.
    pub fn below(
        &self,
        wanted: &[u8],
        mut each: impl FnMut(Entry) -> Result<(), BackupError>,
    ) -> Result<(), BackupError> {
        self.entries(|entry, _| {
            if wanted.is_empty() || entry.path == wanted || is_below(&entry.path, wanted) {
                each(entry)?;
            } else if order(&entry.path, wanted) == Ordering::Greater {
                return Ok(ControlFlow::Break(()));
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    /// The chunks of a file that are not all zeroes, by their numbers in it, and how long each must be.
    pub(super) fn chunks(
        &self,
        size: u64,
        first: u64,
    ) -> Result<impl Iterator<Item = Result<(u64, ChunkId, usize), Error>> + use<'_>, Error> {
        let chunk_size = u64::from(self.tree.chunk_size);
        let range = first..first + size.div_ceil(chunk_size);
        let walk = Walk::range(self.reader, self.tree.contents, range)?;
        Ok(walk.filter_map(move |step| match step {
            Ok(Step::Chunk { index, id }) => {
                let number = index - first;
                Some(Ok((number, id, (size - number * chunk_size).min(chunk_size) as usize)))
            }
            Ok(Step::Node { .. }) => None,
            Err(error) => Some(Err(error)),
        }))
    }
}
