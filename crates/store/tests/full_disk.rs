//! The disk of a resync's target is full: what it overwrites cannot be kept. It waits, and loses nothing.

mod common;

use common::{Change, World, open};
use rempart_store::{
    BatchBuilder, BatchPlace, ChainValue, FileId, Health, IoErrorKind, OpenOptions, Output, Slice,
    SnapshotId, Store, StoreEvent, SyncingPhase, Token,
};
use rempart_types::{DiskIndex, ExtentIndex, Lineage, LogPosition, Lsn, MonotonicTime, Term, WallTime};
use std::time::Duration;

const IMAGE: FileId = FileId::Image(DiskIndex(0));
const EXTENT: usize = 65536;
const UNDO: SnapshotId = SnapshotId(9);

fn used(world: &World) -> u64 {
    let files: Vec<FileId> = world.disk.files().collect();
    files.into_iter().map(|file| world.disk.content(file).map_or(0, |content| content.len() as u64)).sum()
}

fn extent(index: u64, fill: u8, world: &mut World) {
    let data = Some(Slice::copy_of(&[fill; EXTENT]));
    let token = Token(u64::from(fill));
    let store = &mut world.store;
    store
        .write_extent(token, DiskIndex(0), ExtentIndex(index), Lsn(7), data, &mut world.out)
        .expect("takes extents");
}

/// A copy that holds ones is set aside, and its disk has room for `room` bytes more.
fn set_aside(room: u64) -> World {
    let mut world = World::new(8);
    for index in 0..2 {
        let data = vec![1; 4096];
        world.append(vec![Change::Write { disk: 0, offset: index * EXTENT as u64, data }]);
    }
    world.make_all_stable();
    world.store.begin_resync(UNDO, &mut world.out).expect("begins");
    world.run_untwinned();
    assert!(matches!(world.store.health(), Health::Syncing(SyncingPhase::Extents)));
    let used = used(&world);
    world.disk.set_capacity(Some(used + room));
    world
}

fn image(world: &World) -> (u8, u8) {
    let content = world.disk.content(IMAGE).expect("exists");
    (content[0], content[EXTENT])
}

/// Time passes until the next try, which is made.
fn next_try(world: &mut World, now: &mut MonotonicTime) -> (Duration, Vec<StoreEvent>) {
    let wake = world.store.next_wake().expect("it tries again");
    let pause = wake.since(*now);
    *now = wake;
    world.store.tick(wake, &mut world.out);
    (pause, world.run_untwinned())
}

fn rolled_back(mut world: World) -> (u8, u8) {
    world.disk.set_capacity(None);
    let options = OpenOptions { roll_back: true, limits: common::limits() };
    let (_, recovered) = Store::open(&mut world.disk, &options).expect("opens");
    assert!(recovered.rolled_back || recovered.health == Health::Good);
    image(&world)
}

#[test]
fn a_resync_waits_for_room_and_goes_on() {
    // Nothing fits; the data fits, and the map does not.
    for room in [0, EXTENT as u64] {
        let mut world = set_aside(room);
        let mut now = MonotonicTime(0);
        world.store.now_is(now);
        extent(0, 5, &mut world);
        extent(1, 6, &mut world);
        let events = world.run_untwinned();
        let told = |event: &StoreEvent| matches!(event, StoreEvent::NoRoom(error) if error.kind == IoErrorKind::Full);
        assert_eq!(events.iter().filter(|event| told(event)).count(), 1, "{events:?}");
        assert!(world.store.waits_for_room() && world.store.failure().is_none());
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let (pause, events) = next_try(&mut world, &mut now);
            pauses.push(pause.as_secs());
            assert!(events.is_empty(), "{events:?}");
            assert_eq!(image(&world), (1, 1), "overwritten, and not kept");
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        world.disk.set_capacity(None);
        let (_, events) = next_try(&mut world, &mut now);
        assert!(events.iter().any(|event| matches!(event, StoreEvent::RoomAgain)), "{events:?}");
        for fill in [5, 6] {
            let written = |event: &StoreEvent| matches!(event, StoreEvent::ExtentWritten(Token(token)) if *token == fill);
            assert!(events.iter().any(written), "{events:?}");
        }
        assert!(!world.store.waits_for_room());
        assert_eq!(image(&world), (5, 6));
        assert_eq!(rolled_back(world), (1, 1), "room for {room} bytes");
    }
}

/// The process ends or power is lost at any step, while it waits or after there was room: the old state is there.
#[test]
fn what_was_before_the_resync_survives_every_end_of_the_wait() {
    let mut ends = 0;
    for room in [0, EXTENT as u64, EXTENT as u64 + 4096] {
        for power in [false, true] {
            for steps in 0.. {
                let mut world = set_aside(room);
                let mut now = MonotonicTime(0);
                world.store.now_is(now);
                extent(0, 5, &mut world);
                extent(1, 6, &mut world);
                let (mut left, mut tries) = (steps, 0);
                while left > 0 {
                    for command in world.out.commands.drain(..) {
                        world.disk.submit(command);
                    }
                    if world.disk.queued().is_empty() {
                        if !world.store.waits_for_room() {
                            break;
                        }
                        tries += 1;
                        if tries == 3 {
                            world.disk.set_capacity(None);
                        }
                        now = world.store.next_wake().expect("it tries again");
                        world.store.tick(now, &mut world.out);
                    } else {
                        let completion = world.disk.run(0);
                        world.store.complete(completion, &mut world.out);
                    }
                    left -= 1;
                }
                if power {
                    // All that was written stays: the worst that can happen to what was kept.
                    world.disk.lose_power(&mut || 1);
                } else {
                    world.disk.crash_process(&mut || 0);
                }
                assert_eq!(
                    rolled_back(world),
                    (1, 1),
                    "room {room}, after {steps} steps, power lost: {power}"
                );
                ends += 1;
                if left > 0 {
                    break;
                }
            }
        }
    }
    assert!(ends > 60, "only {ends}");
}

/// The log behind the extents is taken while its application waits.
#[test]
fn the_log_behind_the_extents_waits_for_room_too() {
    let mut world = set_aside(1 << 30);
    let mut now = MonotonicTime(0);
    world.store.now_is(now);
    extent(0, 5, &mut world);
    world.run_untwinned();
    let at = LogPosition { term: Term::new(3, 0), lsn: Lsn(7) };
    let mut lineage = Lineage::new();
    lineage.append(at.term, Lsn(1));
    world.store.start_resync_log(at, Some(ChainValue(1)), &lineage, &mut world.out).expect("starts the log");
    world.run_untwinned();
    let mut builder = BatchBuilder::new(world.store.max_batch_len());
    builder.write(DiskIndex(0), EXTENT as u64, &[7; 4096]);
    let (wall, clock) = (WallTime(5), WallTime(5));
    let (group, term, previous) = (common::GROUP, at.term, ChainValue(1));
    let batch =
        builder.seal(&BatchPlace { group, term, first: Lsn(8), stable: at.lsn, wall, clock, previous });
    world.store.append(&batch, &mut world.out).expect("it follows");
    world.store.sync(&mut world.out);
    world.run_untwinned();
    let used = used(&world);
    world.disk.set_capacity(Some(used));
    world.store.stable_is(Lsn(8), &mut world.out);
    world.run_untwinned();
    assert!(world.store.waits_for_room() && world.store.failure().is_none());
    assert_eq!((world.store.durable(), world.store.applied()), (Lsn(8), Lsn(7)));
    assert_eq!(image(&world), (5, 1));
    world.disk.set_capacity(None);
    // Other timers run beside it.
    while world.store.waits_for_room() {
        next_try(&mut world, &mut now);
    }
    assert_eq!(world.store.applied(), Lsn(8));
    world.store.end_resync(&mut world.out).expect("ends");
    world.run_untwinned();
    assert_eq!((world.store.health(), image(&world)), (&Health::Good, (5, 7)));
}

/// Nobody knows how long it would take.
#[test]
fn a_store_that_is_closed_does_not_wait_for_room() {
    let mut world = set_aside(0);
    extent(0, 5, &mut world);
    world.run_untwinned();
    world.store.close(&mut world.out);
    let events = world.run_untwinned();
    assert!(matches!(events[..], [StoreEvent::Failed(_)]), "{events:?}");
    world.disk.set_capacity(None);
    world.disk.crash_process(&mut || 0);
    world.out = Output::default();
    let (_, recovered) = open(&mut world.disk).expect("opens");
    assert!(matches!(recovered.health, Health::Syncing(SyncingPhase::Extents)));
    assert_eq!(rolled_back(world), (1, 1));
}
