//! A file system in memory that can lose power after any of its calls, and lets its users take turns as a seed says.

use super::file_system::{Entry, FileSystem, Stat};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// A file, or a directory. 0 is the root.
pub type Node = usize;

/// What happened, in order.
#[derive(Debug, Clone)]
pub enum Event {
    Write(Node, Vec<u8>),
    SyncFile(Node),
    /// A node came up, without a name yet.
    New(Node, Kind),
    /// A directory's entry got its node, or lost it.
    Entry(Node, String, Option<Node>),
    SyncDir(Node),
    SyncAll,
    /// From here on the object must be there: whole, or with this content.
    Relied(String, Option<Vec<u8>>),
    /// From here on there must be no such object.
    Gone(String),
}

/// A mistake that a test must find, or a fault that is survived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    SyncFileIgnored,
    SyncDirIgnored,
    /// Every file is said to have one name.
    LinksUncounted,
    /// The same, but not while link(2) is tried out.
    LinksLie,
    SyncDirFails,
    SyncFileFails,
    NoLink,
    /// link(2) is done, and said to have found the name taken.
    LinkRepeated,
    Full,
    ReadOnly,
}

#[derive(Debug, Clone)]
pub enum Kind {
    File(Vec<u8>),
    Dir(BTreeMap<String, Node>),
}

#[derive(Debug, Default)]
struct World {
    nodes: Vec<Kind>,
    events: Vec<Event>,
    flaws: Vec<Flaw>,
    turns: Option<Arc<(Mutex<Turns>, Condvar)>>,
}

thread_local! {
    /// Number of the user that this thread is.
    static ME: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Whose turn it is.
#[derive(Debug)]
struct Turns {
    random: fastrand::Rng,
    /// How likely it is that the same goes on: some mistakes need one that does ten calls between two of another's.
    persistence: f64,
    last: usize,
    running: usize,
    waiting: BTreeSet<usize>,
    granted: Option<usize>,
}

impl Turns {
    /// Once all wait, one is chosen.
    fn grant(&mut self) {
        if self.granted.is_none() && self.running > 0 && self.waiting.len() == self.running {
            let goes_on = self.waiting.contains(&self.last) && self.random.f64() < self.persistence;
            if !goes_on {
                self.last = self.random.choice(self.waiting.iter().copied()).expect("somebody waits");
            }
            self.granted = Some(self.last);
        }
    }
}

/// One thread that uses the file system, among others.
pub type User = Box<dyn FnOnce() + Send>;

#[derive(Debug, Clone)]
pub struct Simulated {
    world: Arc<Mutex<World>>,
}

impl Simulated {
    pub fn new() -> Simulated {
        let world = World { nodes: vec![Kind::Dir(BTreeMap::new())], ..World::default() };
        Simulated { world: Arc::new(Mutex::new(world)) }
    }

    pub fn with_flaw(flaw: Flaw) -> Simulated {
        let simulated = Simulated::new();
        simulated.world().flaws.push(flaw);
        simulated
    }

    pub fn set_flaws(&self, flaws: &[Flaw]) {
        self.world().flaws = flaws.to_vec();
    }

    /// Runs `users` at once; before each call all wait, and one of them goes on.
    pub fn play(&self, seed: u64, users: Vec<User>) {
        let mut random = fastrand::Rng::with_seed(seed);
        let turns = Turns {
            persistence: random.choice([0.0, 0.5, 0.8, 0.9]).expect("there are some"),
            random,
            last: 0,
            running: users.len(),
            waiting: BTreeSet::new(),
            granted: None,
        };
        let turns = Arc::new((Mutex::new(turns), Condvar::new()));
        self.world().turns = Some(turns.clone());
        std::thread::scope(|scope| {
            for (number, user) in users.into_iter().enumerate() {
                let turns = turns.clone();
                scope.spawn(move || {
                    ME.set(Some(number));
                    user();
                    let mut state = turns.0.lock().expect("no user panics with it");
                    state.running -= 1;
                    state.grant();
                    turns.1.notify_all();
                });
            }
        });
        self.world().turns = None;
    }

    pub fn relied(&self, name: &str, content: Option<&[u8]>) {
        self.world().events.push(Event::Relied(name.to_owned(), content.map(<[u8]>::to_vec)));
    }

    pub fn gone(&self, name: &str) {
        self.world().events.push(Event::Gone(name.to_owned()));
    }

    pub fn events(&self) -> Vec<Event> {
        self.world().events.clone()
    }

    /// A file system in which just this happened.
    pub fn of(events: impl IntoIterator<Item = Event>) -> Simulated {
        let simulated = Simulated::new();
        let mut world = simulated.world();
        for event in events {
            world.apply(&event);
        }
        drop(world);
        simulated
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().expect("no user panics with it")
    }

    /// The world, once it is our turn to change or see it.
    fn turn(&self) -> MutexGuard<'_, World> {
        let turns = self.world().turns.clone();
        if let (Some(me), Some(turns)) = (ME.get(), turns) {
            let mut state = turns.0.lock().expect("no user panics with it");
            state.waiting.insert(me);
            state.grant();
            turns.1.notify_all();
            let mut state =
                turns.1.wait_while(state, |state| state.granted != Some(me)).expect("no user panics with it");
            state.granted = None;
            state.waiting.remove(&me);
        }
        self.world()
    }
}

fn error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl World {
    fn flawed(&self, flaw: Flaw) -> bool {
        self.flaws.contains(&flaw)
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.flawed(Flaw::ReadOnly) { Err(error(libc::EROFS)) } else { Ok(()) }
    }

    fn dir(&self, dir: Node) -> &BTreeMap<String, Node> {
        match &self.nodes[dir] {
            Kind::Dir(entries) => entries,
            Kind::File(_) => panic!("a file was used as a directory"),
        }
    }

    fn look_up(&self, dir: Node, name: &str) -> io::Result<Node> {
        self.dir(dir).get(name).copied().ok_or_else(|| error(libc::ENOENT))
    }

    fn links(&self, node: Node) -> u64 {
        let dirs = self.nodes.iter().filter_map(|kind| match kind {
            Kind::Dir(entries) => Some(entries),
            Kind::File(_) => None,
        });
        dirs.flat_map(BTreeMap::values).filter(|entry| **entry == node).count() as u64
    }

    /// An empty directory without a name takes no entries.
    fn check_alive(&self, dir: Node) -> io::Result<()> {
        if dir == 0 || self.links(dir) > 0 { Ok(()) } else { Err(error(libc::ENOENT)) }
    }

    fn stat(&self, node: Node) -> Stat {
        let (is_file, len) = match &self.nodes[node] {
            Kind::File(content) => (true, content.len() as u64),
            Kind::Dir(_) => (false, 0),
        };
        let links = self.links(node);
        let links = if self.flawed(Flaw::LinksUncounted) { 1 } else { links };
        Stat { is_file, len, links, age: Duration::ZERO }
    }

    fn happen(&mut self, event: Event) {
        self.apply(&event);
        self.events.push(event);
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::New(node, kind) => {
                assert_eq!(*node, self.nodes.len(), "nodes are numbered as they come up");
                self.nodes.push(kind.clone());
            }
            Event::Write(file, content) => self.nodes[*file] = Kind::File(content.clone()),
            Event::Entry(dir, name, node) => {
                let Kind::Dir(entries) = &mut self.nodes[*dir] else { panic!("a file has no entries") };
                match node {
                    Some(node) => entries.insert(name.clone(), *node),
                    None => entries.remove(name),
                };
            }
            Event::SyncFile(_) | Event::SyncDir(_) | Event::SyncAll | Event::Relied(..) | Event::Gone(_) => {}
        }
    }

    fn come_up(&mut self, dir: Node, name: &str, kind: Kind) -> Node {
        let node = self.nodes.len();
        self.happen(Event::New(node, kind));
        self.happen(Event::Entry(dir, name.to_owned(), Some(node)));
        node
    }
}

impl FileSystem for Simulated {
    type Dir = Node;
    type File = Node;

    fn open_dir(&self, parent: &Node, name: &str) -> io::Result<Node> {
        let world = self.turn();
        let node = world.look_up(*parent, name)?;
        if matches!(world.nodes[node], Kind::Dir(_)) { Ok(node) } else { Err(error(libc::ENOTDIR)) }
    }

    fn make_dir(&self, parent: &Node, name: &str) -> io::Result<()> {
        let mut world = self.turn();
        if world.look_up(*parent, name).is_ok() {
            return Err(error(libc::EEXIST));
        }
        world.check_writable()?;
        world.check_alive(*parent)?;
        world.come_up(*parent, name, Kind::Dir(BTreeMap::new()));
        Ok(())
    }

    fn remove_dir(&self, parent: &Node, name: &str) -> io::Result<()> {
        let mut world = self.turn();
        let node = world.look_up(*parent, name)?;
        if !world.dir(node).is_empty() {
            return Err(error(libc::ENOTEMPTY));
        }
        world.happen(Event::Entry(*parent, name.to_owned(), None));
        Ok(())
    }

    fn sync_dir(&self, dir: &Node) -> io::Result<()> {
        let mut world = self.turn();
        if world.flawed(Flaw::SyncDirFails) {
            return Err(error(libc::EIO));
        }
        if !world.flawed(Flaw::SyncDirIgnored) {
            world.happen(Event::SyncDir(*dir));
        }
        Ok(())
    }

    fn entries(&self, dir: &Node, each: &mut dyn FnMut(Entry<'_>)) -> io::Result<()> {
        let world = self.turn();
        for (name, node) in world.dir(*dir) {
            each(Entry { name, is_dir: matches!(world.nodes[*node], Kind::Dir(_)) });
        }
        Ok(())
    }

    fn create_file(&self, dir: &Node, name: &str) -> io::Result<Node> {
        let mut world = self.turn();
        world.check_writable()?;
        if world.look_up(*dir, name).is_ok() {
            return Err(error(libc::EEXIST));
        }
        Ok(world.come_up(*dir, name, Kind::File(Vec::new())))
    }

    fn open_file(&self, dir: &Node, name: &str) -> io::Result<Node> {
        self.turn().look_up(*dir, name)
    }

    fn lock_file(&self, _: &Node) -> io::Result<bool> {
        Ok(true)
    }

    fn stat(&self, file: &Node) -> io::Result<Stat> {
        let world = self.turn();
        let mut stat = world.stat(*file);
        // Not of the empty file by which link(2) is tried out.
        if world.flawed(Flaw::LinksLie) && stat.len > 0 {
            stat.links = 1;
        }
        Ok(stat)
    }

    fn stat_at(&self, dir: &Node, name: &str) -> io::Result<Stat> {
        let world = self.turn();
        Ok(world.stat(world.look_up(*dir, name)?))
    }

    fn write(&self, file: &Node, parts: &[&[u8]]) -> io::Result<()> {
        let mut world = self.turn();
        if world.flawed(Flaw::Full) {
            return Err(error(libc::ENOSPC));
        }
        world.happen(Event::Write(*file, parts.concat()));
        Ok(())
    }

    fn read(&self, file: &Node, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let world = self.turn();
        let Kind::File(content) = &world.nodes[*file] else { return Err(error(libc::EISDIR)) };
        bytes.copy_from_slice(&content[offset as usize..][..bytes.len()]);
        Ok(())
    }

    fn sync_file(&self, file: &Node) -> io::Result<()> {
        let mut world = self.turn();
        if world.flawed(Flaw::SyncFileFails) {
            return Err(error(libc::EIO));
        }
        if !world.flawed(Flaw::SyncFileIgnored) {
            world.happen(Event::SyncFile(*file));
        }
        Ok(())
    }

    fn link(&self, from: (&Node, &str), to: (&Node, &str)) -> io::Result<()> {
        let mut world = self.turn();
        if world.flawed(Flaw::NoLink) {
            return Err(error(libc::EPERM));
        }
        let node = world.look_up(*from.0, from.1)?;
        if world.look_up(*to.0, to.1).is_ok() {
            return Err(error(libc::EEXIST));
        }
        world.check_alive(*to.0)?;
        world.happen(Event::Entry(*to.0, to.1.to_owned(), Some(node)));
        if world.flawed(Flaw::LinkRepeated) { Err(error(libc::EEXIST)) } else { Ok(()) }
    }

    fn unlink(&self, dir: &Node, name: &str) -> io::Result<()> {
        let mut world = self.turn();
        world.check_writable()?;
        world.look_up(*dir, name)?;
        world.happen(Event::Entry(*dir, name.to_owned(), None));
        Ok(())
    }

    fn sync_all(&self, _: &Node) -> io::Result<()> {
        self.turn().happen(Event::SyncAll);
        Ok(())
    }
}
