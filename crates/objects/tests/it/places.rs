//! Every place keeps what all must keep.

use rempart_objects::testing::conformance;
use rempart_objects::{Directory, Memory, Objects};
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
    let name = rempart_objects::Name::new("p").expect("a name");
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
