//! What is damaged is found without a key, whatever it is.

use crate::collection::{HOW, gc};
use crate::lab::Lab;
use rempart_objects::{Directory, Objects};
use rempart_repository::collect::Collection;
use rempart_repository::{Checked, Error, check, log};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { files_below(&path, found) } else { found.push(path) }
    }
}

/// What was found sound, and the names of what was not.
fn checked(lab: &Lab) -> (Result<Checked, Error>, Vec<String>) {
    let place: Arc<dyn Objects> =
        Arc::new(Directory::open(&lab.folder.path().join("repository")).expect("opens"));
    let mut told = Vec::new();
    let ended = check(&place, &mut |error| told.push(error.object));
    (ended, told)
}

/// Every object with one bit that is another, at its beginning, in the middle and at its end, and every one that others rely upon
/// missing. None of them closes the repository.
#[test]
fn every_object_is_held_against_itself() {
    let mut lab = Lab::new();
    lab.make_disk(2 << 20);
    let mut last = lab.back_up(None, None).expect("backs up");
    for round in 0..3 {
        let changed = lab.change(8);
        last = lab.back_up(Some(&last), Some(changed)).expect("backs up");
        if round == 1 {
            gc(&lab, Collection { checkpoint_after: 0, ..HOW });
        }
    }
    let root = lab.folder.path().join("repository");
    let mut files = Vec::new();
    files_below(&root, &mut files);
    let name = |path: &Path| path.strip_prefix(&root).expect("below").to_str().expect("text").to_owned();
    let count = |prefix: &str| files.iter().filter(|path| name(path).starts_with(prefix)).count() as u64;
    assert!(count("checkpoints/") == 1 && count("log/") > 4, "{files:?}");

    let (ended, told) = checked(&lab);
    let sound = ended.expect("all of it is there");
    assert_eq!(told, Vec::<String>::new());
    assert_eq!(
        (sound.packs, sound.segments, sound.points, sound.keys),
        (count("packs/"), count("segments/"), 4, count("keys/"))
    );
    for path in &files {
        let (name, whole) = (name(path), std::fs::read(path).expect("read"));
        for at in [0, whole.len() / 2, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(path, &bytes).expect("written");
            let (ended, told) = checked(&lab);
            assert!(ended.is_ok() && told.contains(&name), "`{name}`, byte {at}: {ended:?}, {told:?}");
        }
        std::fs::remove_file(path).expect("removed");
        let (ended, told) = checked(&lab);
        if ["packs/", "segments/"].iter().any(|prefix| name.starts_with(prefix)) {
            assert_eq!((told, ended.is_ok()), (vec![name.clone()], true), "missing");
        }
        std::fs::write(path, &whole).expect("written");
    }
    assert_eq!(checked(&lab).1, Vec::<String>::new());
}

/// And the description also where it is lost.
#[test]
fn a_collection_mends_what_reading_begins_with() {
    let mut lab = Lab::new();
    lab.make_disk(1 << 20);
    for checkpoint_after in [u64::MAX, 0, u64::MAX] {
        lab.back_up(None, None).expect("backs up");
        gc(&lab, Collection { checkpoint_after, ..HOW });
    }
    let root = lab.folder.path().join("repository");
    let whole = std::fs::read(root.join("repository")).expect("read");
    std::fs::remove_file(root.join("repository")).expect("removed");
    gc(&lab, HOW);
    assert!(std::fs::read(root.join("repository")).expect("it is there again") == whole);

    for place in 0..6 {
        let name = &beginning(&lab)[place];
        let mut bytes = std::fs::read(root.join(name)).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(root.join(name), bytes).expect("written");
        assert_eq!(&checked(&lab).1, std::slice::from_ref(name));
        gc(&lab, HOW);
        assert_eq!(checked(&lab).1, Vec::<String>::new(), "{name}");
    }
}

/// What nobody can read the repository without, each with its copy.
fn beginning(lab: &Lab) -> [String; 6] {
    let log = lab.repository.log().expect("opens");
    let (number, _) = log.state().floor().expect("it was folded");
    let pointer = format!("checkpoints/{:016x}", log.state().checkpoints() - 1);
    let [description, checkpoint] = ["repository".to_owned(), log::name(number).to_string()];
    let copy = |name: &String| format!("copies/{name}");
    [copy(&description), copy(&pointer), copy(&checkpoint), description, pointer, checkpoint]
}
