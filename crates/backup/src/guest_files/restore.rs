//! Files of a guest's file system, listed and brought back as those of a machine's agent are.

use super::volume::GuestVolume;
use super::{GuestError, ROOT};
use crate::files::{Contents, Restore, write_at};
use crate::restore::is_of_the_place;
use crate::{BackupError, Entry, Kind, Progress, ReadError, RestoredFiles, Time};
use rempart_guest_fs::files::{self, Attributes};
use rempart_repository::{Decompressor, Error, ErrorKind};
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::Path;

/// Bytes of a file that are read at once.
const PIECE: usize = 1 << 20;

/// Gives the entry at `wanted` and those below it, all if that is empty, in order; and of each folder that cannot be read why.
/// Whether there is such a file.
pub fn list_guest_files(
    volume: &GuestVolume,
    wanted: &[u8],
    mut each: impl FnMut(Entry) -> Result<(), BackupError>,
    mut lost: impl FnMut(&[u8], &GuestError),
) -> Result<bool, BackupError> {
    let mut walk = Walk::new(volume);
    let Some(at) = walk.reach(wanted)? else { return Ok(false) };
    walk.below(at, &mut |step| match step {
        Step::Entry(entry, _) => each(entry),
        Step::Lost(path, why) => {
            lost(path, why);
            Ok(())
        }
    })?;
    Ok(true)
}

/// Restores what is at `wanted` and below it, all if that is empty, into a new folder, or an empty one, with the folders that
/// lead there.
pub fn restore_guest_files(
    volume: &GuestVolume,
    wanted: &[u8],
    to: &Path,
    threads: usize,
    progress: &Progress,
) -> Result<RestoredFiles, BackupError> {
    let mut walk = Walk::new(volume);
    let Some(at) = walk.reach(wanted)? else {
        return Err(Error::new(
            ErrorKind::Missing,
            crate::files::shown(wanted),
            "the file system has no such file",
        )
        .into());
    };
    let contents = GuestContents(volume);
    let mut restore = Restore::new(&contents, to, threads, progress)?;
    for (path, file, attributes) in walk.passed.clone() {
        let entry = walk.entry(path, file, attributes);
        restore.entry(entry, file)?;
    }
    walk.below(at, &mut |step| {
        if progress.is_stopped() {
            return Err(BackupError::Stopped);
        }
        match step {
            Step::Entry(entry, file) => restore.entry(entry, file),
            Step::Lost(path, why) => {
                restore.fail(path, why);
                Ok(())
            }
        }
    })?;
    restore.end(to)
}

impl GuestVolume {
    /// Whether there is something at a path.
    pub fn has(&self, path: &[u8]) -> Result<bool, BackupError> {
        Ok(Walk::new(self).reach(path)?.is_some())
    }
}

type Place = (Vec<u8>, u64, Attributes);

enum Step<'a> {
    Entry(Entry, u64),
    Lost(&'a [u8], &'a GuestError),
}

/// A walk through a file system in the order of paths.
struct Walk<'a> {
    volume: &'a GuestVolume,
    /// Folders that lead to where it began.
    passed: Vec<Place>,
    /// Folders that it has been to: one that comes again is within itself.
    folders: HashSet<u64>,
    /// The first name of each file that has several.
    names: HashMap<u64, Vec<u8>>,
}

fn failed(error: GuestError) -> BackupError {
    match error {
        GuestError::Unreadable(ReadError { source, .. }) => source.into(),
        error => BackupError::Guest(error),
    }
}

impl<'a> Walk<'a> {
    fn new(volume: &'a GuestVolume) -> Walk<'a> {
        Walk { volume, passed: Vec::new(), folders: HashSet::new(), names: HashMap::new() }
    }

    fn reach(&mut self, wanted: &[u8]) -> Result<Option<Place>, BackupError> {
        let mut at = (Vec::new(), ROOT, self.volume.attributes_now(ROOT).map_err(failed)?);
        for part in wanted.split(|byte| *byte == b'/').filter(|part| !part.is_empty()) {
            if at.2.kind != files::Kind::Folder {
                return Ok(None);
            }
            let Some((file, attributes)) = self.volume.find_now(at.1, part).map_err(failed)? else {
                return Ok(None);
            };
            let path = if at.0.is_empty() { part.to_vec() } else { [&at.0, &b"/"[..], part].concat() };
            let passed = std::mem::replace(&mut at, (path, file, attributes));
            if !passed.0.is_empty() {
                self.passed.push(passed);
            }
        }
        Ok(Some(at))
    }

    fn below(
        &mut self,
        at: Place,
        each: &mut dyn FnMut(Step<'_>) -> Result<(), BackupError>,
    ) -> Result<(), BackupError> {
        // The last is what comes next: names, and what stands for them.
        let mut next = vec![at];
        while let Some((path, file, attributes)) = next.pop() {
            let is_folder = attributes.kind == files::Kind::Folder;
            if !path.is_empty() {
                let entry = self.entry(path.clone(), file, attributes);
                if !entry.is_possible() {
                    let why = GuestError::Refused("no file can be like that".to_owned());
                    each(Step::Lost(&path, &why))?;
                    continue;
                }
                each(Step::Entry(entry, file))?;
            }
            if !is_folder {
                continue;
            }
            if !self.folders.insert(file) {
                each(Step::Lost(&path, &GuestError::Refused("it is a folder of two names".to_owned())))?;
                continue;
            }
            let mut names = match self.volume.list_now(file) {
                Ok(names) => names,
                Err(why) => {
                    each(Step::Lost(&path, &why))?;
                    continue;
                }
            };
            // Backwards, and of two that are equal the first.
            names.sort_by(|one, other| one.name.cmp(&other.name));
            names.dedup_by(|next, before| next.name == before.name);
            for name in names.into_iter().rev() {
                let path = if path.is_empty() { name.name } else { [&path, &b"/"[..], &name.name].concat() };
                match self.volume.attributes_now(name.file) {
                    Ok(attributes) => next.push((path, name.file, attributes)),
                    Err(why) => each(Step::Lost(&path, &why))?,
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: Vec<u8>, file: u64, attributes: Attributes) -> Entry {
        let mut unread = None;
        let (major, minor) = attributes.device;
        let mut kind = match attributes.kind {
            files::Kind::Folder => Kind::Folder,
            files::Kind::File => Kind::File { size: attributes.size },
            files::Kind::Link => match self.volume.target_now(file) {
                Ok(target) => Kind::Link { target },
                Err(why) => {
                    unread = Some(format!("cannot be read: {why}"));
                    Kind::Unknown
                }
            },
            files::Kind::CharacterDevice => Kind::CharacterDevice { major, minor },
            files::Kind::BlockDevice => Kind::BlockDevice { major, minor },
            files::Kind::Pipe => Kind::Pipe,
            files::Kind::Socket => Kind::Socket,
        };
        if attributes.links > 1 && !matches!(kind, Kind::Folder) {
            match self.names.get(&file) {
                Some(of) => kind = Kind::Again { of: of.clone() },
                None => {
                    self.names.insert(file, path.clone());
                }
            }
        }
        let extended = self.volume.extended_now(file).unwrap_or_else(|why| {
            unread.get_or_insert(format!("has attributes that cannot be read: {why}"));
            Vec::new()
        });
        let (seconds, nanoseconds) = attributes.modified;
        Entry {
            path,
            kind,
            mode: attributes.mode,
            owner: attributes.owner,
            group: attributes.group,
            modified: Time { seconds, nanoseconds },
            attributes: extended,
            unread,
        }
    }
}

/// What files of a guest hold, by their numbers.
struct GuestContents<'a>(&'a GuestVolume);

impl Contents for GuestContents<'_> {
    fn fill(
        &self,
        file: &OwnedFd,
        size: u64,
        first: u64,
        progress: &Progress,
        _: &mut Decompressor,
    ) -> Result<Result<(), String>, BackupError> {
        let content = match self.0.content_now(first) {
            Ok(content) if content.size() == size => content,
            Ok(_) => return Ok(Err("it is not as long as it says".to_owned())),
            Err(why) => return refuse(why),
        };
        let mut piece = vec![0; PIECE];
        let mut at = content.seek(0, true);
        while at < size {
            if progress.is_stopped() {
                return Err(BackupError::Stopped);
            }
            let end = content.seek(at, false).min(at + PIECE as u64);
            let piece = &mut piece[..(end - at) as usize];
            if let Err(error) = content.read(at, piece) {
                return refuse(GuestError::Unreadable(error));
            }
            if let Err(errno) = write_at(file, piece, at) {
                return Ok(Err(errno.to_string()));
            }
            progress.add(end - at);
            at = content.seek(end, true);
        }
        Ok(Ok(()))
    }
}

/// What is lost is lost; a place that does not answer ends all.
fn refuse(why: GuestError) -> Result<Result<(), String>, BackupError> {
    match why {
        GuestError::Unreadable(error) if is_of_the_place(&error.source) => Err(error.source.into()),
        why => Ok(Err(why.to_string())),
    }
}
