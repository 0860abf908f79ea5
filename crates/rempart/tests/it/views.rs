//! Views of a machine's disks, as a backup reads them: over the daemon's API and NBD, while the disks are written.

use crate::rack::{Rack, Server};
use rempart_api::{Changes, Client, Error, OpenView, View, ViewDisk, ViewPosition, ViewRequest};
use rempart_nbd::client::{Client as Nbd, ConnectOptions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const BLOCK: u64 = 4096;

/// A view that stays open.
struct Held {
    open: OpenView,
    runtime: tokio::runtime::Runtime,
}

fn try_view(node: &Server, since: Option<ViewPosition>) -> Result<Held, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let client = Client::new(node.home.join("run/api.sock"));
    let open =
        runtime.block_on(client.open_view("shop", &ViewRequest { since, ..ViewRequest::default() }))?;
    Ok(Held { open, runtime })
}

#[track_caller]
fn view(node: &Server, since: Option<ViewPosition>) -> Held {
    match try_view(node, since) {
        Ok(held) => held,
        Err(error) => panic!("no view on {}: {error:?}\n{}", node.name, node.log()),
    }
}

impl Held {
    fn view(&self) -> &View {
        &self.open.view
    }

    fn lost(&mut self) -> Error {
        let lost = self.open.lost();
        self.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(30), lost).await }).unwrap()
    }
}

fn connect(disk: &ViewDisk, context: &str) -> Nbd<UnixStream> {
    let mut options = ConnectOptions::new(&disk.export);
    options.contexts = vec![context.to_owned()];
    Nbd::connect_unix(&disk.socket, &options).unwrap()
}

fn read(client: &mut Nbd<UnixStream>, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    client.read(offset, &mut bytes).unwrap();
    bytes
}

/// A whole disk of a view, in reads that begin and end anywhere.
fn full(disk: &ViewDisk) -> Vec<u8> {
    let mut client = connect(disk, "base:allocation");
    assert_eq!(client.size(), disk.size_bytes);
    let mut bytes = Vec::new();
    let mut length = 512;
    while (bytes.len() as u64) < disk.size_bytes {
        let at = bytes.len() as u64;
        bytes.extend(read(&mut client, at, length.min(disk.size_bytes - at)));
        length = (length * 3) % (1 << 20) / 512 * 512 + 512;
    }
    bytes
}

/// What may have changed since the position that the view was opened with: offset and length.
fn changed(disk: &ViewDisk) -> Vec<(u64, u64)> {
    const CONTEXT: &str = "rempart:changed-since";
    let mut client = connect(disk, CONTEXT);
    let mut at = 0;
    let mut changed = Vec::new();
    for run in client.map(CONTEXT, 0, disk.size_bytes).unwrap() {
        if run.flags == 1 {
            changed.push((at, run.length));
        }
        at += run.length;
    }
    assert_eq!(at, disk.size_bytes);
    changed
}

/// What a backup keeps.
struct Backup {
    position: ViewPosition,
    disks: Vec<Vec<u8>>,
    /// Bytes read of each disk, where only changes were.
    read: Vec<Option<u64>>,
}

/// A full read, and beside it what an incremental one gives, disk by disk, where it is possible.
#[track_caller]
fn backup(node: &Server, earlier: Option<&Backup>) -> Backup {
    let held = view(node, earlier.map(|backup| backup.position.clone()));
    let (mut disks, mut taken) = (Vec::new(), Vec::new());
    for disk in &held.view().disks {
        let whole = full(disk);
        if disk.changes == Changes::Known {
            let earlier = earlier.expect("it was named");
            let place = earlier.position.disks.iter().position(|then| then.uuid == disk.uuid).unwrap();
            let mut bytes = earlier.disks[place].clone();
            bytes.resize(disk.size_bytes as usize, 0);
            let mut client = connect(disk, "base:allocation");
            let runs = changed(disk);
            for &(offset, length) in &runs {
                let data = read(&mut client, offset, length);
                bytes[offset as usize..(offset + length) as usize].copy_from_slice(&data);
            }
            assert!(bytes == whole, "disk {} on {}: {runs:?} is not all that changed", disk.index, node.name);
            taken.push(Some(runs.iter().map(|(_, length)| length).sum()));
        } else {
            taken.push(None);
        }
        disks.push(whole);
    }
    Backup { position: held.view().position.clone(), disks, read: taken }
}

fn at(disk: &[u8], offset: usize) -> u8 {
    disk[offset]
}

/// Write after write, each acknowledged before the next, to one disk and the other in turn: a view holds the first so
/// many of them, on both disks, and all that were acknowledged before it was ordered.
#[test]
fn a_view_is_one_moment_of_all_disks_however_busy_they_are() {
    const BLOCKS: u64 = 256;
    let rack = Rack::new();
    let node = rack.node("node-a");
    let size = (BLOCKS * BLOCK) as usize;
    node.import("shop", &[&rack.image("a.raw", size, 0), &rack.image("b.raw", size, 0)]);
    let socket = node.home.join("run/vms/shop/nbd.sock");
    // Write number n goes to block n * 7 of disk n % 2.
    let place = |number: u64| ((number % 2) as usize, number / 2 * 7 % BLOCKS);
    let (stop, acknowledged, begun) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let writer = {
        let (stop, acknowledged, begun) = (stop.clone(), acknowledged.clone(), begun.clone());
        std::thread::spawn(move || {
            let connect =
                |disk: &str| Nbd::connect_unix(&socket, &ConnectOptions::new(disk)).expect("connects");
            let mut disks = [connect("disk0"), connect("disk1")];
            for number in 1.. {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let (disk, block) = place(number);
                let data = number.to_le_bytes().repeat(BLOCK as usize / 8);
                begun.store(number, Ordering::Release);
                disks[disk].write(block * BLOCK, &data, false).expect("writes");
                acknowledged.store(number, Ordering::Release);
            }
        })
    };
    node.until("it is busy", || acknowledged.load(Ordering::Acquire) > 1000);
    for _ in 0..3 {
        let before = acknowledged.load(Ordering::Acquire);
        let held = view(&node, None);
        let after = begun.load(Ordering::Acquire);
        // It goes on being overwritten while it is read.
        node.until("it is written on", || acknowledged.load(Ordering::Acquire) > after + 1000);
        let disks: Vec<Vec<u8>> = held.view().disks.iter().map(full).collect();
        let number = |disk: usize, block: u64| {
            let bytes = &disks[disk][(block * BLOCK) as usize..((block + 1) * BLOCK) as usize];
            assert!(bytes.chunks(8).all(|chunk| chunk == &bytes[..8]), "a torn block");
            u64::from_le_bytes(bytes[..8].try_into().unwrap())
        };
        let last = (0..2).flat_map(|disk| (0..BLOCKS).map(move |block| (disk, block)));
        let last = last.map(|(disk, block)| number(disk, block)).max().unwrap();
        assert!((before..=after).contains(&last), "{before} were acknowledged, {last} seen, {after} begun");
        let mut expected = vec![vec![0; BLOCKS as usize]; 2];
        for number in 1..=last {
            let (disk, block) = place(number);
            expected[disk][block as usize] = number;
        }
        for (disk, blocks) in expected.iter().enumerate() {
            for (block, &expected) in blocks.iter().enumerate() {
                assert_eq!(number(disk, block as u64), expected, "block {block} of disk {disk} after {last}");
            }
        }
        let socket = held.view().disks[0].socket.clone();
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(held.view().definition["name"], "shop");
        drop(held);
        node.until("its socket is gone", || !socket.exists());
    }
    stop.store(true, Ordering::Release);
    writer.join().unwrap();
    let kept = node.data("vms/shop/store/snapshot-data");
    node.until("what it kept is given back", || std::fs::metadata(&kept).map_or(0, |file| file.len()) == 0);
}

#[test]
fn only_what_changed_is_read_wherever_the_machine_runs() {
    const KIB: u64 = 1024;
    let rack = Rack::new();
    let (mut a, mut b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 4 << 20, 7)]);
    a.ok(&["vm", "disk", "add", "shop", "--size", "2M"]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    let backed = backup(&a, None);
    assert_eq!(backed.read, [None, None]);

    a.io("shop", 0, &["write -P 9 1M 4k", "flush"]);
    let backed = backup(&a, Some(&backed));
    assert_eq!((backed.read.clone(), at(&backed.disks[0], 1 << 20)), (vec![Some(64 * KIB), Some(0)], 9));
    let backed = backup(&a, Some(&backed));
    assert_eq!(backed.read, [Some(0), Some(0)]);

    // Its daemon is killed: it goes on as the primary, or the peer takes over; here it has no time to.
    a.io("shop", 1, &["write -P 5 100k 4k"]);
    a.kill();
    a.start();
    // A peer that does not follow yet may be about to take over.
    a.until("one leads, and the other follows it", || {
        let (a, b) = (a.vm("shop"), b.vm("shop"));
        let roles = [&a["role"], &b["role"]];
        roles.iter().any(|role| *role == "primary")
            && roles.iter().any(|role| *role == "secondary")
            && a["epoch"] == b["epoch"]
    });
    let leader = if a.vm("shop")["role"] == "primary" { &a } else { &b };
    leader.until_mirrored("shop");
    let backed = backup(leader, Some(&backed));
    assert_eq!((backed.read.clone(), at(&backed.disks[1], 100 << 10)), (vec![Some(0), Some(64 * KIB)], 5));

    // A planned failover, with writes on both sides of it.
    let (old, new) = if leader.name == "node-a" { (&a, &b) } else { (&b, &a) };
    old.io("shop", 0, &["write -P 3 0 4k", "flush"]);
    new.ok(&["failover", "shop"]);
    new.io("shop", 0, &["write -P 4 2M 4k", "flush"]);
    let refused = try_view(old, None).err().expect("the other node leads");
    assert!(refused.message.contains("cannot open a view of `shop`"), "{refused:?}");
    let backed = backup(new, Some(&backed));
    assert_eq!(backed.read, [Some(128 * KIB), Some(0)]);
    new.until_mirrored("shop");

    // The primary dies, and the peer takes over.
    let a_leads = new.name == "node-a";
    let last_write = ["write -P 6 3M 4k", "flush"];
    new.io("shop", 0, &last_write);
    let (dead, alive) = if a_leads { (&mut a, &mut b) } else { (&mut b, &mut a) };
    dead.kill();
    alive.until("takeover", || alive.vm("shop")["role"] == "primary");
    alive.io("shop", 0, &["write -P 8 3200k 4k", "flush"]);
    let backed = backup(alive, Some(&backed));
    assert_eq!((backed.read.clone(), at(&backed.disks[0], 3 << 20)), (vec![Some(128 * KIB), Some(0)], 6));

    dead.start();
    alive.until_mirrored("shop");
    alive.ok(&["vm", "disk", "resize", "shop", "0", "5M"]);
    alive.ok(&["vm", "disk", "remove", "shop", "1", "--yes"]);
    alive.ok(&["vm", "disk", "add", "shop", "--size", "2M"]);
    let backed = backup(alive, Some(&backed));
    assert_eq!(
        backed.read,
        [Some(1024 * KIB), None],
        "what it grew by; and another disk in the old one's place"
    );

    // Another machine's position is worth nothing, nor is one that never was.
    let mut foreign = backed.position.clone();
    foreign.group = foreign.group.replace(|c: char| c.is_ascii_digit(), "f");
    let mut ahead = backed.position.clone();
    ahead.lsn += 1_000_000;
    for since in [foreign, ahead] {
        let held = view(alive, Some(since));
        let changes = held.view().disks.iter().map(|disk| disk.changes.clone()).collect::<Vec<_>>();
        assert!(changes.iter().all(|changes| matches!(changes, Changes::Unknown { .. })), "{changes:?}");
    }
}

#[test]
fn a_view_that_is_lost_says_so_to_whoever_reads_it() {
    let rack = Rack::new();
    let (a, b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 4 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    let mut held = view(&a, None);
    let mut client = connect(&held.view().disks[0], "base:allocation");
    assert_eq!(read(&mut client, 1 << 20, 512), [7; 512]);
    let refused = client.write(0, &[1; 512], false).unwrap_err().to_string();
    assert!(refused.contains("read-only") || refused.contains("permitted"), "{refused}");
    b.ok(&["failover", "shop"]);
    let lost = held.lost();
    assert!(lost.cause.as_deref().is_some_and(|cause| cause.contains("leads no more")), "{lost:?}");
    let mut bytes = [0; 512];
    let said = client.read(0, &mut bytes).unwrap_err().to_string();
    assert!(said.contains("view is lost"), "{said}");
    // Only so many at once, and they are given back.
    let several: Vec<Held> = (0..4).map(|_| view(&b, None)).collect();
    let refused = try_view(&b, None).err().expect("one too many");
    assert!(refused.cause.as_deref().is_some_and(|cause| cause.contains("too many views")), "{refused:?}");
    drop(several);
    b.until("there is room again", || try_view(&b, None).is_ok());
}
