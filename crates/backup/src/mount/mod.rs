//! Restore points as files, through FUSE: a folder for each machine, in it one for each point, in it the disks, beside each a
//! folder of its file systems, and `files` with what a program in the machine read.

mod guests;
mod trees;

use crate::files::FileFinder;
use crate::{ChunkCache, Content, DiskReader, GuestDisks, GuestReaders, ReadError};
use fuser::{
    AccessFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, Request,
};
use guests::{Guests, Volumes};
use rempart_nbd::server::Piece;
use rempart_repository::{ChunkId, MEMORY, Point};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Nothing here ever changes, so the kernel need not ask again.
const FOR_EVER: Duration = Duration::from_secs(24 * 60 * 60);
/// Threads that answer the kernel: they wait for a disk or a network mostly.
const THREADS: usize = 8;
/// Bytes that the kernel reads ahead.
const READ_AHEAD: u32 = 1 << 20;
/// `lseek`'s words for the next byte that is data, or that is not.
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;
const SECTOR: u64 = 512;
const ROOT: usize = 0;

/// Told of everything that could not be read.
pub type Unreadable = Box<dyn Fn(&ReadError) + Send + Sync>;

/// Told when it is mounted no more.
pub type Ended = Box<dyn FnOnce() + Send + Sync>;

/// What will be mounted.
pub struct PointFiles {
    cache: Arc<ChunkCache>,
    nodes: Vec<Node>,
    owner: (u32, u32),
    unreadable: Unreadable,
    readers: Arc<GuestReaders>,
    guests: Guests,
}

/// What is mounted.
struct Served {
    files: Arc<PointFiles>,
    ended: Option<Ended>,
}

struct Node {
    parent: usize,
    time: SystemTime,
    what: What,
}

enum What {
    Folder(BTreeMap<String, usize>),
    Disk(Arc<DiskReader>),
    /// What lies on a disk.
    Volumes(Volumes),
    /// What a program in the machine read: the number of its root.
    Tree(INodeNo),
    Bytes(Vec<u8>),
    /// In chunks, and how many bytes they are.
    Chunks(Vec<ChunkId>, u64),
}

impl PointFiles {
    /// Nothing yet. The files will be `owner`'s, by user and group, and nobody else's.
    pub fn new(
        cache: Arc<ChunkCache>,
        owner: (u32, u32),
        readers: Arc<GuestReaders>,
        unreadable: Unreadable,
    ) -> PointFiles {
        let root = Node { parent: ROOT, time: SystemTime::now(), what: What::Folder(BTreeMap::new()) };
        PointFiles { cache, nodes: vec![root], owner, unreadable, readers, guests: Guests::default() }
    }

    /// The files of backup `root`.
    pub fn add(&mut self, root: u64, point: &Point) {
        let time = UNIX_EPOCH + Duration::from_millis(point.taken.0);
        let machine = self.folder(ROOT, &file_name(&point.vm), time);
        let folder = self.folder(machine, &root.to_string(), time);
        let chunk_size = self.cache.chunk_size();
        let mut readers = Vec::new();
        for disk in &point.disks {
            let content = Content::of(disk, chunk_size);
            let reader = Arc::new(DiskReader::new(&self.cache, &disk.name, content));
            readers.push(reader.clone());
            self.insert(folder, &format!("{}.raw", file_name(&disk.name)), time, What::Disk(reader));
        }
        let disks = GuestDisks::new(&self.readers, format!("`{}@{root}`", point.vm), readers);
        for (number, disk) in point.disks.iter().enumerate() {
            let volumes = What::Volumes(Volumes::new(disks.clone(), number));
            self.insert(folder, &format!("{}.files", file_name(&disk.name)), time, volumes);
        }
        if let Some(tree) = &point.files {
            let files = FileFinder::new(&self.cache, &format!("{}@{root}", point.vm), tree);
            let top = What::Tree(self.guests.add(files));
            self.insert(folder, "files", time, top);
        }
        if let Some(definition) = &point.definition {
            let ending = if definition.kind == "libvirt" { "xml" } else { "json" };
            let bytes = What::Bytes(definition.content.clone());
            self.insert(folder, &format!("definition.{ending}"), time, bytes);
        }
        if let Some(memory) = &point.memory {
            let content = Content::of(memory, chunk_size);
            let reader = Arc::new(DiskReader::new(&self.cache, &memory.name, content));
            self.insert(folder, &format!("{MEMORY}.qemu"), time, What::Disk(reader));
        }
        if let Some((chunks, len)) = &point.nvram {
            self.insert(folder, "nvram", time, What::Chunks(chunks.clone(), *len));
        }
    }

    fn folder(&mut self, parent: usize, name: &str, time: SystemTime) -> usize {
        let Some(there) = self.children(parent).get(name).copied() else {
            return self.insert(parent, name, time, What::Folder(BTreeMap::new()));
        };
        // As new as what is newest in it.
        let node = &mut self.nodes[there];
        node.time = node.time.max(time);
        there
    }

    fn children(&mut self, folder: usize) -> &mut BTreeMap<String, usize> {
        match &mut self.nodes[folder].what {
            What::Folder(children) => children,
            _ => panic!("only folders have children"),
        }
    }

    fn insert(&mut self, parent: usize, name: &str, time: SystemTime, what: What) -> usize {
        let number = self.nodes.len();
        self.nodes.push(Node { parent, time, what });
        self.children(parent).insert(name.to_owned(), number);
        number
    }

    /// Mounts it, until the value is dropped or somebody unmounts it.
    pub fn mount(self, folder: &Path, ended: Ended) -> io::Result<Mounted> {
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::RO,
            MountOption::NoSuid,
            MountOption::NoDev,
            MountOption::NoExec,
            MountOption::FSName("rempart".to_owned()),
            MountOption::Subtype("rempart".to_owned()),
        ];
        config.n_threads = Some(THREADS);
        config.clone_fd = true;
        // Nobody but who mounted it may look, whoever owns a file in a guest.
        let served = Served { files: Arc::new(self), ended: Some(ended) };
        let session = fuser::spawn_mount(served, folder, &config)?;
        Ok(Mounted { session: Some(session), folder: folder.to_owned() })
    }

    fn node(&self, ino: INodeNo) -> Option<&Node> {
        self.nodes.get(usize::try_from(u64::from(ino)).ok()?.checked_sub(1)?)
    }

    fn attributes(&self, number: usize) -> FileAttr {
        let node = &self.nodes[number];
        let (kind, perm, size) = match &node.what {
            What::Folder(_) | What::Volumes(_) | What::Tree(_) => (FileType::Directory, 0o500, 0),
            What::Disk(disk) => (FileType::RegularFile, 0o400, disk.size()),
            What::Bytes(bytes) => (FileType::RegularFile, 0o400, bytes.len() as u64),
            What::Chunks(_, len) => (FileType::RegularFile, 0o400, *len),
        };
        // How much of a disk is holes takes a walk through its tree. A file with fewer blocks than bytes has holes, for
        // those who copy it: they ask for each then.
        let blocks = size.div_ceil(SECTOR);
        let blocks = if matches!(node.what, What::Disk(_)) { blocks.saturating_sub(1) } else { blocks };
        FileAttr { blocks, ..attributes(ino(number), kind, perm, size, node.time, self.owner) }
    }

    fn read_node(&self, node: &Node, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        let part = |bytes: &[u8]| {
            let start = offset.min(bytes.len() as u64) as usize;
            bytes[start..bytes.len().min(start + len as usize)].to_vec()
        };
        match &node.what {
            What::Folder(_) | What::Volumes(_) | What::Tree(_) => Err(Errno::EISDIR),
            What::Bytes(bytes) => Ok(part(bytes)),
            What::Chunks(chunks, whole) => {
                self.cache.content(chunks, *whole).map(|content| part(&content)).map_err(|_| Errno::EIO)
            }
            What::Disk(disk) => {
                let start = offset.min(disk.size());
                let read = disk.read(start, len.min(disk.size() - start));
                let pieces = read.map_err(|error| self.unreadable(&error))?;
                let mut bytes = Vec::with_capacity(len as usize);
                for piece in pieces {
                    match piece {
                        Piece::Data(data) => bytes.extend_from_slice(&data),
                        Piece::Zeroes(zeroes) => bytes.resize(bytes.len() + zeroes as usize, 0),
                    }
                }
                Ok(bytes)
            }
        }
    }

    fn seek(&self, ino: INodeNo, handle: FileHandle, offset: i64, whence: i32) -> Result<i64, Errno> {
        let node = self.node(ino);
        let open = if node.is_none() { Some(self.guests.content(handle)?) } else { None };
        let size = match node.map(|node| &node.what) {
            None => open.as_ref().map_or(0, |open| open.size()),
            Some(What::Disk(disk)) => disk.size(),
            Some(What::Bytes(bytes)) => bytes.len() as u64,
            Some(What::Chunks(_, len)) => *len,
            Some(What::Folder(_) | What::Volumes(_) | What::Tree(_)) => return Err(Errno::EINVAL),
        };
        let at = u64::try_from(offset).ok().filter(|at| *at < size).ok_or(Errno::ENXIO)?;
        let to_data = match whence {
            SEEK_DATA => true,
            SEEK_HOLE => false,
            _ => return Err(Errno::EINVAL),
        };
        let found = match (node.map(|node| &node.what), &open) {
            (Some(What::Disk(disk)), _) => disk.seek(at, to_data).map_err(|error| self.unreadable(&error))?,
            (_, Some(open)) => open.seek(at, to_data).map_err(|error| self.unreadable(&error))?,
            _ if to_data => at,
            _ => size,
        };
        // The end of a file is a hole, and no data.
        if to_data && found == size { Err(Errno::ENXIO) } else { Ok(found as i64) }
    }

    fn unreadable(&self, error: &ReadError) -> Errno {
        (self.unreadable)(error);
        Errno::EIO
    }
}

impl Filesystem for Served {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if let Err(most) = config.set_max_readahead(READ_AHEAD) {
            let _ = config.set_max_readahead(most);
        }
        Ok(())
    }

    fn destroy(&mut self) {
        if let Some(ended) = self.ended.take() {
            ended();
        }
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let files = &self.files;
        let child = match files.node(parent).map(|node| &node.what) {
            Some(What::Folder(children)) => name.to_str().and_then(|name| children.get(name)),
            Some(What::Volumes(_)) => return files.find_volume(parent, name, reply),
            Some(What::Tree(top)) => return files.find_in_guest(*top, name, reply),
            Some(_) => None,
            None => return files.find_in_guest(parent, name, reply),
        };
        match child {
            Some(number) => reply.entry(&FOR_EVER, &files.attributes(*number), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.files.node(ino) {
            Some(_) => reply.attr(&FOR_EVER, &self.files.attributes(u64::from(ino) as usize - 1)),
            None => self.files.attributes_in_guest(ino, reply),
        }
    }

    /// Who may look was asked when it was mounted.
    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        self.files.target_in_guest(ino, reply);
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.files.node(ino) {
            Some(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            None => self.files.open_in_guest(ino, reply),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.guests.close(handle);
        reply.ok();
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.files.node(ino).map(|node| &node.what) {
            Some(What::Volumes(_)) => self.files.list_volumes(ino, reply),
            Some(What::Tree(top)) => self.files.list_in_guest(*top, reply),
            Some(_) => reply.opened(FileHandle(0), FopenFlags::empty()),
            None => self.files.list_in_guest(ino, reply),
        }
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.files.guests.close(handle);
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = match self.files.node(ino) {
            Some(node) => self.files.read_node(node, offset, u64::from(size)),
            None => self.files.read_in_guest(handle, offset, size),
        };
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match self.files.seek(ino, handle, offset, whence) {
            Ok(at) => reply.offset(at),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        ino_of: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let files = &self.files;
        let Some(Node { parent, what: What::Folder(children), .. }) = files.node(ino_of) else {
            return files.guests.read_folder(ino_of, handle, offset, reply);
        };
        let itself = u64::from(ino_of) as usize - 1;
        let entries = [(".", itself), ("..", *parent)].into_iter();
        let entries = entries.chain(children.iter().map(|(name, number)| (name.as_str(), *number)));
        for (place, (name, number)) in entries.enumerate().skip(offset as usize) {
            let is_full = reply.add(ino(number), place as u64 + 1, files.attributes(number).kind, name);
            if is_full {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let size = |node: &Node| if let What::Disk(disk) = &node.what { disk.size() } else { 0 };
        let nodes = &self.files.nodes;
        let blocks = nodes.iter().map(size).sum::<u64>().div_ceil(4096);
        reply.statfs(blocks, 0, 0, nodes.len() as u64, 0, 4096, 255, 4096);
    }
}

impl fmt::Debug for PointFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PointFiles").field("nodes", &self.nodes.len()).finish_non_exhaustive()
    }
}

/// It is mounted until this is dropped.
#[derive(Debug)]
pub struct Mounted {
    session: Option<fuser::BackgroundSession>,
    folder: PathBuf,
}

impl Mounted {
    /// Takes it away, also from those who use it: they get errors. Whether there were any.
    pub fn unmount(mut self) -> bool {
        self.take_away()
    }

    fn take_away(&mut self) -> bool {
        let Some(session) = self.session.take() else { return false };
        if session.umount_and_join().is_ok() {
            return false;
        }
        // Somebody has a file open.
        let _ = rustix::mount::unmount(&self.folder, rustix::mount::UnmountFlags::DETACH);
        true
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.take_away();
    }
}

/// Of a file that has one name, and was never anything else.
fn attributes(
    ino: INodeNo,
    kind: FileType,
    perm: u16,
    size: u64,
    time: SystemTime,
    (uid, gid): (u32, u32),
) -> FileAttr {
    FileAttr {
        ino,
        size,
        blocks: size.div_ceil(SECTOR),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm,
        nlink: 1,
        uid,
        gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn ino(number: usize) -> INodeNo {
    INodeNo(number as u64 + 1)
}

/// A name as that of a file: what cannot be in one is written as `%` and two digits.
fn file_name(name: &str) -> String {
    let mut safe = String::with_capacity(name.len());
    for (place, c) in name.chars().enumerate() {
        match c {
            '/' | '%' | '\0'..='\x1f' => safe.push_str(&format!("%{:02x}", c as u32)),
            '.' if place == 0 => safe.push_str("%2e"),
            _ => safe.push(c),
        }
    }
    if safe.is_empty() { "%".to_owned() } else { safe }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_is_a_file_name_and_two_stay_two() {
        for (name, expected) in [
            ("shop", "shop"),
            ("a/b", "a%2fb"),
            ("..", "%2e."),
            (".", "%2e"),
            ("", "%"),
            ("50%", "50%25"),
            ("a\n", "a%0a"),
        ] {
            assert_eq!(file_name(name), expected);
        }
    }
}
