//! Whether a place can be trusted to give each name once.

use crate::{Created, Error, ErrorKind, Name, Objects};
use std::sync::Barrier;

/// Creations of one name at the same time, and how many such races.
const CONTENDERS: usize = 6;
const RACES: usize = 5;

/// Creates the same names from several threads at once, and fails with [`ErrorKind::Unsupported`] if the place lies: if one is
/// given twice or to nobody, replaced, or does not hold what its creator wrote. It can refute, not prove: a race
/// may go well by luck.
pub fn probe(place: &dyn Objects) -> Result<(), Error> {
    for _ in 0..RACES {
        let name = fresh_name(place)?;
        let probed = probe_name(place, &name);
        match place.remove(&name) {
            // Some buckets retain everything for a while, and some users may not remove.
            Err(error) if !matches!(error.kind, ErrorKind::Retained | ErrorKind::Denied) => {
                probed.and(Err(error))?;
            }
            _ => probed?,
        }
    }
    Ok(())
}

fn fresh_name(place: &dyn Objects) -> Result<Name, Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        Error::at_place(ErrorKind::Failed, "draw a name to try out", place.url(), error.to_string())
    })?;
    Ok(Name::new(format!("probe/{:032x}", u128::from_le_bytes(bytes))).expect("it is hexadecimal"))
}

fn probe_name(place: &dyn Objects, name: &Name) -> Result<(), Error> {
    let lies = |why: String| {
        let why = format!(
            "{why}: two writers could overwrite each other's backups, so that it cannot hold a repository"
        );
        Error::new(ErrorKind::Unsupported, "trust", name, place.url(), why)
    };
    let content = |contender: usize| format!("contender {contender}");
    let barrier = Barrier::new(CONTENDERS);
    let outcomes: Vec<Result<Created, Error>> = std::thread::scope(|scope| {
        let contenders: Vec<_> = (0..CONTENDERS)
            .map(|contender| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    place.create(name, &[content(contender).as_bytes()], None)
                })
            })
            .collect();
        contenders.into_iter().map(|contender| contender.join().expect("it does not panic")).collect()
    });
    let mut winner = None;
    let mut failed = None;
    for (contender, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Ok(Created::New) => {
                if winner.replace(contender).is_some() {
                    return Err(lies("it gave one name to two writers at once".to_owned()));
                }
            }
            Ok(Created::Taken) => {}
            Err(error) => failed = Some(error),
        }
    }
    // One that failed may have been the one that created it.
    let Some(winner) = winner else {
        return Err(
            failed.unwrap_or_else(|| lies("it told all writers that a free name was taken".to_owned()))
        );
    };
    let held = |when: &str| {
        let found = place.get(name, 100)?;
        if found == content(winner).as_bytes() {
            return Ok(());
        }
        Err(lies(format!(
            "{when}, an object does not hold what the one writer wrote who was told of success"
        )))
    };
    held("after a race")?;
    match place.create(name, &[b"afterwards"], None)? {
        Created::Taken => held("after another creation of its name"),
        Created::New => Err(lies("it gave a taken name away again".to_owned())),
    }
}
