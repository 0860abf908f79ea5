//! Power is lost at every step of what a [`Directory`] does: what it acknowledged is there afterwards, and nothing is
//! there in part.
//!
//! After a power cut, what was synced is there; of the rest, any part: file contents not at all, by half or whole, entries
//! of directories each or not.

use super::Directory;
use super::simulated::{Event, Flaw, Simulated, User};
use crate::{Created, ErrorKind, Name, Objects};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Outcomes of one power cut that are looked at, of one writer and of several; of more, that many at random.
const OUTCOMES_ALONE: usize = 200;
const OUTCOMES_TOGETHER: usize = 20;

/// What may be found under each name.
type Attempts = BTreeMap<String, Vec<Vec<u8>>>;

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn open(files: &Simulated) -> Directory<Simulated> {
    Directory::start(files.clone(), 0, "simulated".to_owned()).expect("it opens")
}

/// For each event, how many ways it may go if power is lost, and which event makes an end of that.
fn ways(events: &[Event]) -> Vec<(usize, usize)> {
    let until = |from: usize, wanted: &dyn Fn(&Event) -> bool| {
        let ends = |event: &Event| wanted(event) || matches!(event, Event::SyncAll);
        events[from..].iter().position(ends).map_or(events.len(), |after| from + after)
    };
    let ways = events.iter().enumerate().map(|(at, event)| match event {
        Event::Write(file, _) => (3, until(at, &|event| matches!(event, Event::SyncFile(f) if f == file))),
        Event::Entry(dir, ..) => (2, until(at, &|event| matches!(event, Event::SyncDir(d) if d == dir))),
        _ => (1, at),
    });
    ways.collect()
}

/// What is left of the events; choice 0 is all.
fn survivors(events: &[Event], choices: &[usize]) -> Vec<Event> {
    let left = events.iter().zip(choices).filter_map(|(event, choice)| match (event, choice) {
        (event, 0) => Some(event.clone()),
        (Event::Write(file, content), 1) => Some(Event::Write(*file, content[..content.len() / 2].to_vec())),
        _ => None,
    });
    left.collect()
}

/// The choices to look at: all if they are few.
fn choices(ways: &[usize], most: usize, random: &mut fastrand::Rng) -> Vec<Vec<usize>> {
    let total = ways.iter().try_fold(1usize, |total, ways| total.checked_mul(*ways));
    if let Some(total) = total.filter(|total| *total <= most) {
        let choice = |mut number: usize| {
            let digit = |ways: &usize| {
                let digit = number % ways;
                number /= ways;
                digit
            };
            ways.iter().map(digit).collect()
        };
        return (0..total).map(choice).collect();
    }
    let extremes = [ways.iter().map(|_| 0).collect(), ways.iter().map(|ways| ways - 1).collect()];
    let by_chance = (0..most).map(|_| ways.iter().map(|ways| random.usize(..ways)).collect());
    extremes.into_iter().chain(by_chance).collect()
}

/// Loses power after each event, and looks at what is left. Fails with the first broken promise, else tells how many
/// outcomes there were.
fn replay(events: &[Event], attempts: &Attempts, most: usize) -> Result<usize, String> {
    let mut random = fastrand::Rng::with_seed(events.len() as u64);
    let mut outcomes = 0;
    let ways = ways(events);
    for cut in 0..=events.len() {
        let before = &events[..cut];
        let ways_now = |&(ways, until): &(usize, usize)| if until < cut { 1 } else { ways };
        let ways_now: Vec<usize> = ways[..cut].iter().map(ways_now).collect();
        for choices in choices(&ways_now, most, &mut random) {
            outcomes += 1;
            let left = open(&Simulated::of(survivors(before, &choices)));
            check(&left, before, attempts).map_err(|broken| {
                format!("power lost after event {cut} of {events:#?}\n{choices:?}: {broken}")
            })?;
        }
    }
    Ok(outcomes)
}

fn check(left: &Directory<Simulated>, before: &[Event], attempts: &Attempts) -> Result<(), String> {
    let read = |text: &str| match left.get(&name(text), 1 << 20) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind == ErrorKind::Missing => Ok(None),
        Err(error) => Err(format!("{error}: {}", error.source)),
    };
    for (name, contents) in attempts {
        if let Some(content) = read(name)?
            && !contents.contains(&content)
        {
            return Err(format!("`{name}` holds {content:?}, which nobody wrote"));
        }
    }
    for event in before {
        match event {
            Event::Relied(name, content) => match (read(name)?, content) {
                (None, _) => return Err(format!("`{name}` was relied on, and is lost")),
                (Some(found), Some(content)) if found != *content => {
                    return Err(format!("`{name}` was relied on, and holds something else"));
                }
                _ => {}
            },
            Event::Gone(name) if read(name)?.is_some() => return Err(format!("`{name}` is back")),
            _ => {}
        }
    }
    Ok(())
}

/// Creates three objects, one after the other, one of them twice.
fn alone(files: &Simulated) -> Attempts {
    let directory = open(files);
    let mut attempts = Attempts::new();
    for (text, content) in [("log/1", "first"), ("packs/a/b", "second"), ("top", "third"), ("log/1", "again")]
    {
        attempts.entry(text.to_owned()).or_default().push(content.as_bytes().to_vec());
        match directory.create(&name(text), &[content.as_bytes()], None).expect("no faults") {
            Created::New => files.relied(text, Some(content.as_bytes())),
            Created::Taken => files.relied(text, None),
        }
    }
    attempts
}

/// Writers, each with a view of its own if `apart`, append to one log, as a repository's do.
fn together(files: &Simulated, seed: u64, apart: bool) -> Attempts {
    const WRITERS: u8 = 3;
    const ENTRIES: u8 = 2;
    let shared = Arc::new(open(files));
    let mut attempts = Attempts::new();
    for entry in 0..WRITERS * ENTRIES {
        let contents = (0..WRITERS).map(|writer| vec![writer; 4]).collect();
        attempts.insert(format!("log/{entry}"), contents);
    }
    let writer = |writer: u8| -> User {
        let (files, shared) = (files.clone(), shared.clone());
        Box::new(move || {
            let directory = if apart { Arc::new(open(&files)) } else { shared };
            let mut created = 0;
            for entry in 0..WRITERS * ENTRIES {
                let text = format!("log/{entry}");
                match directory.create(&name(&text), &[&[writer; 4]], None).expect("no faults") {
                    Created::New => {
                        files.relied(&text, Some(&[writer; 4]));
                        created += 1;
                    }
                    Created::Taken => {
                        files.relied(&text, None);
                        let content = directory.get(&name(&text), 100).expect("it is there");
                        files.relied(&text, Some(&content));
                    }
                }
                if created == ENTRIES {
                    break;
                }
            }
        })
    };
    files.play(seed, (0..WRITERS).map(writer).collect());
    attempts
}

/// One removes what is in a directory, and the directory with it; others create there.
fn around_a_removal(files: &Simulated, seed: u64) -> Attempts {
    let first = open(files);
    first.create(&name("packs/s/old"), &[b"old"], None).expect("no faults");
    let creator = |text: &'static str, directory: Arc<Directory<Simulated>>| -> User {
        let files = files.clone();
        Box::new(move || {
            directory.create(&name(text), &[b"new"], None).expect("no faults");
            files.relied(text, Some(b"new"));
        })
    };
    // One has had the directory open from before, the other comes new to it.
    let first = Arc::new(first);
    let remover: User = {
        let (files, directory) = (files.clone(), open(files));
        Box::new(move || {
            directory.remove(&name("packs/s/old")).expect("no faults");
            files.gone("packs/s/old");
        })
    };
    let users = vec![creator("packs/s/a", first), creator("packs/s/b", Arc::new(open(files))), remover];
    files.play(seed, users);
    Attempts::from([
        ("packs/s/old".to_owned(), vec![b"old".to_vec()]),
        ("packs/s/a".to_owned(), vec![b"new".to_vec()]),
        ("packs/s/b".to_owned(), vec![b"new".to_vec()]),
    ])
}

/// Several create in one new directory at once.
fn in_a_new_directory(files: &Simulated, seed: u64) -> Attempts {
    let creator = |text: &'static str| -> User {
        let (files, directory) = (files.clone(), open(files));
        Box::new(move || {
            directory.create(&name(text), &[b"new"], None).expect("no faults");
            files.relied(text, Some(b"new"));
        })
    };
    let texts = ["packs/s/a", "packs/s/b"];
    files.play(seed, texts.map(creator).into());
    texts.map(|text| (text.to_owned(), vec![b"new".to_vec()])).into()
}

#[test]
fn what_one_creates_survives_a_power_cut_at_any_step() {
    let files = Simulated::new();
    let attempts = alone(&files);
    let outcomes =
        replay(&files.events(), &attempts, OUTCOMES_ALONE).unwrap_or_else(|broken| panic!("{broken}"));
    assert!(outcomes > 300, "only {outcomes} outcomes");
}

#[test]
fn what_several_create_and_read_survives_a_power_cut_at_any_step() {
    for seed in 0..8 {
        let files = Simulated::new();
        let attempts = together(&files, seed, seed % 2 == 0);
        replay(&files.events(), &attempts, OUTCOMES_TOGETHER)
            .unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    }
}

#[test]
fn a_new_directory_stays_for_all_who_create_there() {
    for seed in 0..60 {
        let files = Simulated::new();
        let attempts = in_a_new_directory(&files, seed);
        replay(&files.events(), &attempts, OUTCOMES_TOGETHER)
            .unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    }
}

#[test]
fn a_directory_that_is_removed_takes_nothing_with_it() {
    for seed in 0..30 {
        let files = Simulated::new();
        let attempts = around_a_removal(&files, seed);
        replay(&files.events(), &attempts, OUTCOMES_TOGETHER)
            .unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    }
}

#[test]
fn where_files_tell_nothing_of_their_names_everything_is_synced() {
    for seed in 0..4 {
        let files = Simulated::with_flaw(Flaw::LinksUncounted);
        let attempts = together(&files, seed, true);
        replay(&files.events(), &attempts, OUTCOMES_TOGETHER)
            .unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
    }
}

/// The replay would see it if a step were left out.
#[test]
fn each_missing_sync_is_found() {
    for flaw in [Flaw::SyncFileIgnored, Flaw::SyncDirIgnored] {
        let files = Simulated::with_flaw(flaw);
        let attempts = alone(&files);
        replay(&files.events(), &attempts, OUTCOMES_ALONE).expect_err("a sync is missing");
    }
    let found = (0..40).any(|seed| {
        let files = Simulated::with_flaw(Flaw::LinksLie);
        let attempts = together(&files, seed, true);
        replay(&files.events(), &attempts, OUTCOMES_TOGETHER).is_err()
    });
    assert!(found, "another's entry is relied upon before it is durable");
}
