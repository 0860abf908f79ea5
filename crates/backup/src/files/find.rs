//! Finding single files of a point: their entries are in order, so that a few pages are read, and not all.

use super::entry::{Entry, Kind, decode_page, is_below, order};
use crate::{ChunkCache, DiskReader};
use quick_cache::sync::Cache;
use rempart_repository::{ChunkSize, Error, ErrorKind, FileTree};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

/// Pages that are kept taken apart.
const PAGES: usize = 8;
/// Bytes of the pages' first paths that are remembered: those at which a search looks.
const FIRSTS: usize = 8 << 20;
/// Pages that cannot be read, one behind the other, before a search gives up.
const LOST: u64 = 8;
/// Bits of an entry's number that say which of its page it is: a page has a MiB at most.
const INDEX_BITS: u32 = 20;

/// The files of one point.
pub struct FileFinder {
    cache: Arc<ChunkCache>,
    tree: FileTree,
    /// Of the point, for people.
    name: String,
    /// The first chunk of content of each page.
    starts: OnceLock<Vec<u64>>,
    pages: Cache<u64, Arc<Vec<Entry>>>,
    firsts: Mutex<Firsts>,
}

#[derive(Debug, Default)]
struct Firsts {
    paths: HashMap<u64, Arc<[u8]>>,
    bytes: usize,
}

/// Where an entry is; the first is where a search begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    page: u64,
    index: usize,
}

/// An entry, and the number that stands for it as long as the point is there.
#[derive(Debug, Clone)]
pub struct Found {
    pub number: u64,
    pub entry: Entry,
}

fn damaged(why: &'static str) -> Error {
    Error::new(ErrorKind::Damaged, "files", why)
}

impl Place {
    fn number(self) -> u64 {
        (self.page << INDEX_BITS | self.index as u64) + 1
    }

    fn of(number: u64) -> Option<Place> {
        let place = number.checked_sub(1)?;
        Some(Place { page: place >> INDEX_BITS, index: (place & ((1 << INDEX_BITS) - 1)) as usize })
    }
}

impl FileFinder {
    pub fn new(cache: &Arc<ChunkCache>, name: &str, tree: &FileTree) -> FileFinder {
        FileFinder {
            cache: cache.clone(),
            tree: tree.clone(),
            name: name.to_owned(),
            starts: OnceLock::new(),
            pages: Cache::new(PAGES),
            firsts: Mutex::default(),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The entry of a number that this once gave.
    pub fn get(&self, number: u64) -> Result<Entry, Error> {
        let place = Place::of(number).ok_or_else(|| damaged("no entry has that number"))?;
        let entries = self.page(place.page)?;
        entries.get(place.index).cloned().ok_or_else(|| damaged("no entry has that number"))
    }

    /// The entry at a path.
    pub fn find(&self, path: &[u8]) -> Result<Option<Found>, Error> {
        // How many pages begin at it or before.
        let behind = self.partition(0..self.pages()?, |first| order(first, path) != Ordering::Greater)?;
        if let Some(page) = behind.checked_sub(1) {
            let entries = self.page(page)?;
            if let Ok(index) = entries.binary_search_by(|entry| order(&entry.path, path)) {
                let number = Place { page, index }.number();
                return Ok(Some(Found { number, entry: entries[index].clone() }));
            }
        }
        if behind < self.pages()? {
            // It may be in one that is lost.
            self.first(behind)?;
        }
        Ok(None)
    }

    /// What is in a folder, in order, and what is below that not; the root is an empty path.
    pub fn children(&self, folder: &[u8]) -> Result<Vec<Found>, Error> {
        let begin = if folder.is_empty() { 0 } else { folder.len() + 1 };
        let mut found: Vec<Found> = Vec::new();
        let mut next = self.behind(None, |path| {
            // Only the root's are before nothing.
            !folder.is_empty() && order(path, folder) != Ordering::Greater
        })?;
        while let Some(place) = next {
            let entries = self.page(place.page)?;
            let entry = &entries[place.index];
            if !folder.is_empty() && !is_below(&entry.path, folder) {
                break;
            }
            let name = entry.path[begin..].split(|byte| *byte == b'/').next().expect("there is one always");
            let child = &entry.path[..begin + name.len()];
            if found.last().is_some_and(|last| order(&last.entry.path, child) != Ordering::Less) {
                return Err(damaged("their pages are not in order"));
            }
            // What has no entry of its own is not there, nor what is below it.
            if child.len() == entry.path.len() {
                found.push(Found { number: place.number(), entry: entry.clone() });
            }
            next = self.behind(Some(place), |path| path == child || is_below(path, child))?;
        }
        Ok(found)
    }

    /// What a file holds. `None` if that could not be read when it was backed up, or it is none.
    pub fn content(&self, number: u64) -> Result<Option<DiskReader>, Error> {
        let Some(place) = Place::of(number) else { return Ok(None) };
        let entries = self.page(place.page)?;
        let Some(entry @ Entry { kind: Kind::File { size }, unread: None, .. }) = entries.get(place.index)
        else {
            return Ok(None);
        };
        let chunk_size = ChunkSize::new(self.tree.chunk_size)
            .map_err(|_| damaged("their chunks have no size of a chunk"))?;
        let too_many = || damaged("they hold more than there is");
        let mut first = *self.starts()?.get(place.page as usize).ok_or_else(too_many)?;
        for before in &entries[..place.index] {
            first = first.checked_add(before.chunks(self.tree.chunk_size)).ok_or_else(too_many)?;
        }
        let end = first.checked_add(entry.chunks(self.tree.chunk_size));
        end.filter(|end| *end <= self.tree.contents.chunks).ok_or_else(too_many)?;
        let what = format!("`{}` of `{}`", super::shown(&entry.path), self.name);
        Ok(Some(DiskReader::of_part(&self.cache, what, self.tree.contents, chunk_size, first, *size)))
    }

    fn pages(&self) -> Result<u64, Error> {
        self.starts().map(|starts| starts.len() as u64)
    }

    fn starts(&self) -> Result<&[u64], Error> {
        if let Some(starts) = self.starts.get() {
            return Ok(starts);
        }
        if !super::read::is_possible(&self.tree) {
            return Err(damaged("they are no tree of files"));
        }
        let (chunks, len) = &self.tree.starts;
        let bytes = self.cache.content(chunks, *len)?;
        let (starts, _) = bytes.as_chunks::<8>();
        Ok(self.starts.get_or_init(|| starts.iter().map(|start| u64::from_le_bytes(*start)).collect()))
    }

    fn page(&self, page: u64) -> Result<Arc<Vec<Entry>>, Error> {
        if page >= self.pages()? {
            return Err(damaged("no entry has that number"));
        }
        self.pages.get_or_insert_with(&page, || {
            let bytes = self.cache.chunk_of(self.tree.pages, page)?;
            decode_page(&format!("page {page} of the files"), &bytes).map(Arc::new)
        })
    }

    /// The first path of a page.
    fn first(&self, page: u64) -> Result<Arc<[u8]>, Error> {
        if let Some(first) = self.firsts.lock().expect("no holder panics").paths.get(&page) {
            return Ok(first.clone());
        }
        let first: Arc<[u8]> = self.page(page)?[0].path.as_slice().into();
        let mut firsts = self.firsts.lock().expect("no holder panics");
        if firsts.bytes + first.len() > FIRSTS {
            *firsts = Firsts::default();
        }
        if firsts.paths.insert(page, first.clone()).is_none() {
            firsts.bytes += first.len();
        }
        Ok(first)
    }

    /// The first of these pages whose first path is not `before`; the end of the range if there is none. Those that cannot be
    /// read count as what is behind them.
    fn partition(&self, pages: Range<u64>, before: impl Fn(&[u8]) -> bool) -> Result<u64, Error> {
        let Range { mut start, mut end } = pages;
        while start < end {
            let middle = start + (end - start) / 2;
            let mut probed = None;
            for page in middle..end.min(middle + LOST) {
                match self.first(page) {
                    Ok(first) => {
                        probed = Some((page, before(&first)));
                        break;
                    }
                    Err(error) if page + 1 == middle + LOST => return Err(error),
                    Err(_) => {}
                }
            }
            match probed {
                Some((page, true)) => start = page + 1,
                Some((_, false)) | None => end = middle,
            }
        }
        Ok(start)
    }

    /// The first entry behind `place`, or of all, that is not `before`; entries that are come first.
    fn behind(&self, place: Option<Place>, before: impl Fn(&[u8]) -> bool) -> Result<Option<Place>, Error> {
        let within = |page: u64, from: usize| -> Result<Option<Place>, Error> {
            let entries = self.page(page)?;
            let index = from + entries[from..].partition_point(|entry| before(&entry.path));
            Ok((index < entries.len()).then_some(Place { page, index }))
        };
        let mut from = 0;
        if let Some(place) = place {
            if let Some(found) = within(place.page, place.index + 1)? {
                return Ok(Some(found));
            }
            from = place.page + 1;
        }
        let pages = self.pages()?;
        let next = self.partition(from..pages, &before)?;
        // The page before that one begins with what is passed over, and may end with what is not.
        if next > from
            && let Some(found) = within(next - 1, 0)?
        {
            return Ok(Some(found));
        }
        if next == pages { Ok(None) } else { within(next, 0) }
    }
}

impl std::fmt::Debug for FileFinder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileFinder").field("name", &self.name).finish_non_exhaustive()
    }
}
