//! One seed's world: who is there, who goes next, what goes wrong, and what must hold.

use crate::actor::{AGENT, AGENTS_DOMAIN, Actor, IDLE, OWNER, OWNERS_DOMAIN, REPOSITORY, Role};
use crate::book::{Book, Chunks, chunks_in};
use crate::fiber::Fiber;
use crate::keys::Check;
use crate::place::{Faults, Place, Store};
use crate::rng::Rng;
use rempart_objects::Name;
use rempart_repository::collect::Collector;
use rempart_repository::log::{self, Content, Log, Object, Session, Status};
use rempart_repository::{CHECKPOINTS, COPIES, EntryHash, PackName, SessionId};
use rempart_types::WallTime;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

/// Steps of a last program, when nothing goes wrong any more, at most.
const PATIENCE: u64 = 20_000;

/// A world.
#[derive(Debug)]
pub struct World {
    rng: Rng,
    actors: Vec<Working>,
    place: Place,
    book: Arc<Mutex<Book>>,
    /// The checker's own reading of the log.
    log: Log,
    /// What backups reach, by their entries' hashes.
    payloads: BTreeMap<EntryHash, Chunks>,
    /// What was condemned and not gone when it was looked at last.
    condemned: BTreeSet<Name>,
    /// Sessions that were over then, and their last entries.
    over: BTreeMap<SessionId, (u64, EntryHash)>,
    crashes: u64,
    pauses: u64,
    damages: u64,
    /// Of objects that are there twice, those of which one was damaged.
    damaged: BTreeSet<Name>,
    /// How often the same one goes on, in a thousand steps.
    sticky: u64,
    /// Whose turn it is.
    turn: usize,
    steps: u64,
}

#[derive(Debug)]
struct Working {
    actor: Actor,
    /// `None`: it crashed, and comes back then.
    fiber: Option<Fiber>,
    sleeps_until: u64,
}

impl World {
    pub fn new(seed: u64, tell: bool) -> World {
        let mut rng = Rng::new(seed);
        let rates = [(0, 0), (20, 10), (80, 30), (200, 50)];
        let (unknown, unavailable) = rates[rng.below(4) as usize];
        let faults = Faults { unknown, unavailable };
        let store = Arc::new(Mutex::new(Store::new(rng.fork(), faults, tell)));
        let place = Place { store, actor: None };
        let log = create(&place);
        let book = Arc::new(Mutex::new(Book::default()));
        let mut roles = vec![Role::Writer(OWNER), Role::Writer(OWNER), Role::Collector];
        let others = [
            Role::Writer(AGENT),
            Role::Collector,
            Role::Fencer,
            Role::Reader,
            Role::Repacker,
            // What they look for is there for a short time only: between a condemnation and its removals.
            Role::Undeleter,
            Role::Undeleter,
            Role::Undeleter,
            Role::Undeleter,
            Role::Liar,
            Role::Writer(OWNER),
        ];
        roles.extend(others.into_iter().filter(|_| rng.chance(400)));
        let actors = roles.into_iter().enumerate().map(|(number, role)| Working {
            actor: Actor {
                number,
                role,
                place: Place { actor: Some(number), ..place.clone() },
                book: Arc::clone(&book),
                rng: Arc::new(Mutex::new(rng.fork())),
            },
            fiber: None,
            sleeps_until: 0,
        });
        let actors = actors.collect();
        World {
            steps: 300 + rng.below(2700),
            sticky: [0, 500, 900][rng.below(3) as usize],
            turn: 0,
            crashes: [0, 3, 10][rng.below(3) as usize],
            pauses: [0, 5, 20][rng.below(3) as usize],
            damages: [0, 0, 10][rng.below(3) as usize],
            damaged: BTreeSet::new(),
            rng,
            actors,
            place,
            book,
            log,
            payloads: BTreeMap::new(),
            condemned: BTreeSet::new(),
            over: BTreeMap::new(),
        }
    }

    /// Faults first, then everything is healed and must come to rest. What broke, if anything did.
    pub fn run(&mut self) -> Result<(), String> {
        let result = caught(|| {
            for _ in 0..self.steps {
                self.step()?;
                self.check()?;
            }
            self.heal()
        });
        if let Err(broken) = &result {
            let broken = broken.clone();
            self.place.store().tell(|| format!("BROKEN: {broken}"));
        }
        result
    }

    /// What happened, told line by line.
    pub fn trace(&self) -> Vec<String> {
        self.place.store().trace.clone().unwrap_or_default()
    }

    /// How often what happened.
    pub fn met(&self) -> BTreeMap<&'static str, u64> {
        self.book.lock().expect("no holder panics").met.clone()
    }

    fn step(&mut self) -> Result<(), String> {
        let now = {
            let mut store = self.place.store();
            store.now += 1;
            store.now
        };
        if self.rng.chance(30) {
            self.land_one();
        }
        if self.rng.chance(self.damages) {
            self.damage_one();
        }
        if !self.rng.chance(self.sticky) {
            self.turn = self.rng.below(self.actors.len() as u64) as usize;
        }
        let number = self.turn;
        if self.rng.chance(self.crashes) {
            self.crash(number);
        } else if self.rng.chance(self.pauses) {
            self.actors[number].sleeps_until = now + 5 + self.rng.below(500);
        }
        let working = &mut self.actors[number];
        if working.sleeps_until > now {
            return Ok(());
        }
        let fiber = working.fiber.get_or_insert_with(|| {
            let actor = working.actor.clone();
            Fiber::new(move || actor.work())
        });
        assert!(!fiber.resume(), "who works, works until it is stopped");
        Ok(())
    }

    fn land_one(&mut self) {
        let mut store = self.place.store();
        if store.late.is_empty() {
            return;
        }
        let which = self.rng.below(store.late.len() as u64) as usize;
        let late = store.late.swap_remove(which);
        store.land(late);
        drop(store);
        self.book().meet("landed late");
    }

    /// Of what is there twice, one, and of each two never more: who mends a copy may be so late that it removes the one that another
    /// made, and must not be left with nothing.
    fn damage_one(&mut self) {
        let mut store = self.place.store();
        let mut whole = store.whole_copies();
        whole.retain(|(original, _)| !self.damaged.contains(original));
        if whole.is_empty() {
            return;
        }
        let (original, copy) = &whole[self.rng.below(whole.len() as u64) as usize];
        let name = if self.rng.chance(500) { original } else { copy };
        store.damage(name, self.rng.below(1 << 32));
        self.damaged.insert(original.clone());
        drop(store);
        self.book().meet("damaged");
    }

    /// What it had asked for may be done yet.
    fn crash(&mut self, number: usize) {
        if self.actors[number].fiber.take().is_none() {
            return;
        }
        let reads = self.actors[number].actor.role == Role::Reader && !self.book().in_use.is_empty();
        self.book().meet(if reads { "crashed, a reader" } else { "crashed" });
        let mut store = self.place.store();
        store.tell(|| format!("{number}: crashes"));
        if let Some(late) = store.in_flight.remove(&number)
            && self.rng.chance(500)
        {
            store.late.push(late);
        }
    }

    /// What must hold at any moment.
    fn check(&mut self) -> Result<(), String> {
        let mut store = self.place.store();
        if let Some(broken) = store.broken.take() {
            return Err(broken);
        }
        let changed = std::mem::take(&mut store.changed);
        drop(store);
        if let Some(broken) = self.book().broken.take() {
            return Err(broken);
        }
        if !changed {
            return Ok(());
        }
        unplanted_reading(|| self.log.refresh()).map_err(|error| format!("the log: {error:?}"))?;
        let state = self.log.state();
        let book = self.book.lock().expect("no holder panics");
        for (number, (hash, _)) in &book.committed {
            let given_up = book.given_up.contains(number);
            let hash = book.brought_back.get(number).unwrap_or(hash);
            let there = state.roots().get(number).is_some_and(|root| root.hash == *hash);
            if !there && !given_up {
                return Err(format!("backup {number} was acknowledged, and is in the log no more"));
            }
        }
        drop(book);
        self.check_over()?;
        self.check_domains()?;
        self.check_gone()?;
        self.check_uses()?;
        self.check_roots()
    }

    /// An agent writes into its own domain, and nobody requires what others put.
    fn check_domains(&self) -> Result<(), String> {
        let state = self.log.state();
        let agent = log::Sign::verifier(&AGENT).id();
        if let Some(elsewhere) = state.sessions().find(|of| of.key == agent && of.domain != AGENTS_DOMAIN) {
            return Err(format!("session {} is an agent's, and in another domain", elsewhere.id));
        }
        for (number, root) in state.roots() {
            let is_foreign = |object: &Object| {
                state.owner(object).domain != root.domain && !state.verified().contains(object.number)
            };
            if let Some(foreign) = root.required.iter().filter_map(|pack| state.object(pack)).find(is_foreign)
            {
                return Err(format!(
                    "backup {number} requires {}, which is of another domain",
                    foreign.number
                ));
            }
        }
        Ok(())
    }

    /// Nothing counts that a session says behind its end.
    fn check_over(&mut self) -> Result<(), String> {
        let over = self.log.state().sessions().filter(|session| session.is_over);
        let over: BTreeMap<_, _> = over.map(|session| (session.id, session.last)).collect();
        let mut before = self.over.iter();
        match before.find(|(id, last)| over.get(id).is_some_and(|now| now != *last)) {
            Some((id, _)) => Err(format!("session {id} is over, and what it said since counts")),
            None => {
                self.over = over;
                Ok(())
            }
        }
    }

    /// What was condemned is told to be gone when it was, at some time.
    fn check_gone(&mut self) -> Result<(), String> {
        let (state, store) = (self.log.state(), self.place.store());
        let condemned = state.objects().filter(|object| object.status == Status::Condemned);
        let condemned = condemned.map(|object| object.content.object(state.owner(&object).id)).collect();
        let mut gone = self.condemned.difference(&condemned);
        match gone.find(|name| !store.removed.contains(name)) {
            Some(name) => Err(format!("{name} is told to be gone, and never was")),
            None => {
                self.condemned = condemned;
                Ok(())
            }
        }
    }

    /// What somebody has in use is there, until its session is over; and that only by itself, by those who set out to end it,
    /// and when it was silent.
    fn check_uses(&self) -> Result<(), String> {
        let (state, now) = (self.log.state(), self.place.store().now);
        let mut book = self.book();
        for (session, used) in &book.in_use {
            let gone = used.roots.iter().find(|root| !state.roots().contains_key(root));
            if state.session_is_open(*session) {
                if let Some(root) = gone {
                    return Err(format!("backup {root} is gone, and session {session} has it in use"));
                }
            } else if !book.ended.contains(session) && used.told.0 + IDLE >= now {
                return Err(format!("nobody ended session {session}, which has {:?} in use", used.roots));
            }
        }
        book.in_use.retain(|session, _| state.session_is_open(*session));
        Ok(())
    }

    /// Everything that any backup reaches lies in packs that it requires and that are there.
    fn check_roots(&mut self) -> Result<(), String> {
        let state = self.log.state();
        let mut found = Vec::new();
        for (number, root) in state.roots() {
            let chunks = match self.payloads.get(&root.hash) {
                Some(chunks) => *chunks,
                None => {
                    let payload = self.log.payload(*number);
                    let payload = payload.map_err(|error| format!("backup {number}: {error}"))?;
                    found.push((root.hash, chunks_in(&payload)));
                    chunks_in(&payload)
                }
            };
            let (book, store) = (self.book.lock().expect("no holder panics"), self.place.store());
            let mut held = 0;
            for pack in root.required.iter() {
                // What another domain's writer put may not be what it says.
                if let Some(object) = state.object(pack)
                    && (state.owner(&object).domain == root.domain
                        || state.verified().contains(object.number))
                    && let Content::Pack(pack) = object.content
                    && store.packs.contains(&PackName { session: state.owner(&object).id, pack })
                {
                    held |= book.chunks_of(pack);
                }
            }
            if chunks & !held != 0 {
                let told: Vec<_> = root
                    .required
                    .iter()
                    .map(|pack| {
                        let Some(object) = state.object(pack) else { return format!("{pack}: ?") };
                        let Content::Pack(id) = object.content else { return format!("{pack}: ?") };
                        let name = PackName { session: state.owner(&object).id, pack: id };
                        let there = if store.packs.contains(&name) { "there" } else { "gone" };
                        format!("{pack}: {:b} {there}", book.chunks_of(id))
                    })
                    .collect();
                return Err(format!(
                    "backup {number} lost chunks {:b} of {chunks:b}; it requires {}",
                    chunks & !held,
                    told.join(", ")
                ));
            }
        }
        self.payloads.extend(found);
        Ok(())
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().expect("no holder panics")
    }

    /// Nothing goes wrong any more: a backup and collections succeed, nothing is left over.
    fn heal(&mut self) -> Result<(), String> {
        for working in &mut self.actors {
            working.fiber = None;
        }
        let late = {
            let mut store = self.place.store();
            store.tell(|| "healed".to_owned());
            store.faults = Faults::default();
            let in_flight: Vec<_> = std::mem::take(&mut store.in_flight).into_values().collect();
            store.late.extend(in_flight);
            std::mem::take(&mut store.late)
        };
        for late in late {
            self.place.store().land(late);
            self.check()?;
        }
        let before = self.book().committed.len();
        self.finish("a backup", |actor| {
            actor.back_up(OWNER, &mut BTreeMap::new()).map_err(|error| format!("{error:?}"))
        })?;
        if self.book().committed.len() == before {
            return Err("after healing a backup does not succeed".to_owned());
        }
        // The collection ends whoever is there.
        self.book().in_use.clear();
        self.finish("a collection", collect_all)?;
        self.finish("forgetting", |actor| actor.forget_most().map_err(|error| format!("{error:?}")))?;
        self.finish("a collection", collect_all)?;
        self.check_rest()
    }

    fn finish(
        &mut self,
        what: &str,
        program: impl Fn(&Actor) -> Result<(), String> + 'static,
    ) -> Result<(), String> {
        let mut actor = self.actors[0].actor.clone();
        actor.number = self.actors.len();
        actor.place.actor = Some(actor.number);
        let result = Arc::new(Mutex::new(None));
        let told = Arc::clone(&result);
        let mut fiber = Fiber::new(move || {
            let result = program(&actor);
            *told.lock().expect("no holder panics") = Some(result);
        });
        for _ in 0..PATIENCE {
            self.place.store().now += 1;
            let ended = fiber.resume();
            self.check()?;
            if ended {
                let result = result.lock().expect("no holder panics").take().expect("it ended");
                return result.map_err(|error| format!("after healing {what} fails: {error}"));
            }
        }
        Err(format!("after healing {what} does not end"))
    }

    /// No object is there that nothing needs.
    fn check_rest(&mut self) -> Result<(), String> {
        unplanted_reading(|| self.log.refresh()).map_err(|error| format!("the log: {error:?}"))?;
        let state = self.log.state();
        let (floor, _) = state.floor().expect("a checkpoint was made");
        if !state.condemned().is_empty() {
            return Err("condemned objects are left".to_owned());
        }
        let stands = |entry| state.roots().values().any(|root| root.entry == entry);
        let copy = Name::new(format!("{COPIES}{}", log::name(floor))).expect("it is short");
        let pointers = [CHECKPOINTS.to_owned(), format!("{COPIES}{CHECKPOINTS}")];
        let store = self.place.store();
        for name in store.names() {
            let needed = match (Content::of_name(name), log::number_of(name)) {
                (Some((session, content)), _) => state.status(session, content) == Some(Status::Live),
                (None, Some(number)) => number >= floor || stands(number),
                (None, None) if *name == copy => true,
                (None, None) => pointers.iter().any(|pointers| name.as_str().starts_with(pointers)),
            };
            if !needed {
                return Err(format!("{name} is left over"));
            }
        }
        let whole = store.whole_copies();
        let newest = store.names().rfind(|name| name.as_str().starts_with(CHECKPOINTS));
        for begins in [Some(&log::name(floor)), newest].into_iter().flatten() {
            if whole.iter().all(|(original, _)| original != begins) {
                return Err(format!("{begins} and its copy are not whole"));
            }
        }
        let own = state.objects().filter(|object| !state.owner(object).is_over).count();
        if own > 0 {
            return Err("sessions are left open".to_owned());
        }
        Ok(())
    }
}

fn create(place: &Place) -> Log {
    let objects = Arc::new(place.clone());
    let log = Log::create(objects, Arc::new(Check), REPOSITORY, &OWNER, OWNERS_DOMAIN, WallTime(0));
    let mut log = log.expect("nothing befalls the checker");
    let session = Session::open(log, Arc::new(OWNER), SessionId([0xff; 16]), WallTime(0));
    let mut session = session.expect("nothing befalls the checker");
    let agent = log::Key { public: log::Sign::verifier(&AGENT), domain: AGENTS_DOMAIN };
    session.register(WallTime(0), agent).expect("nothing befalls the checker");
    log = session.end(WallTime(0)).expect("nothing befalls the checker");
    log
}

/// Everybody's session is ended, everything that can be removed is.
fn collect_all(actor: &Actor) -> Result<(), String> {
    let told = |error: &dyn std::fmt::Debug| format!("{error:?}");
    let log = actor.open_log().map_err(|error| told(&error))?;
    let now = WallTime(actor.place.store().now + 1);
    let id = SessionId(Rng::new(now.0).bytes16());
    let mut session = Session::open(log, Arc::new(OWNER), id, now).map_err(|error| told(&error))?;
    let collect = |session: &mut Session| {
        let mut collector = Collector::new(session, WallTime(now.0 + 1), true)?;
        collector.fence_idle(Duration::ZERO)?;
        collector.condemn(Some(&mut actor.walk(None)))?;
        collector.delete()?;
        collector.sweep()?;
        collector.truncate(0)?;
        Ok::<_, rempart_repository::collect::CollectError>(())
    };
    collect(&mut session).map_err(|error| told(&error))?;
    session.end(now).map_err(|error| told(&error))?;
    Ok(())
}

/// The checker finds the head whatever mistakes others make.
fn unplanted_reading<T>(read: impl FnOnce() -> T) -> T {
    #[cfg(feature = "planted-bugs")]
    {
        use rempart_repository::{Bug, plant, planted};
        if planted(Bug::EmptySlotIsHead) {
            plant(None);
            let result = read();
            plant(Some(Bug::EmptySlotIsHead));
            return result;
        }
    }
    read()
}

thread_local! {
    /// What the last panic on this thread said, and where.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
    static CATCHING: RefCell<bool> = const { RefCell::new(false) };
}

/// A panic of the code that is tested is a broken promise like any other.
fn caught(story: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CATCHING.with_borrow(|catching| *catching) {
                return usual(info);
            }
            PANIC.set(Some(info.to_string()));
        }));
    });
    CATCHING.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(story));
    CATCHING.set(false);
    result.unwrap_or_else(|_| Err(format!("a panic: {}", PANIC.take().unwrap_or_default())))
}
