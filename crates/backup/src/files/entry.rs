//! What stands in a tree of files.

use rempart_repository::{Error, ErrorKind};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// Bytes of a path, or of where a link leads.
pub(super) const LONGEST_PATH: usize = 64 << 10;
/// Bytes of one part of a path: what file systems take.
const LONGEST_NAME: usize = 255;
/// Bytes of a page, at most: a blob's.
pub(super) const LONGEST_PAGE: usize = 1 << 20;

/// One name, and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// From the root on, parts joined by `/`: bytes as the file system has them.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permissions.
    pub mode: u32,
    pub owner: u32,
    pub group: u32,
    pub modified: Time,
    /// Extended attributes, ACLs and capabilities among them.
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
    /// Why what it holds, or it itself, could not be read. Then it is as empty.
    pub unread: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Folder,
    File {
        size: u64,
    },
    Link {
        target: Vec<u8>,
    },
    /// Another name of the file of an entry before.
    Again {
        of: Vec<u8>,
    },
    CharacterDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Pipe,
    Socket,
    /// Not even that could be read.
    Unknown,
}

/// Since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// The order of paths: a folder comes before what is in it, and that before the folder's next neighbour.
pub(super) fn order(one: &[u8], other: &[u8]) -> Ordering {
    parts(one).cmp(parts(other))
}

pub(super) fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
}

/// The folder that a path is in; none of what is in the root.
pub(super) fn parent(path: &[u8]) -> Option<&[u8]> {
    path.iter().rposition(|byte| *byte == b'/').map(|slash| &path[..slash])
}

/// Whether a path is in a folder, or below one.
pub(super) fn is_below(path: &[u8], folder: &[u8]) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.first() == Some(&b'/'))
}

fn is_path(path: &[u8]) -> bool {
    let is_name = |name: &[u8]| {
        (1..=LONGEST_NAME).contains(&name.len()) && name != b"." && name != b".." && !name.contains(&0)
    };
    path.len() <= LONGEST_PATH && parts(path).all(is_name)
}

impl Entry {
    /// Chunks of content.
    pub(super) fn chunks(&self, chunk_size: u32) -> u64 {
        match self.kind {
            Kind::File { size } => size.div_ceil(chunk_size.into()),
            _ => 0,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).expect("writing to memory does not fail")
    }

    /// Whether it can be an entry at all: nothing in it leads anywhere but below the root.
    pub(crate) fn is_possible(&self) -> bool {
        let kind = match &self.kind {
            Kind::File { size } => i64::try_from(*size).is_ok(),
            Kind::Link { target } => (1..LONGEST_PATH).contains(&target.len()) && !target.contains(&0),
            Kind::Again { of } => is_path(of) && order(of, &self.path) == Ordering::Less,
            _ => true,
        };
        let attributes = &self.attributes;
        kind && is_path(&self.path)
            && self.mode & !0o7777 == 0
            && self.modified.nanoseconds < 1_000_000_000
            && attributes
                .iter()
                .all(|(name, _)| (1..=LONGEST_NAME).contains(&name.len()) && !name.contains(&0))
    }
}

/// Takes a page apart. Its entries are in order.
pub(super) fn decode_page(page: &str, mut bytes: &[u8]) -> Result<Vec<Entry>, Error> {
    let damaged = |why: &'static str| Error::new(ErrorKind::Damaged, page, why);
    let mut entries: Vec<Entry> = Vec::new();
    while !bytes.is_empty() {
        let (entry, rest) =
            postcard::take_from_bytes::<Entry>(bytes).map_err(|_| damaged("it is no page of files"))?;
        if !entry.is_possible() {
            return Err(damaged("it has an entry that no file can be"));
        }
        if entries.last().is_some_and(|last| order(&last.path, &entry.path) != Ordering::Less) {
            return Err(damaged("its entries are not in order"));
        }
        entries.push(entry);
        bytes = rest;
    }
    if entries.is_empty() {
        return Err(damaged("it has no entries"));
    }
    Ok(entries)
}

/// # Panics
/// If entries are accepted that lead elsewhere, are not in order or do not read back.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_page(bytes: &[u8]) {
    let Ok(entries) = decode_page("page", bytes) else { return };
    let leads_elsewhere = |path: &[u8]| path.starts_with(b"/") || parts(path).any(|part| part == b"..");
    assert!(entries.iter().all(|entry| entry.is_possible() && !leads_elsewhere(&entry.path)));
    assert!(entries.windows(2).all(|pair| order(&pair[0].path, &pair[1].path) == Ordering::Less));
    let again: Vec<u8> = entries.iter().flat_map(Entry::encode).collect();
    assert_eq!(decode_page("page", &again).expect("it was written"), entries);
    let _ = entries.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.chunks(1 << 18)));
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn entry(path: &str, kind: Kind) -> Entry {
        Entry {
            path: path.as_bytes().to_vec(),
            kind,
            mode: 0o644,
            owner: 1,
            group: 2,
            modified: Time { seconds: -3, nanoseconds: 4 },
            attributes: vec![(b"user.a".to_vec(), b"b".to_vec())],
            unread: None,
        }
    }

    fn refused(entry: Entry) -> bool {
        decode_page("page", &entry.encode()).is_err()
    }

    #[test]
    fn a_page_reads_back_and_is_in_order() {
        let entries: Vec<Entry> = ["a", "a/b", "a/b/c", "a b", "a.b"]
            .map(|path| entry(path, Kind::File { size: 9 }))
            .into_iter()
            .collect();
        let bytes: Vec<u8> = entries.iter().flat_map(Entry::encode).collect();
        assert_eq!(decode_page("page", &bytes).expect("whole"), entries);
        let mut turned = entries.clone();
        turned.swap(1, 3);
        let bytes: Vec<u8> = turned.iter().flat_map(Entry::encode).collect();
        assert!(decode_page("page", &bytes).is_err());
        let twice = [entries[0].encode(), entries[0].encode()].concat();
        assert!(decode_page("page", &twice).is_err() && decode_page("page", &[]).is_err());
    }

    #[test]
    fn what_leads_elsewhere_is_refused() {
        let long = "a".repeat(256);
        for path in ["", "/etc", "../x", "a/../b", "a//b", "a/", ".", "a/.", "a\0b", &long] {
            assert!(refused(entry(path, Kind::Folder)), "{path:?}");
            assert!(refused(entry("zz", Kind::Again { of: path.into() })), "{path:?}");
        }
        assert!(refused(entry("a", Kind::Again { of: b"b".to_vec() })), "of one that comes later");
        assert!(refused(entry("a", Kind::File { size: u64::MAX })));
        assert!(refused(Entry { mode: 0o100_644, ..entry("a", Kind::Folder) }));
        for target in [&b""[..], b"a\0b"] {
            assert!(refused(entry("a", Kind::Link { target: target.to_vec() })));
        }
        // A link may lead anywhere: nobody follows it.
        assert!(!refused(entry("a", Kind::Link { target: b"/etc/passwd".to_vec() })));
    }

    proptest! {
        #[test]
        fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..60, bit in 0u8..8) {
            let _ = decode_page("page", &bytes);
            let mut changed = entry("a/b", Kind::Link { target: b"c".to_vec() }).encode();
            let at = at % changed.len();
            changed[at] ^= 1 << bit;
            let _ = decode_page("page", &changed);
        }
    }
}
