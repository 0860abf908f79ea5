//! A place that misbehaves, by order or by chance: what its users must survive.

use crate::{Abilities, Created, Error, ErrorKind, Listed, Name, Objects};
use fastrand::Rng;
use rempart_types::WallTime;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What happens to one call. One that cannot happen to it (a read is never late) does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    None,
    /// Not done, and the caller knows: 503.
    Refused,
    /// Not done; the caller of a change cannot know: a time-out, 500.
    Lost,
    /// Done; the caller of a change cannot know.
    AnswerLost,
    /// A change that is done before, between or after later calls; the caller cannot know.
    Late,
    /// Done after [`Rates::delay`].
    Slow,
    /// Less is read than there is, without an error.
    Truncated,
    /// A bit of what is read is wrong.
    Flipped,
}

/// How many of a thousand calls go wrong, and how. None by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    pub refused: u32,
    pub lost: u32,
    pub answer_lost: u32,
    pub late: u32,
    pub slow: u32,
    pub truncated: u32,
    pub flipped: u32,
    /// Of slow calls.
    pub delay: Duration,
    /// Not a rate: creations replace what is there, and all are told that the name was free.
    pub lies: bool,
}

impl Rates {
    /// A bad day: everything but lies and damage.
    pub fn rough() -> Rates {
        Rates { refused: 30, lost: 30, answer_lost: 30, late: 30, ..Rates::default() }
    }
}

/// Wraps a place. Without faults it is as good as the place it wraps.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Objects>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    random: Rng,
    rates: Rates,
    plan: VecDeque<Fault>,
    late: Vec<Change>,
    met: BTreeMap<Fault, u64>,
    /// Calls until the end.
    left: Option<u64>,
}

#[derive(Debug)]
enum Change {
    Create { name: Name, content: Vec<u8>, retain_until: Option<WallTime> },
    Remove { name: Name },
}

/// What a call is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Change,
    Read,
    Other,
}

impl Faulty {
    pub fn new(inner: Arc<dyn Objects>, seed: u64, rates: Rates) -> Faulty {
        let state = State {
            random: Rng::with_seed(seed),
            rates,
            plan: VecDeque::new(),
            late: Vec::new(),
            met: BTreeMap::new(),
            left: None,
        };
        Faulty { inner, state: Mutex::new(state) }
    }

    /// Other rates from now on; the default heals it. What is late stays late.
    pub fn set_rates(&self, rates: Rates) {
        self.state().rates = rates;
    }

    /// Faults of the next calls, one each, before chance has its say.
    pub fn plan(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state().plan.extend(faults);
    }

    /// That many calls are still answered, and none after them, which nobody tries again: as for one who is killed.
    pub fn die_after(&self, calls: u64) {
        self.state().left = Some(calls);
    }

    /// Everything that is late is done now, in any order.
    pub fn land(&self) {
        let mut late = {
            let mut state = self.state();
            let mut late = std::mem::take(&mut state.late);
            state.random.shuffle(&mut late);
            late
        };
        for change in late.drain(..) {
            self.apply(change);
        }
    }

    /// Changes that are late.
    pub fn late(&self) -> usize {
        self.state().late.len()
    }

    /// How often each fault happened.
    pub fn met(&self) -> BTreeMap<Fault, u64> {
        self.state().met.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody waits for the outcome.
    fn apply(&self, change: Change) {
        let _ = match change {
            Change::Create { name, content, retain_until } => {
                self.do_create(&name, &[&content], retain_until).map(|_| ())
            }
            Change::Remove { name } => self.inner.remove(&name),
        };
    }

    fn do_create(
        &self,
        name: &Name,
        parts: &[&[u8]],
        retain_until: Option<WallTime>,
    ) -> Result<Created, Error> {
        let created = self.inner.create(name, parts, retain_until)?;
        if created == Created::Taken && self.state().rates.lies {
            self.inner.remove(name)?;
            self.inner.create(name, parts, retain_until)?;
            return Ok(Created::New);
        }
        Ok(created)
    }

    /// Lets some of what is late happen, and chooses the fault of this call.
    fn begin(&self, call: Call, action: &'static str, name: &str) -> Result<Fault, Error> {
        let (landing, fault, delay) = {
            let mut state = self.state();
            let mut landing = Vec::new();
            for change in std::mem::take(&mut state.late) {
                if state.random.u8(..4) == 0 { landing.push(change) } else { state.late.push(change) }
            }
            let Some(fault) = state.choose(call) else {
                return Err(self.error(
                    ErrorKind::Failed,
                    action,
                    name,
                    "nobody is there any more (injected)",
                ));
            };
            (landing, fault, state.rates.delay)
        };
        for change in landing {
            self.apply(change);
        }
        match fault {
            Fault::Refused => {
                return Err(self.error(ErrorKind::Unavailable, action, name, "refused (injected)"));
            }
            Fault::Lost if call != Call::Change => {
                return Err(self.error(ErrorKind::Unavailable, action, name, "no answer (injected)"));
            }
            Fault::Slow => std::thread::sleep(delay),
            _ => {}
        }
        Ok(fault)
    }

    fn error(&self, kind: ErrorKind, action: &'static str, name: &str, why: &'static str) -> Error {
        Error { kind, action, name: name.to_owned(), place: self.inner.url(), source: why.into() }
    }

    /// A change: `change` if it is late, `now` if it is done.
    fn change<T>(
        &self,
        action: &'static str,
        name: &Name,
        change: impl FnOnce() -> Change,
        now: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let unknown = || self.error(ErrorKind::Unknown, action, name.as_str(), "no answer (injected)");
        match self.begin(Call::Change, action, name.as_str())? {
            Fault::Lost => Err(unknown()),
            Fault::Late => {
                self.state().late.push(change());
                Err(unknown())
            }
            Fault::AnswerLost => {
                // Whatever came back, nobody hears of it.
                let _ = now();
                Err(unknown())
            }
            _ => now(),
        }
    }

    fn read(&self, name: &Name, read: impl FnOnce() -> Result<Vec<u8>, Error>) -> Result<Vec<u8>, Error> {
        let fault = self.begin(Call::Read, "read", name.as_str())?;
        let mut content = read()?;
        let mut state = self.state();
        match fault {
            Fault::Truncated => content.truncate(state.random.usize(..=content.len().saturating_sub(1))),
            Fault::Flipped if !content.is_empty() => {
                let at = state.random.usize(..content.len());
                content[at] ^= 1 << state.random.u8(..8);
            }
            _ => {}
        }
        Ok(content)
    }
}

impl State {
    /// None after the end.
    fn choose(&mut self, call: Call) -> Option<Fault> {
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(1)?;
        }
        let rates = self.rates;
        let chances = [
            (Fault::Refused, rates.refused),
            (Fault::Lost, rates.lost),
            (Fault::AnswerLost, rates.answer_lost),
            (Fault::Late, rates.late),
            (Fault::Slow, rates.slow),
            (Fault::Truncated, rates.truncated),
            (Fault::Flipped, rates.flipped),
        ];
        let possible = |fault: Fault| match fault {
            Fault::AnswerLost | Fault::Late => call == Call::Change,
            Fault::Truncated | Fault::Flipped => call == Call::Read,
            Fault::None | Fault::Refused | Fault::Lost | Fault::Slow => true,
        };
        let by_chance = |random: &mut Rng| {
            let mut throw = random.u32(..1000);
            let hit = chances.into_iter().find(|(_, rate)| {
                let hit = throw < *rate;
                throw = throw.saturating_sub(*rate);
                hit
            });
            hit.map_or(Fault::None, |(fault, _)| fault)
        };
        let fault = self.plan.pop_front().unwrap_or_else(|| by_chance(&mut self.random));
        let fault = if possible(fault) { fault } else { Fault::None };
        *self.met.entry(fault).or_default() += 1;
        Some(fault)
    }
}

impl Objects for Faulty {
    fn create(&self, name: &Name, parts: &[&[u8]], retain_until: Option<WallTime>) -> Result<Created, Error> {
        let late = || Change::Create { name: name.clone(), content: parts.concat(), retain_until };
        self.change("create", name, late, || self.do_create(name, parts, retain_until))
    }

    fn get(&self, name: &Name, limit: u64) -> Result<Vec<u8>, Error> {
        self.read(name, || self.inner.get(name, limit))
    }

    fn get_range(&self, name: &Name, range: Range<u64>) -> Result<Vec<u8>, Error> {
        self.read(name, || self.inner.get_range(name, range))
    }

    fn len(&self, name: &Name) -> Result<u64, Error> {
        self.begin(Call::Other, "look at", name.as_str())?;
        self.inner.len(name)
    }

    fn list(&self, prefix: &str, after: Option<&Name>) -> Result<Vec<Listed>, Error> {
        self.begin(Call::Other, "list", prefix)?;
        self.inner.list(prefix, after)
    }

    fn remove(&self, name: &Name) -> Result<(), Error> {
        let late = || Change::Remove { name: name.clone() };
        self.change("remove", name, late, || self.inner.remove(name))
    }

    fn retain(&self, name: &Name, until: WallTime) -> Result<(), Error> {
        self.begin(Call::Other, "retain", name.as_str())?;
        self.inner.retain(name, until)
    }

    fn abilities(&self) -> Abilities {
        self.inner.abilities()
    }

    fn url(&self) -> String {
        self.inner.url()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    fn name(text: &str) -> Name {
        Name::new(text).expect("a name")
    }

    fn faulty(seed: u64, rates: Rates) -> Faulty {
        Faulty::new(Arc::new(Memory::default()), seed, rates)
    }

    #[test]
    fn planned_faults_come_in_their_order() {
        let place = faulty(1, Rates::default());
        place.plan([Fault::Refused, Fault::Lost, Fault::AnswerLost, Fault::None]);
        let create = |content: &[u8]| place.create(&name("log/1"), &[content], None);
        assert_eq!(create(b"1").expect_err("refused").kind, ErrorKind::Unavailable);
        assert_eq!(create(b"2").expect_err("lost").kind, ErrorKind::Unknown);
        assert_eq!(place.inner.len(&name("log/1")).expect_err("nothing was done").kind, ErrorKind::Missing);
        assert_eq!(create(b"3").expect_err("no answer").kind, ErrorKind::Unknown);
        assert_eq!(create(b"4").expect("answered"), Created::Taken);
        assert_eq!(place.get(&name("log/1"), 9).expect("read"), b"3");
        place.plan([Fault::Flipped, Fault::Truncated, Fault::Lost]);
        let flipped = place.get(&name("log/1"), 9).expect("read");
        assert_eq!((flipped[0] ^ b'3').count_ones(), 1);
        assert_eq!(place.get(&name("log/1"), 9).expect("read"), b"");
        assert_eq!(place.get(&name("log/1"), 9).expect_err("lost").kind, ErrorKind::Unavailable);
        let met = place.met();
        assert_eq!((met[&Fault::Lost], met[&Fault::Flipped], met[&Fault::Truncated]), (2, 1, 1));
    }

    #[test]
    fn a_late_change_comes_after_later_ones() {
        let place = faulty(1, Rates::default());
        place.plan([Fault::Late]);
        place.create(&name("log/1"), &[b"late"], None).expect_err("no answer");
        place.land();
        assert_eq!(place.get(&name("log/1"), 9).expect("it landed"), b"late");
        place.plan([Fault::Late]);
        place.remove(&name("log/1")).expect_err("no answer");
        assert_eq!(place.late(), 1);
        place.land();
        assert_eq!(place.late(), 0);
        assert_eq!(place.inner.len(&name("log/1")).expect_err("removed").kind, ErrorKind::Missing);
        let overtaken = (0..100).any(|seed| {
            let place = faulty(seed, Rates::default());
            place.plan([Fault::Late]);
            place.create(&name("log/1"), &[b"late"], None).expect_err("no answer");
            place.create(&name("log/1"), &[b"later"], None).expect("answered") == Created::New
        });
        assert!(overtaken);
    }

    #[test]
    fn chance_is_the_seeds() {
        let play = |seed| {
            let rates = Rates { truncated: 100, flipped: 100, slow: 10, ..Rates::rough() };
            let place = faulty(seed, rates);
            let mut outcomes = Vec::new();
            for number in 0..500 {
                let text = format!("log/{}", number / 2);
                outcomes.push(format!("{:?}", place.create(&name(&text), &[text.as_bytes()], None).ok()));
                outcomes.push(format!("{:?}", place.get(&name(&text), 100).ok()));
                outcomes.push(format!("{:?}", place.list("log/", None).ok().map(|page| page.len())));
            }
            (outcomes, place.met())
        };
        let (outcomes, met) = play(7);
        assert_eq!((&outcomes, &met), (&play(7).0, &play(7).1));
        assert_ne!(outcomes, play(8).0);
        assert_eq!(met.len(), 8, "all of them happen: {met:?}");
    }

    #[test]
    fn the_dead_say_nothing() {
        let place = faulty(1, Rates::default());
        place.die_after(2);
        place.create(&name("a"), &[b"a"], None).expect("alive");
        place.get(&name("a"), 9).expect("alive");
        place.create(&name("b"), &[b"b"], None).expect_err("dead");
        assert_eq!(place.inner.list("", None).expect("listed").len(), 1);
    }

    #[test]
    fn a_liar_gives_a_name_twice() {
        let place = faulty(1, Rates { lies: true, ..Rates::default() });
        for content in [b"1", b"2"] {
            assert_eq!(place.create(&name("log/1"), &[content], None).expect("told so"), Created::New);
            assert_eq!(place.get(&name("log/1"), 9).expect("read"), content);
        }
    }
}
