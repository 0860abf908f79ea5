//! The files inside the disks, and those that were read within machines. Whoever asks for those of disks is answered when their file system's reader has answered: nobody else
//! waits for it.

use super::{FOR_EVER, PointFiles, UNIX_EPOCH, file_name};
use crate::files::FileFinder;
use crate::{DiskReader, FileContent, GuestDisks, GuestError, GuestVolume, Looked, ReadError};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyEntry, ReplyOpen,
};
use rempart_guest_fs::files::{Attributes, Kind, Name};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

/// Bits of an inode's number that are the number of the file in its file system. Before them is that of the file system, from
/// 1 on.
const FILE_BITS: u32 = 44;
pub(super) const ROOT: u64 = crate::guest_files::ROOT;
/// What there is to say of the file systems of a disk.
const ABOUT: &str = "about.txt";

/// What lies on a disk, once somebody looked.
pub(super) struct Volumes {
    disks: GuestDisks,
    disk: usize,
    /// By their names: what they are in the table of all.
    found: OnceLock<BTreeMap<String, u64>>,
}

impl Volumes {
    pub fn new(disks: GuestDisks, disk: usize) -> Volumes {
        Volumes { disks, disk, found: OnceLock::new() }
    }
}

#[derive(Clone)]
enum Shown {
    FileSystem(GuestVolume),
    /// Files that were read within the machine.
    Tree(Arc<FileFinder>),
    About(Arc<[u8]>),
}

enum Open {
    Folder(Vec<(INodeNo, FileType, Vec<u8>)>),
    File(OpenFile),
}

/// What a file holds.
#[derive(Clone)]
pub(super) enum OpenFile {
    OfGuest(Arc<FileContent>),
    OfTree(Arc<DiskReader>),
}

impl OpenFile {
    pub fn size(&self) -> u64 {
        match self {
            OpenFile::OfGuest(content) => content.size(),
            OpenFile::OfTree(content) => content.size(),
        }
    }

    fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>, ReadError> {
        let len = self.size().saturating_sub(offset).min(len.into());
        let mut bytes = vec![0; len as usize];
        match self {
            OpenFile::OfGuest(content) => content.read(offset, &mut bytes).map(drop)?,
            OpenFile::OfTree(content) if len > 0 => content.read_into(offset, &mut bytes)?,
            OpenFile::OfTree(_) => {}
        }
        Ok(bytes)
    }

    pub fn seek(&self, at: u64, to_data: bool) -> Result<u64, ReadError> {
        match self {
            OpenFile::OfGuest(content) => Ok(content.seek(at, to_data)),
            OpenFile::OfTree(content) => content.seek(at, to_data),
        }
    }
}

/// All file systems that were looked at, and what is open in them.
#[derive(Default)]
pub(super) struct Guests {
    shown: Mutex<Vec<Shown>>,
    open: Mutex<(u64, HashMap<u64, Open>)>,
}

/// The number of another file, where that of one is known.
pub(super) fn beside(at: INodeNo, file: u64) -> Result<INodeNo, Errno> {
    ino(u64::from(at) >> FILE_BITS, file)
}

fn ino(number: u64, file: u64) -> Result<INodeNo, Errno> {
    if file >> FILE_BITS == 0 { Ok(INodeNo(number << FILE_BITS | file)) } else { Err(Errno::EOVERFLOW) }
}

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Folder => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
        Kind::CharacterDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::Pipe => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
    }
}

impl Guests {
    /// The number of the top of such files.
    pub fn add(&self, files: FileFinder) -> INodeNo {
        let number = self.show(Shown::Tree(Arc::new(files)));
        ino(number, ROOT).expect("few bits are enough for the first file")
    }

    /// The number of a file in its tree, and that tree.
    pub(super) fn tree(&self, ino: INodeNo) -> Option<(Arc<FileFinder>, u64)> {
        match self.get(ino)? {
            (Shown::Tree(files), file) => Some((files, file)),
            _ => None,
        }
    }

    fn show(&self, shown: Shown) -> u64 {
        let mut all = self.shown.lock().expect("no holder panics");
        all.push(shown);
        all.len() as u64
    }

    fn get(&self, ino: INodeNo) -> Option<(Shown, u64)> {
        let (number, file) = (u64::from(ino) >> FILE_BITS, u64::from(ino) & ((1 << FILE_BITS) - 1));
        let all = self.shown.lock().expect("no holder panics");
        all.get(usize::try_from(number).ok()?.checked_sub(1)?).cloned().map(|shown| (shown, file))
    }

    fn file_system(&self, ino: INodeNo) -> Result<(GuestVolume, u64), Errno> {
        match self.get(ino) {
            Some((Shown::FileSystem(volume), file)) => Ok((volume, file)),
            Some(_) => Err(Errno::ENOTDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn keep(&self, open: Open) -> FileHandle {
        let (last, all) = &mut *self.open.lock().expect("no holder panics");
        *last += 1;
        all.insert(*last, open);
        FileHandle(*last)
    }

    pub fn close(&self, handle: FileHandle) {
        self.open.lock().expect("no holder panics").1.remove(&handle.0);
    }

    pub fn content(&self, handle: FileHandle) -> Result<OpenFile, Errno> {
        match self.open.lock().expect("no holder panics").1.get(&handle.0) {
            Some(Open::File(content)) => Ok(content.clone()),
            _ => Err(Errno::EINVAL),
        }
    }

    pub fn read_folder(&self, itself: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let open = self.open.lock().expect("no holder panics");
        let Some(Open::Folder(names)) = open.1.get(&handle.0) else { return reply.error(Errno::ENOTDIR) };
        let dots = [(itself, FileType::Directory, &b"."[..]), (itself, FileType::Directory, b"..")];
        let names = names.iter().map(|(ino, kind, name)| (*ino, *kind, &name[..]));
        for (place, (ino, kind, name)) in dots.into_iter().chain(names).enumerate().skip(offset as usize) {
            if reply.add(ino, place as u64 + 1, kind, OsStr::from_bytes(name)) {
                break;
            }
        }
        reply.ok();
    }
}

impl PointFiles {
    /// What lies on a disk; `done` is told once that is known.
    fn look(
        self: &Arc<Self>,
        at: INodeNo,
        done: impl FnOnce(&Arc<PointFiles>, Result<&BTreeMap<String, u64>, Errno>) + Send + 'static,
    ) {
        let this = self.clone();
        let Some(volumes) = self.volumes_at(at) else { return done(self, Err(Errno::ENOENT)) };
        if let Some(found) = volumes.found.get() {
            return done(self, Ok(found));
        }
        volumes.disks.look(volumes.disk, move |found| {
            let found = found.map_err(|_| Errno::EIO);
            let found = found.and_then(|found| {
                let volumes = this.volumes_at(at).ok_or(Errno::ENOENT)?;
                Ok(volumes.found.get_or_init(|| this.show(found)))
            });
            done(&this, found);
        });
    }

    fn volumes_at(&self, at: INodeNo) -> Option<&Volumes> {
        match &self.node(at)?.what {
            super::What::Volumes(volumes) => Some(volumes),
            _ => None,
        }
    }

    fn show(&self, found: Vec<Looked>) -> BTreeMap<String, u64> {
        let (mut names, mut about) = (BTreeMap::new(), String::new());
        for (volume, opened) in found {
            let name = file_name(&volume.name);
            let kind = volume.kind.map_or("not shown", |kind| kind.name());
            let note = volume.note.map_or(String::new(), |note| format!(": {}", note.escape_debug()));
            let size = volume.map.map_or(String::new(), |map| format!(", {} MiB", map.len() >> 20));
            about.push_str(&format!("{name}: {kind}{size}{note}\n"));
            if let Some(opened) = opened {
                names.entry(name).or_insert_with(|| self.guests.show(Shown::FileSystem(opened)));
            }
        }
        let about = Shown::About(about.into_bytes().into());
        names.insert(ABOUT.to_owned(), self.guests.show(about));
        names
    }

    pub(super) fn find_volume(self: &Arc<Self>, at: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.look(at, move |this, found| {
            let found = found.and_then(|found| {
                let number = name.to_str().and_then(|name| found.get(name)).ok_or(Errno::ENOENT)?;
                this.top(ino(*number, ROOT)?)
            });
            match found {
                Ok(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
                Err(errno) => reply.error(errno),
            }
        });
    }

    pub(super) fn list_volumes(self: &Arc<Self>, at: INodeNo, reply: ReplyOpen) {
        self.look(at, move |this, found| {
            let listed = found.and_then(|found| {
                let named = found.iter().map(|(name, number)| {
                    let ino = ino(*number, ROOT)?;
                    Ok((ino, this.top(ino)?.kind, name.clone().into_bytes()))
                });
                named.collect::<Result<Vec<_>, _>>()
            });
            match listed {
                Ok(names) => reply.opened(this.guests.keep(Open::Folder(names)), FopenFlags::empty()),
                Err(errno) => reply.error(errno),
            }
        });
    }

    /// What is at the top of a file system, without asking it; or what is said of all.
    fn top(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let time = self.nodes[super::ROOT].time;
        let (kind, perm, size) = match self.guests.get(ino).ok_or(Errno::ENOENT)?.0 {
            Shown::FileSystem(_) | Shown::Tree(_) => (FileType::Directory, 0o500, 0),
            Shown::About(text) => (FileType::RegularFile, 0o400, text.len() as u64),
        };
        Ok(super::attributes(ino, kind, perm, size, time, self.owner))
    }

    pub(super) fn find_in_guest(&self, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if let Some((files, folder)) = self.guests.tree(parent) {
            return match self.child(parent, &files, folder, name.as_bytes()) {
                Ok(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
                Err(errno) => reply.error(errno),
            };
        }
        let (volume, folder) = match self.guests.file_system(parent) {
            Ok(found) => found,
            Err(errno) => return reply.error(errno),
        };
        let number = u64::from(parent) >> FILE_BITS;
        volume.find(folder, name.as_bytes(), move |found| {
            let found = found.map_err(|_| Errno::EIO).and_then(|found| {
                let (file, attributes) = found.ok_or(Errno::ENOENT)?;
                Ok(shape(ino(number, file)?, &attributes))
            });
            match found {
                Ok(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
                Err(errno) => reply.error(errno),
            }
        });
    }

    pub(super) fn attributes_in_guest(&self, ino: INodeNo, reply: ReplyAttr) {
        match self.guests.get(ino) {
            Some((Shown::Tree(files), file)) if file != ROOT => match self.attributes_of(ino, &files, file) {
                Ok(attributes) => reply.attr(&FOR_EVER, &attributes),
                Err(errno) => reply.error(errno),
            },
            Some((Shown::FileSystem(volume), file)) if file != ROOT => {
                volume.attributes(file, move |attributes| match attributes {
                    Ok(attributes) => reply.attr(&FOR_EVER, &shape(ino, &attributes)),
                    Err(_) => reply.error(Errno::EIO),
                });
            }
            _ => match self.top(ino) {
                Ok(attributes) => reply.attr(&FOR_EVER, &attributes),
                Err(errno) => reply.error(errno),
            },
        }
    }

    pub(super) fn target_in_guest(&self, ino: INodeNo, reply: ReplyData) {
        if let Some((files, file)) = self.guests.tree(ino) {
            return match self.target(&files, file) {
                Ok(target) => reply.data(&target),
                Err(errno) => reply.error(errno),
            };
        }
        match self.guests.file_system(ino) {
            Ok((volume, file)) => volume.target(file, move |target| match target {
                Ok(target) => reply.data(&target),
                Err(_) => reply.error(Errno::EIO),
            }),
            Err(errno) => reply.error(errno),
        }
    }

    pub(super) fn open_in_guest(self: &Arc<Self>, ino: INodeNo, reply: ReplyOpen) {
        if let Some((files, file)) = self.guests.tree(ino) {
            return match self.content(&files, file) {
                Ok(content) => {
                    let handle = self.guests.keep(Open::File(OpenFile::OfTree(Arc::new(content))));
                    reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE);
                }
                Err(errno) => reply.error(errno),
            };
        }
        let this = self.clone();
        let opened = move |content| match content {
            Ok(content) => {
                let handle = this.guests.keep(Open::File(OpenFile::OfGuest(Arc::new(content))));
                reply.opened(handle, FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(_) => reply.error(Errno::EIO),
        };
        match self.guests.get(ino) {
            Some((Shown::FileSystem(volume), file)) => volume.content(file, opened),
            Some((Shown::About(text), _)) => opened(Ok::<_, GuestError>(FileContent::of(text.to_vec()))),
            Some((Shown::Tree(_), _)) | None => {
                opened(Err(GuestError::Refused("it is not there".to_owned())));
            }
        }
    }

    pub(super) fn list_in_guest(self: &Arc<Self>, at: INodeNo, reply: ReplyOpen) {
        if let Some((files, folder)) = self.guests.tree(at) {
            return match self.children_of(at, &files, folder) {
                Ok(names) => reply.opened(self.guests.keep(Open::Folder(names)), FopenFlags::empty()),
                Err(errno) => reply.error(errno),
            };
        }
        let (volume, folder) = match self.guests.file_system(at) {
            Ok(found) => found,
            Err(errno) => return reply.error(errno),
        };
        let (this, number) = (self.clone(), u64::from(at) >> FILE_BITS);
        volume.list(folder, move |names| {
            let Ok(names) = names else { return reply.error(Errno::EIO) };
            let shown = |Name { name, file, kind }| Some((ino(number, file).ok()?, file_type(kind), name));
            let names = names.into_iter().filter_map(shown).collect();
            reply.opened(this.guests.keep(Open::Folder(names)), FopenFlags::empty());
        });
    }

    pub(super) fn read_in_guest(&self, handle: FileHandle, offset: u64, len: u32) -> Result<Vec<u8>, Errno> {
        self.guests.content(handle)?.read(offset, len).map_err(|error| self.unreadable(&error))
    }
}

pub(super) fn shape(ino: INodeNo, attributes: &Attributes) -> FileAttr {
    let (seconds, nanoseconds) = attributes.modified;
    let second = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 { UNIX_EPOCH.checked_sub(second) } else { UNIX_EPOCH.checked_add(second) };
    let time = time.and_then(|time| time.checked_add(Duration::from_nanos(nanoseconds.into())));
    let time = time.unwrap_or(SystemTime::UNIX_EPOCH);
    let (kind, mode) = (file_type(attributes.kind), (attributes.mode & 0o7777) as u16);
    let owner = (attributes.owner, attributes.group);
    FileAttr {
        nlink: attributes.links,
        rdev: rustix::fs::makedev(attributes.device.0, attributes.device.1) as u32,
        ..super::attributes(ino, kind, mode, attributes.size, time, owner)
    }
}
