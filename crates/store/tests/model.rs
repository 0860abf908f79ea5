//! The store against a naive twin, under random work, random completion order and random crashes.

mod common;

use common::{SIZES, World};
use rempart_store::{Health, SnapshotId, StoreEvent};
use rempart_types::{DiskIndex, ExtentIndex, Lsn, MonotonicTime};
use std::collections::BTreeMap;

type Kept = BTreeMap<u64, u64>;

/// Reads every extent of a snapshot and compares it with the twin at that position.
fn check_snapshot(world: &mut World, id: u64, at: u64) {
    let expected = world.model.disks_at(at);
    for (disk, bytes) in expected.iter().enumerate() {
        let (disk_index, count) = (DiskIndex(disk as u16), SIZES[disk].div_ceil(65536));
        let tokens: Vec<_> = (0..count).map(|_| world.token()).collect();
        let (id, first) = (SnapshotId(id), ExtentIndex(0));
        world.store.read_snapshot_run(tokens[0], id, disk_index, first, count, &mut world.out);
        world.pump();
        for (extent, token) in (0..count).map(ExtentIndex).zip(tokens) {
            let seen = loop {
                let found = world.events.iter().find_map(|event| match event {
                    StoreEvent::SnapshotRead { token: read, result } if *read == token => {
                        Some(result.clone().expect("the snapshot is read"))
                    }
                    _ => None,
                });
                match found {
                    Some(extent) => break extent,
                    None => assert!(world.step()),
                }
            };
            let range = extent.bytes(SIZES[disk]);
            let expected = &bytes[range.start as usize..range.end as usize];
            let same = match &seen.data {
                Some(data) => &data[..] == expected,
                None => expected.iter().all(|&byte| byte == 0),
            };
            assert!(same, "snapshot {id:?} at {at}: extent {} of disk {disk}", extent.0);
        }
    }
}

fn run(seed: u64, steps: usize) {
    let mut world = World::new(seed);
    let mut kept = Kept::new();
    let mut next_snapshot = 1;
    for _ in 0..steps {
        match world.rng.below(100) {
            0..=29 => {
                if world.model.end() < 4000 {
                    world.append_random();
                }
            }
            30..=39 => world.store.sync(&mut world.out),
            40..=49 => {
                let lsn = world.some_end(world.store.durable().0);
                world.stable_is(lsn);
            }
            50..=55 => {
                let lsn = world.some_end(world.store.accepted().0);
                world.committed_is(lsn);
            }
            56..=59 => {
                world.now += 30_000_000;
                world.store.tick(MonotonicTime(world.now), &mut world.out);
            }
            60..=63 => {
                if world.store.committed().0.min(world.model.end()) >= world.store.applied().0
                    && world.store.durable() >= world.store.applied()
                {
                    let disk = world.rng.below(2) as usize;
                    let offset = world.rng.below(SIZES[disk] / 512) * 512;
                    let len = (1 + world.rng.below(64)) * 512;
                    let len = len.min(SIZES[disk] - offset) as usize;
                    // Refused until the recovered tail is committed.
                    let token = world.token();
                    let refused =
                        world.store.read(token, DiskIndex(disk as u16), offset, len, &mut world.out);
                    if refused.is_ok() {
                        world.check_reads(disk, offset, len);
                    }
                }
            }
            64 => world.store.checkpoint(&mut world.out),
            65 | 66 => {
                let bound = world.store.applied().0.max(world.stable);
                let lsn = world.some_end(world.model.end());
                if lsn >= bound && world.store.truncate_after(Lsn(lsn), &mut world.out).is_ok() {
                    world.model.truncate(lsn);
                    world.durable = world.durable.min(lsn);
                    world.committed = world.committed.min(lsn);
                    world.drain();
                    assert!(
                        world
                            .events
                            .iter()
                            .any(|event| matches!(event, StoreEvent::Truncated(at) if at.0 == lsn))
                    );
                    world.events.clear();
                    world.epoch += 1;
                }
            }
            67 | 74..=77 => {
                let id = next_snapshot;
                next_snapshot += 1;
                if kept.len() < 3 && world.store.open_snapshot(SnapshotId(id), None, &mut world.out).is_ok() {
                    world.drain();
                    // After a crash it waits until the image is at a known position again.
                    if !world.store.snapshots().iter().any(|(open, _)| open.0 == id) {
                        world.make_all_stable();
                    }
                    let at = world.events.iter().find_map(|event| match event {
                        StoreEvent::SnapshotOpened { snapshot, at } if snapshot.0 == id => Some(at.0),
                        _ => None,
                    });
                    kept.insert(id, at.expect("the snapshot opens"));
                }
            }
            68 | 78 | 79 => {
                if let Some((&id, _)) = kept.iter().nth(world.rng.below(3) as usize) {
                    world.store.close_snapshot(SnapshotId(id), &mut world.out).expect("it is open");
                    world.drain();
                    assert!(
                        world.events.iter().any(
                            |event| matches!(event, StoreEvent::SnapshotClosed(closed) if closed.0 == id)
                        )
                    );
                    kept.remove(&id);
                }
            }
            69 | 80 | 81 => {
                for (id, at) in kept.clone() {
                    check_snapshot(&mut world, id, at);
                }
            }
            70..=72 => {
                let power = world.rng.chance(2);
                let recovered = world.crash(power);
                assert_eq!(recovered.health, Health::Good);
                assert!(world.store.snapshots().is_empty(), "snapshots end with the process");
                kept.clear();
                world.check_changed_since();
                if world.rng.chance(3) {
                    world.make_all_stable();
                    world.check_images(world.model.end());
                }
            }
            73 => world.check_changed_since(),
            _ => {
                for _ in 0..world.rng.below(12) {
                    world.step();
                }
            }
        }
        world.pump();
    }
    world.make_all_stable();
    world.check_images(world.model.end());
    for (id, at) in kept {
        check_snapshot(&mut world, id, at);
    }
}

#[test]
fn recovered_image_and_redo_are_a_prefix_with_everything_durable() {
    let seeds: u64 = std::env::var("STORE_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(150);
    let first: u64 = std::env::var("STORE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    for seed in first..first + seeds {
        let result = std::panic::catch_unwind(|| run(seed, 400));
        if let Err(panic) = result {
            eprintln!(
                "failed with seed {seed}: STORE_SEED={seed} STORE_SEEDS=1 cargo test -p rempart-store --test model"
            );
            std::panic::resume_unwind(panic);
        }
    }
}
