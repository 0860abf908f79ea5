//! The decision table of recovery (docs/formats/store.md): its rows, made one by one, say that they applied. Rows A to D,
//! F, M, P and Q come up in `crash_replay.rs`, which asserts that they do.

mod common;

use common::{Change, SEGMENT, World};
use rempart_store::{
    Disk, FileId, Health, IoOp, OpenError, Recovered, Slice, SnapshotId, SuperblockChange, Token,
};
use rempart_types::{DiskIndex, ExtentIndex, Lsn};

const FIRST: FileId = FileId::Segment(1);

fn write(fill: u8, len: usize) -> Vec<Change> {
    vec![Change::Write { disk: 0, offset: 0, data: vec![fill; len] }]
}

/// Three flushed batches of 8 KiB, from byte 4096 of the first segment on; 28672 is free.
fn three_batches() -> World {
    let mut world = World::new(1);
    for fill in 1..=3 {
        world.append(write(fill, 4096));
    }
    world.store.sync(&mut world.out);
    world.drain();
    world
}

fn reopen(world: &mut World) -> Recovered {
    let (store, recovered) = common::open(&mut world.disk).expect("opens");
    world.store = store;
    recovered
}

/// Carries out what was asked for, without telling the store: nothing follows from it.
fn submit(world: &mut World) {
    for command in world.out.commands.drain(..) {
        world.disk.submit(command);
    }
    while !world.disk.queued().is_empty() {
        world.disk.run(0);
    }
}

fn assert_rows(recovered: &Recovered, rows: &str) {
    assert_eq!(recovered.rows.iter().collect::<String>(), rows);
}

#[test]
fn an_old_batch_behind_the_end_is_no_part_of_the_log() {
    let mut world = three_batches();
    let first = world.disk.content(FIRST).expect("exists")[4096..12288].to_vec();
    world.disk.overwrite(FIRST, 28672, &first);
    let recovered = reopen(&mut world);
    assert_rows(&recovered, "AE");
    assert_eq!((recovered.health, recovered.log_end.lsn.0), (Health::Good, 3));
}

#[test]
fn what_was_claimed_or_synced_and_is_missing_is_damage() {
    // Claimed by the header of a later batch.
    let mut world = three_batches();
    world.store.stable_is(Lsn(3), &mut world.out);
    world.append(write(4, 4096));
    submit(&mut world);
    world.disk.rot(FIRST, 12288, 0x10);
    let recovered = reopen(&mut world);
    assert!(matches!(recovered.health, Health::Damaged(_)));
    assert_rows(&recovered, "G");
    // Synced, as the superblock remembers.
    let mut world = three_batches();
    world.store.persist(Token(1), SuperblockChange::default(), &mut world.out);
    world.drain();
    world.disk.rot(FIRST, 12288, 0x10);
    let recovered = reopen(&mut world);
    assert!(matches!(recovered.health, Health::Damaged(_)));
    assert_rows(&recovered, "H");
}

#[test]
fn segments_whose_headers_cannot_be_read() {
    // The log goes on in the second segment, whose last record claims the one before.
    let two_segments = || {
        let mut world = World::new(1);
        for fill in 1..=5 {
            world.append(write(fill, 16384));
        }
        world.store.sync(&mut world.out);
        world.drain();
        world.store.stable_is(Lsn(5), &mut world.out);
        world.append(write(6, 16384));
        submit(&mut world);
        world
    };
    let mut world = two_segments();
    assert_rows(&reopen(&mut world), "AD");
    let mut world = two_segments();
    world.disk.rot(FileId::Segment(2), 33, 1);
    let recovered = reopen(&mut world);
    assert!(matches!(recovered.health, Health::Damaged(_)));
    assert!(recovered.rows.contains('I'), "{:?}", recovered.rows);
    // One that was prepared and holds nothing is only removed.
    let mut world = three_batches();
    world.disk.rot(FileId::Segment(2), 33, 1);
    let recovered = reopen(&mut world);
    assert_rows(&recovered, "AJ");
    assert_eq!((recovered.health, recovered.log_end.lsn.0), (Health::Good, 3));
    assert!(world.disk.content(FileId::Segment(2)).is_none());
    // The one that the superblock names.
    let mut world = three_batches();
    world.disk.rot(FIRST, 33, 1);
    let recovered = reopen(&mut world);
    assert!(matches!(recovered.health, Health::Damaged(_)));
    assert_rows(&recovered, "K");
}

#[test]
fn a_segment_whose_creation_was_cut_off_is_removed() {
    let mut world = three_batches();
    let file = FileId::Segment(9);
    let head = Slice::copy_of(&[]);
    world.disk.execute(&IoOp::Create { file, len: SEGMENT, head }).expect("creates");
    let recovered = reopen(&mut world);
    assert_rows(&recovered, "AL");
    assert!(world.disk.content(file).is_none());
}

#[test]
fn unsound_superblock_copies() {
    let mut world = three_batches();
    world.disk.rot(FileId::Superblock, 40, 1);
    assert_rows(&reopen(&mut world), "AN");
    // Recovery wrote it again.
    assert_rows(&reopen(&mut world), "A");
    world.disk.rot(FileId::Superblock, 40, 1);
    world.disk.rot(FileId::Superblock, rempart_store::SUPERBLOCK_COPY_SIZE + 40, 1);
    // O: there is no store to tell it.
    assert!(matches!(common::open(&mut world.disk), Err(OpenError::Superblock)));
}

#[test]
fn an_image_that_somebody_wrote_to() {
    let mut world = three_batches();
    world.make_all_stable();
    world.store.close(&mut world.out);
    world.drain();
    world.disk.overwrite(FileId::Image(DiskIndex(0)), 0, &[9; 512]);
    assert_rows(&reopen(&mut world), "AR");
    // It stays suspect; the row is about finding it.
    assert_rows(&reopen(&mut world), "A");
}

#[test]
fn unsound_pages_of_the_maps() {
    let mut world = three_batches();
    world.make_all_stable();
    world.store.begin_resync(SnapshotId(1), &mut world.out).expect("begins");
    world.run_untwinned();
    let data = Some(Slice::copy_of(&[4; 65536]));
    let (disk, extent) = (DiskIndex(0), ExtentIndex(0));
    world.store.write_extent(Token(1), disk, extent, Lsn(7), data, &mut world.out).expect("takes it");
    world.run_untwinned();
    world.store.checkpoint(&mut world.out);
    world.run_untwinned();
    assert_rows(&reopen(&mut world), "AQ");
    let map = FileId::ChangeMap(DiskIndex(0));
    let used =
        world.disk.content(map).expect("exists").iter().position(|&byte| byte != 0).expect("was written");
    world.disk.rot(map, used as u64 + 40, 1);
    world.disk.rot(FileId::SnapshotMap, 40, 1);
    assert_rows(&reopen(&mut world), "AQST");
}
