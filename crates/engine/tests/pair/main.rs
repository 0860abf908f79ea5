//! Two engines joined by a network, on simulated disks, with a register and a guest.

mod guest;
mod liar;
mod regressions;
mod views;
mod world;

use rand::Rng;
use rempart_engine::{Command, CommandOutput};
use rempart_store::DiskEntry;
use rempart_types::MonotonicTime;
use std::time::Duration;
use world::{World, node_id};

const SECONDS: fn(u64) -> Duration = Duration::from_secs;

/// Lets everything end and requires the promise of the whole product: one history, two equal copies.
fn settle(world: &mut World) {
    world.heal();
    for node in 0..world.nodes.len() {
        if !world.nodes[node].powered {
            world.power_on(node);
        } else if !world.is_up(node) {
            world.start(node);
        }
    }
    let all = world.nodes.len();
    world.run_until("all in sync and the machine runs", SECONDS(400), |w| {
        w.in_sync() == all && w.primary().is_some_and(|node| w.nodes[node].vm && w.guest.is_connected(node))
    });
    world.run_for(SECONDS(1));
    world.guest.depth = 0;
    world.run_until("the guest is idle", SECONDS(60), |w| w.guest.is_idle());
    world.run_until("all copies are applied", SECONDS(60), World::is_settled);
    world.assert_images_equal();
    world.check_images();
}

/// A busy guest, mirrored for a second, whose second copy is gone.
fn peer_lost_its_power(seed: u64) -> World {
    let mut world = World::new(seed, 2);
    world.guest.depth = 4;
    world.mirrored();
    world.run_for(SECONDS(1));
    world.lose_power(1);
    world.run_until("solo", SECONDS(10), |w| w.in_sync() == 1);
    world
}

#[test]
fn a_mirrored_guest_writes_to_both_copies() {
    let mut world = World::new(1, 2);
    world.guest.depth = 4;
    world.mirrored();
    world.run_for(SECONDS(2));
    assert!(world.guest.acknowledged_writes > 100, "{}", world.guest.acknowledged_writes);
    assert!(world.guest.acknowledged_flushes > 10);
    settle(&mut world);
}

#[test]
fn the_survivor_takes_over_with_every_acknowledged_flush() {
    for seed in 0..2 {
        let mut world = World::new(seed, 2);
        world.guest.depth = 4;
        world.mirrored();
        world.run_for(Duration::from_millis(700));
        world.lose_power(0);
        world.run_until("takeover", SECONDS(12), |w| w.primary() == Some(1) && w.nodes[1].vm);
        world.run_for(SECONDS(2));
        settle(&mut world);
    }
}

#[test]
fn a_lost_peer_is_left_behind_and_brought_up_from_the_log() {
    let mut world = World::new(3, 2);
    world.guest.depth = 2;
    world.guest.range = Some((0, 16));
    world.mirrored();
    world.crash(1);
    world.run_until("solo", SECONDS(10), |w| w.in_sync() == 1);
    world.guest.depth = 1;
    world.run_for(Duration::from_millis(20));
    settle(&mut world);
}

/// With nothing to acknowledge, only the passing of time can let a peer in that was held back.
#[test]
fn a_held_back_peer_is_let_in_although_the_guest_is_idle() {
    for seed in 0..4 {
        let mut world = World::new(seed, 2);
        world.mirrored();
        world.guest.depth = 0;
        world.run_until("the guest is idle", SECONDS(60), |w| w.guest.is_idle());
        world.run_for(SECONDS(5));
        world.crash(1);
        world.run_until("solo", SECONDS(10), |w| w.in_sync() == 1);
        world.start(1);
        world.run_until("mirrored again", SECONDS(10), |w| w.in_sync() == 2);
    }
}

#[test]
fn a_peer_behind_the_journal_gets_only_the_extents_that_changed() {
    let mut world = peer_lost_its_power(4);
    // Blocks 0..32 are two extents.
    world.guest.range = Some((0, 32));
    world.run_for(SECONDS(5));
    let before = world.extent_bytes;
    settle(&mut world);
    let sent = world.extent_bytes - before;
    assert!(sent > 0 && sent <= 6 * 65536, "{sent} bytes of extents");
}

/// It never saw a batch of the log that it goes on with: what its first one must name came with the extents.
#[test]
fn a_copy_brought_up_while_the_guest_was_idle_can_lead() {
    let mut world = peer_lost_its_power(4);
    world.guest.range = Some((0, 32));
    world.run_for(SECONDS(5));
    world.guest.depth = 0;
    world.run_until("the guest is idle", SECONDS(60), |w| w.guest.is_idle());
    world.run_until("the image has it all", SECONDS(60), World::is_settled);
    let before = world.extent_bytes;
    world.power_on(1);
    world.run_until("mirrored again", SECONDS(60), |w| w.in_sync() == 2);
    assert!(world.extent_bytes > before, "brought up by extents");
    world.command(0, Command::Handover { to: node_id(1) });
    world.run_until("handed over", SECONDS(20), |w| w.primary() == Some(1) && w.nodes[1].vm);
    settle(&mut world);
}

#[test]
fn an_image_that_came_with_content_is_compared_and_copied() {
    let mut world = World::with_bases(5, &[DiskEntry::EXISTING, DiskEntry::EMPTY]);
    world.guest.depth = 3;
    world.mirrored();
    world.run_for(SECONDS(1));
    settle(&mut world);
}

#[test]
fn a_planned_handover_moves_the_machine() {
    for seed in 0..2 {
        let mut world = World::new(seed, 2);
        world.guest.depth = 4;
        world.mirrored();
        world.run_for(Duration::from_millis(500));
        let id = world.command(0, Command::Handover { to: node_id(1) });
        world.run_until("handed over", SECONDS(20), |w| w.primary() == Some(1) && w.nodes[1].vm);
        assert_eq!(world.results.get(&id), Some(&Ok(CommandOutput::Done)));
        world.run_for(SECONDS(1));
        settle(&mut world);
    }
}

/// Its daemon slept, was replaced, and is told to hand over before it notices: the order is answered, and not in the
/// way of others.
#[test]
fn a_handover_ordered_to_a_primary_that_was_replaced_is_answered() {
    let mut world = World::new(6, 2);
    world.mirrored();
    world.run_for(SECONDS(1));
    let asleep = world.nodes[0].engine.take();
    world.run_until("takeover", SECONDS(20), |w| w.is_up(1) && w.primary() == Some(1));
    world.nodes[0].engine = asleep;
    let handover = world.command(0, Command::Handover { to: node_id(1) });
    world.run_until("an answer", SECONDS(30), |w| w.results.contains_key(&handover));
    assert!(world.results[&handover].is_err(), "{:?}", world.results[&handover]);
    let next = world.command(0, Command::AddPeer { peer: node_id(1) });
    world.run_for(SECONDS(1));
    assert_eq!(world.results.get(&next), Some(&Ok(CommandOutput::Done)));
}

#[test]
fn compare_finds_equal_copies_equal_and_a_flipped_byte() {
    let mut world = World::new(6, 2);
    world.guest.depth = 4;
    world.mirrored();
    world.run_for(SECONDS(1));
    let id = world.command(0, Command::Compare { peer: node_id(1) });
    world.run_until("compared", SECONDS(20), |w| w.results.contains_key(&id));
    let Some(Ok(CommandOutput::Compared { extents, differing, .. })) = world.results.get(&id) else {
        panic!("{:?}", world.results.get(&id));
    };
    assert_eq!((*extents, differing.len()), (64, 0), "{differing:?}");

    world.guest.depth = 0;
    world.run_until("settled", SECONDS(20), |w| w.guest.is_idle() && w.is_settled());
    let file = rempart_store::FileId::Image(rempart_types::DiskIndex(1));
    let byte = world.image(1, 1)[70_000] ^ 1;
    world.nodes[1].disk.overwrite(file, 70_000, &[byte]);
    let id = world.command(0, Command::Compare { peer: node_id(1) });
    world.run_until("compared", SECONDS(20), |w| w.results.contains_key(&id));
    let Some(Ok(CommandOutput::Compared { differing, .. })) = world.results.get(&id) else {
        panic!("{:?}", world.results.get(&id));
    };
    assert_eq!(differing.len(), 1, "{differing:?}");
}

#[test]
fn the_definition_of_the_machine_is_on_every_replica() {
    let mut world = World::new(8, 2);
    world.mirrored();
    let content = rempart_engine::Bytes::from_static(b"two cpus");
    let id = world.command(0, Command::PutConfig { content: content.clone() });
    world.run_until("logged", SECONDS(5), |w| w.results.contains_key(&id));
    world.run_until("settled", SECONDS(20), World::is_settled);
    for node in 0..2 {
        assert_eq!(world.engine(node).config(), Some(&content));
        world.crash(node);
        world.start(node);
        assert_eq!(world.engine(node).config(), Some(&content));
    }
}

/// Random faults, then peace: one history, equal copies, nothing promised is lost.
fn storm(seed: u64) {
    let mut world = World::new(seed, 2);
    world.guest.depth = world.rng.random_range(1..8);
    if world.rng.random() {
        world.guest.range = Some((0, 64));
    }
    world.mirrored();
    for _ in 0..world.rng.random_range(3..10) {
        let pause = world.rng.random_range(10..3_000);
        world.run_for(Duration::from_millis(pause));
        let node = world.rng.random_range(0..2);
        match world.rng.random_range(0..8) {
            0 if world.is_up(node) => world.crash(node),
            1 if world.nodes[node].powered => world.lose_power(node),
            2 | 3 => {
                if !world.nodes[node].powered {
                    world.power_on(node);
                } else if !world.is_up(node) {
                    world.start(node);
                }
            }
            4 => world.cut(0, 1),
            5 => world.register_cut.push(node),
            6 => world.register_unknown = 300,
            7 => world.heal(),
            _ => {}
        }
    }
    settle(&mut world);
}

/// A guest that commits in a regular pattern: the sync that its next flush needs is under way before it comes, on both
/// nodes, although otherwise nothing would be synced for a second.
#[test]
fn a_regular_flush_finds_its_sync_under_way() {
    let mut world = World::new(3, 2);
    world.limits.sync_delay = SECONDS(1);
    world.mirrored();
    let durable = |world: &World| {
        let status = |node: usize| world.engine(node).status(MonotonicTime(world.now));
        [0, 1].map(|node| status(node).durable == status(0).end)
    };
    let idle = |world: &mut World| world.run_until("answered", SECONDS(1), |w| w.guest.is_idle());
    // What started the term is no part of the pattern.
    world.guest_flushes(0);
    idle(&mut world);
    let mut foreseen = Vec::new();
    for round in 0..6 {
        for block in [0, 1] {
            world.guest_writes(0, round * 2 + block);
            idle(&mut world);
        }
        // Long enough for a sync that started with the write, far too short for one that waits.
        world.run_for(Duration::from_millis(20));
        foreseen.push(durable(&world));
        world.guest_flushes(0);
        idle(&mut world);
        assert_eq!(durable(&world), [true; 2], "what was flushed is durable");
    }
    let (not, yes) = ([false; 2], [true; 2]);
    assert_eq!(foreseen, [not, not, not, yes, yes, yes], "three flushes make a habit");
    settle(&mut world);
}

/// What no TCP does: messages of a living session are lost or repeated, most of all during a resync.
fn unfaithful(seed: u64) {
    let mut world = World::new(seed, 2);
    world.guest.depth = 3;
    world.mirrored();
    for _ in 0..4 {
        let pause = world.rng.random_range(10..1_000);
        world.run_for(Duration::from_millis(pause));
        if world.is_up(1) && world.rng.random() {
            world.crash(1);
            world.run_until("solo", SECONDS(10), |w| w.in_sync() == 1);
            world.run_for(Duration::from_millis(500));
        }
        world.unfaithful = 50;
        if !world.is_up(1) {
            world.start(1);
        }
        world.run_for(SECONDS(2));
    }
    settle(&mut world);
}

#[test]
fn an_unfaithful_network_stops_no_engine() {
    for seed in seeds() {
        unfaithful(seed);
    }
}

/// One given seed, or some.
fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    match number("REMPART_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("REMPART_SEEDS").unwrap_or(3),
    }
}

#[test]
fn storms_leave_one_history() {
    for seed in seeds() {
        storm(seed);
    }
}
