//! How a [`Directory`] takes what a file system does to it.

use super::simulated::{Flaw, Simulated};
use super::{Directory, TEMPORARIES};
use crate::{Created, ErrorKind, Name, Objects};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn simulated(files: &Simulated) -> Directory<Simulated> {
    Directory::start(files.clone(), 0, "simulated".to_owned()).expect("it opens")
}

#[test]
fn after_a_failed_sync_nothing_is_changed_any_more() {
    for (flaw, kind) in [(Flaw::SyncDirFails, ErrorKind::Unknown), (Flaw::SyncFileFails, ErrorKind::Failed)] {
        let files = Simulated::new();
        let directory = simulated(&files);
        // Its directory is known to be durable, so that the sync after the link is the one that fails.
        assert_eq!(directory.create(&name("log/0"), &[b"zero"], None).expect("no faults"), Created::New);
        files.set_flaws(&[flaw]);
        let error = directory.create(&name("log/1"), &[b"one"], None).expect_err("a sync failed");
        assert_eq!(error.kind, kind, "{flaw:?}");
        files.set_flaws(&[]);
        for error in [
            directory.create(&name("log/2"), &[b"two"], None).expect_err("it is aborted"),
            directory.remove(&name("log/0")).expect_err("it is aborted"),
        ] {
            assert_eq!(error.kind, ErrorKind::Failed);
            assert!(error.source.to_string().contains("open it anew"), "{}", error.source);
        }
        assert_eq!(directory.get(&name("log/0"), 10).expect("reading goes on"), b"zero");
        let anew = simulated(&files);
        assert_eq!(anew.create(&name("log/2"), &[b"two"], None).expect("no faults"), Created::New);
        let again = anew.create(&name("log/1"), &[b"one"], None).expect("no faults");
        assert_eq!(again, if kind == ErrorKind::Unknown { Created::Taken } else { Created::New });
    }
}

#[test]
fn a_file_system_without_links_is_refused() {
    let files = Simulated::with_flaw(Flaw::NoLink);
    let error = Directory::start(files, 0, "simulated".to_owned()).expect_err("no link(2)");
    assert_eq!(error.kind, ErrorKind::Unsupported);
    assert!(error.source.to_string().contains("no hard links"), "{}", error.source);
}

#[test]
fn a_link_that_met_itself_was_made() {
    let files = Simulated::new();
    let directory = simulated(&files);
    files.set_flaws(&[Flaw::LinkRepeated]);
    assert_eq!(directory.create(&name("log/1"), &[b"one"], None).expect("created"), Created::New);
    files.set_flaws(&[]);
    assert_eq!(directory.create(&name("log/1"), &[b"two"], None).expect("created"), Created::Taken);
}

#[test]
fn a_full_file_system_says_so_and_keeps_nothing_of_the_object() {
    let files = Simulated::new();
    let directory = simulated(&files);
    files.set_flaws(&[Flaw::Full]);
    let error = directory.create(&name("log/1"), &[b"one"], None).expect_err("it is full");
    assert_eq!(error.kind, ErrorKind::Full);
    files.set_flaws(&[]);
    assert_eq!(directory.get(&name("log/1"), 9).expect_err("nothing").kind, ErrorKind::Missing);
    assert_eq!(directory.create(&name("log/1"), &[b"one"], None).expect("room again"), Created::New);
}

#[test]
fn a_read_only_file_system_can_be_read() {
    let files = Simulated::new();
    simulated(&files).create(&name("log/1"), &[b"one"], None).expect("no faults");
    files.set_flaws(&[Flaw::ReadOnly]);
    let directory = simulated(&files);
    assert_eq!(directory.get(&name("log/1"), 9).expect("it is there"), b"one");
    for error in [
        directory.create(&name("log/2"), &[b"two"], None).expect_err("read-only"),
        directory.remove(&name("log/1")).expect_err("read-only"),
    ] {
        assert_eq!(error.kind, ErrorKind::Denied, "{error}");
    }
}

#[test]
fn only_its_owner_may_look_at_it() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("a/b");
    let directory = Directory::create(&path).expect("it is made");
    directory.create(&name("packs/s/x"), &[b"x"], None).expect("created");
    let mode =
        |inner: &str| fs::metadata(path.join(inner)).expect("it is there").permissions().mode() & 0o777;
    for dir in ["..", "", "packs", "packs/s", TEMPORARIES] {
        assert_eq!(mode(dir), 0o700, "`{dir}`");
    }
    assert_eq!(mode("packs/s/x"), 0o600);
}

#[test]
fn a_place_that_is_not_there_is_missing() {
    let home = tempfile::tempdir().expect("a directory");
    let error = Directory::open(&home.path().join("none")).expect_err("nothing there");
    assert_eq!(error.kind, ErrorKind::Missing);
    assert!(error.to_string().contains("none"), "{error}");
    let file = home.path().join("file");
    fs::write(&file, "").expect("written");
    Directory::open(&file).expect_err("it is a file");
    Directory::create(&file).expect_err("it is a file");
}

#[test]
fn leftovers_go_once_they_are_old_and_nobody_has_them_locked() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path();
    drop(Directory::open(path).expect("it opens"));
    let leftover = |name: &str, age: Duration| {
        let file = fs::File::create(path.join(TEMPORARIES).join(name)).expect("a file");
        file.set_modified(SystemTime::now() - age).expect("its time is set");
        file
    };
    let day = Duration::from_secs(24 * 3600);
    drop(leftover("young", day / 2));
    drop(leftover("old", day * 2));
    let locked = leftover("locked", day * 2);
    locked.lock().expect("it is free");
    drop(Directory::open(path).expect("it opens"));
    let left = || {
        let mut names: Vec<_> = fs::read_dir(path.join(TEMPORARIES))
            .expect("it is there")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
            .collect();
        names.sort();
        names
    };
    assert_eq!(left(), ["locked", "young"]);
    drop(locked);
    drop(Directory::open(path).expect("it opens"));
    assert_eq!(left(), ["young"]);
}

#[test]
fn others_files_are_no_objects() {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path();
    let outside = tempfile::tempdir().expect("a directory");
    fs::write(outside.path().join("x"), "theirs").expect("written");
    let directory = Directory::open(path).expect("it opens");
    directory.create(&name("log/1"), &[b"one"], None).expect("created");
    fs::write(path.join("lost+found"), "").expect("written");
    fs::write(path.join("log/README"), "").expect("written");
    fs::create_dir(path.join("log/2")).expect("made");
    std::os::unix::fs::symlink(outside.path(), path.join("packs")).expect("linked");
    std::os::unix::fs::symlink(outside.path().join("x"), path.join("log/3")).expect("linked");
    let names: Vec<_> =
        directory.list("", None).expect("listed").into_iter().map(|listed| listed.name).collect();
    assert_eq!(names, [name("log/1")]);
    for text in ["packs/x", "log/3", "log/2"] {
        directory.get(&name(text), 100).expect_err("no object");
        let created = directory.create(&name(text), &[b"mine"], None);
        assert!(!matches!(created, Ok(Created::New)), "`{text}` is another's");
    }
    directory.remove(&name("packs/x")).expect_err("it is outside");
    assert_eq!(fs::read(outside.path().join("x")).expect("it is there"), b"theirs");
}

/// What begins a page is written past the page cache as far as whole pages go; nobody can tell.
#[test]
fn large_objects_hold_what_was_put_wherever_it_lay_in_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = Directory::create(&folder.path().join("place")).expect("a place");
    let memory: Vec<u8> = (0..(3 << 20) + 4096 + 17_u32).map(|at| (at.wrapping_mul(at) >> 7) as u8).collect();
    let aligned = memory.as_ptr().align_offset(4096);
    for (number, len) in [1 << 20, (1 << 20) + 1, (2 << 20) + 4095, (3 << 20) - 4096].into_iter().enumerate()
    {
        for (kind, from) in [("aligned", aligned), ("odd", aligned + 1)] {
            let content = &memory[from..from + len];
            let name = Name::new(format!("packs/{kind}{number}")).expect("a name");
            assert_eq!(place.create(&name, &[content], None).expect("creates"), Created::New);
            assert!(place.get(&name, 4 << 20).expect("reads") == content, "{kind}, {len} bytes");
        }
    }
}
