//! Every place keeps what all must keep.

use rempart_objects::testing::{Fault, Faulty, Rates, conformance};
use rempart_objects::{Created, Directory, ErrorKind, Memory, Name, Objects, probe};
use rempart_types::WallTime;
use std::path::Path;
use std::sync::Arc;

fn memory() -> Arc<dyn Objects> {
    Arc::new(Memory::default())
}

fn directory(path: &Path) -> Arc<dyn Objects> {
    Arc::new(Directory::open(path).expect("it opens"))
}

#[test]
fn memory_keeps_its_promises() {
    conformance::check(memory);
    let shared = memory();
    conformance::race(|| shared.clone());
}

#[test]
fn memory_lets_go_when_the_time_has_come() {
    let memory = Memory::default();
    let name = Name::new("p").expect("a name");
    memory.create(&name, &[b"p"], Some(WallTime(1000))).expect("created");
    memory.remove(&name).expect_err("it is retained");
    memory.set_time(WallTime(1000));
    memory.remove(&name).expect("it is no longer");
}

#[test]
fn a_directory_keeps_its_promises() {
    let home = tempfile::tempdir().expect("a directory");
    conformance::check(|| {
        let path = home.path().join(fastrand::u64(..).to_string());
        Arc::new(Directory::create(&path).expect("it is made"))
    });
}

#[test]
fn a_directory_decides_races() {
    let home = tempfile::tempdir().expect("a directory");
    conformance::race(|| directory(home.path()));
    let other = tempfile::tempdir().expect("a directory");
    let shared = directory(other.path());
    conformance::race(|| shared.clone());
}

#[test]
fn a_faulty_place_without_faults_keeps_its_promises() {
    let faulty = || -> Arc<dyn Objects> { Arc::new(Faulty::new(memory(), 1, Rates::default())) };
    conformance::check(faulty);
    let shared = faulty();
    conformance::race(|| shared.clone());
}

#[test]
fn an_honest_place_is_trusted() {
    let home = tempfile::tempdir().expect("a directory");
    for place in [memory(), directory(home.path())] {
        probe(&*place).expect("it is honest");
        assert_eq!(place.list("", None).expect("listed"), [], "nothing is left");
    }
}

#[test]
fn a_place_that_lies_is_refused() {
    let liar = Faulty::new(memory(), 1, Rates { lies: true, ..Rates::default() });
    let error = probe(&liar).expect_err("it lies");
    assert_eq!(error.kind, ErrorKind::Unsupported, "{error}: {}", error.source);
    assert!(error.source.to_string().contains("cannot hold a repository"), "{}", error.source);
}

#[test]
fn a_place_that_fails_while_it_is_tried_out_is_not_called_a_liar() {
    for fault in [Fault::Refused, Fault::Lost, Fault::AnswerLost] {
        let place = Faulty::new(memory(), 1, Rates::default());
        // All contenders of the first race.
        place.plan([fault; 6]);
        let error = probe(&place).expect_err("it fails");
        assert!(error.is_transient(), "{fault:?}: {error}: {}", error.source);
    }
}

#[test]
fn changes_of_a_rough_day_are_done_once_or_not_at_all() {
    for seed in 0..20 {
        let inner = memory();
        let place = Faulty::new(inner.clone(), seed, Rates::rough());
        let mut created = Vec::new();
        for number in 0..200u32 {
            let name = Name::new(format!("log/{number}")).expect("a name");
            let content = number.to_le_bytes();
            // The same bytes under the same name until there is an answer.
            let outcome = (0..100).find_map(|_| place.create(&name, &[&content], None).ok());
            match outcome.expect("chance relents") {
                Created::New => created.push(name),
                Created::Taken => {
                    assert_eq!(inner.get(&name, 4).expect("it is there"), content, "seed {seed}")
                }
            }
        }
        place.land();
        for name in created {
            assert_eq!(inner.len(&name).expect("it was acknowledged"), 4, "seed {seed}");
        }
    }
}
