//! `cargo xtask lab`: tries the instruments without the program they are to measure.
//!
//! The guest runs under plain QEMU on node A while the observer listens; a cut and a black hole must show; the machine
//! is powered off and its disks, shared by both nodes here, are booted on node B; every record must be there.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::guest::{self, Disks, Settings};
use crate::lab::{Host, Lab, Link, Process, Side, Volume};
use crate::observer::Observer;
use crate::setup::Kernel;
use crate::verify::Copy;

const BOOT: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(10);

pub fn run(kernel: &Kernel) -> Result<()> {
    let started = Instant::now();
    let lab = Lab::build(false)?;
    say(started, "servers, switches and observer are up");
    check_volume(&lab)?;
    say(started, "a disk can be filled, and made to fail");
    let disks = guest::make_disks(kernel, Settings::default(), lab.folder())?;
    let observer = Observer::start(&lab)?;

    let _first = boot(&lab, Host::A, &disks)?;
    observer.wait("the first record", BOOT, |notes| (notes.newest_acknowledged() > 0).then_some(()))?;
    say(started, "guest writes on node A");
    observer.wait_for_records(200, SOON)?;
    let hears = |side: Side, deadline| {
        let since = Instant::now();
        observer.wait("a sign of the guest", deadline, |notes| {
            let seen = notes.newest_boot()?.last_seen_at.get(&side).copied()?;
            (seen > since).then_some(())
        })
    };
    // What is on its way when it ends is still heard; a second of silence comes sooner or later.
    let falls_silent = |side| (0..5).any(|_| hears(side, Duration::from_secs(1)).is_err());
    hears(Side::A, SOON)?;
    hears(Side::B, SOON)?;
    say(started, "it is heard on both sides");

    lab.cut(Link::Guest(Side::A))?;
    hears(Side::A, SOON)?;
    ensure!(falls_silent(Side::B), "side B hears the guest through a cut link");
    lab.restore(Link::Guest(Side::A))?;
    hears(Side::B, SOON)?;
    lab.swallow_from(Host::B, Link::Guest(Side::B))?;
    hears(Side::B, SOON)?;
    lab.swallow_nothing()?;
    say(started, "a cut link is cut, a restored one works");
    check_servers_links(&lab)?;
    say(started, "the links between servers can be cut, blinded one way, slowed and healed");

    lab.host(Host::A).signal_all(libc::SIGSTOP);
    ensure!(falls_silent(Side::A), "a stopped machine is heard");
    lab.host(Host::A).signal_all(libc::SIGCONT);
    observer.wait_for_records(50, SOON)?;

    let acknowledged = observer.notes().newest_acknowledged();
    let off = Instant::now();
    lab.power_off(Host::A)?;
    ensure!(lab.host(Host::A).processes().is_empty(), "processes outlive the power cut");
    say(started, &format!("node A is off after record {acknowledged} ({:?})", off.elapsed()));
    let copy = Copy { boot: disks.boot.clone(), data: disks.data.clone() };
    let verdict = copy.verify(acknowledged)?;
    ensure!(verdict.is_good(), "after the power cut: {verdict:?}");

    let restart = Instant::now();
    let _second = boot(&lab, Host::B, &disks)?;
    let boot = observer.wait("a record on node B", BOOT, |notes| {
        let boot = notes.newest_boot()?;
        (notes.boots.len() == 2 && boot.first_acknowledged.is_some()).then(|| boot.clone())
    })?;
    say(started, &format!("first record on node B {:.1} s after its start", restart.elapsed().as_secs_f64()));
    let notes = observer.notes();
    ensure!(boot.broken.is_empty(), "the guest complains: {:?}", boot.broken);
    ensure!(boot.found.is_some_and(|(_, second)| second >= acknowledged), "records lost: {:?}", boot.found);
    ensure!(notes.overlap().is_none(), "two copies heard at one time");
    lab.power_on(Host::A)?;
    check_servers_links(&lab)?;
    observer.wait_for_records(100, SOON)?;
    let acknowledged = observer.notes().newest_acknowledged();
    lab.reset(Host::B)?;
    let verdict = copy.verify(acknowledged)?;
    ensure!(verdict.is_good(), "after the second cut: {verdict:?}");
    say(started, &format!("{acknowledged} records acknowledged, none lost; the instruments work"));
    Ok(())
}

fn say(started: Instant, what: &str) {
    println!("{:6.1} s  {what}", started.elapsed().as_secs_f64());
}

fn boot(lab: &Lab, host: Host, disks: &Disks) -> Result<Process> {
    let namespace = lab.host(host);
    namespace.ip(&["tuntap add dev tap0 mode tap".to_owned(), "link set tap0 master br0 up".to_owned()])?;
    let mut qemu = namespace.command("qemu-system-x86_64");
    qemu.args(
        "-nodefaults -no-user-config -M q35 -accel tcg,tb-size=128 -cpu max -m 192 -display none".split(' '),
    );
    qemu.arg("-serial").arg(format!("file:{}/{host}.serial", lab.folder().display()));
    for (name, path) in [("boot", &disks.boot), ("data", &disks.data)] {
        let node =
            format!("driver=file,node-name={name},filename={},cache.direct=on,aio=io_uring", path.display());
        qemu.args(["-blockdev", &node]);
    }
    qemu.args(["-device", "virtio-blk-pci,drive=boot,bootindex=0", "-device", "virtio-blk-pci,drive=data"]);
    qemu.args(["-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no"]);
    qemu.args(["-device", "virtio-net-pci,netdev=net,romfile=,mac=52:54:00:77:00:50"]);
    Process::start(&mut qemu, &lab.folder().join(format!("{host}.log")))
}

fn check_volume(lab: &Lab) -> Result<()> {
    let mount = lab.folder().join("volume");
    let volume = Volume::create(&mount, 64)?;
    let write = |name: &str| -> std::io::Result<()> {
        let mut file = File::create(mount.join(name))?;
        file.write_all(&[7; 1 << 20])?;
        file.sync_all()
    };
    write("before")?;
    volume.fill()?;
    let error = write("full").expect_err("a full disk takes a write");
    ensure!(error.kind() == ErrorKind::StorageFull, "a full disk says {error}");
    volume.relieve()?;
    write("after")?;
    volume.fail_fsync()?;
    let error = write("failing").expect_err("a failing disk takes a write");
    ensure!(error.raw_os_error() == Some(libc::EIO), "a failing disk says {error}");
    volume.relieve()
}

fn check_servers_links(lab: &Lab) -> Result<()> {
    let reaches = |from: Host, to: Host| {
        let mut ping: Command = lab.host(from).command("ping");
        ping.args(["-c", "1", "-W", "1", "-q", to.address()]);
        crate::workspace::output(&mut ping).is_ok()
    };
    for (from, to) in [(Host::A, Host::B), (Host::B, Host::Witness), (Host::Witness, Host::A)] {
        ensure!(reaches(from, to), "{from} does not reach {to}");
    }
    lab.cut(Link::Peer)?;
    ensure!(!reaches(Host::A, Host::B), "node-a reaches node-b over a cut link");
    ensure!(reaches(Host::A, Host::Witness), "the cut took another link with it");
    lab.restore(Link::Peer)?;
    ensure!(reaches(Host::B, Host::A), "the restored link does not work");
    lab.swallow_from(Host::A, Link::Peer)?;
    ensure!(!reaches(Host::B, Host::A), "answers come through a black hole");
    lab.swallow_nothing()?;
    lab.shape(Link::Peer, 1000)?;
    ensure!(reaches(Host::A, Host::B), "the slowed link does not work");
    lab.unshape(Link::Peer)
}
