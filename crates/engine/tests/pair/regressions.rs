//! Defects that simulated worlds found, each by its name.

use crate::world::{DISKS, World, node_id};
use crate::{peer_lost_its_power, settle};
use rempart_engine::{Command, CommandError, CommandOutput, Report};
use rempart_replication::{Report as ReplicationReport, ResyncMode};
use rempart_store::{FileId, PAGE_SIZE, parse_header};
use rempart_types::{DiskIndex, ExtentIndex, MonotonicTime, RegisterId};
use std::collections::BTreeSet;
use std::time::Duration;

const SECONDS: fn(u64) -> Duration = Duration::from_secs;

fn resyncs(world: &World, mode: ResyncMode) -> usize {
    let started = |report: &Report| matches!(report, Report::Replication(ReplicationReport::ResyncStarted { mode: m, .. }) if *m == mode);
    world.reports.iter().filter(|(_, report)| started(report)).count()
}

fn finished_resyncs(world: &World) -> usize {
    let finished =
        |report: &Report| matches!(report, Report::Replication(ReplicationReport::ResyncFinished { .. }));
    world.reports.iter().filter(|(_, report)| finished(report)).count()
}

/// Extents of all disks that this replica's change map knows of.
fn touched(world: &World, node: usize) -> BTreeSet<(u16, u64)> {
    let extents = |disk: u16| {
        let (extents, next) = world.engine(node).changed_extents(DiskIndex(disk), ExtentIndex(0), 1000);
        assert_eq!(next, None, "all fit");
        extents.into_iter().map(move |(extent, _)| (disk, extent.0))
    };
    (0..DISKS).flat_map(extents).collect()
}

/// The end of a limit's wait woke the engine, but replication was not told that time had passed.
#[test]
fn a_limited_resync_goes_on_while_the_guest_is_idle() {
    let mut world = peer_lost_its_power(11);
    world.run_for(SECONDS(5));
    world.guest.depth = 0;
    world.run_until("the guest is idle", SECONDS(60), |w| w.guest.is_idle());
    world.command(0, Command::LimitResync { bytes_per_second: Some(512 << 10) });
    let (before, began) = (world.extent_bytes, world.now);
    world.power_on(1);
    world.run_until("mirrored again", SECONDS(30), |w| w.in_sync() == 2);
    let (sent, took) = (world.extent_bytes - before, Duration::from_nanos(world.now - began));
    assert!(sent > 1 << 20, "{sent} bytes are no test of a limit");
    // What is sent last is paid for afterwards.
    assert!(took >= SECONDS(sent / (512 << 10) - 1), "{sent} bytes in {took:?}");
    settle(&mut world);
}

/// It was connected all the while: nobody told cluster's new peer of that, nor again that it had caught up.
#[test]
fn a_peer_removed_and_added_again_while_connected_is_admitted() {
    let mut world = World::new(12, 2);
    world.guest.depth = 2;
    world.mirrored();
    world.command(0, Command::RemovePeer { peer: node_id(1) });
    world.run_until("alone", SECONDS(10), |w| w.in_sync() == 1);
    world.run_for(SECONDS(2));
    world.command(0, Command::AddPeer { peer: node_id(1) });
    world.run_until("mirrored again", SECONDS(20), |w| w.in_sync() == 2);
    settle(&mut world);
}

/// Two replicas that hold the same, written since the last checkpoint; the guest is idle.
fn written_without_a_checkpoint(seed: u64) -> World {
    let mut world = World::new(seed, 2);
    world.limits.checkpoint_every = u64::MAX;
    world.limits.checkpoint_delay = SECONDS(100_000);
    world.guest.depth = 4;
    world.mirrored();
    world.run_for(SECONDS(1));
    world.guest.depth = 0;
    world.run_until("the guest is idle", SECONDS(60), |w| w.guest.is_idle() && w.is_settled());
    world
}

/// Damage takes records whose extents the change map on disk does not know yet, although the image has them. Where
/// the images are alike nothing is sent: the map must learn of them all the same, or the guest reads zeroes there
/// after a takeover, and the next resync leaves them out.
#[test]
fn a_copy_repaired_by_comparison_knows_every_extent_that_it_holds() {
    // All that the change maps know comes from the journal.
    let mut world = written_without_a_checkpoint(13);
    world.crash(1);
    let segments: Vec<FileId> =
        world.nodes[1].disk.files().filter(|file| matches!(file, FileId::Segment(_))).collect();
    for segment in segments {
        assert!(world.nodes[1].disk.rot(segment, 33, 1));
    }
    world.start(1);
    world.run_until("it is found to be damaged", SECONDS(60), |w| resyncs(w, ResyncMode::Compare) > 0);
    world.run_until("resynchronised", SECONDS(60), |w| finished_resyncs(w) > 0);
    world.run_until("mirrored again", SECONDS(60), |w| w.in_sync() == 2 && w.is_settled());
    let (held, known) = (touched(&world, 0), touched(&world, 1));
    assert!(held.len() > 10, "{held:?}");
    assert!(held.is_subset(&known), "not known there: {:?}", held.difference(&known));
    let before = world.guest.reads;
    world.guest.depth = 4;
    world.command(0, Command::Handover { to: node_id(1) });
    world.run_until("handed over", SECONDS(20), |w| w.primary() == Some(1) && w.nodes[1].vm);
    // It checks what it reads.
    world.run_for(SECONDS(2));
    assert!(world.guest.reads > before + 50);
    settle(&mut world);
}

/// The place of the newest batch in this replica's journal.
fn newest_batch(world: &World, node: usize) -> (FileId, u64) {
    let disk = &world.nodes[node].disk;
    let batches = disk.files().filter(|file| matches!(file, FileId::Segment(_))).flat_map(|file| {
        let content = disk.content(file).expect("it is there");
        let pages = content.chunks(PAGE_SIZE).enumerate();
        let pages: Vec<_> = pages.map(|(page, bytes)| ((page * PAGE_SIZE) as u64, bytes.to_vec())).collect();
        pages.into_iter().filter_map(move |(at, bytes)| Some((parse_header(&bytes).ok()?.first, file, at)))
    });
    let (_, file, at) = batches.max_by_key(|(first, ..)| *first).expect("it holds records");
    (file, at)
}

/// Bit rot made the newest part of a primary's journal look torn, and recovery cut it off. Its peer knew that those
/// records were stable and had them in its image alone: the primary waited for them a while and went on without.
#[test]
fn a_primary_whose_flushed_records_rotted_away_gives_way() {
    // What was durable at the last checkpoint is missed without anybody's help.
    let mut world = written_without_a_checkpoint(15);
    world.crash(0);
    let (file, at) = newest_batch(&world, 0);
    assert!(world.nodes[0].disk.rot(file, at, 1));
    // Nobody takes over for now.
    world.register_cut = vec![1];
    world.start(0);
    let lost = |report: &Report| matches!(report, Report::Replication(ReplicationReport::Lost { .. }));
    world.run_until("it learns what it lost", SECONDS(60), |w| w.reports.iter().any(|(_, r)| lost(r)));
    world.run_for(Duration::from_millis(100));
    assert_eq!(world.primary(), None);
    // It knows that by itself from now on, wherever the peer is.
    world.crash(0);
    world.cut(0, 1);
    world.start(0);
    world.run_for(SECONDS(20));
    assert_eq!(world.primary(), None, "{}", world.picture());
    world.heal();
    world.run_until("the good copy leads", SECONDS(60), |w| w.primary() == Some(1));
    world.run_until("the other is brought up", SECONDS(60), |w| w.in_sync() == 2);
    assert!(resyncs(&world, ResyncMode::Compare) > 0);
    settle(&mut world);
}

/// Cluster reports that it is superseded, and nothing else: the order was waited for without end, and every later
/// one, most of all that to rejoin, refused as busy.
#[test]
fn a_forced_takeover_of_a_superseded_replica_is_answered() {
    let mut world = World::new(14, 2);
    world.guest.depth = 2;
    world.mirrored();
    world.cut(0, 1);
    world.run_until("solo", SECONDS(10), |w| w.in_sync() == 1);
    world.lose_power(0);
    let force = |register| Command::Force {
        confirmed_fenced: true,
        new_register: RegisterId(register),
        old_register_lost: false,
    };
    // What only the lost one has, this takeover gives up: the guest starts anew.
    world.guest.depth = 0;
    let forced = world.command(1, force(0x78));
    world.run_until("forced", SECONDS(30), |w| w.primary() == Some(1) && w.nodes[1].vm);
    assert_eq!(world.results.get(&forced), Some(&Ok(CommandOutput::Done)));
    world.power_on(0);
    let forced = world.command(0, force(0x79));
    world.run_until("answered", SECONDS(30), |w| w.results.contains_key(&forced));
    assert!(matches!(world.results[&forced], Err(CommandError::Aborted(_))), "{:?}", world.results[&forced]);
    let rejoin = world.command(0, Command::Rejoin);
    world.heal();
    world.run_until("mirrored again", SECONDS(60), |w| w.primary() == Some(1) && w.in_sync() == 2);
    assert_eq!(world.results.get(&rejoin), Some(&Ok(CommandOutput::Done)));
    world.run_until("all copies are applied", SECONDS(60), World::is_settled);
    world.assert_images_equal();
}

/// What the target overwrites cannot be kept: it failed, and stayed so until its daemon restarted.
#[test]
fn a_resync_waits_while_its_targets_disk_is_full() {
    let mut world = peer_lost_its_power(15);
    world.guest.depth = 1;
    world.run_for(SECONDS(5));
    world.power_on(1);
    let status = |world: &World| world.engine(1).status(MonotonicTime(world.now));
    world.run_until("set aside", SECONDS(20), |w| w.is_up(1) && status(w).set_aside.is_some());
    let files: Vec<FileId> = world.nodes[1].disk.files().collect();
    let length = |file| world.nodes[1].disk.content(file).map_or(0, |content| content.len() as u64);
    let used = files.into_iter().map(length).sum();
    world.nodes[1].disk.set_capacity(Some(used));
    world.run_until("it is full", SECONDS(20), |w| status(w).disk_full);
    let before = world.guest.reads;
    world.run_for(SECONDS(8));
    assert!(status(&world).disk_full && !status(&world).disk_failed && world.in_sync() == 1);
    assert!(world.guest.reads > before + 20, "the guest went on alone");
    let told = |report: &Report| matches!(report, Report::DiskFull { .. });
    assert_eq!(world.reports.iter().filter(|(node, report)| *node == 1 && told(report)).count(), 1);
    // Nobody knows how long it would take: a stop does not wait, and is no clean one.
    let stop = world.command(1, Command::Stop);
    world.run_until("answered", SECONDS(5), |w| w.results.contains_key(&stop));
    assert!(matches!(world.results[&stop], Err(CommandError::Aborted(_))), "{:?}", world.results[&stop]);
    world.crash(1);
    world.start(1);
    world.run_until("it is full again", SECONDS(60), |w| status(w).disk_full);
    world.nodes[1].disk.set_capacity(None);
    world.run_until("mirrored again", SECONDS(60), |w| w.in_sync() == 2);
    assert!(!status(&world).disk_full);
    assert!(world.reports.iter().any(|(node, report)| *node == 1 && matches!(report, Report::DiskHasRoom)));
    settle(&mut world);
}

/// Seed 726855: the store, which was being closed, refused to end the resync, whose log came to its mark just then.
#[test]
fn a_target_that_is_stopped_while_its_resync_ends_stops() {
    let comes_back = || {
        let mut world = peer_lost_its_power(16);
        world.run_for(SECONDS(5));
        world.power_on(1);
        world.run_until("set aside", SECONDS(20), |w| w.is_up(1) && is_set_aside(w));
        world
    };
    fn is_set_aside(world: &World) -> bool {
        world.engine(1).status(MonotonicTime(world.now)).set_aside.is_some()
    }
    let mut world = comes_back();
    world.run_until("the resync ended", SECONDS(60), |w| !is_set_aside(w));
    let ended = world.now;
    for before in [4, 6, 8] {
        let mut world = comes_back();
        world.run_for(Duration::from_nanos(ended - world.now) - Duration::from_millis(before));
        assert!(is_set_aside(&world), "the same world");
        let stop = world.command(1, Command::Stop);
        world.run_until("stopped", SECONDS(10), |w| w.results.contains_key(&stop));
        assert_eq!(world.results[&stop], Ok(CommandOutput::Done));
        world.crash(1);
        world.start(1);
        world.run_until("mirrored again", SECONDS(60), |w| w.in_sync() == 2);
    }
}
