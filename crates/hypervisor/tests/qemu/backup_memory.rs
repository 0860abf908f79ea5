//! Views with the guest's memory: it goes on elsewhere from there, runs on here, and never stands still because of us.

use crate::backup::{Known, SDA, VDA, images, models, two_disks};
use crate::backup_vm::{
    Host, Random, Swallower, Vm, apply_changes, copied_by_nbdcopy, disk, read_all, run, tokens,
};
use crate::guest::run::COUNTER;
use crate::guest::{self, Guest, never_went_back, numbers_on};
use crate::lab::{HELPER, PATIENCE};
use rempart_hypervisor::guest_agent::Level;
use rempart_hypervisor::qemu::backup::{LiveView, Otherwise, Policy, Prepared, Reached, Saving};
use rempart_hypervisor::qmp::Client;
use rempart_hypervisor::{Error, ErrorKind, Result};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Writes to 24 MB of its memory without end, no zeroes: those are sent as nothing.
const DIRTIER: &str = "for%i%in%1%2%3%4%5%6%7%8%9%10%11%12;do%cat%/bin/busybox;done>/tmp/a;n=0;while%dd%if=/tmp/a%of=/tmp/x%bs=1M%conv=notrunc%2>/tmp/e;do%n=$((n+1));echo%counted%$n%times.;done";

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

/// Waits until the guest counts on.
async fn counts_on(console: &Path, more: usize) -> u64 {
    let console = console.to_owned();
    tokio::task::spawn_blocking(move || guest::counts_on(&console, more)).await.unwrap()
}

/// A machine whose guest counts, or does something else with the same disks.
async fn counter(host: &Host, run: &str, disks: [&str; 2], console: &str, more: &[&str]) -> Vm {
    let mut options = Guest::options(run);
    for (node, disk) in ["vda", "vdb"].into_iter().zip(disks) {
        let file = host.path(disk).display().to_string();
        let blockdev = format!("driver=raw,node-name={node},file.driver=file,file.filename={file}");
        let device = format!("virtio-blk-pci,drive={node},id={node}");
        options.extend(["-blockdev".into(), blockdev, "-device".into(), device]);
    }
    options.extend(["-serial".into(), format!("file:{}", host.path(console).display())]);
    options.extend(more.iter().map(|word| (*word).to_owned()));
    host.start(&options.iter().map(String::as_str).collect::<Vec<_>>()).await
}

const DISKS: [&str; 2] = ["system", "numbers"];
const COPIES: [&str; 2] = ["system-copy", "numbers-copy"];

/// Images for it, and its console.
fn counters(host: &Host) -> PathBuf {
    let [system, _] = DISKS.map(|name| host.image(name, "raw"));
    run("mkfs.ext4", &["-q", &system]);
    host.path("console")
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

async fn until_migration_is(status: &str, client: &Client) {
    let end = Instant::now() + PATIENCE;
    while client.query_migrate().await.unwrap().status != status {
        assert!(Instant::now() < end, "{:?}", client.query_migrate().await);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_guest_goes_on_from_its_memory_and_disks_of_one_moment() {
    let host = Host::new();
    let console = counters(&host);
    let vm = counter(&host, COUNTER, DISKS, "console", &[]).await;
    let before = counts_on(&console, 1).await;
    let parameters = vm.control().query_migrate_parameters().await.unwrap();
    let (view, reached) = take(&host, &host.monitor(), Saving::new(limit()), false).await.unwrap();
    assert_eq!((reached.level, reached.why.as_str()), (Level::SavedState, "not asked"));
    // What it said until it stood still, and perhaps a word more.
    let pause = view.pause().unwrap();
    println!("stood still for {pause:?}, of which {:?} to take the view", view.stall());
    assert!(pause > Duration::ZERO && pause < Duration::from_secs(20), "{pause:?}");
    assert_eq!(vm.control().query_migrate_parameters().await.unwrap(), parameters);
    let after = counts_on(&console, 1).await;
    // A view of another moment would show it.
    counts_on(&console, 20).await;

    for (id, copy) in ["vda", "vdb"].into_iter().zip(COPIES) {
        copied_by_nbdcopy(disk(&view, id), &host.path(copy));
    }
    let memory = view.memory().unwrap();
    assert_eq!(memory.file.metadata().unwrap().len(), memory.bytes);
    std::io::copy(
        &mut std::fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory.file)))
            .unwrap(),
        &mut std::fs::File::create(host.path("memory")).unwrap(),
    )
    .unwrap();
    view.retire().await.unwrap();
    counts_on(&console, 1).await;
    // Every number once: it never went back, and nothing was lost.
    assert_eq!(vm.leavings().await, [""; 0]);
    vm.kill();
    never_went_back(&console);
    let numbers = numbers_on(&host.path("numbers"));
    assert!(numbers.iter().copied().eq(1..=numbers.len() as u64), "{numbers:?}");

    let last = guest::take_numbers_off(&host.path(COPIES[1]));
    assert!((before - 1..=after).contains(&last), "{before} {last} {after}");
    let incoming = format!("exec:cat {}", host.path("memory").display());
    let resumed = counter(&host, COUNTER, COPIES, "console-2", &["-incoming", &incoming]).await;
    until_it_runs(resumed.control()).await;
    counts_on(&host.path("console-2"), 5).await;
    resumed.quit().await;
    never_went_back(&host.path("console-2"));
    guest::went_on_from(last, &host.path(COPIES[1]));
    // It never was without what it wrote: the journal is all that is to be done.
    let repaired = Command::new("e2fsck").arg("-fy").arg(host.path(COPIES[0])).output().unwrap();
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

/// A process that takes a view, killed at the latest at the end of its test: one that is stopped would stay for ever.
struct Saver(Child);

impl Saver {
    fn start(host: &Host, how: &str, monitor: &Path) -> Saver {
        let mut helper = Command::new(HELPER);
        helper.args(["view", how, "{}"]).args([monitor, &host.path("views")]).stdout(Stdio::piped());
        Saver(helper.spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// What came of it after it was stopped.
    async fn goes_on(mut self) -> String {
        self.signal(Signal::CONT);
        let stdout = self.0.stdout.take().unwrap();
        let told = tokio::task::spawn_blocking(move || BufReader::new(stdout).lines().next());
        let told = tokio::time::timeout(PATIENCE, told).await.expect("it says nothing");
        told.unwrap().expect("it ended").unwrap()
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_guest_runs_on_when_its_saver_is_killed_wherever_it_is() {
    let host = Host::new();
    let console = counters(&host);
    let vm = counter(&host, COUNTER, DISKS, "console", &[]).await;
    counts_on(&console, 1).await;

    // While its memory is sent.
    let through = |command| Swallower::new(&host, command);
    let saver = Saver::start(&host, "saved-slowly", &through("nothing").socket);
    until_migration_is("active", vm.control()).await;
    drop(saver);
    until_it_runs(vm.control()).await;
    counts_on(&console, 1).await;
    until_migration_is("failed", vm.control()).await;

    // When it stands still: before the view is cut, and after. A command that is on its way may come after the death.
    for command in ["blockdev-reopen", "\"cont\""] {
        let mut between = through(command);
        let saver = Saver::start(&host, "saved", &between.socket);
        between.held().await;
        assert_eq!(vm.control().query_status().await.unwrap().status, "postmigrate", "{command}");
        drop(saver);
        until_it_runs(vm.control()).await;
        counts_on(&console, 1).await;
        // Its last word ends with the connection.
        tokio::time::sleep(Duration::from_secs(6)).await;
    }

    // As soon as it stands still, whatever is done just then.
    for _ in 0..5 {
        let mut events = vm.control().events();
        let saver = Saver::start(&host, "saved", &through("nothing").socket);
        let stops = events.wait_for(|event| (*event == rempart_hypervisor::qmp::Event::Stop).then_some(()));
        tokio::time::timeout(PATIENCE, stops).await.expect("it does not stop").unwrap();
        drop(saver);
        until_it_runs(vm.control()).await;
        counts_on(&console, 1).await;
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert!(runs(vm.control()).await);
    }

    // The next one takes away what all of them left.
    let (view, reached) = take(&host, &through("nothing").socket, Saving::new(limit()), false).await.unwrap();
    assert_eq!(reached.level, Level::SavedState);
    view.abandon().await.unwrap();
    counts_on(&console, 1).await;
    assert_eq!((vm.leavings().await, vm.bitmaps().await), (vec![], vec![]));
    let left = std::fs::read_dir(host.path("views")).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(left.flat_map(|vm| std::fs::read_dir(vm.join("scratch")).unwrap()).count(), 0);
}

#[tokio::test]
async fn a_guest_goes_on_when_its_saver_hangs_and_when_the_next_one_finds_it_standing() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let mut between = Swallower::new(&host, "blockdev-reopen");
    let prepared = Prepared::new(&between.socket, &host.options("nightly"), &Known::new()).await.unwrap();
    let policy = policy(Saving::new(Duration::from_secs(2)), false);
    let hanging = tokio::spawn(async move { prepared.take_consistently(&policy).await.map(drop) });
    between.held().await;
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

#[tokio::test]
async fn a_saver_that_stood_still_itself_keeps_no_memory_of_another_moment() {
    let host = Host::new();
    let console = counters(&host);
    let vm = counter(&host, COUNTER, DISKS, "console", &[]).await;
    counts_on(&console, 1).await;

    // While memory is sent: more than fits into a socket, so that somebody takes it.
    let saver = Saver::start(&host, "saved-slowly-briefly", &host.monitor());
    let transferred = async || {
        let migration = vm.control().execute("query-migrate", Value::Null, PATIENCE).await.unwrap();
        migration["ram"]["transferred"].as_u64().unwrap_or(0)
    };
    let end = Instant::now() + PATIENCE;
    while transferred().await < 2 << 20 {
        assert!(Instant::now() < end, "{:?}", vm.control().query_migrate().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    saver.signal(Signal::STOP);
    until_migration_is("failed", vm.control()).await;
    until_it_runs(vm.control()).await;
    counts_on(&console, 1).await;
    let told = saver.goes_on().await;
    assert!(told.starts_with("refused") && told.contains("this program stood still itself"), "{told}");

    // Just before the view is cut: what was on its way is done after the guest went on.
    let mut between = Swallower::new(&host, "blockdev-reopen");
    let saver = Saver::start(&host, "saved-briefly", &between.socket);
    between.held().await;
    assert_eq!(vm.control().query_status().await.unwrap().status, "postmigrate");
    saver.signal(Signal::STOP);
    until_it_runs(vm.control()).await;
    counts_on(&console, 5).await;
    between.let_go();
    let told = saver.goes_on().await;
    assert!(told.starts_with("refused") && told.contains("while the guest stood still"), "{told}");
    assert!(runs(vm.control()).await);
    assert_eq!((vm.leavings().await, vm.bitmaps().await), (vec![], vec![]));
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
    let console = counters(&host);
    let vm = counter(&host, DIRTIER, DISKS, "console", &[]).await;
    counts_on(&console, 1).await;
    let mut saving = Saving::new(Duration::from_secs(4));
    (saving.downtime, saving.bandwidth, saving.rounds) = (Duration::from_millis(10), 8 << 20, 4);
    let error = take(&host, &host.monitor(), saving.clone(), false).await.unwrap_err();
    assert!(error.to_string().contains("faster than QEMU sends it: after 4 rounds"), "{error}");
    assert!(runs(vm.control()).await);
    counts_on(&console, 1).await;
    // It may stand still longer: that is enough.
    saving.limit = limit();
    let (view, reached) = take(&host, &host.monitor(), saving, false).await.unwrap();
    assert_eq!(reached.level, Level::SavedState);
    println!("stood still for {:?}", view.pause().unwrap());
    view.abandon().await.unwrap();
    counts_on(&console, 1).await;
}
