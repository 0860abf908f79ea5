//! Disks into a repository in a directory, and back.

use crate::lab::{CHUNK, Lab, PACE, PASSPHRASE};
use rempart_backup::{ChunkSet, Content, Progress, check_disk};
use rempart_objects::{Abilities, Created, Directory, Error, Front, Memory, Name, Objects};
use rempart_repository::{BlobReader, NodeSource, Repository, Unlock};
use rempart_types::WallTime;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

#[test]
fn every_point_is_what_the_disk_was() {
    let mut lab = Lab::new();
    lab.make_disk(40 * 1024 * 1024 + 512);
    let mut points = Vec::new();
    let mut last = lab.back_up(None, None).expect("backs up");
    points.push((last.0, lab.content()));
    for round in 0..6 {
        let mut changed = lab.change(20);
        if round == 2 || round == 4 {
            let file = File::options().write(true).open(lab.disk()).expect("opens");
            let size = file.metadata().expect("it is there").len();
            let size = if round == 2 { size + 3 * CHUNK + 1024 } else { size - 200 * CHUNK - 512 };
            file.set_len(size).expect("resizes");
            let mut resized = ChunkSet::none(size, CHUNK);
            (0..changed.chunks().min(resized.chunks()))
                .filter(|chunk| changed.contains(*chunk))
                .for_each(|chunk| resized.insert_chunks(chunk..chunk + 1));
            changed = resized;
        }
        let touched = changed.bytes();
        let (root, disk) = lab.back_up(Some(&last), Some(changed)).expect("backs up");
        assert_eq!((disk.how.full_because.clone(), disk.how.missed), (None, 0));
        let most = touched + 2 * CHUNK + disk.how.audited * CHUNK;
        assert!(disk.how.read <= most, "{} bytes were read, {touched} had changed", disk.how.read);
        last = (root, disk);
        points.push((last.0, lab.content()));
    }
    // What is known already is found again, however it is read.
    let (_, again) = lab.back_up(None, None).expect("backs up");
    assert_eq!((again.how.new, again.root), (0, last.1.root));
    for (root, content) in points {
        assert!(lab.restore(root).expect("restores") == content, "point {root}");
    }
}

#[test]
fn of_a_disk_as_small_as_the_sample_every_unchanged_chunk_is_read_once() {
    let mut lab = Lab::new();
    let chunks = 2 * PACE.audit as u64;
    lab.make_disk(chunks * CHUNK);
    lab.fill(0, chunks * CHUNK);
    let mut last = lab.back_up(None, None).expect("backs up");
    for round in 0..PACE.audit as u64 {
        // Every second one is told to have changed: one of the others has.
        let mut told = ChunkSet::none(chunks * CHUNK, CHUNK);
        (0..chunks).step_by(2).for_each(|chunk| told.insert_chunks(chunk..chunk + 1));
        lab.fill((2 * round + 1) * CHUNK + 77, 40);
        last = lab.back_up(Some(&last), Some(told)).expect("backs up");
        assert_eq!((last.1.how.audited, last.1.how.missed), (PACE.audit as u64, 1), "round {round}");
    }
}

#[test]
fn a_change_that_was_missed_is_found_and_mended() {
    let mut lab = Lab::new();
    lab.make_disk(8 * 1024 * 1024);
    let first = lab.back_up(None, None).expect("backs up");
    lab.change(2000);
    let nothing = ChunkSet::none(8 * 1024 * 1024, CHUNK);
    let (root, disk) = lab.back_up(Some(&first), Some(nothing)).expect("backs up");
    assert!(disk.how.missed > 0 && disk.how.full_because.is_some(), "{:?}", disk.how);
    assert!(lab.restore(root).expect("restores") == lab.content());
}

#[test]
fn the_same_disk_twice_is_stored_once() {
    let mut lab = Lab::new();
    lab.make_disk(8 * 1024 * 1024);
    let size = |lab: &Lab| {
        let used =
            std::process::Command::new("du").args(["-sb"]).arg(lab.folder.path().join("repository")).output();
        let used = String::from_utf8(used.expect("du runs").stdout).expect("text");
        used.split_whitespace().next().expect("a number").parse::<u64>().expect("a number")
    };
    lab.back_up(None, None).expect("backs up");
    let once = size(&lab);
    let (_, again) = lab.back_up(None, None).expect("backs up");
    assert_eq!(again.how.new, 0);
    assert!(size(&lab) < once + 64 * 1024, "{once} and then {} bytes", size(&lab));
}

#[test]
fn a_wrong_passphrase_and_an_empty_place_are_told_apart() {
    let lab = Lab::new();
    let place = Arc::new(Directory::open(&lab.folder.path().join("repository")).expect("opens"));
    let open = |place, unlock| Repository::open(place, lab.folder.path(), unlock);
    let error = open(place, Unlock::Passphrase("wrong")).expect_err("refused");
    assert_eq!(error.kind, rempart_repository::ErrorKind::WrongKey, "{error}");
    let empty = Arc::new(Directory::create(&lab.folder.path().join("empty")).expect("creates"));
    let error = open(empty, PASSPHRASE).expect_err("refused");
    assert!(error.to_string().contains("there is no repository in"), "{error}");
}

#[test]
fn an_index_that_is_gone_or_garbage_is_made_again() {
    let mut lab = Lab::new();
    lab.make_disk(4 * 1024 * 1024);
    let first = lab.back_up(None, None).expect("backs up");
    let cache = lab.folder.path().join("cache").join(lab.repository.id().to_string()).join("index");
    // It has what the backup before brought.
    lab.back_up(None, None).expect("backs up");
    let sound = std::fs::read(&cache).expect("there is one");
    for content in [vec![], b"garbage".to_vec(), sound[..sound.len() / 2].to_vec()] {
        std::fs::write(&cache, content).expect("writes");
        let (_, again) = lab.back_up(None, None).expect("backs up");
        assert_eq!(again.how.new, 0);
    }
    // A part of it that is looked at only when something there is searched for.
    let mut damaged = sound.clone();
    damaged[4096 + 5] ^= 1;
    std::fs::write(&cache, &damaged).expect("writes");
    let read = |lab: &Lab| {
        let log = lab.repository.log()?;
        let point = lab.repository.point(&log, first.0)?;
        let reader = BlobReader::new(&lab.repository, log.state(), lab.repository.index(log.state())?);
        reader.node(&point.disk("vda").expect("it has one").root)
    };
    let error = read(&lab).expect_err("it is damaged");
    assert!(!error.is_loss(), "nothing is lost: {error}");
    assert!(error.to_string().contains("index`: is damaged, and was thrown away: begin again"), "{error}");
    read(&lab).expect("it was made anew");
    std::fs::write(&cache, &damaged).expect("writes");
    let _ = lab.back_up(None, None);
    let (_, again) = lab.back_up(None, None).expect("backs up");
    assert_eq!(again.how.new, 0);
    // Segments, too: the packs themselves tell what is in them.
    std::fs::remove_file(&cache).expect("removes");
    std::fs::remove_dir_all(lab.folder.path().join("repository/segments")).expect("removes");
    let (_, again) = lab.back_up(None, None).expect("backs up");
    assert_eq!(again.how.new, 0);
    assert!(lab.restore(first.0).expect("restores") == lab.content());
}

#[test]
fn a_damaged_chunk_that_did_not_change_is_read_and_stored_again() {
    let mut lab = Lab::new();
    lab.make_disk(8 * 1024 * 1024);
    let nothing = || ChunkSet::none(8 * 1024 * 1024, CHUNK);
    let first = lab.back_up(None, None).expect("backs up");
    let packs = |lab: &Lab| {
        let listed = std::process::Command::new("find")
            .arg(lab.folder.path().join("repository/packs"))
            .args(["-type", "f"])
            .output()
            .expect("find runs");
        let listed = String::from_utf8(listed.stdout).expect("text");
        let mut packs: Vec<PathBuf> = listed.lines().map(PathBuf::from).collect();
        packs.sort_by_key(|pack| pack.metadata().expect("it is there").len());
        packs
    };
    // The largest holds chunks.
    let largest = packs(&lab).pop().expect("there are some");
    let mut bytes = std::fs::read(&largest).expect("reads");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&largest, bytes).expect("writes");
    let log = lab.repository.log().expect("opens");
    let reader =
        BlobReader::new(&lab.repository, log.state(), lab.repository.index(log.state()).expect("opens"));
    let chunk_size = lab.repository.chunk_size();
    let content = Content::of(&first.1, chunk_size);
    let check = || check_disk(&reader, content, 2, &Progress::default()).expect("reads");
    let lost = check().chunks;
    assert_eq!(lost.len(), 1);
    lab.repository.report_damaged(&lost, WallTime(5)).expect("reports");

    let second = lab.back_up(Some(&first), Some(nothing())).expect("backs up");
    assert_eq!((second.1.how.full_because.clone(), second.1.how.new > 0), (None, true));
    assert!(lab.restore(first.0).expect("the old point is whole again") == lab.content());
    let third = lab.back_up(Some(&second), Some(nothing())).expect("backs up");
    assert_eq!(third.1.how.new, 0, "it is settled");

    // Those that are smaller than a chunk hold the tree: nobody knows what was in it, so all is read.
    let small = |pack: &PathBuf| pack.metadata().expect("it is there").len() < CHUNK;
    packs(&lab).into_iter().filter(small).for_each(|pack| std::fs::remove_file(pack).expect("removes"));
    let (_, disk) = lab.back_up(Some(&third), Some(nothing())).expect("backs up");
    assert!(
        disk.how.full_because.as_deref().is_some_and(|why| why.contains("cannot be read")),
        "{:?}",
        disk.how
    );
}

#[test]
fn a_log_that_was_never_begun_is_begun_and_one_that_was_lost_is_not() {
    let mut lab = Lab::new();
    let log = lab.folder.path().join("repository/log");
    std::fs::remove_dir_all(&log).expect("removes");
    lab.make_disk(1024 * 1024);
    let (root, _) = lab.back_up(None, None).expect("whoever made it was killed before it had a log");
    assert!(lab.restore(root).expect("restores") == lab.content());
    std::fs::remove_dir_all(&log).expect("removes");
    lab.repository.log().expect_err("its packs are of a log that was lost");
}

/// A place that, when it has taken five packs, takes more only five at a time.
#[derive(Debug)]
struct FiveAtATime {
    behind: Memory,
    packs: Mutex<Packs>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Packs {
    taken: u32,
    on_their_way: u32,
    most: u32,
}

const TOGETHER: u32 = 5;

impl Front for FiveAtATime {
    fn behind(&self) -> &dyn Objects {
        &self.behind
    }

    fn create(&self, name: &Name, parts: &[&[u8]], until: Option<WallTime>) -> Result<Created, Error> {
        let is_pack = name.as_str().starts_with("packs/");
        if is_pack {
            let mut packs = self.packs.lock().expect("no holder panics");
            packs.on_their_way += 1;
            packs.most = packs.most.max(packs.on_their_way);
            assert!(packs.on_their_way <= packs.taken + 1, "it is offered no more than it has shown to take");
            self.changed.notify_all();
            if packs.taken == 0 {
                // Time for the next one, which is not to come.
                let alone = |packs: &mut Packs| packs.on_their_way == 1;
                let waited = self.changed.wait_timeout_while(packs, Duration::from_millis(500), alone);
                packs = waited.expect("no holder panics").0;
            }
            let few = |packs: &mut Packs| packs.taken >= TOGETHER && packs.most < TOGETHER;
            let waited = self.changed.wait_timeout_while(packs, Duration::from_secs(60), few);
            let (packs, ended) = waited.expect("no holder panics");
            assert!(!ended.timed_out(), "{packs:?}");
        }
        let created = self.behind.create(name, parts, until);
        if is_pack {
            let mut packs = self.packs.lock().expect("no holder panics");
            packs.on_their_way -= 1;
            packs.taken += 1;
        }
        created
    }

    fn abilities(&self) -> Abilities {
        Abilities { creates: 8, ..self.behind.abilities() }
    }
}

/// A bucket gives each connection a part of what it could.
#[test]
fn as_many_packs_are_on_their_way_as_a_place_is_worth_and_has_shown_to_take() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = FiveAtATime { behind: Memory::default(), packs: Mutex::default(), changed: Condvar::new() };
    let mut lab = Lab::on(folder, Arc::new(place));
    lab.make_disk(1);
    // A pack there has 1 MiB.
    lab.fill(0, 24 << 20);
    let backup = lab.back_up(None, None).expect("backs up");
    assert!(lab.restore(backup.0).expect("restores") == lab.content());
}
