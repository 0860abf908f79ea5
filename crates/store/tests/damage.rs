//! Each class of damaged byte, and failing devices: told apart from crashes, reported, never a panic.

mod common;

use common::{Change, GROUP, SEGMENT, World};
use rempart_store::{
    AppendError, Batch, BatchBuilder, BatchError, BatchPlace, ChainValue, Damage, FileId, Health,
    IoErrorKind, LogReadError, OpenError, Output, PinId, Refused, SnapshotId, StoreEvent, SuperblockChange,
    Token,
};
use rempart_types::{DiskIndex, GroupId, Lsn, MonotonicTime, Term, WallTime};

fn write(offset: u64, fill: u8, len: usize) -> Vec<Change> {
    vec![Change::Write { disk: 0, offset, data: vec![fill; len] }]
}

/// Three flushed batches of two pages each, at 4096, 12288 and 20480 of the first segment; then `stable` is
/// claimed by the headers of two more, unflushed ones.
fn five_batches(stable: u64) -> World {
    let mut world = World::new(1);
    for number in 0..3u8 {
        world.append(write(u64::from(number) * 4096, number + 1, 4096));
    }
    world.store.sync(&mut world.out);
    world.drain();
    world.stable = stable;
    if stable > 0 {
        // Only told: what is applied from it does not matter here.
        world.store.stable_is(Lsn(stable), &mut world.out);
    }
    for number in 3..5u8 {
        world.append(write(u64::from(number) * 4096, number + 1, 4096));
    }
    for command in world.out.commands.drain(..) {
        world.disk.submit(command);
    }
    world
}

fn settle_process(world: &mut World) {
    while !world.disk.queued().is_empty() {
        world.disk.run(0);
    }
}

fn reopen(world: &mut World) -> rempart_store::Recovered {
    world.out = Output::default();
    world.done.clear();
    let (store, recovered) = common::open(&mut world.disk).expect("opens whatever the journal holds");
    world.store = store;
    recovered
}

const FIRST_SEGMENT: FileId = FileId::Segment(1);

/// Byte offsets of the classes in a batch at `at`.
fn classes(at: u64) -> Vec<(&'static str, u64)> {
    vec![
        ("magic", at),
        ("version", at + 8),
        ("count", at + 12),
        ("group", at + 20),
        ("term", at + 32),
        ("length", at + 45),
        ("number", at + 48),
        ("stable watermark", at + 56),
        ("wall time", at + 64),
        ("previous checksum", at + 80),
        ("own checksum", at + 92),
        ("record kind", at + 96),
        ("record disk", at + 98),
        ("record checksum", at + 100),
        ("record offset", at + 104),
        ("record length", at + 112),
        ("payload place", at + 120),
        ("payload", at + 4096 + 100),
    ]
}

#[test]
fn a_flipped_byte_below_what_was_claimed_stable_is_damage_not_a_torn_tail() {
    for (class, at) in classes(12288) {
        // Record 2 rots; the header of record 4 says that records to 3 are stable.
        let mut world = five_batches(3);
        settle_process(&mut world);
        assert!(world.disk.rot(FIRST_SEGMENT, at, 0x10));
        let recovered = reopen(&mut world);
        let expected = Damage { segment: 1, offset: 12288, expected: Lsn(2), claimed: Lsn(3) };
        assert_eq!(recovered.health, Health::Damaged(expected.clone()), "{class}");
        assert_eq!(recovered.log_end.lsn, Lsn(1), "{class}");
        let text = expected.to_string();
        assert!(text.contains("segment 1 at byte 12288"), "{text}");
        // It takes nothing more, and stays out over restarts.
        let batch = world.build(&write(0, 9, 512));
        assert_eq!(world.store.append(&batch, &mut world.out), Err(AppendError::NotWritable));
        assert!(matches!(reopen(&mut world).health, Health::Damaged(_)), "{class}");
        // Its image still serves as a resync's ground.
        world.store.stable_is(Lsn(1), &mut world.out);
        world.store.begin_resync(SnapshotId(1), &mut world.out).expect("a resync is its cure");
        world.drain();
        assert!(world.events.iter().any(|event| matches!(event, StoreEvent::ResyncBegun { .. })), "{class}");
    }
}

/// The last records were durable and nothing that is left tells so: only another copy knows.
#[test]
fn what_another_copy_knows_to_be_lost_is_damage_from_then_on() {
    let mut world = five_batches(0);
    settle_process(&mut world);
    assert!(world.disk.rot(FIRST_SEGMENT, 12288, 0x10));
    let recovered = reopen(&mut world);
    assert_eq!((recovered.health, recovered.log_end.lsn), (Health::Good, Lsn(1)));
    let lost_to = |world: &mut World, lsn: u64| {
        let change = SuperblockChange { lost_to: Some(Lsn(lsn)), ..Default::default() };
        world.store.persist(Token(lsn), change, &mut world.out);
        world.store.health().clone()
    };
    assert_eq!(lost_to(&mut world, 1), Health::Good, "record 1 is here");
    let expected = Damage { segment: 1, offset: 12288, expected: Lsn(2), claimed: Lsn(3) };
    assert_eq!(lost_to(&mut world, 3), Health::Damaged(expected.clone()));
    let batch = world.build(&write(0, 9, 512));
    assert_eq!(world.store.append(&batch, &mut world.out), Err(AppendError::NotWritable));
    world.drain();
    assert_eq!(reopen(&mut world).health, Health::Damaged(expected));
}

#[test]
fn a_flipped_byte_in_the_unflushed_tail_is_a_torn_tail() {
    for (class, at) in classes(28672) {
        // Record 4 was never flushed; nothing claims it.
        let mut world = five_batches(3);
        settle_process(&mut world);
        assert!(world.disk.rot(FIRST_SEGMENT, at, 0x10));
        let recovered = reopen(&mut world);
        assert_eq!(recovered.health, Health::Good, "{class}");
        assert_eq!(recovered.log_end.lsn, Lsn(3), "{class}");
        // Record 5 behind it does not come back when another 4 is written before it.
        world.model.truncate(3);
        world.epoch = 2;
        world.append(write(0, 77, 4096));
        world.store.sync(&mut world.out);
        world.drain();
        assert_eq!(reopen(&mut world).log_end.lsn, Lsn(4), "{class}");
    }
}

#[test]
fn a_torn_tail_does_not_revive_when_the_batch_before_it_comes_again() {
    let mut world = five_batches(0);
    settle_process(&mut world);
    let journal = world.disk.content(FIRST_SEGMENT).expect("exists");
    let fourth = Batch::parse(&journal[28672..]).expect("sound so far");
    assert_eq!(fourth.first(), Lsn(4));
    assert!(world.disk.rot(FIRST_SEGMENT, 28672 + 4096, 1));
    assert_eq!(reopen(&mut world).log_end.lsn, Lsn(3));
    // As a follower gets it from its primary, whose log ends there.
    world.store.append(&fourth, &mut world.out).expect("the very same batch");
    world.store.sync(&mut world.out);
    world.drain();
    assert_eq!(reopen(&mut world).log_end.lsn, Lsn(4), "record 5 was cut off for good");
}

#[test]
fn own_durability_is_remembered_where_no_header_claims_it() {
    let mut world = five_batches(0);
    settle_process(&mut world);
    world.store.persist(Token(1), SuperblockChange::default(), &mut world.out);
    world.drain();
    assert!(world.disk.rot(FIRST_SEGMENT, 12288 + 4096, 1));
    let recovered = reopen(&mut world);
    assert!(
        matches!(recovered.health, Health::Damaged(Damage { claimed: Lsn(3), .. })),
        "{:?}",
        recovered.health
    );
}

#[test]
fn a_damaged_segment_header_is_damage_where_records_are_missing() {
    let mut world = five_batches(3);
    settle_process(&mut world);
    assert!(world.disk.rot(FIRST_SEGMENT, 33, 1));
    let recovered = reopen(&mut world);
    assert!(matches!(recovered.health, Health::Damaged(_)), "{:?}", recovered.health);
}

#[test]
fn one_damaged_superblock_copy_loses_nothing_and_two_are_refused() {
    let promise = Term::new(41, 2);
    let prepare = || {
        let mut world = World::new(3);
        let change = SuperblockChange {
            promise: Some(promise),
            control: Some(b"an open attempt".to_vec()),
            ..SuperblockChange::default()
        };
        world.store.persist(Token(5), change, &mut world.out);
        world.drain();
        assert!(world.events.iter().any(|event| matches!(event, StoreEvent::Persisted(Token(5)))));
        world
    };
    let copy = 256 * 1024;
    for at in [0, 9, 13, 17, 25, 40, 60, 100, 150] {
        for number in 0..2u64 {
            let mut world = prepare();
            assert!(world.disk.rot(FileId::Superblock, number * copy + at, 0x40));
            let recovered = reopen(&mut world);
            assert_eq!(recovered.promise, promise, "byte {at} of copy {number}");
            assert_eq!(recovered.control, b"an open attempt");
        }
        let mut world = prepare();
        world.disk.rot(FileId::Superblock, at, 0x40);
        world.disk.rot(FileId::Superblock, copy + at, 0x40);
        let error = common::open(&mut world.disk).expect_err("nothing sound is left");
        assert!(matches!(error, OpenError::Superblock), "{error}");
    }
}

#[test]
fn a_failed_sync_is_final() {
    let mut world = five_batches(0);
    world.disk.fail_next_sync(FIRST_SEGMENT);
    world.store.sync(&mut world.out);
    let mut failures = 0;
    for _ in 0..50 {
        for command in world.out.commands.drain(..) {
            world.disk.submit(command);
        }
        for event in world.out.events.drain(..) {
            match event {
                StoreEvent::Failed(failure) => {
                    failures += 1;
                    assert_eq!(failure.what, "make the journal durable");
                    assert_eq!(failure.error.kind, IoErrorKind::Io);
                }
                StoreEvent::Accepted(_) => assert_eq!(failures, 0),
                event => assert!(failures == 0, "{event:?} after the failure"),
            }
        }
        if !world.disk.queued().is_empty() {
            let completion = world.disk.run(0);
            world.store.complete(completion, &mut world.out);
        }
        if failures > 0 {
            world.store.sync(&mut world.out);
            world.store.stable_is(Lsn(5), &mut world.out);
            world.store.checkpoint(&mut world.out);
            world.store.tick(MonotonicTime(u64::MAX / 2), &mut world.out);
            assert!(world.out.commands.is_empty(), "nothing is tried again");
        }
    }
    assert_eq!(failures, 1);
}

#[test]
fn a_failing_image_names_its_disk() {
    let mut world = World::new(1);
    world.append(write(0, 1, 4096));
    world.store.sync(&mut world.out);
    world.drain();
    world.disk.fail_next_write(FileId::Image(DiskIndex(0)), IoErrorKind::Full);
    world.store.stable_is(Lsn(1), &mut world.out);
    for _ in 0..20 {
        for command in world.out.commands.drain(..) {
            world.disk.submit(command);
        }
        if !world.disk.queued().is_empty() {
            let completion = world.disk.run(0);
            world.store.complete(completion, &mut world.out);
        }
    }
    let failure = world.store.failure().expect("it failed");
    assert_eq!((failure.disk, failure.error.kind), (Some(DiskIndex(0)), IoErrorKind::Full));
    assert_eq!(
        failure.to_string(),
        "cannot apply the log to the image: image of disk 0: no space left on device"
    );
}

#[test]
fn damage_in_the_old_journal_ends_catch_up_not_the_replica() {
    let mut world = World::new(5);
    world.store.pin(PinId(1), Lsn(0));
    for number in 0..30u8 {
        world.append(write(u64::from(number % 8) * 4096, number, 4096));
        world.drain();
    }
    world.make_all_stable();
    world.store.checkpoint(&mut world.out);
    world.drain();
    let read = |world: &mut World, after: u64| {
        world.events.clear();
        world.store.read_log(Token(9), Lsn(after), 64 * 1024, &mut world.out);
        world.drain();
        world.events.drain(..).find_map(|event| match event {
            StoreEvent::LogRead { result, .. } => Some(result),
            _ => None,
        })
    };
    let mut after = 0;
    while after < 30 {
        let chunk = read(&mut world, after).expect("answered").expect("served");
        assert_eq!(chunk.batches[0].first(), Lsn(after + 1));
        after = chunk.batches.last().expect("not empty").last().0;
    }
    assert!(world.disk.rot(FIRST_SEGMENT, 4096 + 5000, 1));
    let result = read(&mut world, 0).expect("answered");
    let Err(LogReadError::Gone { oldest }) = result else { panic!("{result:?}") };
    assert!(oldest > Lsn(1) && world.store.failure().is_none());
    assert!(read(&mut world, oldest.0 - 1).expect("answered").is_ok());
}

/// A copy that catches up stores headers whose claims are about other copies.
#[test]
fn a_torn_tail_of_catch_up_is_no_damage() {
    for seed in 0..60 {
        let mut world = World::new(seed);
        let mut previous = ChainValue::default();
        for number in 1..=12u64 {
            let mut builder = BatchBuilder::new(world.store.max_batch_len());
            builder.write(DiskIndex(0), number * 512, &[number as u8; 512]);
            let place = BatchPlace {
                group: GROUP,
                term: Term::new(4, 0),
                first: Lsn(number),
                stable: Lsn(number - 1),
                wall: WallTime(number),
                clock: WallTime(number),
                previous,
            };
            let batch = builder.seal(&place);
            previous = batch.chain();
            world.store.append(&batch, &mut world.out).expect("the source's batches");
            if number == 6 {
                world.store.sync(&mut world.out);
            }
            for _ in 0..world.rng.below(6) {
                for command in world.out.commands.drain(..) {
                    world.disk.submit(command);
                }
                if !world.disk.queued().is_empty() {
                    let completion = world.disk.run(0);
                    world.store.complete(completion, &mut world.out);
                }
            }
        }
        let durable = world.store.durable();
        let rng = &mut world.rng;
        world.disk.lose_power(&mut || rng.next());
        let recovered = reopen(&mut world);
        assert_eq!(recovered.health, Health::Good, "seed {seed}");
        assert!(recovered.log_end.lsn >= durable);
    }
}

#[test]
fn foreign_and_misplaced_batches_are_refused() {
    let mut world = World::new(1);
    world.append(write(0, 1, 512));
    let good = world.store.next_place(Term::new(1, 0), WallTime(9));
    let seal = |place: BatchPlace, offset: u64| {
        let mut builder = BatchBuilder::new(64 * 1024);
        builder.write(DiskIndex(1), offset, &[1; 512]);
        builder.seal(&place)
    };
    let expect = |world: &mut World, place: BatchPlace, offset: u64, error: AppendError| {
        assert_eq!(world.store.append(&seal(place, offset), &mut world.out), Err(error));
    };
    let found = Lsn(4);
    expect(
        &mut world,
        BatchPlace { first: found, ..good },
        0,
        AppendError::NotNext { expected: Lsn(2), found },
    );
    expect(&mut world, BatchPlace { previous: ChainValue(1), ..good }, 0, AppendError::OtherBranch);
    expect(&mut world, BatchPlace { term: Term::new(0, 9), ..good }, 0, AppendError::OlderTerm);
    expect(&mut world, BatchPlace { group: GroupId(2), ..good }, 0, AppendError::OtherGroup);
    let size = common::SIZES[1];
    let (disk, len) = (DiskIndex(1), 512);
    expect(&mut world, good, size, AppendError::OutOfRange { disk, offset: size, len });
    let mut builder = BatchBuilder::new(2 * SEGMENT as usize);
    builder.write(DiskIndex(0), 0, &vec![1; SEGMENT as usize]);
    assert_eq!(world.store.append(&builder.seal(&good), &mut world.out), Err(AppendError::TooLarge));
    assert_eq!(world.store.truncate_after(Lsn(5), &mut world.out), Err(Refused::OutOfRange));
    world.store.append(&seal(good, 0), &mut world.out).expect("the sound one");
}

#[test]
fn no_single_flipped_bit_of_a_batch_goes_unnoticed_or_panics() {
    let mut world = World::new(2);
    let batch = world.build(&[
        Change::Write { disk: 0, offset: 512, data: vec![3; 1024] },
        Change::Zero { disk: 1, offset: 0, len: 4096 },
    ]);
    let bytes = batch.bytes().to_vec();
    assert_eq!(Batch::parse(&bytes), Ok(batch.clone()));
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        match Batch::parse(&flipped) {
            Err(error) => assert!(error != BatchError::Short || bit / 8 < 96, "bit {bit}: {error}"),
            // Padding is the only part without meaning.
            Ok(_) => assert!((160..4096).contains(&(bit / 8)) || bit / 8 >= 4096 + 1024, "bit {bit}"),
        }
    }
    for len in 0..bytes.len() {
        assert!(Batch::parse(&bytes[..len]).is_err());
    }
}
