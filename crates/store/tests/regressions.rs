//! Defects that simulated worlds found, each by its name.

mod common;

use common::{Change, Dying, World, open};
use rempart_store::{
    FileId, Health, OpenOptions, Output, Recovered, Slice, SnapshotId, SnapshotLoss, Store, StoreEvent,
    SuperblockChange, SyncingPhase, Token,
};
use rempart_types::{DiskIndex, ExtentIndex, Lineage, LogPosition, Lsn, Term};

const IMAGE: FileId = FileId::Image(DiskIndex(0));

fn write(fill: u8) -> Vec<Change> {
    vec![Change::Write { disk: 0, offset: 0, data: vec![fill; 4096] }]
}

/// Runs what there is to do until the store fails, as it must.
fn until_failed(world: &mut World) {
    for _ in 0..100 {
        for command in world.out.commands.drain(..) {
            world.disk.submit(command);
        }
        if world.store.failure().is_some() {
            return;
        }
        if !world.disk.queued().is_empty() {
            let completion = world.disk.run(0);
            world.store.complete(completion, &mut world.out);
        }
    }
    panic!("it goes on in spite of the failed sync");
}

/// The process ends, the page cache lives on; nothing that was under way happens.
fn restart(world: &mut World) -> Recovered {
    world.disk.crash_process(&mut || 0);
    reopened(world)
}

/// Power is lost, and with it every page that no sync took to the medium.
fn lose_power(world: &mut World) -> Recovered {
    world.disk.lose_power(&mut || 0);
    reopened(world)
}

fn reopened(world: &mut World) -> Recovered {
    world.out = Output::default();
    let (store, recovered) = open(&mut world.disk).expect("opens");
    world.store = store;
    recovered
}

/// A failed sync leaves pages in the cache that look as if they were on the medium, and never will be.
#[test]
fn recovery_writes_the_journals_end_again_where_a_sync_failed() {
    let mut world = World::new(1);
    world.append(write(1));
    world.store.sync(&mut world.out);
    world.drain();
    world.append(write(2));
    world.disk.fail_next_sync(FileId::Segment(1));
    world.store.sync(&mut world.out);
    until_failed(&mut world);
    assert_eq!(restart(&mut world).log_end.lsn, Lsn(2), "the process was killed, the cache has it");
    // Recovery called it durable: others may have built upon that.
    assert_eq!(lose_power(&mut world).log_end.lsn, Lsn(2));
}

/// It acts on what the superblock says, long before it writes a newer one.
#[test]
fn recovery_writes_the_superblock_again_where_a_sync_failed() {
    let mut world = World::new(2);
    for fill in 1..=5 {
        world.append(write(fill));
    }
    world.store.sync(&mut world.out);
    world.drain();
    world.store.persist(Token(1), SuperblockChange::default(), &mut world.out);
    world.drain();
    // The intent to cut the log reaches the cache and no more.
    world.disk.fail_next_sync(FileId::Superblock);
    world.store.truncate_after(Lsn(3), &mut world.out).expect("none of it is stable");
    until_failed(&mut world);
    world.disk.crash_process(&mut || 0);
    for left in 0.. {
        let mut disk = world.disk.clone();
        let options = OpenOptions { limits: common::limits(), roll_back: false };
        let done = Store::open(&mut Dying { disk: &mut disk, left }, &options).is_ok();
        disk.lose_power(&mut || 0);
        let (_, recovered) = open(&mut disk).expect("opens");
        assert_eq!(
            recovered.health,
            Health::Good,
            "recovery ended after {left} commands, then power was lost"
        );
        if done {
            assert_eq!(recovered.log_end.lsn, Lsn(3), "what was found is acted upon");
            break;
        }
    }
}

#[test]
fn recovery_writes_the_snapshot_map_again_where_a_sync_failed() {
    fn put_extent(world: &mut World) {
        let data = Some(Slice::copy_of(&[2; 65536]));
        let (disk, extent) = (DiskIndex(0), ExtentIndex(0));
        world.store.write_extent(Token(1), disk, extent, Lsn(7), data, &mut world.out).expect("takes it");
    }
    let mut world = World::new(3);
    world.append(write(1));
    world.make_all_stable();
    world.store.begin_resync(SnapshotId(9), &mut world.out).expect("begins");
    world.run_untwinned();
    world.disk.fail_next_sync(FileId::SnapshotMap);
    put_extent(&mut world);
    until_failed(&mut world);
    restart(&mut world);
    // The extent was saved, says the map: it is overwritten now.
    world.store.begin_resync(SnapshotId(9), &mut world.out).expect("begins again");
    world.run_untwinned();
    put_extent(&mut world);
    world.run_untwinned();
    world.store.checkpoint(&mut world.out);
    world.run_untwinned();
    lose_power(&mut world);
    assert_eq!(world.disk.content(IMAGE).expect("exists")[0], 2, "the image is durable");
    let options = OpenOptions { limits: common::limits(), roll_back: true };
    let (_, recovered) = Store::open(&mut world.disk, &options).expect("rolls back");
    assert_eq!((recovered.health, recovered.log_end.lsn), (Health::Good, Lsn(1)));
    let image = world.disk.content(IMAGE).expect("exists");
    assert_eq!((image[0], image[4095], image[4096]), (1, 1, 0), "as it was before");
}

/// Who wrote to a stopped copy's image, and where, nobody knows: no extent of it is untouched.
#[test]
fn an_image_changed_while_stopped_counts_as_changed_everywhere() {
    let mut world = World::new(4);
    world.append(write(1));
    world.make_all_stable();
    world.store.close(&mut world.out);
    world.drain();
    world.disk.overwrite(IMAGE, 2 * 65536, &[9; 512]);
    let recovered = reopened(&mut world);
    assert_eq!(recovered.images_changed, [DiskIndex(0)]);
    assert!(!world.store.is_untouched(DiskIndex(0), ExtentIndex(2)), "a guest would read zeroes there");
    let (changed, next) = world.store.changed_since(DiskIndex(0), Lsn(0), ExtentIndex(0), 100);
    assert_eq!((changed.len(), next), (5, None), "{changed:?}");
}

/// The next leader orders a resync while the undo snapshot of the last one is still being put away.
#[test]
fn a_resync_may_begin_while_the_last_one_ends() {
    let mut world = World::new(5);
    world.append(write(1));
    world.make_all_stable();
    world.store.begin_resync(SnapshotId(9), &mut world.out).expect("begins");
    world.run_untwinned();
    let (disk, extent) = (DiskIndex(0), ExtentIndex(0));
    let data = Some(Slice::copy_of(&[5; 65536]));
    world.store.write_extent(Token(1), disk, extent, Lsn(7), data, &mut world.out).expect("takes extents");
    world.run_untwinned();
    let mut lineage = Lineage::new();
    lineage.append(Term::new(3, 0), Lsn(1));
    let from = LogPosition { term: Term::new(3, 0), lsn: Lsn(7) };
    world.store.start_resync_log(from, None, &lineage, &mut world.out).expect("starts the log");
    world.run_untwinned();
    world.store.end_resync(&mut world.out).expect("ends");
    world.store.begin_resync(SnapshotId(9), &mut world.out).expect("begins again");
    let events = world.run_untwinned();
    let place = |wanted: fn(&StoreEvent) -> bool| events.iter().position(wanted);
    let ended = place(|event| matches!(event, StoreEvent::ResyncEnded));
    let begun = place(|event| matches!(event, StoreEvent::ResyncBegun { .. }));
    assert!(ended.is_some() && ended < begun, "{events:?}");
    assert!(matches!(world.store.health(), Health::Syncing(SyncingPhase::Extents)));
}

/// A snapshot for a comparison waits for records that this log will never have.
#[test]
fn a_resync_lets_go_of_snapshots_that_wait_for_records() {
    let mut world = World::new(6);
    world.append(write(1));
    world.make_all_stable();
    world.store.open_snapshot(SnapshotId(3), Some(Lsn(40)), &mut world.out).expect("waits");
    world.store.begin_resync(SnapshotId(9), &mut world.out).expect("begins");
    let events = world.run_untwinned();
    let closed = |event: &StoreEvent| matches!(event, StoreEvent::SnapshotClosed(SnapshotId(3)));
    assert!(events.iter().any(closed), "{events:?}");
    assert!(events.iter().any(|event| matches!(event, StoreEvent::ResyncBegun { .. })));
}

/// A pair of records over one extent, a snapshot between them, and a disk without room for what it needs.
fn full_disk() -> World {
    let mut world = World::new(7);
    world.append(write(1));
    world.make_all_stable();
    world.store.open_snapshot(SnapshotId(3), None, &mut world.out).expect("opens");
    world.run_untwinned();
    world.append(write(2));
    world.store.sync(&mut world.out);
    world.run_untwinned();
    let length = |file| world.disk.content(file).map_or(0, |content| content.len() as u64);
    let used = world.disk.files().collect::<Vec<_>>().into_iter().map(length).sum();
    world.disk.set_capacity(Some(used));
    world
}

#[test]
fn a_full_disk_drops_the_snapshot_not_the_replica() {
    let mut world = full_disk();
    world.store.stable_is(Lsn(2), &mut world.out);
    let events = world.run_untwinned();
    let lost = |event: &StoreEvent| {
        matches!(event, StoreEvent::SnapshotLost { snapshot: SnapshotId(3), why: SnapshotLoss::DiskFull })
    };
    assert!(events.iter().any(lost), "{events:?}");
    assert!(world.store.failure().is_none());
    assert_eq!(world.store.applied(), Lsn(2));
    assert_eq!(world.disk.content(IMAGE).expect("exists")[0], 2);
    assert!(world.store.snapshots().is_empty());
    world.store.read_snapshot(Token(7), SnapshotId(3), DiskIndex(0), ExtentIndex(0), &mut world.out);
    let events = world.run_untwinned();
    assert!(matches!(events[..], [StoreEvent::SnapshotRead { result: Err(_), .. }]), "{events:?}");
    // Another one may be opened.
    world.disk.set_capacity(None);
    world.store.open_snapshot(SnapshotId(4), None, &mut world.out).expect("opens");
    world.run_untwinned();
    assert_eq!(world.store.snapshots().len(), 1);
}

fn apply_write(world: &mut World, offset: u64, data: Vec<u8>) -> Vec<StoreEvent> {
    world.append(vec![Change::Write { disk: 0, offset, data }]);
    world.store.sync(&mut world.out);
    let mut events = world.run_untwinned();
    world.store.stable_is(world.store.log_end().lsn, &mut world.out);
    events.extend(world.run_untwinned());
    events
}

/// What was saved for a snapshot that is closed serves the older one that is not: the image has changed since.
#[test]
fn pages_saved_for_a_newer_snapshot_are_not_saved_again_for_an_older_one() {
    let mut world = World::new(7);
    apply_write(&mut world, 0, vec![1; 4096]);
    for id in [3, 4] {
        world.store.open_snapshot(SnapshotId(id), None, &mut world.out).expect("opens");
        world.run_untwinned();
        apply_write(&mut world, 8192, vec![id as u8; 4096]);
    }
    apply_write(&mut world, 0, vec![2; 4096]);
    world.store.close_snapshot(SnapshotId(4), &mut world.out).expect("closes");
    world.run_untwinned();
    apply_write(&mut world, 0, vec![3; 4096]);
    world.store.read_snapshot(Token(7), SnapshotId(3), DiskIndex(0), ExtentIndex(0), &mut world.out);
    let events = world.run_untwinned();
    let [StoreEvent::SnapshotRead { result: Ok(read), .. }] = &events[..] else { panic!("{events:?}") };
    let data = read.data.as_ref().expect("it holds something");
    assert!(data[..4096].iter().all(|byte| *byte == 1) && data[4096..].iter().all(|byte| *byte == 0));
}

/// A guest that writes here and there does not wait for sixteen times as much to be put aside.
#[test]
fn a_view_keeps_the_pages_that_are_overwritten_and_no_more() {
    let mut world = World::new(7);
    for extent in 0..4 {
        (0..4).for_each(|part| drop(apply_write(&mut world, extent * 65536 + part * 16384, vec![1; 16384])));
    }
    world.store.open_snapshot(SnapshotId(3), None, &mut world.out).expect("opens");
    world.run_untwinned();
    // Twice the same page, half a page, two pages at once, a page on either side of an extent's end.
    for (offset, len) in
        [(8192, 4096), (8192, 4096), (65536 + 512, 1024), (131072, 8192), (196608 - 4096, 8192)]
    {
        apply_write(&mut world, offset, vec![2; len]);
    }
    assert_eq!(world.store.snapshot_bytes(), 65536, "six pages share the room of one extent");
    for extent in 0..4 {
        world.store.read_snapshot(Token(7), SnapshotId(3), DiskIndex(0), ExtentIndex(extent), &mut world.out);
        let events = world.run_untwinned();
        let [StoreEvent::SnapshotRead { result: Ok(read), .. }] = &events[..] else { panic!("{events:?}") };
        assert!(read.data.as_ref().is_some_and(|data| data.iter().all(|byte| *byte == 1)), "extent {extent}");
    }
    world.store.close_snapshot(SnapshotId(3), &mut world.out).expect("closes");
    world.run_untwinned();
    assert_eq!(world.store.snapshot_bytes(), 0);
}

/// What may be kept aside is bounded, and the last extent that fits is still kept.
#[test]
fn snapshots_over_their_limit_are_dropped_not_the_replica() {
    let mut world = World::new(7);
    // A page in each sixteenth of an extent fills the room of one.
    let put = |world: &mut World, extent: u64, fill| {
        let pages = (0..16).map(|page| extent * 65536 + page * 4096);
        pages.flat_map(|offset| apply_write(world, offset, vec![fill; 4096])).collect::<Vec<_>>()
    };
    for extent in 0..3 {
        put(&mut world, extent, 1);
    }
    world.store.limit_snapshots(2 * 65536);
    world.store.open_snapshot(SnapshotId(3), None, &mut world.out).expect("opens");
    world.run_untwinned();
    // The third goes into what is kept already: nothing new to keep.
    for (extent, fill) in [(0, 2), (1, 2), (0, 3)] {
        put(&mut world, extent, fill);
        assert_eq!(world.store.snapshots().len(), 1);
    }
    assert_eq!(world.store.snapshot_bytes(), 2 * 65536);
    let events = put(&mut world, 2, 2);
    let lost = |event: &StoreEvent| {
        matches!(event, StoreEvent::SnapshotLost { snapshot: SnapshotId(3), why: SnapshotLoss::OverLimit })
    };
    assert!(events.iter().any(lost), "{events:?}");
    assert_eq!((world.store.snapshots().len(), world.store.snapshot_bytes()), (0, 0));
    assert_eq!(world.store.applied(), world.store.log_end().lsn);
    assert!(world.store.failure().is_none());
}

/// Whenever it is asked meanwhile: a snapshot answers with what it was, or not at all.
#[test]
fn a_snapshot_is_dropped_before_anything_is_overwritten() {
    let (mut kept, mut dropped) = (0, 0);
    for steps in 0.. {
        let mut world = full_disk();
        world.store.stable_is(Lsn(2), &mut world.out);
        let mut left = steps;
        while left > 0 {
            for command in world.out.commands.drain(..) {
                world.disk.submit(command);
            }
            if world.disk.queued().is_empty() {
                break;
            }
            let completion = world.disk.run(0);
            world.store.complete(completion, &mut world.out);
            left -= 1;
        }
        world.store.read_snapshot(Token(7), SnapshotId(3), DiskIndex(0), ExtentIndex(0), &mut world.out);
        let events = world.run_untwinned();
        let read = events.iter().find_map(|event| match event {
            StoreEvent::SnapshotRead { result, .. } => Some(result.clone()),
            _ => None,
        });
        match read.expect("answered") {
            Ok(extent) => {
                kept += 1;
                assert_eq!(extent.data.expect("no zeroes")[0], 1, "after {steps} steps");
            }
            Err(_) => dropped += 1,
        }
        if left > 0 {
            break;
        }
    }
    assert!(kept > 0 && dropped > 1, "kept {kept} times, dropped {dropped} times");
}
