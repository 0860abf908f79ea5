//! Collections on objects in memory, one story a test.

use super::*;
use crate::log::tests::{NOW, commit, commit_of, memory, numbers, open, packs, put, session};
use crate::log::{Commit, Content, Numbers, Segment, Session, Status, name};
use crate::{PackId, PackName, SessionId};
use rempart_objects::{Name, Objects};
use rempart_types::WallTime;
use std::sync::Arc;
use std::time::Duration;

/// Puts packs as `session` would, and returns the segment that names them.
fn put_packs(objects: &Arc<dyn Objects>, session: u8, ids: &[u8]) -> Segment {
    for id in ids {
        objects.create(&pack(session, *id), &[b"pack"], None).unwrap();
    }
    packs(ids)
}

fn pack(session: u8, id: u8) -> Name {
    PackName { session: SessionId([session; 16]), pack: PackId([id; 32]) }.object()
}

fn is_there(objects: &Arc<dyn Objects>, name: &Name) -> bool {
    objects.len(name).is_ok()
}

fn collector(session: &mut Session) -> Collector<'_> {
    Collector::new(session, NOW, false).expect("nothing is doubtful")
}

/// A session that made packs 10, 11 and 12 live, of which a backup requires 10, put 13 and ended.
fn backed_up() -> (Arc<dyn Objects>, u64) {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, put_packs(&objects, 1, &[10, 11, 12])).unwrap();
    put_packs(&objects, 1, &[13]);
    let until = Some(WallTime(NOW.0 + 5000));
    let kept = Commit { retain_until: until, ..commit_of(numbers([0])) };
    let root = commit(&mut writer, &kept).unwrap().number;
    commit(&mut writer, &commit_of(numbers([0, 1]))).unwrap();
    writer.end(NOW).unwrap();
    (objects, root)
}

#[test]
fn what_no_backup_requires_is_removed_and_the_rest_stays() {
    let (objects, _) = backed_up();
    let mut session = session(&objects, 2);
    assert_eq!(
        collector(&mut session).condemn(None).unwrap(),
        Condemned { objects: 1, retained: numbers([]) }
    );
    assert_eq!(collector(&mut session).delete().unwrap().objects, 1);
    assert_eq!(collector(&mut session).sweep().unwrap().objects, 1, "the one that was never live");
    for (id, stays) in [(10, true), (11, true), (12, false), (13, false)] {
        assert_eq!(is_there(&objects, &pack(1, id)), stays, "pack {id}");
    }
    assert_eq!(open(&objects).state().condemned(), Numbers::new());
    assert_eq!(open(&objects).state().live(), numbers([0, 1]));
    assert_eq!(collector(&mut session).condemn(None).unwrap(), Condemned::default(), "nothing is left to do");
}

/// Rule 7: resume is to read the log.
#[test]
fn what_a_collector_that_died_condemned_is_removed_by_the_next() {
    let (objects, _) = backed_up();
    let mut dying = session(&objects, 2);
    collector(&mut dying).condemn(None).unwrap();
    drop(dying);
    let mut next = session(&objects, 3);
    assert!(is_there(&objects, &pack(1, 12)));
    assert_eq!(collector(&mut next).delete().unwrap().objects, 1);
    assert!(!is_there(&objects, &pack(1, 12)));
}

#[test]
fn packs_of_a_writer_that_is_here_are_left_alone() {
    let objects = memory();
    let mut writer = session(&objects, 1);
    writer.segment(NOW, put_packs(&objects, 1, &[10])).unwrap();
    put_packs(&objects, 1, &[11]);
    let mut other = session(&objects, 2);
    assert_eq!(collector(&mut other).condemn(None).unwrap().objects, 0);
    assert_eq!(collector(&mut other).sweep().unwrap().objects, 0);
    assert_eq!(collector(&mut other).fence_idle(Duration::from_millis(1)).unwrap(), 0, "it just wrote");
    let late = WallTime(NOW.0 + 1000);
    let mut collector = Collector::new(&mut other, late, false).unwrap();
    assert_eq!(collector.fence_idle(Duration::from_millis(999)).unwrap(), 1);
    assert_eq!(collector.condemn(None).unwrap().objects, 1);
    assert_eq!(collector.delete().unwrap().objects, 1);
    assert_eq!(collector.sweep().unwrap().objects, 1);
}

/// Rule 10: what the place would not remove yet stays live, so that it is of use meanwhile.
#[test]
fn packs_under_object_lock_are_condemned_when_that_is_over() {
    let (objects, root) = backed_up();
    let mut session = session(&objects, 2);
    let roots = session.state().roots().keys().copied().collect();
    session.forget(NOW, roots).unwrap();
    let condemned = collector(&mut session).condemn(None).unwrap();
    assert_eq!(condemned, Condemned { objects: 2, retained: numbers([0]) });
    let locked = Content::Pack(PackId([10; 32]));
    assert_eq!(session.state().status(SessionId([1; 16]), locked), Some(Status::Live), "of backup {root}");
    let mut later = Collector::new(&mut session, WallTime(NOW.0 + 5000), false).unwrap();
    assert_eq!(later.condemn(None).unwrap(), Condemned { objects: 1, retained: numbers([]) });
}

#[test]
fn nothing_is_removed_while_an_entry_cannot_be_read() {
    let (objects, _) = backed_up();
    let garbage = open(&objects).state().next();
    put(&objects, garbage, b"garbage");
    let mut session = session(&objects, 2);
    let refused = Collector::new(&mut session, NOW, false);
    assert!(matches!(refused, Err(CollectError::Doubtful(number)) if number == garbage), "{refused:?}");
    Collector::new(&mut session, NOW, true).expect("somebody looked");
}

/// Names that are none of ours are left alone.
#[test]
fn foreign_objects_are_not_swept() {
    let (objects, _) = backed_up();
    let foreign = Name::new("packs/readme.txt").unwrap();
    objects.create(&foreign, &[b"hello"], None).unwrap();
    let mut session = session(&objects, 2);
    collector(&mut session).sweep().unwrap();
    assert!(is_there(&objects, &foreign));
}

#[test]
fn a_log_stays_short() {
    let (objects, root) = backed_up();
    let mut session = session(&objects, 2);
    for _ in 0..5 {
        collector(&mut session).truncate(0).unwrap();
        let entries = objects.list("log/", None).unwrap();
        assert_eq!(entries.len(), 3, "two backups and the checkpoint: {entries:?}");
        assert!(is_there(&objects, &name(root)));
    }
    let long = collector(&mut session).truncate(100).unwrap();
    assert_eq!(long, 0, "no checkpoint without need");
}
