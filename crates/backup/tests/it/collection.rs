//! Collections of repositories that hold real backups: what remains is whole, what is gone is gone.

use crate::lab::{CHUNK, Lab, PACE};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use rempart_backup::{
    BackupError, Changes, ChunkCache, ChunkSet, Content as DiskContent, DiskJob, DiskReader, FileSource,
    Progress, back_up_disk, check_disk,
};
use rempart_objects::{Memory, Name, Objects, pages};
use rempart_repository::collect::{Collected, Collection, Follow, Kept, Reach, collect, look};
use rempart_repository::log::{Content, Session, Status};
use rempart_repository::{
    BackupWriter, BlobReader, Decompressor, ErrorKind, Point, PointDisk, Remains, SessionId,
};
use rempart_types::WallTime;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// No session is ended for being idle.
const PATIENT: Duration = Duration::from_secs(1 << 40);
const NOW: WallTime = WallTime(10);
pub const HOW: Collection = Collection {
    now: NOW,
    idle: PATIENT,
    follow: true,
    repack: None,
    accept_doubtful: false,
    checkpoint_after: 20,
};

pub fn in_memory() -> Lab {
    Lab::on(tempfile::tempdir().expect("a folder"), Arc::new(Memory::default()))
}

pub fn gc(lab: &Lab, how: Collection) -> Collected {
    collect(&lab.repository, &how).expect("collects")
}

pub fn forget(lab: &Lab, roots: &[u64]) {
    let log = lab.repository.log().expect("opens");
    let mut session = Session::open(log, lab.repository.signer(), SessionId::random(), NOW).expect("opens");
    session.forget(NOW, roots.to_vec()).expect("forgets");
    session.end(NOW).expect("ends");
}

/// Objects under a prefix, and their bytes.
pub fn there(objects: &Arc<dyn Objects>, prefix: &str) -> (usize, u64) {
    let listed = pages(&**objects, prefix).flat_map(|page| page.expect("lists"));
    listed.fold((0, 0), |(count, bytes), listed| (count + 1, bytes + listed.len))
}

pub fn packs(lab: &Lab) -> (usize, u64) {
    there(lab.repository.objects(), "packs/")
}

/// A point, its disk, and what that held.
type Taken = (u64, PointDisk, Vec<u8>);

fn back_up(lab: &mut Lab, points: &mut Vec<Taken>, changed: Option<ChunkSet>) {
    let before = points.last().map(|(root, disk, _)| (*root, disk.clone()));
    let (root, disk) = lab.back_up(before.as_ref(), changed).expect("backs up");
    points.push((root, disk, lab.content()));
}

fn all_restore(lab: &Lab, points: &[Taken]) {
    for (root, _, content) in points {
        assert!(lab.restore(*root).expect("restores") == *content, "point {root}");
    }
}

/// Backups, some full and some not, of a disk that is written to and resized; some are forgotten; collections of each kind.
fn a_life(mut lab: Lab) {
    lab.make_disk(6 * MIB + 512);
    let mut points: Vec<Taken> = Vec::new();
    back_up(&mut lab, &mut points, None);
    for round in 0..8 {
        let changed = lab.change(20);
        let full = lab.random.random_range(0..3) == 0;
        if round % 4 == 3 {
            let file = File::options().write(true).open(lab.disk()).expect("opens");
            file.set_len(lab.random.random_range(3 * MIB..9 * MIB)).expect("resizes");
            back_up(&mut lab, &mut points, None);
        } else {
            back_up(&mut lab, &mut points, (!full).then_some(changed));
        }
        let gone: Vec<Taken> = match round % 3 {
            0 => Vec::new(),
            // Not the newest: the next one continues it.
            _ => vec![points.remove(lab.random.random_range(0..points.len() - 1))],
        };
        let roots: Vec<u64> = gone.iter().map(|(root, ..)| *root).collect();
        if !roots.is_empty() {
            forget(&lab, &roots);
        }
        let how = match round % 4 {
            0 => Collection { follow: false, ..HOW },
            1 => HOW,
            _ => Collection { repack: Some(if round < 6 { 50 } else { 100 }), ..HOW },
        };
        let done = gc(&lab, how);
        assert!(done.unreadable.is_empty() && done.removed.unsettled == 0, "{done:?}");
        all_restore(&lab, &points);
        roots.iter().for_each(|root| drop(lab.restore(*root).expect_err("it was forgotten")));
    }
    // Only the last remains: the place holds what a repository with nothing else would, and not much more.
    let last = points.pop().expect("there is one");
    forget(&lab, &points.iter().map(|(root, ..)| *root).collect::<Vec<_>>());
    gc(&lab, Collection { repack: Some(100), ..HOW });
    all_restore(&lab, std::slice::from_ref(&last));
    let mut fresh = in_memory();
    std::fs::copy(lab.disk(), fresh.disk()).expect("copies");
    back_up(&mut fresh, &mut Vec::new(), None);
    let (needed, used) = (packs(&fresh).1, packs(&lab).1);
    assert!(used < needed + needed / 50 + 64 * 1024, "{used} bytes for {needed}");
    // And nothing remains of nothing.
    forget(&lab, &[last.0]);
    gc(&lab, HOW);
    assert_eq!((packs(&lab), there(lab.repository.objects(), "segments/")), ((0, 0), (0, 0)));
}

#[test]
fn a_life_in_a_directory() {
    a_life(Lab::new());
}

#[test]
fn a_life_in_memory() {
    a_life(in_memory());
}

/// What only a forgotten point had is removed; by the log alone it would not be, for the next point claims it, too.
#[test]
fn what_nothing_reaches_is_removed_though_it_is_claimed() {
    let mut lab = in_memory();
    lab.make_disk(8 * MIB);
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    let (_, before) = packs(&lab);
    lab.fill(0, 8 * MIB);
    back_up(&mut lab, &mut points, Some(ChunkSet::all(8 * MIB, CHUNK)));
    let both = packs(&lab).1;
    forget(&lab, &[points.remove(0).0]);
    let quick = gc(&lab, Collection { follow: false, ..HOW });
    assert_eq!((quick.removed.objects, packs(&lab).1), (0, both));
    let outlook = look(&lab.repository, &HOW).expect("looks");
    let done = gc(&lab, HOW);
    assert_eq!((packs(&lab).1, done.removed.bytes >= before), (both - before, true), "{done:?}");
    assert_eq!(outlook.packs, done.condemned.objects);
    assert!(outlook.bytes <= before && outlook.bytes > before - before / 50, "{outlook:?} of {before}");
    all_restore(&lab, &points);
}

/// Whoever removes a tree's nodes takes from the collection what tells what is reached.
#[test]
fn a_point_whose_tree_is_lost_keeps_all_that_it_claims() {
    let mut lab = in_memory();
    lab.make_disk(6 * MIB);
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    let objects = lab.repository.objects().clone();
    // Nodes are in a pack of their own: here, the smallest.
    let listed = objects.list("packs/", None).expect("lists");
    let tree = listed.iter().min_by_key(|listed| listed.len).expect("there is one");
    objects.remove(&tree.name).expect("removes");
    let before = packs(&lab);
    lab.make_disk(2 * MIB);
    back_up(&mut lab, &mut points, None);
    forget(&lab, &[points[1].0]);
    let done = gc(&lab, Collection { repack: Some(90), ..HOW });
    assert!(done.unreadable.contains_key(&points[0].0), "{done:?}");
    assert_eq!(packs(&lab), before, "only what the forgotten one had is gone");
}

/// Damages the largest pack of a directory, so many percent behind its beginning, and has it known what of a disk is lost by that.
fn damage(lab: &Lab, at: u64, disk: &PointDisk) {
    damage_largest(lab, at, |_| true);
    let log = lab.repository.log().expect("opens");
    let index = lab.repository.index(log.state()).expect("opens");
    let reader = BlobReader::new(&lab.repository, log.state(), index);
    let content = DiskContent::of(disk, lab.repository.chunk_size());
    let found = check_disk(&reader, content, 2, &Progress::default());
    lab.repository.report_damaged(&found.expect("reads").chunks, NOW).expect("reports");
}

/// Of those packs.
fn damage_largest(lab: &Lab, at: u64, of: impl Fn(&Name) -> bool) {
    let listed = lab.repository.objects().list("packs/", None).expect("lists");
    let packs = listed.iter().filter(|listed| of(&listed.name));
    let largest = packs.max_by_key(|listed| listed.len).expect("there is one");
    let path = lab.folder.path().join("repository").join(largest.name.as_str());
    let mut bytes = std::fs::read(&path).expect("reads");
    bytes[(largest.len * at / 100) as usize] ^= 1;
    std::fs::write(&path, bytes).expect("writes");
}

/// It finds the damaged one first, and would have nothing of the good one when the backup that mended is forgotten.
#[test]
fn a_backup_that_finds_a_chunk_twice_requires_both() {
    let mut lab = Lab::new();
    lab.make_disk(4 * MIB);
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    damage(&lab, 30, &points[0].1);
    back_up(&mut lab, &mut points, None);
    back_up(&mut lab, &mut points, None);
    assert_eq!(points[2].1.how.new, 0, "it is all there");
    forget(&lab, &[points[0].0, points[1].0]);
    gc(&lab, Collection { follow: false, ..HOW });
    all_restore(&lab, &points[2..]);
}

/// Of a chunk that lies twice, because its first copy is damaged, the good one stays.
#[test]
fn the_good_copy_of_a_chunk_stays() {
    let mut lab = Lab::new();
    lab.make_disk(4 * MIB);
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    for at in [30, 60] {
        damage(&lab, at, &points[0].1);
        lab.back_up(None, None).expect("backs up");
        gc(&lab, HOW);
        all_restore(&lab, &points);
        gc(&lab, Collection { repack: Some(if at == 30 { 0 } else { 100 }), ..HOW });
        all_restore(&lab, &points);
    }
}

/// Two backups at once store the same; one has more. What lies twice is kept once, without being written anew, and then
/// there is nothing left to do.
#[test]
fn what_two_backups_at_once_both_stored_is_kept_once() {
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Damaged {
        None,
        First,
        Second,
    }
    for damaged in [Damaged::None, Damaged::First, Damaged::Second] {
        let mut lab = Lab::new();
        File::create(lab.disk()).and_then(|disk| disk.set_len(6 * MIB)).expect("creates");
        // One thread reads the first 4 MiB, another the rest.
        lab.fill(0, 3 * MIB);
        let [first, second] = [0, 1].map(|_| BackupWriter::open(lab.repository.clone()).expect("opens"));
        let store = |lab: &Lab, writer: BackupWriter| -> Taken {
            let source = FileSource::open(&lab.disk()).expect("opens");
            let changes = Changes::Unknown("the test wants it".to_owned());
            let job = DiskJob { name: "vda", source: &source, changes, position: None, left_out: &[] };
            let stored = back_up_disk(&writer, lab.repository.chunk_size(), &job, PACE, &Progress::default());
            let (disk, chain) = (stored.expect("stored"), lab.repository.chain("shop"));
            let point = lab.point(vec![disk.clone()]);
            let written = writer.commit(chain, None, &point, None).expect("committed");
            (written.root, disk, lab.content())
        };
        let one = store(&lab, first);
        let once = packs(&lab).1;
        let of_first = lab.repository.objects().list("packs/", None).expect("lists");
        let is_of_first = |pack: &Name| of_first.iter().any(|listed| listed.name == *pack);
        lab.fill(4 * MIB, MIB);
        let points = [one, store(&lab, second)];
        let twice = packs(&lab).1;
        assert!(twice > once * 2 + MIB, "{twice} bytes, and {once} of the first");
        match damaged {
            Damaged::None => {}
            Damaged::First => damage_largest(&lab, 50, is_of_first),
            Damaged::Second => damage_largest(&lab, 50, |pack| !is_of_first(pack)),
        }
        let repacking = Collection { repack: Some(60), ..HOW };
        let done = gc(&lab, repacking);
        all_restore(&lab, &points);
        // Only what the newer one has not whole is written.
        let anew = if damaged == Damaged::Second { CHUNK + 4096 } else { 0 };
        assert!(done.rewritten.bytes <= anew, "{damaged:?}: {done:?}");
        assert_eq!(done.rewritten.bytes == 0, anew == 0, "{damaged:?}: {done:?}");
        let left = packs(&lab).1;
        assert!(
            left <= twice - once + anew + 64 * 1024,
            "{damaged:?}: {left} bytes of {twice}, {once} of them twice"
        );
        let done = gc(&lab, repacking);
        assert_eq!((done.rewritten.bytes, done.condemned.objects), (0, 0), "{damaged:?}");
        all_restore(&lab, &points);
    }
}

/// Also when the backups panic.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn backups_go_on_while_collections_run() {
    let mut lab = in_memory();
    lab.make_disk(3 * MIB);
    let repository = lab.repository.clone();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            let mut condemned = 0;
            while !over.load(Ordering::Relaxed) {
                let done = collect(&repository, &Collection { repack: Some(80), ..HOW }).expect("collects");
                condemned += done.condemned.objects;
            }
            condemned
        });
        let _end = EndOnDrop(&over);
        let mut points: Vec<Taken> = Vec::new();
        for round in 0..12 {
            let changed = lab.change(10);
            let before = points.last().map(|(root, disk, _)| (*root, disk.clone()));
            let mut taken = lab.back_up(before.as_ref(), (round % 4 > 0).then_some(changed));
            // What it relied on was condemned: all is read next time. No collection is followed by the next at once in life.
            while taken.as_ref().is_err_and(BackupError::is_stale) {
                taken = lab.back_up(None, None);
            }
            let (root, disk) = taken.expect("backs up");
            points.push((root, disk, lab.content()));
            if points.len() > 3 {
                forget(&lab, &[points.remove(0).0]);
            }
        }
        over.store(true, Ordering::Relaxed);
        assert!(collector.join().expect("no panic") > 0, "there was something to collect");
        all_restore(&lab, &points);
    });
}

/// A point that comes while trees are followed shifts what is in the index.
#[test]
fn what_was_followed_stays_followed_when_the_index_grows() {
    let mut lab = in_memory();
    lab.make_disk(4 * MIB);
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    let early = lab.repository.log().expect("opens");
    let repository = lab.repository.clone();
    let mut reach = Reach::new(&repository, early.state()).expect("opens");
    let mut kept = Kept::default();
    reach.follow(early.state(), points[0].0, &mut kept).expect("follows");
    lab.make_disk(4 * MIB);
    back_up(&mut lab, &mut points, None);
    let late = lab.repository.log().expect("opens");
    reach.finish(late.state(), &mut kept).expect("tells");
    let required = |at: usize| late.state().roots()[&points[at].0].required.clone();
    assert!(required(0).difference(&kept.packs()).is_empty(), "{kept:?}");
    // The first one reaches nothing of the second but what both hold.
    assert!(!required(1).difference(&kept.packs()).is_empty(), "{kept:?}");
}

#[test]
fn segments_do_not_pile_up() {
    let mut lab = in_memory();
    let mut points = Vec::new();
    for _ in 0..20 {
        lab.make_disk(CHUNK);
        lab.fill(0, CHUNK);
        back_up(&mut lab, &mut points, None);
    }
    let (before, _) = there(lab.repository.objects(), "segments/");
    assert_eq!(before, 20);
    let done = gc(&lab, HOW);
    assert_eq!((done.segments, there(lab.repository.objects(), "segments/").0), (20, 1));
    all_restore(&lab, &points);
    // Those that are few are left alone, until nothing is left that they tell of.
    assert_eq!(gc(&lab, HOW).segments, 0);
    // Small packs are put together once they make a full one; waste is none.
    let last = points.pop().expect("there is one");
    forget(&lab, &points.iter().map(|(root, ..)| *root).collect::<Vec<_>>());
    let done = gc(&lab, HOW);
    assert_eq!(done.segments, 1, "most of its packs are gone: it is told anew, shorter");
    all_restore(&lab, &[last]);
}

#[test]
fn what_a_writer_that_died_put_is_removed_when_it_was_idle_for_long() {
    let mut lab = in_memory();
    lab.make_disk(2 * MIB);
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    let before = packs(&lab);
    let writer = BackupWriter::open(lab.repository.clone()).expect("opens");
    let mut blobs = writer.blobs();
    blobs.chunk(&vec![7; CHUNK as usize]).expect("puts");
    blobs.finish().expect("puts");
    drop(writer);
    assert!(packs(&lab) > before);
    let late = |idle| Collection { now: WallTime(u64::MAX), idle, ..HOW };
    assert_eq!((gc(&lab, late(Duration::MAX)).fenced, packs(&lab) > before), (0, true));
    let slow = BackupWriter::open(lab.repository.clone()).expect("opens");
    assert_eq!((gc(&lab, late(Duration::from_secs(1))).fenced, packs(&lab)), (2, before));
    // It lives after all, and is told to begin again.
    let ended = slow.commit(lab.repository.chain("shop"), None, &lab.point(Vec::new()), None);
    assert_eq!(ended.expect_err("it was ended").kind, ErrorKind::Stale);
    all_restore(&lab, &points);
}

/// What a point holds beside its disks.
#[test]
fn firmware_variables_stay() {
    let lab = in_memory();
    let writer = BackupWriter::open(lab.repository.clone()).expect("opens");
    let nvram: Vec<u8> = (0..200_000u32).map(|at| (at % 251) as u8).collect();
    let kept = writer.keep(&nvram).expect("keeps");
    let point = Point { nvram: Some(kept.clone()), ..lab.point(Vec::new()) };
    writer.commit(lab.repository.chain("shop"), None, &point, None).expect("commits");
    let before = packs(&lab);
    gc(&lab, HOW);
    assert_eq!(packs(&lab), before);
    gc(&lab, Collection { repack: Some(100), ..HOW });
    let log = lab.repository.log().expect("opens");
    let state = log.state();
    let index = lab.repository.index(state).expect("opens");
    let reader = BlobReader::new(&lab.repository, state, index);
    let mut read = vec![Vec::new(); kept.0.len()];
    let mut decompressor = Decompressor::new();
    let each = |place: usize, plain: &[u8]| {
        read[place] = plain.to_vec();
        Ok(())
    };
    reader.read_many(&kept.0, &mut decompressor, each).expect("reads");
    assert!(read.concat() == nvram);
    let live = state.objects().filter(|object| object.status == Status::Live);
    assert!(live.filter(|object| matches!(object.content, Content::Pack(_))).count() > 0);
}

/// Packs are written anew, and the old ones removed, while somebody reads a point here and there.
#[test]
fn a_point_that_is_served_is_read_on_while_its_packs_are_written_anew() {
    let mut lab = in_memory();
    lab.make_disk(8 * MIB);
    lab.fill(0, 8 * MIB);
    let mut points: Vec<Taken> = Vec::new();
    back_up(&mut lab, &mut points, None);
    let changed = lab.change(60);
    back_up(&mut lab, &mut points, Some(changed));
    let cache = ChunkCache::new(lab.repository.clone(), 1 << 20).expect("opens");
    let (_, disk, content) = &points[1];
    let chunk_size = lab.repository.chunk_size();
    let whole = DiskContent::of(disk, chunk_size);
    let reader = DiskReader::new(&cache, &disk.name, whole);
    let mut bytes = vec![0; content.len()];
    reader.read_into(0, &mut bytes[..4096]).expect("reads");
    forget(&lab, &[points[0].0]);
    let done = gc(&lab, Collection { repack: Some(100), ..HOW });
    assert!(done.unreadable.is_empty(), "{done:?}");
    reader.read_into(0, &mut bytes).expect("it is found where it is now");
    assert!(bytes == *content);
}

/// Object lock: nothing of a point goes before its time, whoever wants it to; what is shared is kept for the newest point.
#[test]
fn what_is_kept_against_everybody_is_removed_when_that_is_over() {
    const DAY: u64 = 24 * 3_600_000;
    let place = Arc::new(Memory::default());
    let now = || WallTime(std::time::UNIX_EPOCH.elapsed().expect("later than 1970").as_millis() as u64);
    place.set_time(now());
    let kept = Some(Duration::from_millis(8 * DAY));
    let mut lab = Lab::keeping(tempfile::tempdir().expect("a folder"), place.clone(), kept);
    lab.make_disk(4 * MIB);
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    let changed = lab.change(3);
    back_up(&mut lab, &mut points, Some(changed));
    let log = lab.repository.log().expect("opens");
    let promised = log.state().roots()[&points[1].0].retain_until.expect("it is kept");
    let soon = WallTime(now().0 + 8 * DAY);
    assert!(promised >= soon && promised.0 <= soon.0 + DAY, "{promised:?}");
    // At the promise's last moment nothing that there is can be removed.
    place.set_time(WallTime(promised.0 - 1));
    let listed = place.list("", None).expect("lists");
    assert!(listed.len() > 8, "{listed:?}");
    for object in &listed {
        // The sessions of who read, later, are of no need to the points.
        if object.name.as_str().starts_with("probe/") {
            continue;
        }
        place.remove(&object.name).expect_err("it is kept");
    }
    forget(&lab, &[points[0].0, points[1].0]);
    let before = packs(&lab);
    let early = gc(&lab, Collection { now: WallTime(promised.0 - 1), ..HOW });
    assert_eq!((packs(&lab), early.removed.bytes), (before, 0));
    assert_eq!((early.condemned.retained.len(), early.retained_bytes), (before.0 as u64, before.1));
    let later = WallTime(promised.0 + DAY);
    place.set_time(later);
    gc(&lab, Collection { now: later, ..HOW });
    assert_eq!(packs(&lab), (0, 0));
}

/// Brings back all that can be, and tells what is left of each.
fn undelete(lab: &Lab) -> Vec<(u64, Remains)> {
    let log = lab.repository.log().expect("opens");
    let found = lab.repository.forgotten(&log).expect("reads");
    assert!(found.unreadable.is_empty(), "{found:?}");
    let good: Vec<_> = found.points.iter().filter(|point| point.remains.is_good()).collect();
    let mut done = Vec::new();
    lab.repository.undelete(&good, NOW, |point| done.push(point.root)).expect("brings back");
    assert!(done.iter().eq(good.iter().map(|point| &point.root)));
    found.points.iter().map(|point| (point.root, point.remains.clone())).collect()
}

/// A thief with the key, whose clock is days ahead, has all but the newest point forgotten and what only they had condemned; the
/// place keeps it all the same.
#[test]
fn what_a_thief_forgot_and_condemned_is_brought_back() {
    const DAY: u64 = 24 * 3_600_000;
    let place = Arc::new(Memory::default());
    let now = WallTime(std::time::UNIX_EPOCH.elapsed().expect("later than 1970").as_millis() as u64);
    place.set_time(now);
    let kept = Some(Duration::from_millis(8 * DAY));
    let mut lab = Lab::keeping(tempfile::tempdir().expect("a folder"), place.clone(), kept);
    lab.make_disk(4 * MIB);
    let mut points = Vec::new();
    for round in 0..4 {
        let changed = (round > 0).then(|| lab.change(30));
        back_up(&mut lab, &mut points, changed);
    }
    let roots: Vec<u64> = points.iter().map(|(root, ..)| *root).collect();
    let before = packs(&lab);
    // With a clock that is right nothing is condemned that is kept.
    forget(&lab, &roots[..3]);
    gc(&lab, Collection { now, checkpoint_after: 0, ..HOW });
    let whole = |at: usize| (roots[at], Remains::Whole);
    assert_eq!(undelete(&lab), [whole(0), whole(1), whole(2)]);
    all_restore(&lab, &points);
    assert_eq!(packs(&lab), before, "nothing was stored for that");

    forget(&lab, &roots[..3]);
    let ahead = WallTime(now.0 + 20 * DAY);
    let done = gc(&lab, Collection { now: ahead, repack: Some(100), checkpoint_after: 0, ..HOW });
    assert!(done.condemned.objects > 0 && done.removed.retained > 0 && done.truncated == 0, "{done:?}");
    all_restore(&lab, &points[3..]);
    let remains = undelete(&lab);
    let is_condemned = |(_, remains): &(u64, Remains)| matches!(remains, Remains::Condemned { .. });
    assert!(remains.len() == 3 && remains.iter().all(is_condemned), "{remains:?}");
    let collected = [Collection { now, ..HOW }, Collection { now, follow: false, ..HOW }];
    for how in collected.into_iter().chain([Collection { now: ahead, repack: Some(100), ..HOW }]) {
        all_restore(&lab, &points);
        gc(&lab, how);
    }
    all_restore(&lab, &points);
    // The next backup builds on them as before, from an index that is made anew.
    std::fs::remove_dir_all(lab.folder.path().join("cache")).expect("removes");
    let changed = lab.change(5);
    back_up(&mut lab, &mut points, Some(changed));
    all_restore(&lab, &points);
    // They are kept for as long again as any point that is made now.
    let log = lab.repository.log().expect("opens");
    assert!(
        points
            .iter()
            .all(|(root, ..)| log.state().roots()[root].retain_until >= Some(WallTime(now.0 + 8 * DAY)))
    );
    place.set_time(WallTime(now.0 + 8 * DAY));
    for object in place.list("packs/", None).expect("lists") {
        let live =
            Content::of_name(&object.name).and_then(|(session, pack)| log.state().status(session, pack));
        if live == Some(Status::Live) {
            place.remove(&object.name).expect_err("it is kept");
        }
    }
    place.set_time(ahead);
    forget(&lab, &points.iter().map(|(root, ..)| *root).collect::<Vec<_>>());
    gc(&lab, Collection { now: ahead, ..HOW });
    assert_eq!(packs(&lab), (0, 0));
}

/// A repository that keeps everything for a second and a half, and a disk.
fn lab_that_keeps() -> (Arc<Memory>, Lab) {
    let place = Arc::new(Memory::default());
    let kept = Some(Duration::from_millis(1500));
    let mut lab = Lab::keeping(tempfile::tempdir().expect("a folder"), place.clone(), kept);
    lab.make_disk(4 * MIB);
    (place, lab)
}

/// A pack that an old point brought is kept for as long as the new point that shares it.
#[test]
fn what_is_shared_is_kept_for_the_newest() {
    let (place, mut lab) = lab_that_keeps();
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    std::thread::sleep(Duration::from_millis(1100));
    back_up(&mut lab, &mut points, None);
    let log = lab.repository.log().expect("opens");
    let until = |at: usize| log.state().roots()[&points[at].0].retain_until.expect("it is kept");
    assert!(until(1) > until(0));
    // The second brought nothing of its own: all that there is, but for what came before it and is of no need, is kept.
    all_of_need_is_kept(&place, until(1));
}

/// Until the moment before.
fn all_of_need_is_kept(place: &Memory, until: WallTime) {
    place.set_time(WallTime(until.0 - 1));
    for object in pages(place, "").flat_map(|page| page.expect("lists")) {
        let name = object.name.as_str();
        if ["packs/", "segments/", "keys/", "repository", "log/"].iter().any(|p| name.starts_with(p)) {
            place.remove(&object.name).expect_err("it is kept");
        }
    }
}

/// As a point that is made then.
#[test]
fn what_is_brought_back_is_kept_from_then_on() {
    let (place, mut lab) = lab_that_keeps();
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    let root = points[0].0;
    let until = || {
        let log = lab.repository.log().expect("opens");
        log.state().roots()[&root].retain_until.expect("it is kept")
    };
    let before = until();
    forget(&lab, &[root]);
    // More than ends of periods are rounded by.
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(undelete(&lab), [(root, Remains::Whole)]);
    assert!(until() > before);
    all_of_need_is_kept(&place, until());
}

/// Who is interrupted has not worked in vain.
#[test]
fn what_was_stored_by_a_writer_that_died_is_not_stored_again() {
    let lab = in_memory();
    let chunks: Vec<Vec<u8>> = (0..200u8).map(|number| noise_of(number, CHUNK as usize)).collect();
    let store = |writer: &BackupWriter| {
        let mut blobs = writer.blobs();
        for chunk in &chunks {
            blobs.chunk(chunk).expect("puts");
        }
        blobs.finish().expect("puts");
        writer.new_bytes()
    };
    let mut dies = BackupWriter::open(lab.repository.clone()).expect("opens");
    dies.make_live_every(Duration::ZERO);
    assert_eq!(store(&dies), 200 * CHUNK);
    drop(dies);
    let next = BackupWriter::open(lab.repository.clone()).expect("opens");
    // The last packs were not acknowledged yet when the one before was made live.
    assert!(store(&next) <= 150 * CHUNK, "{} chunks were stored again", next.new_bytes() / CHUNK);
}

/// In a large repository the index gives up its filter while it is made anew, with what this backup stored.
#[test]
fn what_a_backup_stored_itself_and_does_not_remember_it_finds_in_the_index() {
    let lab = in_memory();
    let chunks: Vec<Vec<u8>> = (0..200u8).map(|number| noise_of(number, CHUNK as usize)).collect();
    let mut writer = BackupWriter::open(lab.repository.clone()).expect("opens");
    writer.remember(20);
    let store = |first: usize| {
        let mut blobs = writer.blobs();
        let ids: Vec<_> =
            (0..200).map(|place| blobs.chunk(&chunks[(first + place) % 200]).expect("puts")).collect();
        blobs.finish().expect("puts");
        ids
    };
    let ids = store(0);
    assert_eq!(writer.new_bytes(), 200 * CHUNK);
    assert!(
        ids.iter().filter(|id| writer.take_over(id).expect("reads")).count() > 100,
        "most are in the index"
    );
    std::thread::scope(|scope| (0..3).for_each(|part| drop(scope.spawn(move || store(part * 70)))));
    // The new filter may take a chunk that is in no pack yet for one that it has.
    assert!(
        writer.new_bytes() <= 205 * CHUNK,
        "{} chunks were stored twice",
        writer.new_bytes() / CHUNK - 200
    );
}

fn noise_of(seed: u8, len: usize) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(u64::from(seed));
    let mut bytes = vec![0; len];
    random.fill_bytes(&mut bytes);
    bytes
}

#[test]
fn who_reads_goes_on_where_a_collection_put_what_is_read() {
    let mut lab = in_memory();
    lab.make_disk(MIB);
    lab.fill(0, MIB);
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    lab.fill(0, MIB / 2);
    back_up(&mut lab, &mut points, None);
    let log = lab.repository.log().expect("opens");
    let open = || lab.repository.index(log.state()).expect("opens");
    let following = BlobReader::following(&lab.repository, log.state()).expect("opens");
    let fixed = BlobReader::new(&lab.repository, log.state(), open());
    forget(&lab, &[points.remove(0).0]);
    let done = gc(&lab, Collection { repack: Some(100), ..HOW });
    assert!(done.rewritten.packs > 0, "{done:?}");
    let content = DiskContent::of(&points[0].1, lab.repository.chunk_size());
    let damaged = |reader| {
        let checked = check_disk(reader, content, 2, &Progress::default()).expect("reads");
        checked.damaged.len()
    };
    assert_ne!(damaged(&fixed), 0, "what it reads was moved");
    assert_eq!(damaged(&following), 0);
}

/// Without object lock, too, as long as nothing was removed; and not in part.
#[test]
fn a_mistake_is_undone_until_a_collection_removed_something() {
    let mut lab = Lab::new();
    lab.make_disk(4 * MIB);
    let mut points = Vec::new();
    back_up(&mut lab, &mut points, None);
    let changed = lab.change(30);
    back_up(&mut lab, &mut points, Some(changed));
    // One that holds nothing of its own.
    back_up(&mut lab, &mut points, None);
    let roots: Vec<u64> = points.iter().map(|(root, ..)| *root).collect();
    forget(&lab, &roots[..2]);
    assert_eq!(undelete(&lab), [(roots[0], Remains::Whole), (roots[1], Remains::Whole)]);
    all_restore(&lab, &points);
    gc(&lab, HOW);
    all_restore(&lab, &points);

    forget(&lab, &roots[..2]);
    gc(&lab, Collection { checkpoint_after: 1000, ..HOW });
    let remains = undelete(&lab);
    assert!(
        matches!(remains[0], (root, Remains::Removed { packs: 1.., of: 2.. }) if root == roots[0]),
        "{remains:?}"
    );
    for ((root, remains), (_, _, content)) in remains.iter().zip(&points) {
        match remains.is_good() {
            true => assert!(lab.restore(*root).expect("restores") == *content, "point {root}"),
            false => drop(lab.restore(*root).expect_err("it was removed")),
        }
    }
    all_restore(&lab, &points[2..]);
    // What somebody took away behind the repository's back is missed before anything is promised.
    let there: Vec<u64> = lab.repository.log().expect("opens").state().roots().keys().copied().collect();
    forget(&lab, &there);
    for pack in lab.repository.objects().list("packs/", None).expect("lists") {
        lab.repository.objects().remove(&pack.name).expect("removes");
    }
    let log = lab.repository.log().expect("opens");
    let found = lab.repository.forgotten(&log).expect("reads").points;
    let last = found.last().expect("it was forgotten");
    let error = lab
        .repository
        .undelete(&[last], NOW, |_| panic!("a pack is missing"))
        .expect_err("a pack is missing");
    assert_eq!(error.kind, ErrorKind::Missing, "{error}");
    assert!(lab.repository.log().expect("opens").state().roots().is_empty());
}
