//! What is damaged is found without a key, whatever it is.

use crate::collection::{HOW, gc};
use crate::lab::Lab;
use rempart_objects::{Directory, Objects};
use rempart_repository::collect::Collection;
use rempart_repository::{Checked, Error, check};
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
/// missing.
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
            let is_named =
                told.contains(&name) || ended.as_ref().is_err_and(|error| with_causes(error).contains(&name));
            assert!(is_named, "`{name}`, byte {at}: {ended:?}, {told:?}");
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

/// An error with all that it comes from.
fn with_causes(error: &dyn std::error::Error) -> String {
    let source = error.source().map(with_causes).unwrap_or_default();
    format!("{error}: {source}")
}
