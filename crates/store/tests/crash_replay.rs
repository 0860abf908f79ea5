//! A scripted life of a store, ended after every single command it ever issues, in several ways.

mod common;

use common::{Change, Dying, Moment, Rng, SIZES, World, limits};
use rempart_store::simulated::SimulatedDisk;
use rempart_store::{
    BatchBuilder, BatchPlace, ChainValue, Disk, FileId, Health, OpenOptions, Output, Recovered, RecoveryRows,
    Slice, SnapshotId, Store, StoreEvent, SyncingPhase, Token,
};
use rempart_types::{DiskIndex, ExtentIndex, Lineage, LogPosition, Lsn, MonotonicTime, Term, WallTime};
use std::collections::BTreeSet;

fn open(disk: &mut dyn Disk, roll_back: bool) -> Result<(Store, Recovered), rempart_store::OpenError> {
    Store::open(disk, &OpenOptions { limits: limits(), roll_back })
}

/// A store that runs alone, every command at once.
struct Alone {
    disk: SimulatedDisk,
    store: Store,
    out: Output,
    events: Vec<StoreEvent>,
}

impl Alone {
    fn run(&mut self) {
        loop {
            self.events.append(&mut self.out.events);
            let commands = std::mem::take(&mut self.out.commands);
            if commands.is_empty() {
                match self.store.next_wake() {
                    Some(wake) => self.store.tick(MonotonicTime(wake.0), &mut self.out),
                    None => return,
                }
                if self.out.commands.is_empty() && self.out.events.is_empty() {
                    return;
                }
                continue;
            }
            for command in commands {
                self.disk.submit(command);
                let completion = self.disk.run(0);
                self.store.complete(completion, &mut self.out);
            }
        }
    }

    fn images(&self) -> Vec<Vec<u8>> {
        let image = |disk| self.disk.content(FileId::Image(DiskIndex(disk))).expect("exists");
        (0..SIZES.len() as u16).map(image).collect()
    }
}

/// How a life ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Process,
    Power(u64),
}

fn end(moment: &Moment, how: End) -> SimulatedDisk {
    let mut disk = moment.disk.clone();
    match how {
        End::Process => disk.crash_process(&mut || 1),
        End::Power(seed) => {
            let mut rng = Rng(seed);
            disk.lose_power(&mut || rng.next());
        }
    }
    disk
}

/// Opens; some recoveries die on the way and are repeated.
fn recover(mut disk: SimulatedDisk, seed: u64, roll_back: bool) -> (Alone, Recovered) {
    let mut rng = Rng(seed);
    for _ in 0..rng.below(3) {
        let left = rng.below(60);
        let before = disk.executed();
        let result = open(&mut Dying { disk: &mut disk, left }, roll_back);
        if result.is_err() || rng.chance(2) {
            disk.lose_power(&mut || rng.next());
        }
        assert!(disk.executed() <= before + 60);
    }
    let (store, recovered) = open(&mut disk, roll_back).expect("opens after any crash");
    (Alone { disk, store, out: Output::default(), events: Vec::new() }, recovered)
}

fn ends(index: usize) -> [End; 3] {
    let seed = index as u64 * 1000;
    [End::Process, End::Power(seed + 1), End::Power(seed + 2)]
}

fn check_good(moment: &Moment, how: End, seed: u64) -> RecoveryRows {
    let context = format!("{} / {how:?} / {seed}", moment.note);
    let (mut alone, recovered) = recover(end(moment, how), seed, false);
    assert_eq!(recovered.health, Health::Good, "{context}");
    let log_end = recovered.log_end.lsn.0;
    assert!(log_end >= moment.durable && log_end <= moment.model.end(), "{context}: log to {log_end}");
    assert!(recovered.applied.0 <= moment.stable, "{context}");
    alone.store.stable_is(Lsn(log_end), &mut alone.out);
    alone.run();
    assert!(alone.images() == moment.model.disks_at(log_end), "{context}: image and redo are a prefix");
    assert!(alone.store.snapshots().is_empty(), "{context}: snapshots end with the process");
    for file in [FileId::SnapshotMap, FileId::SnapshotData] {
        let kept = alone.disk.content(file).map_or(0, |content| content.len());
        assert_eq!(kept, 0, "{context}: what they put aside is given back");
    }
    recovered.rows
}

fn event(world: &mut World, wanted: impl Fn(&StoreEvent) -> bool) {
    for _ in 0..100 {
        if world.events.iter().any(&wanted) {
            world.events.clear();
            return;
        }
        world.drain();
        if let Some(wake) = world.store.next_wake() {
            world.now = world.now.max(wake.0);
            world.store.tick(MonotonicTime(world.now), &mut world.out);
        }
    }
    panic!("the event never comes: {:?}", world.store);
}

fn append_some(world: &mut World, batches: usize) {
    for _ in 0..batches {
        world.append_random();
        if world.rng.chance(3) {
            world.store.sync(&mut world.out);
        }
        for _ in 0..world.rng.below(4) {
            world.step();
        }
        let lsn = world.floor(world.store.durable().0);
        if world.rng.chance(2) {
            world.stable_is(lsn);
        }
    }
}

/// Appends, syncs, applies, checkpoints, recycles, takes and drops snapshots, truncates.
#[test]
fn every_crash_of_a_scripted_life_recovers_a_prefix() {
    let mut world = World::new(42);
    world.moments = Some(Vec::new());
    world.note = "appends".into();
    append_some(&mut world, 25);
    world.make_all_stable();

    world.note = "a snapshot".into();
    world.store.open_snapshot(SnapshotId(1), None, &mut world.out).expect("opens");
    event(&mut world, |event| matches!(event, StoreEvent::SnapshotOpened { .. }));
    append_some(&mut world, 12);
    world.make_all_stable();

    world.note = "a second snapshot".into();
    world.store.open_snapshot(SnapshotId(2), None, &mut world.out).expect("opens");
    event(&mut world, |event| matches!(event, StoreEvent::SnapshotOpened { .. }));
    append_some(&mut world, 12);

    world.note = "closing the second".into();
    world.store.close_snapshot(SnapshotId(2), &mut world.out).expect("closes");
    event(&mut world, |event| matches!(event, StoreEvent::SnapshotClosed(_)));
    append_some(&mut world, 10);

    world.note = "a truncation".into();
    world.store.sync(&mut world.out);
    world.drain();
    let kept = world.floor(world.stable.max(world.committed));
    let everything = world.model.clone();
    let durable = world.durable;
    world.durable = world.durable.min(kept);
    world.store.truncate_after(Lsn(kept), &mut world.out).expect("cuts");
    assert!(durable > kept, "the script cuts something off");
    event(&mut world, |event| matches!(event, StoreEvent::Truncated(_)));
    assert_eq!(everything.end(), world.model.end());
    world.model.truncate(kept);
    world.epoch += 1;

    world.note = "after the truncation".into();
    append_some(&mut world, 10);
    world.note = "closing the first".into();
    world.store.close_snapshot(SnapshotId(1), &mut world.out).expect("closes");
    event(&mut world, |event| matches!(event, StoreEvent::SnapshotClosed(_)));
    append_some(&mut world, 25);
    world.make_all_stable();
    world.note = "closing".into();
    world.store.close(&mut world.out);
    event(&mut world, |event| matches!(event, StoreEvent::Closed));

    let moments = world.moments.take().expect("kept");
    assert!(moments.len() > 400, "{} moments", moments.len());
    let stride = std::env::var("STORE_STRIDE").ok().and_then(|stride| stride.parse().ok()).unwrap_or(1);
    let mut met = BTreeSet::new();
    for (index, moment) in moments.iter().enumerate().step_by(stride) {
        for (number, how) in ends(index).into_iter().enumerate() {
            met.extend(check_good(moment, how, (index * 4 + number) as u64).iter());
        }
    }
    assert!("ABCDF".chars().all(|row| met.contains(&row)), "rows of the recovery table: {met:?}");
}

/// The source of a resync: another branch of the log.
struct Source {
    at: LogPosition,
    chain: Option<ChainValue>,
    lineage: Lineage,
    disks: Vec<Vec<u8>>,
}

fn extent_of(disks: &[Vec<u8>], disk: usize, extent: u64) -> Option<Slice> {
    let range = ExtentIndex(extent).bytes(SIZES[disk]);
    let bytes = &disks[disk][range.start as usize..range.end as usize];
    bytes.iter().any(|&byte| byte != 0).then(|| Slice::copy_of(bytes))
}

fn source(world: &mut World) -> Source {
    let mut lineage = Lineage::new();
    lineage.append(Term::new(1, 0), Lsn(1));
    lineage.append(Term::new(90, 0), Lsn(20));
    let mut disks = world.model.disks_at(world.model.end());
    for _ in 0..12 {
        if let Change::Write { disk, offset, data } = world.random_change() {
            disks[disk][offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        }
    }
    let at = LogPosition { term: Term::new(90, 0), lsn: Lsn(500) };
    Source { at, chain: Some(ChainValue(0x5eed)), lineage, disks }
}

/// Completes a resync on a store that crashed in the middle of one, from its beginning.
fn resync_again(alone: &mut Alone, source: &Source) {
    alone.store.begin_resync(SnapshotId(9), &mut alone.out).expect("begins again");
    alone.run();
    for (disk, size) in SIZES.iter().enumerate() {
        for extent in 0..size.div_ceil(65536) {
            let data = extent_of(&source.disks, disk, extent);
            let (disk_index, extent) = (DiskIndex(disk as u16), ExtentIndex(extent));
            let lsn = source.at.lsn;
            alone
                .store
                .write_extent(Token(1), disk_index, extent, lsn, data, &mut alone.out)
                .expect("takes extents");
        }
    }
    alone.run();
    alone
        .store
        .start_resync_log(source.at, source.chain, &source.lineage, &mut alone.out)
        .expect("starts the log");
    alone.run();
    assert_eq!(alone.store.log_end(), source.at);
    assert_eq!(alone.store.chain(), ChainValue(0x5eed), "it can be led on without a word from the source");
    alone.store.end_resync(&mut alone.out).expect("ends");
    alone.run();
    assert!(alone.events.iter().any(|event| matches!(event, StoreEvent::ResyncEnded)));
    assert!(alone.images() == source.disks);
}

#[test]
fn every_crash_of_a_resync_can_be_rolled_back_and_repeated() {
    let mut world = World::new(7);
    append_some(&mut world, 10);
    world.make_all_stable();
    // A view is open, and what it put aside lies where the undo snapshot's extents will.
    world.store.open_snapshot(SnapshotId(1), None, &mut world.out).expect("opens");
    event(&mut world, |event| matches!(event, StoreEvent::SnapshotOpened { .. }));
    append_some(&mut world, 10);
    world.make_all_stable();
    assert!(world.store.snapshot_bytes() > 0, "the view put something aside");
    let old = world.model.disks_at(world.model.end());
    let old_end = world.model.end();
    let mut source = source(&mut world);
    let before = source.disks.clone();
    world.moments = Some(Vec::new());

    world.note = "beginning".into();
    world.store.begin_resync(SnapshotId(9), &mut world.out).expect("begins");
    event(&mut world, |event| matches!(event, StoreEvent::ResyncBegun { .. }));
    let begun = world.moments.as_ref().map_or(0, Vec::len);
    world.note = "extents".into();
    for (disk, size) in SIZES.iter().enumerate() {
        for extent in 0..size.div_ceil(65536) {
            let (token, lsn) = (world.token(), source.at.lsn.plus(extent % 2));
            let data = extent_of(&before, disk, extent);
            let (disk, extent) = (DiskIndex(disk as u16), ExtentIndex(extent));
            world.store.write_extent(token, disk, extent, lsn, data, &mut world.out).expect("takes extents");
            world.step();
        }
    }
    world.drain();
    world.note = "the new log".into();
    world.store.start_resync_log(source.at, source.chain, &source.lineage, &mut world.out).expect("starts");
    // The twin's world counts from the old log: from here on only this test watches.
    world.durable = 0;
    event(&mut world, |event| matches!(event, StoreEvent::ResyncLogStarted { .. }));
    assert_eq!(world.store.end_resync(&mut world.out), Err(rempart_store::Refused::State), "not far enough");

    world.note = "its records".into();
    let mut builder = BatchBuilder::new(world.store.max_batch_len());
    let data = vec![0xa5; 8192];
    builder.write(DiskIndex(0), 65536 - 4096, &data);
    builder.term_start();
    source.disks[0][65536 - 4096..65536 + 4096].fill(0xa5);
    let place = BatchPlace {
        group: common::GROUP,
        term: source.at.term,
        first: source.at.lsn.next(),
        stable: source.at.lsn,
        wall: WallTime(5),
        clock: WallTime(5),
        previous: ChainValue(0x5eed),
    };
    let batch = builder.seal(&place);
    world.store.append(&batch, &mut world.out).expect("it follows what the source's log ended with");
    world.store.sync(&mut world.out);
    while world.store.durable() < batch.last() {
        for command in world.out.commands.drain(..) {
            world.disk.submit(command);
        }
        world.out.events.clear();
        let completion = world.disk.run(0);
        world.keep_moment();
        world.store.complete(completion, &mut world.out);
    }
    world.out.events.clear();
    world.durable = batch.last().0;
    world.stable = batch.last().0;
    world.store.stable_is(batch.last(), &mut world.out);
    world.drain();
    let ending = world.moments.as_ref().map_or(0, Vec::len);
    world.note = "ending".into();
    world.store.end_resync(&mut world.out).expect("far enough");
    event(&mut world, |event| matches!(event, StoreEvent::ResyncEnded));
    world.keep_moment();
    assert_eq!(world.store.health(), &Health::Good);

    let moments = world.moments.take().expect("kept");
    let mut met = BTreeSet::new();
    for (index, moment) in moments.iter().enumerate() {
        for (number, how) in ends(index).into_iter().enumerate() {
            let seed = (index * 4 + number) as u64;
            let context = format!("{} / {how:?} / {seed}", moment.note);
            let (mut alone, recovered) = recover(end(moment, how), seed, false);
            met.extend(recovered.rows.iter());
            if recovered.health == Health::Good {
                assert!(index < begun || index >= ending, "{context}: the mark survives");
                alone.store.stable_is(recovered.log_end.lsn, &mut alone.out);
                alone.run();
                let expected = if index < begun { &old } else { &source.disks };
                assert!(&alone.images() == expected, "{context}");
                continue;
            }
            match recovered.health {
                Health::Syncing(SyncingPhase::Log { until }) => {
                    assert_eq!(until, source.at.lsn.next(), "{context}")
                }
                ref other => assert_eq!(*other, Health::Syncing(SyncingPhase::Extents), "{context}"),
            }
            let refused = alone.store.read(Token(1), DiskIndex(0), 0, 512, &mut alone.out);
            assert!(refused.is_err(), "{context}: a syncing copy serves nothing");
            let seen = alone.disk.clone();
            // The log must reach what extents of the first attempt held already: the source went on meanwhile.
            let at = LogPosition { lsn: Lsn(600), ..source.at };
            let (chain, lineage, disks) = (source.chain, source.lineage.clone(), before.clone());
            resync_again(&mut alone, &Source { at, chain, lineage, disks });

            // A clean stop noted how the unfinished images look: rolling back changes them, and knows that it does.
            let (mut stopped, _) = recover(seen.clone(), seed + 76, false);
            stopped.store.close(&mut stopped.out);
            stopped.run();
            for disk in [seen, stopped.disk] {
                let (rolled, recovered) = recover(disk, seed + 77, true);
                met.extend(recovered.rows.iter());
                assert_eq!((recovered.health, recovered.log_end.lsn.0), (Health::Good, old_end), "{context}");
                assert!(recovered.images_changed.is_empty(), "{context}: nobody else changed the images");
                assert!(rolled.images() == old, "{context}: rolled back");
            }
        }
    }
    assert!("AMPQ".chars().all(|row| met.contains(&row)), "rows of the recovery table: {met:?}");
}
