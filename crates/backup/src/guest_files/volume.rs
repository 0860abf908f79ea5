//! Volumes, and the threads that have their questions answered, one after the other: nobody else waits for a file system that
//! keeps its reader busy.

use super::blocks::{Blocks, FileContent};
use super::process::{GuestError, Process, ReadLimits};
use super::protocol::{Answer, Request};
use crate::DiskReader;
use rempart_guest_fs::files::{Attributes, Extended, FileSystemKind, Name};
use rempart_guest_fs::{Map, Volume};
use std::collections::VecDeque;
use std::fmt;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

/// Processes at once.
const MOST_PROCESSES: usize = 32;
/// After so many failures of its readers, a volume is read no more.
const MOST_FAILURES: u32 = 5;
/// A reader that is asked nothing for so long ends.
const IDLE: Duration = Duration::from_secs(10);
/// How often an idle one looks whether others wait for its place.
const LOOK: Duration = Duration::from_millis(50);
/// Where a link leads, in bytes.
const LONGEST_TARGET: usize = 4095;
const LONGEST_NAME: usize = 255;

/// Makes the command of a process that calls [`read_files`](super::read_files).
type MakeCommand = Box<dyn Fn() -> Command + Send + Sync>;

/// Told why something cannot be shown.
type Tell = Box<dyn Fn(&str) + Send + Sync>;

/// The processes that read guests' file systems.
pub struct GuestReaders {
    command: MakeCommand,
    limits: ReadLimits,
    tell: Tell,
    /// Running, and waiting for one of these to end.
    places: Mutex<(usize, usize)>,
    one_ended: Condvar,
}

impl GuestReaders {
    pub fn new(command: MakeCommand, limits: ReadLimits, tell: Tell) -> Arc<GuestReaders> {
        Arc::new(GuestReaders { command, limits, tell, places: Mutex::default(), one_ended: Condvar::new() })
    }

    fn take_place(self: &Arc<Self>) -> Place {
        let mut places = self.places.lock().expect("no holder panics");
        places.1 += 1;
        let mut places =
            self.one_ended.wait_while(places, |places| places.0 >= MOST_PROCESSES).expect("no holder panics");
        *places = (places.0 + 1, places.1 - 1);
        Place(self.clone())
    }

    fn is_awaited(&self) -> bool {
        self.places.lock().expect("no holder panics").1 > 0
    }
}

impl fmt::Debug for GuestReaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestReaders").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// The right to have a process.
struct Place(Arc<GuestReaders>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.places.lock().expect("no holder panics").0 -= 1;
        self.0.one_ended.notify_one();
    }
}

/// What lies in a part of a disk, and its files if they can be read.
pub type Looked = (Volume, Option<GuestVolume>);

/// The disks of a point.
#[derive(Clone)]
pub struct GuestDisks {
    readers: Arc<GuestReaders>,
    disks: Arc<Vec<Arc<DiskReader>>>,
    /// As people know the point.
    name: String,
}

impl GuestDisks {
    pub fn new(readers: &Arc<GuestReaders>, name: String, disks: Vec<Arc<DiskReader>>) -> GuestDisks {
        GuestDisks { readers: readers.clone(), disks: Arc::new(disks), name }
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.name())
    }

    /// What lies on a disk, told to `done`.
    pub fn look(&self, disk: usize, done: impl FnOnce(Result<Vec<Looked>, GuestError>) + Send + 'static) {
        let mut all = 0;
        let places = self.disks.iter().map(|disk| {
            let start = all;
            all += disk.size();
            start..all
        });
        let places: Vec<_> = places.collect();
        let name = format!("{}, disk `{}`", self.name, self.disks[disk].name());
        let Some(blocks) = Blocks::new(&self.disks, Map::run(0, all)).filter(|_| all > 0) else {
            return done(Ok(Vec::new()));
        };
        let this = self.clone();
        let looker = GuestVolume::new(&self.readers, name.clone(), blocks, None);
        looker.ask(Request::Volumes(places, disk), move |answer| {
            let volumes = answer.and_then(|answer| match answer {
                Answer::Volumes(volumes) => Ok(volumes),
                _ => Err(nonsense()),
            });
            done(
                volumes.map(|volumes| volumes.into_iter().map(|volume| this.opened(&name, volume)).collect()),
            );
        });
    }

    /// The same, waited for.
    pub fn volumes(&self, disk: usize) -> Result<Vec<Looked>, GuestError> {
        let (to, from) = mpsc::channel();
        self.look(disk, move |found| {
            let _ = to.send(found);
        });
        from.recv().expect("every question is answered")
    }

    /// The process is believed no more than that a volume lies on the disks.
    fn opened(&self, disk: &str, mut volume: Volume) -> Looked {
        let blocks = volume.map.take().and_then(|map| Blocks::new(&self.disks, map));
        volume.map = blocks.as_ref().map(|blocks| blocks.map().clone());
        let name = format!("{disk}, {}", volume.name);
        let opened = volume.kind.zip(blocks);
        let opened = opened.map(|(kind, blocks)| GuestVolume::new(&self.readers, name, blocks, Some(kind)));
        (volume, opened)
    }
}

impl fmt::Debug for GuestDisks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestDisks").field("name", &self.name).finish_non_exhaustive()
    }
}

fn nonsense() -> GuestError {
    GuestError::Broken("its answer makes no sense".to_owned())
}

type Done = Box<dyn FnOnce(Result<Answer, GuestError>) + Send>;

/// A file system in a point.
#[derive(Clone)]
pub struct GuestVolume(Arc<Shared>);

struct Shared {
    readers: Arc<GuestReaders>,
    name: String,
    blocks: Blocks,
    kind: Option<FileSystemKind>,
    work: Mutex<Work>,
    more: Condvar,
}

#[derive(Default)]
struct Work {
    asked: VecDeque<(Request, Done)>,
    /// A thread attends to it.
    is_attended: bool,
    failures: u32,
}

impl GuestVolume {
    fn new(
        readers: &Arc<GuestReaders>,
        name: String,
        blocks: Blocks,
        kind: Option<FileSystemKind>,
    ) -> GuestVolume {
        let (readers, work, more) = (readers.clone(), Mutex::default(), Condvar::new());
        GuestVolume(Arc::new(Shared { readers, name, blocks, kind, work, more }))
    }

    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.0.blocks.len()
    }

    fn ask(&self, request: Request, done: impl FnOnce(Result<Answer, GuestError>) + Send + 'static) {
        let mut work = self.0.work.lock().expect("no holder panics");
        work.asked.push_back((request, Box::new(done)));
        if work.is_attended {
            self.0.more.notify_one();
            return;
        }
        work.is_attended = true;
        drop(work);
        let shared = self.0.clone();
        std::thread::spawn(move || shared.attend());
    }

    fn get<T: Send + 'static>(
        &self,
        question: impl FnOnce(&GuestVolume, Box<dyn FnOnce(Result<T, GuestError>) + Send>),
    ) -> Result<T, GuestError> {
        let (to, from) = mpsc::channel();
        question(
            self,
            Box::new(move |answer| {
                let _ = to.send(answer);
            }),
        );
        from.recv().expect("every question is answered")
    }

    pub fn attributes(&self, file: u64, done: impl FnOnce(Result<Attributes, GuestError>) + Send + 'static) {
        self.ask(Request::Attributes(file), |answer| {
            done(answer.and_then(|answer| match answer {
                Answer::Attributes(attributes) => Ok(attributes),
                _ => Err(nonsense()),
            }));
        });
    }

    /// The file of that name in a folder.
    pub fn find(
        &self,
        folder: u64,
        name: &[u8],
        done: impl FnOnce(Result<Option<(u64, Attributes)>, GuestError>) + Send + 'static,
    ) {
        self.ask(Request::Find(folder, name.to_vec()), |answer| {
            done(answer.and_then(|answer| match answer {
                Answer::Found(found) => Ok(found),
                _ => Err(nonsense()),
            }));
        });
    }

    /// What is in a folder. Names that no file can have here are left out, and told.
    pub fn list(&self, folder: u64, done: impl FnOnce(Result<Vec<Name>, GuestError>) + Send + 'static) {
        let this = self.clone();
        self.ask(Request::List(folder), move |answer| {
            let Ok(Answer::Names(mut names)) = answer else {
                return done(answer.and_then(|_| Err(nonsense())));
            };
            let count = names.len();
            names.retain(|name| is_name(&name.name));
            if names.len() < count {
                let hidden = count - names.len();
                this.tell(&format!("{hidden} names of a folder cannot be names here, and are left out"));
            }
            done(Ok(names));
        });
    }

    /// Where a file's bytes lie.
    pub fn content(&self, file: u64, done: impl FnOnce(Result<FileContent, GuestError>) + Send + 'static) {
        let blocks = self.0.blocks.clone();
        self.ask(Request::Content(file), move |answer| {
            done(answer.and_then(|answer| match answer {
                Answer::Content(content) if content.is_sound(blocks.len()) => {
                    Ok(FileContent::new(content, blocks))
                }
                Answer::Content(_) => {
                    Err(GuestError::Refused("a file lies behind the end of its file system".to_owned()))
                }
                _ => Err(nonsense()),
            }));
        });
    }

    /// Where a link leads.
    pub fn target(&self, link: u64, done: impl FnOnce(Result<Vec<u8>, GuestError>) + Send + 'static) {
        self.ask(Request::Target(link), |answer| {
            done(answer.and_then(|answer| match answer {
                Answer::Target(target)
                    if (1..=LONGEST_TARGET).contains(&target.len()) && !target.contains(&0) =>
                {
                    Ok(target)
                }
                Answer::Target(_) => Err(GuestError::Refused("a link leads to what is no path".to_owned())),
                _ => Err(nonsense()),
            }));
        });
    }

    pub fn extended(&self, file: u64, done: impl FnOnce(Result<Extended, GuestError>) + Send + 'static) {
        self.ask(Request::Extended(file), |answer| {
            done(answer.and_then(|answer| match answer {
                Answer::Extended(attributes) => Ok(attributes),
                _ => Err(nonsense()),
            }));
        });
    }

    pub(super) fn attributes_now(&self, file: u64) -> Result<Attributes, GuestError> {
        self.get(|this, done| this.attributes(file, done))
    }

    pub(super) fn find_now(&self, folder: u64, name: &[u8]) -> Result<Option<(u64, Attributes)>, GuestError> {
        self.get(|this, done| this.find(folder, name, done))
    }

    pub(super) fn list_now(&self, folder: u64) -> Result<Vec<Name>, GuestError> {
        self.get(|this, done| this.list(folder, done))
    }

    pub(super) fn content_now(&self, file: u64) -> Result<FileContent, GuestError> {
        self.get(|this, done| this.content(file, done))
    }

    pub(super) fn target_now(&self, link: u64) -> Result<Vec<u8>, GuestError> {
        self.get(|this, done| this.target(link, done))
    }

    pub(super) fn extended_now(&self, file: u64) -> Result<Extended, GuestError> {
        self.get(|this, done| this.extended(file, done))
    }

    /// Tells something of this file system.
    pub fn tell(&self, what: &str) {
        (self.0.readers.tell)(&format!("{}: {what}", self.0.name));
    }
}

impl fmt::Debug for GuestVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GuestVolume").field(&self.0.name).finish()
    }
}

/// Whether it can be that of a file, here.
pub(super) fn is_name(name: &[u8]) -> bool {
    (1..=LONGEST_NAME).contains(&name.len())
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

impl Shared {
    /// Answers what is asked, until nothing is for a while.
    fn attend(&self) {
        let place = self.readers.take_place();
        let mut process = None;
        while let Some((request, done)) = self.next() {
            done(self.answer(&mut process, &request));
        }
        drop(process);
        drop(place);
    }

    fn next(&self) -> Option<(Request, Done)> {
        let start = Instant::now();
        let mut work = self.work.lock().expect("no holder panics");
        loop {
            if let Some(asked) = work.asked.pop_front() {
                return Some(asked);
            }
            // Who only looks is asked once.
            if self.kind.is_none() || start.elapsed() >= IDLE || self.readers.is_awaited() {
                work.is_attended = false;
                return None;
            }
            work = self.more.wait_timeout(work, LOOK).expect("no holder panics").0;
        }
    }

    fn answer(&self, process: &mut Option<Process>, request: &Request) -> Result<Answer, GuestError> {
        let limits = self.readers.limits;
        let failures = self.work.lock().expect("no holder panics").failures;
        if failures >= MOST_FAILURES {
            return Err(GuestError::Refused("its readers failed too often: it is read no more".to_owned()));
        }
        let answered = (|| {
            let ready = match process.take() {
                Some(ready) => ready,
                None => {
                    let mut started = Process::start(&mut (self.readers.command)(), &self.blocks, limits)?;
                    if let Some(kind) = self.kind {
                        started.ask(&Request::Open(kind), &self.blocks, limits)?;
                    }
                    started
                }
            };
            process.insert(ready).ask(request, &self.blocks, limits)
        })();
        if matches!(answered, Err(GuestError::Broken(_))) {
            *process = None;
        }
        // Nor is one that cannot be opened opened for ever.
        if process.is_none() && !matches!(answered, Err(GuestError::Unreadable(_))) {
            self.work.lock().expect("no holder panics").failures += 1;
        }
        if let Err(error) = &answered {
            (self.readers.tell)(&format!("{}: {}", self.name, chain(error)));
        }
        answered
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}
