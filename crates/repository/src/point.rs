//! What a backup says of itself: sealed in its log entry, for who holds the master key.

use crate::error::{Error, ErrorKind};
use crate::{ChunkId, ChunkSize, Tree};
use rempart_types::WallTime;
use serde::{Deserialize, Serialize};

/// The newest form that is known here. The first one had no files, the second no memory; what has no memory is written in the
/// second one.
const VERSION: u8 = 3;
const WITHOUT_MEMORY: u8 = 2;
/// The name of [`Point::memory`].
pub const MEMORY: &str = "memory";
/// Disks of one virtual machine, at most.
const MAX_DISKS: usize = 1024;
/// Bytes of a disk's name: a file system's limit, less what is added to it.
const MAX_NAME: usize = 200;

/// One restore point of one virtual machine: all its disks at one instant, and what it takes to run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// The name it had.
    pub vm: String,
    /// The machine that read the disks.
    pub host: String,
    /// The instant that the disks are of, by that machine's clock.
    pub taken: WallTime,
    /// When the last byte was stored.
    pub ended: WallTime,
    pub consistency: Consistency,
    pub disks: Vec<PointDisk>,
    /// The definition, in the form that its `kind` names.
    pub definition: Option<Definition>,
    /// Firmware variables, in chunks, and how many bytes they are.
    pub nvram: Option<(Vec<ChunkId>, u64)>,
    /// For people: things that were not as they should be.
    pub notes: Vec<String>,
    /// Files that were read one after the other, by a program in the machine.
    pub files: Option<FileTree>,
    /// The guest's memory and devices at that instant, kept as a disk is: the stream with which QEMU sends a machine.
    pub memory: Option<PointDisk>,
}

/// Folders and what is in them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileTree {
    /// What stands in it, in order: chunks of entries.
    pub pages: Tree,
    /// For each page the number of the first chunk of content that its files have, 8 bytes each, in chunks, and how many bytes
    /// they are: whoever loses a page loses no other.
    pub starts: (Vec<ChunkId>, u64),
    /// What the files hold, one after the other. A file's last chunk may be shorter than the others.
    pub contents: Tree,
    /// Bytes of a chunk of content.
    pub chunk_size: u32,
    pub entries: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Entries whose content could not be read, and is not there.
    pub unread: u64,
    /// Where they were copied from, if they were.
    pub position: Option<String>,
    pub how: HowRead,
}

/// How much the guest took part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consistency {
    pub level: ConsistencyLevel,
    /// Why it is not a higher one.
    pub why: Option<String>,
    /// How long the guest stood still for it, in milliseconds.
    pub pause_ms: Option<u64>,
}

/// From the weakest to the strongest, but for the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsistencyLevel {
    /// As after a power cut.
    Crash,
    /// The same, and the guest's memory of that instant is there, too; in points of the first two forms it only stood still.
    SavedState,
    /// File systems were frozen.
    FileSystem,
    /// Applications, too, had a hand in it.
    Application,
    /// It did not run.
    Stopped,
    /// Weaker than any other: read while it was in use, one part after the other.
    Live,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// `rempart`, `libvirt`.
    pub kind: String,
    pub content: Vec<u8>,
}

/// One disk at that instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointDisk {
    /// What tells it from the machine's other disks, now and in later backups.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The top of its tree of chunks.
    pub root: ChunkId,
    /// What the source called this instant of this disk: the next backup asks it what changed since.
    pub position: Option<String>,
    pub how: HowRead,
    /// Ranges of bytes that were left out, and are restored as zeroes.
    pub excluded: Vec<Excluded>,
}

/// How much of a disk was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HowRead {
    /// Why all of it was read; none when only what had changed was.
    pub full_because: Option<String>,
    /// Bytes.
    pub read: u64,
    /// Bytes that no earlier backup had.
    pub new: u64,
    /// Chunks that had not changed, by what is known, and were read and compared all the same.
    pub audited: u64,
    /// Those of them that had changed. Then all was read.
    pub missed: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Excluded {
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    pub reason: String,
}

impl Point {
    /// What is sealed.
    pub fn encode(&self) -> Vec<u8> {
        let version = if self.memory.is_some() { VERSION } else { WITHOUT_MEMORY };
        let encoded = postcard::to_extend(self, vec![version]);
        let mut encoded = encoded.expect("writing to memory does not fail");
        if version == WITHOUT_MEMORY {
            encoded.pop();
        }
        encoded
    }

    /// Reads what was sealed in `object`.
    pub fn decode(object: &str, bytes: &[u8]) -> Result<Point, Error> {
        let damaged = |why: &'static str| Error::new(ErrorKind::Damaged, object, why);
        let (version, bytes) = bytes.split_first().ok_or_else(|| damaged("it says nothing of its backup"))?;
        if *version > VERSION {
            let why = "its backup was made by a newer version of this program";
            return Err(Error::new(ErrorKind::Newer, object, why));
        }
        // None of what the form does not have yet.
        let none = &[0, 0][..usize::from(VERSION.saturating_sub(*version)).min(2)];
        let point = match postcard::take_from_bytes::<Point>(&[bytes, none].concat()) {
            Ok((point, [])) if *version >= 1 => point,
            _ => return Err(damaged("what it says of its backup makes no sense")),
        };
        let mut names: Vec<&str> = point.contents().map(|disk| disk.name.as_str()).collect();
        names.sort_unstable();
        if point.disks.len() > MAX_DISKS || names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(damaged("its backup has too many disks, or two of one name"));
        }
        if !names.iter().all(|name| is_file_name(name)) {
            return Err(damaged("a disk of its backup has a name that no file can have"));
        }
        if point.memory.as_ref().is_some_and(|memory| memory.name != MEMORY || !memory.excluded.is_empty()) {
            return Err(damaged("its backup's memory is not whole, or is called otherwise"));
        }
        Ok(point)
    }

    /// All that its chunks are reached by: disks, and chunks beside them. A field that is new must be looked at here: what is
    /// left out is removed by the next collection.
    pub(crate) fn reaches(&self, chunk_size: ChunkSize) -> (Vec<Tree>, Vec<ChunkId>) {
        let Point {
            disks,
            nvram,
            files,
            memory,
            vm: _,
            host: _,
            taken: _,
            ended: _,
            consistency: _,
            definition: _,
            notes: _,
        } = self;
        let disks = disks.iter().chain(memory);
        let mut trees: Vec<Tree> = disks.map(|disk| disk.tree(chunk_size)).collect();
        let mut chunks = nvram.as_ref().map_or(Vec::new(), |(chunks, _)| chunks.clone());
        if let Some(files) = files {
            trees.extend([files.pages, files.contents]);
            chunks.extend(&files.starts.0);
        }
        (trees, chunks)
    }

    /// Whether its texts are lines of plain text. Whoever may write here may be an enemy of who reads.
    pub(crate) fn is_printable(&self) -> bool {
        let Consistency { why, .. } = &self.consistency;
        let disks = self.contents().flat_map(|disk| {
            let reasons = disk.excluded.iter().map(|excluded| &excluded.reason);
            reasons.chain(&disk.position).chain(&disk.how.full_because)
        });
        let read = self.files.iter().flat_map(|files| files.how.full_because.iter().chain(&files.position));
        let kind = self.definition.as_ref().map(|definition| &definition.kind);
        let mut texts = [&self.vm, &self.host]
            .into_iter()
            .chain(why)
            .chain(&self.notes)
            .chain(disks)
            .chain(kind)
            .chain(read);
        texts.all(|text| !text.chars().any(char::is_control))
    }

    /// Disks, and memory.
    pub fn contents(&self) -> impl Iterator<Item = &PointDisk> {
        self.disks.iter().chain(&self.memory)
    }

    /// The disk of that name; or memory, by [`MEMORY`].
    pub fn disk(&self, name: &str) -> Option<&PointDisk> {
        self.contents().find(|disk| disk.name == name)
    }
}

/// Restored, a disk is a file of its name: nobody may lead it elsewhere.
fn is_file_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && !name.starts_with('.')
        && name.chars().all(|c| c != '/' && !c.is_control())
}

impl PointDisk {
    /// Its tree, in a repository of such chunks.
    pub fn tree(&self, chunk_size: crate::ChunkSize) -> Tree {
        Tree { root: self.root, chunks: chunk_size.count(self.size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn point() -> Point {
        let disk = |name: &str| PointDisk {
            name: name.to_owned(),
            size: 1 << 30,
            root: ChunkId([7; 32]),
            position: Some("bitmap rempart-7".to_owned()),
            how: HowRead { full_because: None, read: 1 << 20, new: 1 << 18, audited: 16, missed: 0 },
            excluded: vec![Excluded { offset: 4096, len: 8192, reason: "swap".to_owned() }],
        };
        Point {
            vm: "shop".to_owned(),
            host: "node-a".to_owned(),
            taken: WallTime(1),
            ended: WallTime(2),
            consistency: Consistency {
                level: ConsistencyLevel::FileSystem,
                why: Some("no hooks".to_owned()),
                pause_ms: Some(12),
            },
            disks: vec![disk("vda"), disk("vdb")],
            definition: Some(Definition { kind: "rempart".to_owned(), content: b"memory = 1".to_vec() }),
            nvram: Some((vec![ChunkId([3; 32])], 528 << 10)),
            notes: vec!["the clock went back".to_owned()],
            files: Some(FileTree {
                pages: Tree { root: ChunkId([4; 32]), chunks: 3 },
                starts: (vec![ChunkId([5; 32])], 24),
                contents: Tree { root: ChunkId([6; 32]), chunks: 700 },
                chunk_size: 1 << 18,
                entries: 999,
                bytes: 1 << 27,
                unread: 1,
                position: None,
                how: HowRead { full_because: None, read: 1 << 20, new: 1 << 18, audited: 0, missed: 0 },
            }),
            memory: Some(PointDisk { name: MEMORY.to_owned(), excluded: Vec::new(), ..disk("") }),
        }
    }

    #[test]
    fn what_had_no_files_yet_is_read() {
        let old = Point { files: None, memory: None, ..point() };
        let bytes = old.encode();
        let (last, first) = bytes[1..].split_last().expect("it says something");
        assert_eq!(*last, 0);
        assert_eq!(Point::decode("log/1", &[&[1], first].concat()).expect("whole"), old);
    }

    #[test]
    fn what_has_no_memory_is_what_programs_without_it_know() {
        let old = Point { memory: None, ..point() };
        let bytes = old.encode();
        assert_eq!(bytes[0], 2);
        assert_eq!(Point::decode("log/1", &bytes).expect("whole"), old);
        let with = point().encode();
        assert_eq!((with[0], &with[1..bytes.len()], with[bytes.len()]), (3, &bytes[1..], 1));
        assert!(Point::decode("log/1", &[&[2], &with[1..]].concat()).is_err());
    }

    #[test]
    fn memory_that_is_not_whole_is_refused() {
        let mut strange = point();
        strange.memory.as_mut().expect("it has one").name = "other".to_owned();
        let excluded = strange.disks[0].excluded.clone();
        let error = Point::decode("log/1", &strange.encode()).expect_err("called otherwise");
        assert_eq!(error.kind, ErrorKind::Damaged);
        strange.memory = Some(PointDisk { excluded, ..point().memory.expect("it has one") });
        Point::decode("log/1", &strange.encode()).expect_err("not whole");
    }

    #[test]
    fn it_reads_back() {
        let bytes = point().encode();
        assert_eq!(Point::decode("log/1", &bytes).expect("whole"), point());
        for length in 0..bytes.len() {
            assert!(Point::decode("log/1", &bytes[..length]).is_err(), "{length}");
        }
        assert!(Point::decode("log/1", &[bytes.as_slice(), &[0]].concat()).is_err());
        let newer = [&[VERSION + 1], &bytes[1..]].concat();
        assert_eq!(Point::decode("log/1", &newer).expect_err("newer").kind, ErrorKind::Newer);
    }

    #[test]
    fn two_disks_of_one_name_are_refused() {
        let mut twice = point();
        twice.disks[1].name = "vda".to_owned();
        let error = Point::decode("log/1", &twice.encode()).expect_err("two of one name");
        assert_eq!(error.kind, ErrorKind::Damaged);
    }

    #[test]
    fn a_disk_whose_name_leads_elsewhere_is_refused() {
        for name in ["", ".", "..", "../disk0", "/etc/passwd", "a/b", "a\nb", "a\0b", &"a".repeat(201)] {
            let mut strange = point();
            strange.disks[0].name = name.to_owned();
            let error = Point::decode("log/1", &strange.encode()).expect_err(name);
            assert_eq!(error.kind, ErrorKind::Damaged, "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn garbage_is_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..200, bit in 0u8..8) {
            let _ = Point::decode("log/1", &bytes);
            bytes.insert(0, VERSION);
            let _ = Point::decode("log/1", &bytes);
            let mut changed = point().encode();
            let at = at % changed.len();
            changed[at] ^= 1 << bit;
            let _ = Point::decode("log/1", &changed);
        }
    }
}
