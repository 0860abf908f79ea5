//! Views with the guest's memory: it goes on elsewhere from there, runs on here, and never stands still because of us.

use crate::backup::{Known, SDA, VDA, images, models, two_disks};
use crate::backup_vm::{
    Host, Random, Swallower, Vm, apply_changes, copied_by_nbdcopy, disk, read_all, run, tokens,
};
use crate::guest::Guest;
use crate::lab::{HELPER, PATIENCE};
use rempart_hypervisor::guest_agent::Level;
use rempart_hypervisor::qemu::backup::{LiveView, Otherwise, Policy, Prepared, Reached, Saving};
use rempart_hypervisor::qmp::Client;
use rempart_hypervisor::{Error, ErrorKind, Result};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Counts in memory, in a file that it never flushes, and in one that it flushes each time and reads from the disk.
const COUNTER: &str = "mount%-t%ext4%/dev/vda%/tmp;n=0;while%:;do%n=$((n+1));echo%3%>/proc/sys/vm/drop_caches;echo%counted%$n%of%$(cat%/tmp/n)%$(cat%/tmp/m).;echo%$n%>/tmp/n;echo%$n|dd%of=/tmp/m%conv=notrunc,fsync%2>/dev/null;usleep%50000;done";
/// Writes to 24 MB of its memory without end, no zeroes: those are sent as nothing.
const DIRTIER: &str = "for%i%in%1%2%3%4%5%6%7%8%9%10%11%12;do%cat%/bin/busybox;done>/tmp/a;n=0;while%dd%if=/tmp/a%of=/tmp/x%bs=1M%conv=notrunc%2>/tmp/e;do%n=$((n+1));echo%counted%$n%of%$((n-1)).;done";

fn limit() -> Duration {
    // A host that does other work at the same time is no reason to fail.
    Duration::from_secs(40)
}

fn policy(saving: Saving, or_crash: bool) -> Policy {
    Policy { agent: Err("not asked"), otherwise: Otherwise::SaveState { saving, or_crash } }
}

async fn take(host: &Host, monitor: &Path, saving: Saving, or_crash: bool) -> Result<(LiveView, Reached)> {
    let prepared = Prepared::new(monitor, &host.options("nightly"), &Known::new()).await?;
    prepared.take_consistently(&policy(saving, or_crash)).await
}

/// The numbers that the guest said whole, with what it read from its file.
fn counted(console: &Path) -> Vec<(u64, u64)> {
    let text = std::fs::read_to_string(console).unwrap_or_default();
    let numbers = text.lines().filter_map(|line| {
        let (number, read) = line.trim().strip_suffix('.')?.strip_prefix("counted ")?.split_once(" of ")?;
        let (number, mut read) = (number.parse().ok()?, read.split(' '));
        let first = read.next()?.parse().ok()?;
        // Both files say the same.
        Some((number, if read.all(|next| next.parse() == Ok(first)) { first } else { u64::MAX }))
    });
    numbers.collect()
}

/// Waits until the guest counts on.
async fn counts_on(console: &Path) -> u64 {
    let last = || counted(console).last().map_or(0, |(number, _)| *number);
    let (before, end) = (last(), Instant::now() + PATIENCE);
    while last() <= before {
        assert!(Instant::now() < end, "the guest does not count on from {before}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    last()
}

async fn counter(host: &Host, run: &str, disk: &str, console: &str, more: &[&str]) -> Vm {
    let mut options = Guest::options(run);
    let node =
        format!("driver=raw,node-name=data,file.driver=file,file.filename={}", host.path(disk).display());
    options.extend(["-blockdev".into(), node, "-device".into(), "virtio-blk-pci,drive=data,id=vda".into()]);
    options.extend(["-serial".into(), format!("file:{}", host.path(console).display())]);
    options.extend(more.iter().map(|word| (*word).to_owned()));
    host.start(&options.iter().map(String::as_str).collect::<Vec<_>>()).await
}

async fn runs(client: &Client) -> bool {
    client.query_status().await.unwrap().running
}

async fn until_it_runs(client: &Client) {
    let end = Instant::now() + PATIENCE;
    while !runs(client).await {
        assert!(Instant::now() < end, "the guest stands still: {:?}", client.query_status().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_guest_goes_on_from_its_memory_and_disks_of_one_moment() {
    let host = Host::new();
    let image = host.image("system", "raw");
    run("mkfs.ext4", &["-q", &image]);
    let console = host.path("console");
    let vm = counter(&host, COUNTER, "system", "console", &[]).await;
    let before = counts_on(&console).await;
    let parameters = vm.control().query_migrate_parameters().await.unwrap();
    let (view, reached) = take(&host, &host.monitor(), Saving::new(limit()), false).await.unwrap();
    assert_eq!((reached.level, reached.why.as_str()), (Level::SavedState, "not asked"));
    // What it said until it stood still, and perhaps a word more.
    let pause = view.pause().unwrap();
    println!("stood still for {pause:?}, of which {:?} to take the view", view.stall());
    assert!(pause > Duration::ZERO && pause < Duration::from_secs(20), "{pause:?}");
    assert_eq!(vm.control().query_migrate_parameters().await.unwrap(), parameters);
    let after = counts_on(&console).await;
    counts_on(&console).await;

    copied_by_nbdcopy(disk(&view, "vda"), &host.path("restored"));
    let memory = view.memory().unwrap();
    assert_eq!(memory.file.metadata().unwrap().len(), memory.bytes);
    std::io::copy(
        &mut std::fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory.file)))
            .unwrap(),
        &mut std::fs::File::create(host.path("memory")).unwrap(),
    )
    .unwrap();
    view.retire().await.unwrap();
    counts_on(&console).await;
    // Every number once: it never went back, and nothing was lost.
    let numbers: Vec<u64> = counted(&console).into_iter().map(|(number, _)| number).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
    assert_eq!(vm.leavings().await, [""; 0]);
    vm.kill();

    let incoming = format!("exec:cat {}", host.path("memory").display());
    let resumed = counter(&host, COUNTER, "restored", "console-2", &["-incoming", &incoming]).await;
    until_it_runs(resumed.control()).await;
    counts_on(&host.path("console-2")).await;
    let numbers = counted(&host.path("console-2"));
    assert!((before..=after).contains(&numbers[0].0), "{before} {:?} {after}", numbers[0]);
    // What it had not flushed is there.
    assert!(numbers.iter().all(|(number, read)| *read == number - 1), "{numbers:?}");
    resumed.quit().await;
    // It never was without what it wrote: the journal is all that is to be done.
    let repaired = Command::new("e2fsck").arg("-fy").arg(host.path("restored")).output().unwrap();
    assert!(repaired.status.code().unwrap() <= 1, "{}", String::from_utf8_lossy(&repaired.stdout));
}

#[tokio::test]
async fn what_changed_is_known_across_a_view_with_memory() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let (mut random, [mut a, mut b]) = (Random(5), models());
    let mut copies = [vec![0; a.bytes.len()], vec![0; b.bytes.len()]];
    let mut known = Known::new();
    for with_memory in [false, true, true, false] {
        for model in [&mut a, &mut b] {
            model.scribble(&vm, &mut random).await;
        }
        let prepared = Prepared::new(&host.monitor(), &host.options("nightly"), &known).await.unwrap();
        let view = match with_memory {
            true => prepared.take_consistently(&policy(Saving::new(limit()), false)).await.unwrap().0,
            false => prepared.take().await.unwrap(),
        };
        assert_eq!(view.memory().is_some(), with_memory);
        let then = [a.bytes.clone(), b.bytes.clone()];
        for model in [&mut a, &mut b] {
            model.scribble(&vm, &mut random).await;
        }
        for ((id, copy), then) in [VDA, SDA].into_iter().zip(&mut copies).zip(then) {
            match known.is_empty() {
                true => *copy = read_all(disk(&view, id)),
                false => {
                    let read = apply_changes(disk(&view, id), copy);
                    assert!(read < copy.len() as u64 / 2, "{read} bytes of {id} were read");
                }
            }
            assert!(*copy == then, "{id} is another than it was");
        }
        known = tokens(&view);
        view.retire().await.unwrap();
        assert!(runs(vm.control()).await);
    }
    assert_eq!(vm.leavings().await, [""; 0]);
    assert_eq!(vm.bitmaps().await.len(), 2);
}

fn helper(host: &Host, how: &str, monitor: &Path) -> Child {
    Command::new(HELPER).args(["view", how, "{}"]).args([monitor, &host.path("views")]).spawn().unwrap()
}

#[tokio::test]
async fn a_guest_runs_on_when_its_saver_is_killed_wherever_it_is() {
    let host = Host::new();
    host.image("system", "raw");
    run("mkfs.ext4", &["-q", &host.path("system").display().to_string()]);
    let console = host.path("console");
    let vm = counter(&host, COUNTER, "system", "console", &[]).await;
    counts_on(&console).await;
    let kill = |mut saver: Child| {
        saver.kill().unwrap();
        saver.wait().unwrap();
    };

    // While its memory is sent.
    let through = |command| Swallower::new(&host, command);
    let saver = helper(&host, "saved-slowly", &through("nothing").socket);
    while vm.control().query_migrate().await.unwrap().status != "active" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    kill(saver);
    until_it_runs(vm.control()).await;
    counts_on(&console).await;
    while vm.control().query_migrate().await.unwrap().status != "failed" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    // When it stands still: before the view is cut, and after. A command that is on its way may come after the death.
    for command in ["blockdev-reopen", "\"cont\""] {
        let between = through(command);
        let saver = helper(&host, "saved", &between.socket);
        between.swallowed().await;
        assert_eq!(vm.control().query_status().await.unwrap().status, "postmigrate", "{command}");
        kill(saver);
        until_it_runs(vm.control()).await;
        counts_on(&console).await;
        // Its last word ends with the connection.
        tokio::time::sleep(Duration::from_secs(6)).await;
    }

    // As soon as it stands still, whatever is done just then.
    for _ in 0..5 {
        let mut events = vm.control().events();
        let saver = helper(&host, "saved", &through("nothing").socket);
        let stops = events.wait_for(|event| (*event == rempart_hypervisor::qmp::Event::Stop).then_some(()));
        tokio::time::timeout(PATIENCE, stops).await.expect("it does not stop").unwrap();
        kill(saver);
        until_it_runs(vm.control()).await;
        counts_on(&console).await;
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert!(runs(vm.control()).await);
    }

    // The next one takes away what all of them left.
    let (view, reached) = take(&host, &through("nothing").socket, Saving::new(limit()), false).await.unwrap();
    assert_eq!(reached.level, Level::SavedState);
    view.abandon().await.unwrap();
    counts_on(&console).await;
    assert_eq!((vm.leavings().await, vm.bitmaps().await), (vec![], vec![]));
    let left = std::fs::read_dir(host.path("views")).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(left.flat_map(|vm| std::fs::read_dir(vm.join("scratch")).unwrap()).count(), 0);
}

#[tokio::test]
async fn a_guest_goes_on_when_its_saver_hangs_and_when_the_next_one_finds_it_standing() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let between = Swallower::new(&host, "blockdev-reopen");
    let prepared = Prepared::new(&between.socket, &host.options("nightly"), &Known::new()).await.unwrap();
    let policy = policy(Saving::new(Duration::from_secs(2)), false);
    let hanging = tokio::spawn(async move { prepared.take_consistently(&policy).await.map(drop) });
    between.swallowed().await;
    until_it_runs(vm.control()).await;
    hanging.abort();
    hanging.await.unwrap_err();
    while !vm.leavings().await.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Nobody is left to say the last word, either: the host's administrator killed it, too.
    vm.control().stop().await.unwrap();
    host.open("nightly", &Known::new()).await.abandon().await.unwrap();
    assert!(!runs(vm.control()).await);
    for views in std::fs::read_dir(host.path("views")).unwrap() {
        std::fs::write(views.unwrap().path().join("paused"), b"").unwrap();
    }
    host.open("nightly", &Known::new()).await.abandon().await.unwrap();
    assert!(runs(vm.control()).await);
    // Who stopped it for another reason finds it stopped.
    vm.control().stop().await.unwrap();
    let refused = take(&host, &host.monitor(), Saving::new(limit()), false).await.unwrap_err();
    assert!(refused.to_string().contains("it does not run: QEMU says `paused`"), "{refused}");
    assert!(!runs(vm.control()).await);
    assert_eq!(vm.leavings().await, [""; 0]);
}

/// Why it is not kept, as an error and where a view without memory is good enough.
async fn refused_and_fallen_back(host: &Host, saving: &Saving) -> Error {
    let error = take(host, &host.monitor(), saving.clone(), false).await.unwrap_err();
    let (view, reached) = take(host, &host.monitor(), saving.clone(), true).await.unwrap();
    assert_eq!((reached.level, view.memory().is_some(), view.pause()), (Level::Crash, false, None));
    assert!(reached.why.starts_with("not asked; cannot keep the guest's memory"), "{}", reached.why);
    assert_eq!(read_all(&view.disks()[0]).len() as u64, view.disks()[0].size_bytes);
    view.abandon().await.unwrap();
    error
}

#[tokio::test]
async fn a_machine_that_cannot_be_sent_is_backed_up_without_its_memory_and_it_is_said_why() {
    let host = Host::new();
    host.image("system", "raw");
    let file =
        format!("driver=raw,node-name=data,file.driver=file,file.filename={}", host.path("system").display());
    let vm = host.start(&["-blockdev", &file, "-device", "nvme,drive=data,serial=1,id=nvme"]).await;
    let error = refused_and_fallen_back(&host, &Saving::new(limit())).await;
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("non-migratable device"), "{error}");
    assert!(runs(vm.control()).await);
    assert_eq!((vm.leavings().await, vm.bitmaps().await), (vec![], vec![]));
    vm.kill();

    // Others read its disks: QEMU would refuse at the end only.
    let (host, more) = (Host::new(), "weekly");
    images(&host);
    let vm = two_disks(&host).await;
    let other = host.open(more, &Known::new()).await;
    let error = take(&host, &host.monitor(), Saving::new(limit()), false).await.unwrap_err();
    assert!(error.to_string().contains("another program reads its disks"), "{error}");
    assert_eq!(read_all(disk(&other, VDA)).len() as u64, other.disks()[0].size_bytes);
    other.abandon().await.unwrap();
    assert!(runs(vm.control()).await);

    // Another program has something in mind.
    let capability = serde_json::json!({ "capabilities": [{ "capability": "multifd", "state": true }] });
    vm.control().execute("migrate-set-capabilities", capability, PATIENCE).await.unwrap();
    let error = refused_and_fallen_back(&host, &Saving::new(limit())).await;
    assert!(error.to_string().contains("`multifd`"), "{error}");
    assert_eq!((vm.leavings().await, vm.bitmaps().await), (vec![], vec![]));
}

#[tokio::test]
async fn a_guest_that_writes_faster_than_its_memory_is_sent_is_left_alone_in_the_end() {
    let host = Host::new();
    host.image("system", "raw");
    let console = host.path("console");
    let vm = counter(&host, DIRTIER, "system", "console", &[]).await;
    counts_on(&console).await;
    let mut saving = Saving::new(Duration::from_secs(4));
    (saving.downtime, saving.bandwidth, saving.rounds) = (Duration::from_millis(10), 8 << 20, 4);
    let error = take(&host, &host.monitor(), saving.clone(), false).await.unwrap_err();
    assert!(error.to_string().contains("faster than QEMU sends it: after 4 rounds"), "{error}");
    assert!(runs(vm.control()).await);
    counts_on(&console).await;
    // It may stand still longer: that is enough.
    saving.limit = limit();
    let (view, reached) = take(&host, &host.monitor(), saving, false).await.unwrap();
    assert_eq!(reached.level, Level::SavedState);
    println!("stood still for {:?}", view.pause().unwrap());
    view.abandon().await.unwrap();
    counts_on(&console).await;
}
