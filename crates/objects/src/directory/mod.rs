//! Objects as files of a directory.
//!
//! An object is written to a file of another name, synced, and given its own name by link(2), which fails where the name
//! is taken; rename(2) would replace. Then its directory and those above are synced, and only then the other name goes:
//!
//! | a power cut after | leaves | the object |
//! |---|---|---|
//! | write, sync of the file | a leftover | is not there |
//! | link | perhaps its name | is there whole, or not at all |
//! | sync of its directory and of those above | its name | is there |
//! | removal of the other name | nothing else | is there |
//!
//! So a file that has two names may be lost yet, by another's power cut before it was told of success. Whoever
//! wants to rely on such a one syncs it first: [`Directory`] does when a name is taken, and when it reads a whole object.
//!
//! A failed sync may have thrown away what was written, and the next one would say nothing of it (that is how the
//! kernel reports them). After one, a `Directory` changes nothing any more.

mod file_system;
mod listing;
#[cfg(test)]
mod power_loss;
#[cfg(test)]
mod simulated;
#[cfg(test)]
mod tests;

use crate::{Abilities, Created, Error, ErrorKind, Listed, Name, Objects};
use file_system::{FileSystem, Linux};
use rempart_types::WallTime;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Where files lie until they have their name. No object's name starts with a dot.
const TEMPORARIES: &str = ".tmp";
/// Nothing takes that long: an older file there, locked by nobody, is a leftover.
const LEFTOVER_AGE: Duration = Duration::from_secs(24 * 3600);
/// Open directories that are kept.
const MOST_DIRS: usize = 64;
/// How often a directory may vanish from under a creation.
const MOST_TRIES: u32 = 8;
/// Large enough that its syncs cost little beside it.
const PACK_LEN: u64 = 16 * 1024 * 1024;
/// One is written while another is synced.
const CREATES: usize = 2;

/// Objects as files of a directory, which several processes may use at once. For the owner only: 0700, 0600.
///
/// The file system must have link(2): any of ext4, XFS, Btrfs, ZFS, NFS, but not FAT. (Linux can rename without
/// replacing on FAT; but FAT has no journal, so a power cut may leave neither name, or both.)
#[derive(Debug)]
pub struct Directory<F: FileSystem = Linux> {
    files: F,
    root: F::Dir,
    path: String,
    /// Not known as long as nothing can be written.
    links: OnceLock<Links>,
    /// Directories that are there after a power cut. Open: one that is removed and made anew under its name is another.
    durable: Mutex<BTreeMap<String, Arc<F::Dir>>>,
    /// The sync that failed.
    aborted: OnceLock<String>,
}

/// Whether the file system tells how many names a file has. Some network file systems say 1 of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Links {
    Counted,
    Uncounted,
}

/// What became of a name.
#[derive(Debug)]
enum Linked {
    New,
    Taken,
    /// Its directory was removed meanwhile.
    NoDirectory,
}

impl Directory {
    /// The directory at `path`, which must be there.
    pub fn open(path: &Path) -> Result<Directory, Error> {
        let failed = |error| Error::at_place(kind(&error), "open", path.display().to_string(), error);
        let root = Linux::open_root(path).map_err(failed)?;
        let path = std::path::absolute(path).map_err(failed)?;
        Directory::start(Linux, root, path.display().to_string())
    }

    /// The same, made if need be, with all above it, and there to stay.
    pub fn create(path: &Path) -> Result<Directory, Error> {
        let failed = |error| Error::at_place(kind(&error), "make", path.display().to_string(), error);
        make_durably(path).map_err(failed)?;
        Directory::open(path)
    }
}

fn make_durably(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    let above = path.parent().into_iter().flat_map(Path::ancestors);
    let missing: Vec<_> = above.take_while(|dir| !dir.exists()).collect();
    for dir in missing.into_iter().rev().chain([&*path]) {
        match std::fs::DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        if let Some(parent) = dir.parent() {
            std::fs::File::open(parent)?.sync_all()?;
        }
    }
    Ok(())
}

impl<F: FileSystem> Directory<F> {
    fn start(files: F, root: F::Dir, path: String) -> Result<Directory<F>, Error> {
        let directory = Directory {
            files,
            root,
            path,
            links: OnceLock::new(),
            durable: Mutex::default(),
            aborted: OnceLock::new(),
        };
        match directory.try_links() {
            Ok(links) => {
                directory.links.get_or_init(|| links);
                directory.sweep();
            }
            Err(error) if error.kind == ErrorKind::Unsupported => return Err(error),
            // Read-only, or full: it can be read. A creation tries again, and says what is wrong.
            Err(_) => {}
        }
        Ok(directory)
    }

    /// Tries out link(2).
    fn try_links(&self) -> Result<Links, Error> {
        let failed = |error| Error::at_place(kind(&error), "try out", self.path.clone(), error);
        let temporaries = self.temporaries().map_err(failed)?;
        let (first, second) = (fresh_name().map_err(failed)?, fresh_name().map_err(failed)?);
        let file = self.files.create_file(&temporaries, &first).map_err(failed)?;
        let linked = self.files.link((&temporaries, &first), (&temporaries, &second));
        let again = self.files.link((&temporaries, &first), (&temporaries, &second));
        let links = self.files.stat(&file).map(|stat| stat.links);
        let synced = self.files.sync_dir(&temporaries);
        for name in [&first, &second] {
            // The second may not be there; one that stays is a leftover like others.
            let _ = self.files.unlink(&temporaries, name);
        }
        let unfit = |why| {
            let hint = "an object is created by link(2), which succeeds once, and made durable by a sync of its directory; \
                        keep the repository on ext4, XFS, Btrfs, ZFS or NFS, or in an object store";
            let why = format!("its file system {why}: {hint}");
            Error::at_place(ErrorKind::Unsupported, "use", self.path.clone(), why)
        };
        match (linked, again) {
            (Err(error), _) if is_refusal(&error) => Err(unfit(format!("has no hard links ({error})"))),
            (Err(error), _) => Err(failed(error)),
            (Ok(()), Err(error)) if error.kind() == io::ErrorKind::AlreadyExists => match synced {
                Err(error) if is_refusal(&error) => Err(unfit(format!("cannot sync a directory ({error})"))),
                Err(error) => Err(failed(error)),
                Ok(()) => Ok(if links.map_err(failed)? == 2 { Links::Counted } else { Links::Uncounted }),
            },
            (Ok(()), _) => Err(unfit("gives one name to two files".to_owned())),
        }
    }

    fn links(&self) -> Result<Links, Error> {
        if let Some(links) = self.links.get() {
            return Ok(*links);
        }
        let links = self.try_links()?;
        Ok(*self.links.get_or_init(|| links))
    }

    fn temporaries(&self) -> io::Result<F::Dir> {
        match self.files.open_dir(&self.root, TEMPORARIES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        match self.files.make_dir(&self.root, TEMPORARIES) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.files.open_dir(&self.root, TEMPORARIES)
    }

    /// Removes what dead processes left. What cannot be removed does no harm, and waits for the next time.
    fn sweep(&self) {
        let Ok(temporaries) = self.temporaries() else { return };
        let mut names = Vec::new();
        let _ = self.files.entries(&temporaries, &mut |entry| names.push(entry.name.to_owned()));
        for name in names {
            let Ok(file) = self.files.open_file(&temporaries, &name) else { continue };
            let Ok(stat) = self.files.stat(&file) else { continue };
            if !stat.is_file || stat.age < LEFTOVER_AGE || matches!(self.files.lock_file(&file), Ok(false)) {
                continue;
            }
            // With one name it will look durable.
            if stat.links > 1 && self.files.sync_all(&temporaries).is_err() {
                return;
            }
            let _ = self.files.unlink(&temporaries, &name);
        }
    }

    fn error(&self, action: &'static str, name: &Name, error: io::Error) -> Error {
        Error::new(kind(&error), action, name, self.path.clone(), error)
    }

    fn refused(&self, kind: ErrorKind, action: &'static str, name: &Name, why: &str) -> Error {
        Error::new(kind, action, name, self.path.clone(), why)
    }

    fn check_not_aborted(&self, action: &'static str, name: &Name) -> Result<(), Error> {
        match self.aborted.get() {
            None => Ok(()),
            Some(sync) => {
                let why = format!(
                    "nothing is changed here since {sync} failed; look after the disk, then open it anew"
                );
                Err(self.refused(ErrorKind::Failed, action, name, &why))
            }
        }
    }

    fn abort(&self, sync: &str, error: &io::Error) {
        self.aborted.get_or_init(|| format!("{sync} ({error})"));
    }

    /// The directory at `path`, made if need be, once it and all above will be there after a power cut.
    fn durable_dir(&self, path: &str) -> io::Result<Option<Arc<F::Dir>>> {
        if path.is_empty() {
            return Ok(None);
        }
        if let Some(dir) = self.durable_dirs().get(path) {
            return Ok(Some(dir.clone()));
        }
        let (above, leaf) = split(path);
        let above = self.durable_dir(above)?;
        let parent = above.as_deref().unwrap_or(&self.root);
        match self.files.make_dir(parent, leaf) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // Opened before the sync: whatever takes its place later is not what was made durable.
        let dir = Arc::new(self.files.open_dir(parent, leaf)?);
        self.files.sync_dir(parent).inspect_err(|error| self.abort("the sync of a directory", error))?;
        let mut durable = self.durable_dirs();
        if durable.len() >= MOST_DIRS {
            durable.clear();
        }
        durable.insert(path.to_owned(), dir.clone());
        Ok(Some(dir))
    }

    fn durable_dirs(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<F::Dir>>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory that `name` lies in, and the directories above it, the root not among them.
    fn dirs_of(&self, name: &Name) -> io::Result<Vec<F::Dir>> {
        let mut dirs: Vec<F::Dir> = Vec::new();
        for part in parts_of(split(name.as_str()).0) {
            let dir = self.files.open_dir(dirs.last().unwrap_or(&self.root), part)?;
            dirs.push(dir);
        }
        Ok(dirs)
    }

    fn open_object(&self, action: &'static str, name: &Name) -> Result<(F::File, u64), Error> {
        let failed = |error| self.error(action, name, error);
        let dirs = self.dirs_of(name).map_err(failed)?;
        let leaf = split(name.as_str()).1;
        let file = self.files.open_file(dirs.last().unwrap_or(&self.root), leaf).map_err(failed)?;
        let stat = self.files.stat(&file).map_err(failed)?;
        if !stat.is_file {
            return Err(self.refused(ErrorKind::Failed, action, name, "it is not a file"));
        }
        Ok((file, stat.len))
    }

    /// Makes an object that somebody else created survive a power cut.
    fn settle(&self, name: &Name, file: &F::File) -> io::Result<()> {
        if self.links.get() == Some(&Links::Counted) && self.files.stat(file)?.links == 1 {
            return Ok(());
        }
        let sync = || {
            self.files.sync_file(file)?;
            let dirs = self.dirs_of(name)?;
            dirs.iter().rev().chain([&self.root]).try_for_each(|dir| self.files.sync_dir(dir))
        };
        match sync() {
            // Nothing changes on a read-only medium, so that there is nothing to sync.
            Err(error) if self.links.get().is_none() && is_refusal(&error) => Ok(()),
            // Removed meanwhile: not there to be relied upon.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(error),
            synced => synced.inspect_err(|error| self.abort("the sync of an object", error)),
        }
    }

    /// The name is taken, by something that stays.
    fn taken(&self, dir: &F::Dir, name: &Name) -> Result<bool, Error> {
        let failed = |error| self.error("create", name, error);
        match self.files.open_file(dir, split(name.as_str()).1) {
            Ok(file) => self.settle(name, &file).map(|()| true).map_err(failed),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// Writes the object, and gives it its name in `dir`.
    fn create_in(&self, dir: &F::Dir, name: &Name, parts: &[&[u8]], links: Links) -> Result<Linked, Error> {
        let failed = |error| self.error("create", name, error);
        let temporaries = self.temporaries().map_err(failed)?;
        let temporary = fresh_name().map_err(failed)?;
        let file = self.files.create_file(&temporaries, &temporary).map_err(failed)?;
        let written = self.files.write(&file, parts).and_then(|()| {
            self.files.sync_file(&file).inspect_err(|error| {
                // A network file system may find out only now that there is no room.
                if kind(error) != ErrorKind::Full {
                    self.abort("the sync of a new file", error);
                }
            })
        });
        let linked = match written {
            Err(error) => Err(failed(error)),
            Ok(()) => self.link(&file, (&temporaries, &temporary), dir, name, links),
        };
        // While it is not known whether the object stays, the other name warns who reads it.
        if !matches!(&linked, Err(error) if error.kind == ErrorKind::Unknown) {
            // One that stays costs room until it is swept.
            let _ = self.files.unlink(&temporaries, &temporary);
        }
        linked
    }

    fn link(
        &self,
        file: &F::File,
        from: (&F::Dir, &str),
        dir: &F::Dir,
        name: &Name,
        links: Links,
    ) -> Result<Linked, Error> {
        let unknown =
            |error: io::Error| Error::new(ErrorKind::Unknown, "create", name, self.path.clone(), error);
        let leaf = split(name.as_str()).1;
        match self.files.link(from, (dir, leaf)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // A network file system that repeated the call met its own first one.
                let ours = links == Links::Counted && self.files.stat(file).map_err(unknown)?.links == 2;
                if !ours {
                    return Ok(Linked::Taken);
                }
            }
            Err(error) if is_gone(&error) => return Ok(Linked::NoDirectory),
            Err(error) if matches!(kind(&error), ErrorKind::Full | ErrorKind::Denied) => {
                return Err(self.error("create", name, error));
            }
            Err(error) => return Err(unknown(error)),
        }
        match self.files.sync_dir(dir) {
            Ok(()) => Ok(Linked::New),
            Err(error) => {
                self.abort("the sync of a directory", &error);
                Err(unknown(error))
            }
        }
    }
}

impl<F: FileSystem> Objects for Directory<F> {
    fn create(&self, name: &Name, parts: &[&[u8]], retain_until: Option<WallTime>) -> Result<Created, Error> {
        if retain_until.is_some() {
            return Err(self.refused(ErrorKind::Unsupported, "create", name, NO_RETENTION));
        }
        self.check_not_aborted("create", name)?;
        let links = self.links()?;
        for _ in 0..MOST_TRIES {
            let dir = match self.durable_dir(split(name.as_str()).0) {
                Ok(dir) => dir,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.durable_dirs().clear();
                    continue;
                }
                Err(error) => return Err(self.error("create", name, error)),
            };
            let dir = dir.as_deref().unwrap_or(&self.root);
            if self.taken(dir, name)? {
                return Ok(Created::Taken);
            }
            match self.create_in(dir, name, parts, links)? {
                Linked::New => return Ok(Created::New),
                Linked::Taken => {
                    if self.taken(dir, name)? {
                        return Ok(Created::Taken);
                    }
                }
                Linked::NoDirectory => self.durable_dirs().clear(),
            }
        }
        let why = "its directory, or what had its name, was removed again and again meanwhile";
        Err(self.refused(ErrorKind::Unavailable, "create", name, why))
    }

    fn get(&self, name: &Name, limit: u64) -> Result<Vec<u8>, Error> {
        let (file, len) = self.open_object("read", name)?;
        if len > limit {
            let why = format!("it has {len} bytes; at most {limit} were expected");
            return Err(self.refused(ErrorKind::TooLong, "read", name, &why));
        }
        self.settle(name, &file).map_err(|error| self.error("read", name, error))?;
        self.read(name, &file, 0..len)
    }

    fn get_range(&self, name: &Name, range: Range<u64>) -> Result<Vec<u8>, Error> {
        let (file, len) = self.open_object("read", name)?;
        if range.end > len {
            let why = format!("it has {len} bytes; {} to {} were wanted", range.start, range.end);
            return Err(self.refused(ErrorKind::TooShort, "read", name, &why));
        }
        self.read(name, &file, range)
    }

    fn len(&self, name: &Name) -> Result<u64, Error> {
        Ok(self.open_object("look at", name)?.1)
    }

    fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error> {
        listing::page(&self.files, &self.root, prefix, after).map_err(|error| Error {
            kind: kind(&error),
            action: "list",
            name: prefix.to_owned(),
            place: self.path.clone(),
            source: error.into(),
        })
    }

    fn remove(&self, name: &Name) -> Result<(), Error> {
        self.check_not_aborted("remove", name)?;
        let failed = |error| self.error("remove", name, error);
        let dirs = match self.dirs_of(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            dirs => dirs.map_err(failed)?,
        };
        let dir = dirs.last().unwrap_or(&self.root);
        match self.files.unlink(dir, split(name.as_str()).1) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        self.files
            .sync_dir(dir)
            .inspect_err(|error| self.abort("the sync of a directory", error))
            .map_err(|error| Error::new(ErrorKind::Unknown, "remove", name, self.path.clone(), error))?;
        // A session's directory goes with its last object. Whoever is about to create one there makes it anew.
        if let [.., above, _] = &dirs[..] {
            let _ = self.files.remove_dir(above, split(split(name.as_str()).0).1);
        }
        Ok(())
    }

    fn retain(&self, name: &Name, _: WallTime) -> Result<(), Error> {
        Err(self.refused(ErrorKind::Unsupported, "retain", name, NO_RETENTION))
    }

    fn abilities(&self) -> Abilities {
        Abilities { retention: false, pack_len: PACK_LEN, creates: CREATES }
    }

    fn url(&self) -> String {
        self.path.clone()
    }
}

const NO_RETENTION: &str =
    "a directory keeps nothing against its owner; an object store with object lock does";

impl<F: FileSystem> Directory<F> {
    /// `range` lies within the file.
    fn read(&self, name: &Name, file: &F::File, range: Range<u64>) -> Result<Vec<u8>, Error> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let mut bytes = Vec::new();
        if bytes.try_reserve_exact(len).is_err() {
            return Err(self.refused(ErrorKind::TooLong, "read", name, "there is no memory for it"));
        }
        bytes.resize(len, 0);
        self.files.read(file, range.start, &mut bytes).map_err(|error| self.error("read", name, error))?;
        Ok(bytes)
    }
}

/// What is before the last `/`, and behind it.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn parts_of(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty())
}

fn fresh_name() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

/// Of a name, or of the directory it was looked for in.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::StaleNetworkFileHandle)
}

/// The file system has no such call.
fn is_refusal(error: &io::Error) -> bool {
    const REFUSALS: [i32; 7] =
        [libc::EPERM, libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP, libc::EMLINK, libc::EROFS, libc::EBADF];
    error.raw_os_error().is_some_and(|code| REFUSALS.contains(&code))
}

fn kind(error: &io::Error) -> ErrorKind {
    use io::ErrorKind as Io;
    match error.kind() {
        Io::NotFound => ErrorKind::Missing,
        Io::StorageFull | Io::QuotaExceeded => ErrorKind::Full,
        Io::PermissionDenied | Io::ReadOnlyFilesystem => ErrorKind::Denied,
        Io::TimedOut | Io::StaleNetworkFileHandle | Io::HostUnreachable | Io::OutOfMemory => {
            ErrorKind::Unavailable
        }
        _ => match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE | libc::EAGAIN | libc::EHOSTDOWN | libc::ENOTCONN) => {
                ErrorKind::Unavailable
            }
            _ => ErrorKind::Failed,
        },
    }
}
