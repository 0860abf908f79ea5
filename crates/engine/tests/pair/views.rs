//! Views: what a backup reads, and whether it may read only what changed since an earlier one.

use crate::guest::{BLOCK, content, place};
use crate::world::{DISK_SIZE, DISKS, World, node_id};
use crate::{SECONDS, settle};
use rand::Rng;
use rempart_engine::{
    Bytes, ChangesSince, Command, CommandError, CommandOutput, Input, OpenedView, Token, ViewId,
    ViewReadError, ViewedExtents,
};
use rempart_store::FileId;
use rempart_types::{DiskIndex, EXTENT_SIZE, ExtentIndex, LogPosition, Lsn, RegisterId};
use std::time::Duration;

const EXTENTS: u64 = DISK_SIZE / EXTENT_SIZE;
/// Blocks 0..64 are four extents.
const FEW: (u64, u64) = (0, 64);

/// All disks at one position.
struct Backup {
    at: LogPosition,
    disks: Vec<Vec<u8>>,
}

fn open(world: &mut World, node: usize, since: Option<LogPosition>) -> OpenedView {
    let id = world.command(node, Command::OpenView { since, keep_bytes: u64::MAX });
    world.run_until("the view is open", SECONDS(20), |w| w.results.contains_key(&id));
    match world.results.remove(&id) {
        Some(Ok(CommandOutput::ViewOpened(view))) => view,
        other => panic!("{other:?}"),
    }
}

fn close(world: &mut World, node: usize, view: ViewId) {
    let id = world.command(node, Command::CloseView { view });
    assert_eq!(world.results.remove(&id).unwrap_or(Ok(CommandOutput::Done)), Ok(CommandOutput::Done));
    world.run_for(Duration::from_millis(50));
}

/// Reads a few extents at once, and lets the guest go on meanwhile.
fn read_run(
    world: &mut World,
    node: usize,
    view: ViewId,
    (disk, first, count): (u16, u64, u64),
) -> Result<Vec<u8>, ViewReadError> {
    let token = u64::from(disk) << 32 | first;
    let extents = ViewedExtents { disk: DiskIndex(disk), first: ExtentIndex(first), count };
    world.feed(node, Input::ReadView { view, token: Token(token), extents });
    world.plan_turn(node);
    let tokens = token..token + count;
    world.run_until("the extents are read", SECONDS(5), |w| {
        tokens.clone().all(|token| w.view_reads.contains_key(&Token(token)))
    });
    let mut bytes = Vec::new();
    for token in tokens {
        let data = world.view_reads.remove(&Token(token)).expect("just seen")?;
        bytes.extend(data.map_or_else(|| vec![0; EXTENT_SIZE as usize], |data| data.to_vec()));
    }
    Ok(bytes)
}

fn read(
    world: &mut World,
    node: usize,
    view: ViewId,
    disk: u16,
    extent: u64,
) -> Result<Vec<u8>, ViewReadError> {
    read_run(world, node, view, (disk, extent, 1))
}

fn read_all(world: &mut World, node: usize, view: ViewId) -> Vec<Vec<u8>> {
    let mut disks = vec![Vec::new(); usize::from(DISKS)];
    for disk in 0..DISKS {
        let mut first = 0;
        while first < EXTENTS {
            let count = world.rng.random_range(1..=5).min(EXTENTS - first);
            let bytes = read_run(world, node, view, (disk, first, count)).expect("the view can be read");
            disks[usize::from(disk)].extend(bytes);
            first += count;
        }
    }
    disks
}

/// Extents that may have changed after `since`.
fn changed(world: &World, node: usize, since: Lsn) -> Vec<(u16, u64)> {
    let mut changed = Vec::new();
    for disk in 0..DISKS {
        let mut from = Some(ExtentIndex(0));
        while let Some(at) = from {
            let (list, next) = world.engine(node).changed_extents(DiskIndex(disk), at, 1000);
            changed.extend(list.iter().filter(|(_, lsn)| *lsn > since).map(|(extent, _)| (disk, extent.0)));
            from = next;
        }
    }
    changed
}

/// A full read; with an earlier one whose changes are known, also an incremental one, which must be the same. Returns
/// how many extents that took.
fn backup(world: &mut World, node: usize, earlier: Option<&Backup>) -> (Backup, Option<usize>) {
    let allowed = world.guest.may_hold();
    let view = open(world, node, earlier.map(|backup| backup.at));
    let mut incremental = None;
    if view.since == Some(ChangesSince::Known) {
        let earlier = earlier.expect("it was named");
        let (mut disks, extents) = (earlier.disks.clone(), changed(world, node, earlier.at.lsn));
        for &(disk, extent) in &extents {
            let data = read(world, node, view.view, disk, extent).expect("the view can be read");
            let start = (extent * EXTENT_SIZE) as usize;
            disks[usize::from(disk)][start..start + data.len()].copy_from_slice(&data);
        }
        incremental = Some((disks, extents.len()));
    }
    let disks = read_all(world, node, view.view);
    let seed = world.seed;
    for (block, tags) in allowed {
        let (disk, offset) = place(block);
        let bytes = &disks[usize::from(disk.0)][offset as usize..(offset + BLOCK) as usize];
        let tag = u64::from_le_bytes(bytes[..8].try_into().expect("a block"));
        let expected = if tag == 0 { vec![0; BLOCK as usize] } else { content(tag, block) };
        assert!(
            bytes == expected && tags.contains(&tag),
            "seed {seed}: block {block} holds {tag}, must be one of {tags:?}"
        );
    }
    let taken = incremental.map(|(incremental, extents)| {
        for (disk, (full, incremental)) in disks.iter().zip(&incremental).enumerate() {
            let differs = (0..EXTENTS as usize).find(|extent| {
                let range = extent * EXTENT_SIZE as usize..(extent + 1) * EXTENT_SIZE as usize;
                full[range.clone()] != incremental[range]
            });
            assert_eq!(
                differs, None,
                "seed {seed}: an extent of disk {disk} changed, and the map says it did not"
            );
        }
        extents
    });
    close(world, node, view.view);
    (Backup { at: view.at, disks }, taken)
}

/// The guest runs within a few extents for a while.
fn busy(world: &mut World, extents: u64) {
    let first = world.guest.range.map_or(0, |(first, _)| (first + 64) % 512);
    world.guest.range = Some((first, first + extents * 16));
    world.run_for(Duration::from_millis(300));
}

#[test]
fn a_view_is_what_the_disks_were_while_the_guest_writes_on() {
    let mut world = World::new(40, 2);
    world.guest.depth = 4;
    world.mirrored();
    world.run_for(SECONDS(1));
    world.guest.depth = 0;
    world.run_until("the guest is idle", SECONDS(60), |w| w.guest.is_idle() && w.is_settled());
    let content = Bytes::from_static(b"one disk");
    world.command(0, Command::PutConfig { content: content.clone() });
    world.run_until("settled", SECONDS(60), World::is_settled);
    let before: Vec<Vec<u8>> = (0..DISKS).map(|disk| world.image(0, disk)).collect();
    let view = open(&mut world, 0, None);
    assert_eq!((view.config, view.since), (Some(content), None));
    world.command(0, Command::PutConfig { content: Bytes::from_static(b"two disks") });
    world.guest.depth = 6;
    world.run_for(SECONDS(1));
    let second = open(&mut world, 0, Some(view.at));
    assert!(second.at.lsn > view.at.lsn && second.since == Some(ChangesSince::Known));
    assert!(read_all(&mut world, 0, view.view) == before, "the view changed");
    assert!(read_all(&mut world, 0, second.view) != before);
    close(&mut world, 0, second.view);
    assert!(read_all(&mut world, 0, view.view) == before, "the view changed as another was closed");
    close(&mut world, 0, view.view);
    assert_eq!(read(&mut world, 0, view.view, 0, 0), Err(ViewReadError::Gone));
    assert_eq!(world.engine(0).snapshot_bytes(), 0, "what it kept is given back");
    settle(&mut world);
}

/// The chain of backups goes on through everything that keeps the log, and each reads little.
#[test]
fn what_changed_is_known_across_restarts_handovers_takeovers_and_resyncs() {
    for seed in 50..52 {
        let mut world = World::new(seed, 2);
        world.guest.depth = 4;
        world.mirrored();
        world.run_for(SECONDS(1));
        busy(&mut world, 1);
        let (mut last, _) = backup(&mut world, 0, None);
        let mut step = |world: &mut World, node: usize, what: &str| {
            let (next, extents) = backup(world, node, Some(&last));
            let extents = extents.unwrap_or_else(|| panic!("seed {seed}: unknown after {what}"));
            assert!(extents > 0 && extents < EXTENTS as usize, "seed {seed}: {extents} extents after {what}");
            last = next;
        };
        busy(&mut world, 3);
        step(&mut world, 0, "writes");

        busy(&mut world, 2);
        world.crash(0);
        world.start(0);
        world
            .run_until("it serves again", SECONDS(20), |w| w.primary() == Some(0) && w.guest.is_connected(0));
        busy(&mut world, 2);
        step(&mut world, 0, "a crash of the daemon");

        world.run_until("mirrored", SECONDS(20), |w| w.in_sync() == 2);
        busy(&mut world, 2);
        world.command(0, Command::Handover { to: node_id(1) });
        world.run_until("handed over", SECONDS(20), |w| w.primary() == Some(1) && w.nodes[1].vm);
        busy(&mut world, 2);
        step(&mut world, 1, "a handover");

        world.run_until("mirrored", SECONDS(20), |w| w.in_sync() == 2);
        busy(&mut world, 2);
        world.lose_power(1);
        world.run_until("takeover", SECONDS(12), |w| w.primary() == Some(0) && w.nodes[0].vm);
        busy(&mut world, 2);
        step(&mut world, 0, "a takeover");

        // Long enough for the journal to be gone: extents bring the peer up, and it leads. The log that follows them
        // touches others.
        world.run_for(SECONDS(5));
        busy(&mut world, 1);
        let before = world.extent_bytes;
        world.power_on(1);
        world.run_until("mirrored", SECONDS(60), |w| w.in_sync() == 2);
        assert!(world.extent_bytes > before, "seed {seed}: brought up by extents");
        busy(&mut world, 1);
        world.command(0, Command::Handover { to: node_id(1) });
        world.run_until("handed over", SECONDS(20), |w| w.primary() == Some(1) && w.nodes[1].vm);
        step(&mut world, 1, "a resync and a handover");
        settle(&mut world);
    }
}

/// A takeover by force gives up what the other side had: nothing is known from there on, and the next chain begins.
#[test]
fn a_position_on_a_branch_that_was_given_up_says_nothing() {
    let mut world = World::new(60, 2);
    world.guest.depth = 2;
    world.mirrored();
    world.run_for(Duration::from_millis(300));
    let (shared, _) = backup(&mut world, 0, None);
    world.cut(0, 1);
    world.run_until("solo", SECONDS(10), |w| w.in_sync() == 1);
    world.run_for(Duration::from_millis(300));
    let (lost, known) = backup(&mut world, 0, Some(&shared));
    assert!(known.is_some());
    world.lose_power(0);
    world.guest.depth = 0;
    world.guest.gullible = true;
    let order =
        Command::Force { confirmed_fenced: true, new_register: RegisterId(0x78), old_register_lost: false };
    world.command(1, order);
    world.run_until("forced", SECONDS(30), |w| w.primary() == Some(1) && w.nodes[1].vm);
    // The log there grows past the number of the position that was given up.
    while world.engine(1).lineage().last_term() == shared.at.term
        || world.engine(1).glance().committed < lost.at.lsn.plus(10)
    {
        world.command(1, Command::Mark { name: "more".into() });
        world.run_for(Duration::from_millis(5));
    }
    let view = open(&mut world, 1, Some(lost.at));
    assert!(matches!(view.since, Some(ChangesSince::Unknown(_))), "{:?}", view.since);
    close(&mut world, 1, view.view);
    let ahead = LogPosition { lsn: Lsn(u64::MAX), ..shared.at };
    let view = open(&mut world, 1, Some(ahead));
    assert!(matches!(view.since, Some(ChangesSince::Unknown(_))), "{:?}", view.since);
    close(&mut world, 1, view.view);
    // What both had before they parted is a position like any other.
    let view = open(&mut world, 1, Some(shared.at));
    assert_eq!(view.since, Some(ChangesSince::Known));
}

/// Somebody wrote to the image while its node was down, and this is the only copy.
#[test]
fn an_image_that_others_changed_is_read_fully() {
    let mut world = World::new(61, 1);
    world.guest.depth = 2;
    world.guest.range = Some(FEW);
    world.mirrored();
    world.run_for(Duration::from_millis(300));
    world.guest.depth = 0;
    world.run_until("settled", SECONDS(20), |w| w.guest.is_idle() && w.is_settled());
    let (earlier, _) = backup(&mut world, 0, None);
    world.run_until("settled", SECONDS(20), World::is_settled);
    let restart = |world: &mut World, foreign: bool| {
        let stop = world.command(0, Command::Stop);
        world.run_until("stopped", SECONDS(20), |w| w.results.contains_key(&stop));
        world.lose_power(0);
        if foreign {
            world.nodes[0].disk.overwrite(FileId::Image(DiskIndex(1)), DISK_SIZE - 512, &[7; 512]);
        }
        world.power_on(0);
        world.run_until("it serves", SECONDS(30), |w| w.primary() == Some(0) && w.nodes[0].vm);
    };
    restart(&mut world, false);
    let (earlier, known) = backup(&mut world, 0, Some(&earlier));
    assert!(known.is_some());
    restart(&mut world, true);
    let (earlier, known) = backup(&mut world, 0, Some(&earlier));
    assert!(known.is_none() && earlier.disks[1][DISK_SIZE as usize - 1] == 7);
    let (_, known) = backup(&mut world, 0, Some(&earlier));
    assert!(known.is_some(), "from here on it is known again");
}

/// Nothing of a view outlasts the leadership, the daemon, or the room it may take.
#[test]
fn a_view_ends_with_its_primary_and_is_lost_for_want_of_room() {
    let mut world = World::new(62, 2);
    world.guest.depth = 4;
    world.mirrored();
    world.run_for(SECONDS(1));
    let id = world.command(0, Command::OpenView { since: None, keep_bytes: 2 * EXTENT_SIZE });
    world.run_until("the view is open", SECONDS(20), |w| w.results.contains_key(&id));
    world.run_until("it is lost", SECONDS(20), |w| !w.views_ended.is_empty());
    let (view, why) = world.views_ended.remove(0);
    assert!(why.contains("more was overwritten"), "{why}");
    assert_eq!(read(&mut world, 0, view, 0, 0), Err(ViewReadError::Gone));

    let view = open(&mut world, 0, None);
    world.run_for(Duration::from_millis(100));
    world.crash(0);
    world.start(0);
    world.run_until("it serves again", SECONDS(20), |w| w.primary() == Some(0) && w.guest.is_connected(0));
    world.run_until("what was left is closed", SECONDS(5), |w| w.engine(0).snapshot_bytes() == 0);
    assert_eq!(read(&mut world, 0, view.view, 0, 0), Err(ViewReadError::Gone));

    world.run_until("mirrored", SECONDS(20), |w| w.in_sync() == 2);
    let view = open(&mut world, 0, None);
    world.command(0, Command::Handover { to: node_id(1) });
    world.run_until("handed over", SECONDS(20), |w| w.primary() == Some(1) && w.nodes[1].vm);
    assert_eq!(world.views_ended.pop().map(|(ended, _)| ended), Some(view.view));
    let refused = world.command(0, Command::OpenView { since: None, keep_bytes: u64::MAX });
    assert_eq!(world.results.get(&refused).cloned(), None, "told with the next turn");
    world.run_for(Duration::from_millis(10));
    assert_eq!(world.results.get(&refused), Some(&Err(CommandError::NotPrimary)));
    settle(&mut world);
}

/// Nobody holds every copy back by opening views, and one that nobody waits for any more opens for nobody.
#[test]
fn views_are_few_and_can_be_called_off() {
    let mut world = World::new(63, 2);
    world.mirrored();
    let open = Command::OpenView { since: None, keep_bytes: u64::MAX };
    let orders: Vec<_> = (0..5).map(|_| world.command(0, open.clone())).collect();
    world.run_until("answered", SECONDS(20), |w| orders.iter().all(|id| w.results.contains_key(id)));
    assert!(matches!(world.results[&orders[4]], Err(CommandError::Refused(_))));
    for id in &orders[..4] {
        let Ok(CommandOutput::ViewOpened(view)) = world.results[id].clone() else { panic!("{id:?}") };
        close(&mut world, 0, view.view);
    }
    settle(&mut world);
}
