//! Views of a QEMU that somebody else runs: what they show, what they know, and what they leave.

use crate::backup_vm::{
    Host, Model, Random, SIZE, Vm, apply_changes, copied_by_nbdcopy, disk, read_all, reader, run, tokens, uri,
};
use crate::lab::{HELPER, PATIENCE};
use rempart_hypervisor::ErrorKind;
use rempart_hypervisor::qemu::backup::{Changes, LiveView, SkipReason, TrackingToken, WhyUnknown};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub type Known = BTreeMap<String, TrackingToken>;

pub const VDA: &str = "vda";
pub const SDA: &str = "sda";

/// A qcow2 disk with an I/O thread on an old-style drive, and a raw SCSI disk on a block node.
pub async fn two_disks(host: &Host) -> Vm {
    host.start(&[
        "-object",
        "iothread,id=io",
        "-drive",
        &format!("file={},format=qcow2,if=none,id=vda,discard=unmap", host.path("a.qcow2").display()),
        "-device",
        "virtio-blk-pci,drive=vda,id=vda,iothread=io",
        "-blockdev",
        &format!(
            "driver=raw,node-name=data,discard=unmap,file.driver=file,file.filename={},file.discard=unmap",
            host.path("b.raw").display()
        ),
        "-device",
        "virtio-scsi-pci",
        "-device",
        "scsi-hd,drive=data,id=sda",
    ])
    .await
}

pub fn images(host: &Host) {
    host.image("a.qcow2", "qcow2");
    host.image("b.raw", "raw");
}

pub fn models() -> [Model; 2] {
    [Model::new("/machine/peripheral/vda/virtio-backend"), Model::new("sda")]
}

#[tokio::test]
async fn a_view_shows_all_disks_as_they_were_at_its_instant() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let (mut random, [mut a, mut b]) = (Random(1), models());
    for model in [&mut a, &mut b] {
        model.scribble(&vm, &mut random).await;
    }
    let (then_a, then_b) = (a.bytes.clone(), b.bytes.clone());
    let view = host.open("nightly", &Known::new()).await;
    for model in [&mut a, &mut b] {
        model.scribble(&vm, &mut random).await;
        model.write(&vm, 0, 1 << 20, 0xEE).await;
    }
    let (vda, sda) = (disk(&view, VDA), disk(&view, SDA));
    assert_eq!((vda.format.as_str(), sda.format.as_str(), sda.node.as_str()), ("qcow2", "raw", "data"));
    assert_eq!(vda.file, Some(host.path("a.qcow2")));
    assert_eq!(vda.changes, Changes::Unknown(WhyUnknown::FirstView));
    assert!(read_all(vda) == then_a && read_all(sda) == then_b);
    assert!(copied_by_nbdcopy(vda, &host.path("a.copy")) == then_a);
    assert!(copied_by_nbdcopy(sda, &host.path("b.copy")) == then_b);
    let mode = std::fs::metadata(&vda.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let socket = vda.socket.clone();
    view.retire().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);
    assert!(!socket.exists());
    assert_eq!(std::fs::read_dir(socket.with_file_name("scratch")).unwrap().count(), 0);
    // What was written meanwhile is on the disks.
    let view = host.open("other", &Known::new()).await;
    assert!(read_all(disk(&view, VDA)) == a.bytes && read_all(disk(&view, SDA)) == b.bytes);
    view.abandon().await.unwrap();
    vm.quit().await;
    run("qemu-img", &["check", &host.path("a.qcow2").display().to_string()]);
}

#[tokio::test]
async fn increments_add_up_whatever_happened_between_them() {
    let host = Host::new();
    images(&host);
    let mut vm = two_disks(&host).await;
    let (mut random, [mut a, mut b]) = (Random(7), models());
    let (mut copy_a, mut copy_b) = (Vec::new(), Vec::new());
    let mut known = Known::new();
    let mut why = Vec::new();
    for round in
        ["first", "running", "restarted", "running", "killed", "resized", "abandoned", "stored, then killed"]
    {
        match round {
            "restarted" => {
                vm.quit().await;
                vm = two_disks(&host).await;
            }
            "killed" | "stored, then killed" => {
                if round != "killed" {
                    vm.quit().await;
                    vm = two_disks(&host).await;
                }
                for model in [&a, &b] {
                    // What the guest has flushed is on the disk.
                    vm.io(model.device, "flush").await;
                }
                vm.kill();
                vm = two_disks(&host).await;
            }
            "resized" => {
                let grown = SIZE + (1 << 20);
                vm.control().block_resize("data", grown).await.unwrap();
                b.bytes.resize(grown as usize, 0);
            }
            "abandoned" => {
                b.scribble(&vm, &mut random).await;
                let view = host.open("nightly", &known).await;
                b.scribble(&vm, &mut random).await;
                view.abandon().await.unwrap();
            }
            _ => (),
        }
        a.scribble(&vm, &mut random).await;
        b.scribble(&vm, &mut random).await;
        let (then_a, then_b) = (a.bytes.clone(), b.bytes.clone());
        let view = host.open("nightly", &known).await;
        a.scribble(&vm, &mut random).await;
        for (id, copy, then) in [(VDA, &mut copy_a, then_a), (SDA, &mut copy_b, then_b)] {
            let disk = disk(&view, id);
            let read = match &disk.changes {
                Changes::Since { .. } => apply_changes(disk, copy),
                Changes::Unknown(reason) => {
                    why.push(format!("{round} {id}: {reason}"));
                    *copy = read_all(disk);
                    disk.size_bytes
                }
            };
            assert!(*copy == then, "{round}: {id} differs");
            assert!(*copy == copied_by_nbdcopy(disk, &host.path("reference")), "{round}: {id}");
            let known = matches!(disk.changes, Changes::Since { .. });
            assert!(!known || read < SIZE / 2, "{round}: {read} bytes of {id} are not an increment");
        }
        known = tokens(&view);
        view.retire().await.unwrap();
    }
    let told: Vec<String> = why.iter().map(|line| without_generation(line)).collect();
    assert_eq!(
        told,
        [
            "first vda: no earlier backup of this disk is known",
            "first sda: no earlier backup of this disk is known",
            "restarted sda: QEMU has no bitmap `rempart-job.nightly.…`: it was restarted, and this kind of image does \
             not keep bitmaps",
            "killed vda: QEMU has no bitmap `rempart-job.nightly.…`: it was killed before it stored it, or the image is \
             another one",
            "killed sda: QEMU has no bitmap `rempart-job.nightly.…`: it was restarted, and this kind of image does not \
             keep bitmaps",
            "resized sda: the disk's size changed from 25165824 to 26214400 bytes",
            "stored, then killed vda: bitmap `rempart-job.nightly.…` missed writes: QEMU or its host did not end in order",
            "stored, then killed sda: QEMU has no bitmap `rempart-job.nightly.…`: it was restarted, and this kind of image \
             does not keep bitmaps",
        ]
    );
    // One period is being recorded for each disk, and nothing else is left.
    assert_eq!(vm.bitmaps().await.len(), 2);
    assert_eq!(vm.leavings().await, [""; 0]);
}

fn without_generation(line: &str) -> String {
    let Some((before, after)) = line.split_once("nightly.") else { return line.to_owned() };
    format!("{before}nightly.…{}", &after[16..])
}

#[tokio::test]
async fn two_jobs_have_views_at_once_and_each_its_own_changes() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let (mut random, [mut a, _]) = (Random(3), models());
    let first_nightly = host.open("nightly", &Known::new()).await;
    a.write(&vm, 0, 65536, 1).await;
    let first_weekly = host.open("weekly", &Known::new()).await;
    let (nightly, weekly) = (tokens(&first_nightly), tokens(&first_weekly));
    let mut copy_weekly = read_all(disk(&first_weekly, VDA));
    let mut copy_nightly = read_all(disk(&first_nightly, VDA));
    // The one below goes first.
    first_nightly.retire().await.unwrap();
    a.scribble(&vm, &mut random).await;
    assert!(read_all(disk(&first_weekly, VDA)) == copy_weekly);
    first_weekly.retire().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);

    let second_weekly = host.open("weekly", &weekly).await;
    let then_weekly = a.bytes.clone();
    a.scribble(&vm, &mut random).await;
    let then_nightly = a.bytes.clone();
    let second_nightly = host.open("nightly", &nightly).await;
    a.scribble(&vm, &mut random).await;
    apply_changes(disk(&second_weekly, VDA), &mut copy_weekly);
    apply_changes(disk(&second_nightly, VDA), &mut copy_nightly);
    assert!(copy_weekly == then_weekly && copy_nightly == then_nightly);
    // The one above goes first.
    second_nightly.retire().await.unwrap();
    a.scribble(&vm, &mut random).await;
    assert!(read_all(disk(&second_weekly, VDA)) == then_weekly);
    second_weekly.retire().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);
    assert_eq!(vm.bitmaps().await.len(), 4);

    let held = host.open("weekly", &Known::new()).await;
    let error = LiveView::open(&host.monitor(), &host.options("weekly"), &Known::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyRunning);
    held.abandon().await.unwrap();
}

/// Starts a process that takes a view, and kills it when it says where it is.
fn killed_maker(host: &Host, how: &str, known: &Known) {
    let mut child = Command::new(HELPER)
        .args(["view", how, &serde_json::to_string(known).unwrap()])
        .args([host.monitor(), host.path("views")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn what_a_killed_process_left_is_removed_and_no_change_is_forgotten() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let (mut random, [mut a, mut b]) = (Random(11), models());
    a.scribble(&vm, &mut random).await;
    let view = host.open("nightly", &Known::new()).await;
    let (known, mut copy) = (tokens(&view), read_all(disk(&view, VDA)));
    view.retire().await.unwrap();
    a.scribble(&vm, &mut random).await;
    for how in ["prepared", "taken"] {
        killed_maker(&host, how, &known);
        assert!(vm.leavings().await.len() > 8, "{how}");
        a.scribble(&vm, &mut random).await;
        b.scribble(&vm, &mut random).await;
    }
    // A view of another job removes it, too, but for the bitmaps of the killed one's period.
    host.open("weekly", &Known::new()).await.abandon().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);
    assert_eq!(vm.bitmaps().await.len(), 4);
    let view = host.open("nightly", &known).await;
    apply_changes(disk(&view, VDA), &mut copy);
    assert!(copy == a.bytes);
    view.retire().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);
    assert_eq!(vm.bitmaps().await.len(), 2);
}

#[tokio::test]
async fn a_dropped_view_is_removed_and_both_its_periods_stay() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let [mut a, _] = models();
    let view = host.open("nightly", &Known::new()).await;
    let known = tokens(&view);
    view.retire().await.unwrap();
    a.write(&vm, 1 << 20, 65536, 3).await;
    let view = host.open("nightly", &known).await;
    let (later, mut copy) = (tokens(&view), read_all(disk(&view, VDA)));
    drop(view);
    a.write(&vm, 2 << 20, 65536, 4).await;
    // Its commit may have been stored, or not: the caller's next view tells.
    host.open("weekly", &Known::new()).await.abandon().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);
    assert_eq!(vm.bitmaps().await.len(), 4);
    let view = host.open("nightly", &later).await;
    let (mut copy_now, read) = (copy.clone(), apply_changes(disk(&view, VDA), &mut copy));
    assert_eq!(read, 65536);
    copy_now[2 << 20..][..65536].fill(4);
    assert!(copy == copy_now);
    view.retire().await.unwrap();
    assert_eq!(vm.bitmaps().await.len(), 2);
}

/// All writes to the disk came through.
async fn assert_written(host: &Host, byte: u8) {
    let view = host.open("judge", &Known::new()).await;
    assert!(read_all(disk(&view, VDA)).iter().all(|found| *found == byte));
    view.abandon().await.unwrap();
}

/// Writes all over a disk, and how long the slowest request took.
async fn slowest_write(vm: &Vm, device: &str, byte: u8) -> Duration {
    let mut slowest = Duration::ZERO;
    for offset in (0..SIZE).step_by(1 << 20) {
        let begin = Instant::now();
        vm.io(device, &format!("write -P {byte} {offset} 1M")).await;
        slowest = slowest.max(begin.elapsed());
    }
    slowest
}

#[tokio::test]
async fn a_full_scratch_image_ends_the_view_and_not_the_guest() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let [a, _] = models();
    let without_view = slowest_write(&vm, a.device, 1).await;
    let mut options = host.options("nightly");
    options.scratch_bytes = 8 << 20;
    let view = LiveView::open(&host.monitor(), &options, &Known::new()).await.unwrap();
    let disk_a = disk(&view, VDA);
    let mut reader = reader(disk_a);
    let mut block = vec![0; 65536];
    reader.read(0, &mut block).unwrap();
    let with_view = slowest_write(&vm, a.device, 2).await;
    println!("slowest 1 MiB write: {without_view:?} without a view, {with_view:?} with one that broke");
    assert!(with_view < Duration::from_secs(2));
    // No block is served any more: neither one that was copied nor one that was overwritten without.
    for offset in [0, SIZE - 65536] {
        reader.read(offset, &mut block).unwrap_err();
    }
    // The other disk's view is whole, but the point is not.
    read_all(disk(&view, SDA));
    view.abandon().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);
    assert_written(&host, 2).await;
}

#[tokio::test]
async fn a_scratch_device_that_hangs_ends_the_view_within_its_time() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let [a, _] = models();
    slowest_write(&vm, a.device, 1).await;
    let scratch = FreezingDirectory::new(&host);
    let mut options = host.options("nightly");
    options.directory = host.path("frozen");
    options.copy_timeout = Duration::from_secs(2);
    let view = LiveView::open(&host.monitor(), &options, &Known::new()).await.unwrap();
    scratch.freeze("-f");
    let slowest = slowest_write(&vm, a.device, 2).await;
    println!("slowest 1 MiB write while the scratch device hangs: {slowest:?}");
    assert!(slowest >= Duration::from_secs(1) && slowest < Duration::from_secs(8), "{slowest:?}");
    scratch.freeze("-u");
    reader(disk(&view, VDA)).read(0, &mut [0; 512]).unwrap_err();
    view.abandon().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);
    assert_written(&host, 2).await;
}

/// A small file system that can be frozen.
struct FreezingDirectory {
    path: String,
}

impl FreezingDirectory {
    fn new(host: &Host) -> Self {
        let (image, path) = (host.image("fs", "raw"), host.path("frozen").display().to_string());
        run("truncate", &["-s", "256M", &image]);
        run("mkfs.ext4", &["-q", &image]);
        std::fs::create_dir(&path).unwrap();
        run("mount", &["-o", "loop", &image, &path]);
        Self { path }
    }

    fn freeze(&self, option: &str) {
        run("fsfreeze", &[option, &self.path]);
    }
}

impl Drop for FreezingDirectory {
    fn drop(&mut self) {
        // A test that failed may have left it frozen.
        let _ = Command::new("fsfreeze").args(["-u", &self.path]).stderr(Stdio::null()).status();
        let _ = Command::new("umount").args(["-l", &self.path]).status();
    }
}

#[tokio::test]
async fn a_slow_reader_does_not_hold_the_guest() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let [a, _] = models();
    slowest_write(&vm, a.device, 1).await;
    let view = host.open("nightly", &Known::new()).await;
    // It asks for everything and takes nothing.
    let mut slow = reader(disk(&view, VDA));
    for offset in (0..SIZE).step_by(1 << 20) {
        slow.submit(rempart_nbd::client::Command::Read { offset, length: 1 << 20 }).unwrap();
    }
    let slowest = slowest_write(&vm, a.device, 2).await;
    println!("slowest 1 MiB write beside a reader that takes nothing: {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    assert!(read_all(disk(&view, VDA)).iter().all(|byte| *byte == 1));
    drop(slow);
    view.abandon().await.unwrap();
}

#[tokio::test]
async fn only_disks_that_the_guest_writes_to_are_in_a_view() {
    let host = Host::new();
    for (name, format) in [("ide", "raw"), ("ro", "raw"), ("cd", "raw"), ("flash", "raw"), ("nvme", "qcow2")]
    {
        host.image(name, format);
    }
    run("truncate", &["-s", "4M", &host.path("flash").display().to_string()]);
    let path = |name: &str| host.path(name).display().to_string();
    let vm = host
        .start(&[
            "-drive",
            &format!("file={},format=raw,if=ide", path("ide")),
            "-drive",
            &format!("file={},format=raw,if=virtio,readonly=on", path("ro")),
            "-drive",
            &format!("file={},format=raw,media=cdrom,if=ide", path("cd")),
            "-drive",
            "if=none,id=nothing,media=cdrom",
            "-device",
            "ide-cd,drive=nothing,id=empty,bus=ide.3",
            "-drive",
            &format!("file={},format=raw,if=pflash,unit=1", path("flash")),
            "-drive",
            &format!("file={},format=raw,if=pflash,unit=0,readonly=on", "/usr/share/OVMF/OVMF_CODE_4M.fd"),
            "-blockdev",
            &format!("driver=qcow2,node-name=n0,file.driver=file,file.filename={}", path("nvme")),
            "-device",
            "nvme,drive=n0,serial=1",
        ])
        .await;
    let view = host.open("nightly", &Known::new()).await;
    let disks: Vec<_> = view.disks().iter().map(|disk| disk.id.as_str()).collect();
    assert_eq!(disks, ["ide0-hd0", "/machine/peripheral-anon/device[0]"]);
    let skipped: BTreeMap<_, _> =
        view.skipped().iter().map(|device| (device.id.as_str(), device.reason.clone())).collect();
    assert_eq!(skipped["nothing"], SkipReason::Empty);
    assert_eq!(skipped["ide1-cd0"], SkipReason::ReadOnly);
    assert_eq!(skipped["virtio0"], SkipReason::ReadOnly);
    assert_eq!(skipped["pflash1"], SkipReason::Firmware(Some(host.path("flash"))));
    for disk in view.disks() {
        assert_eq!(read_all(disk).len() as u64, SIZE);
    }
    let variables = view.variables().unwrap().as_ref().unwrap();
    let copy = host.path("variables");
    let uri = format!("nbd+unix:///{}?socket={}", variables.export, variables.socket.display());
    run("nbdcopy", &[&uri, &copy.display().to_string()]);
    assert!(std::fs::read(copy).unwrap() == std::fs::read(host.path("flash")).unwrap());
    let description = view.description();
    assert_eq!(description["told"]["machine"].as_str().map(|name| name.starts_with("pc-q35")), Some(true));
    assert!(description["command_line"].as_array().unwrap().contains(&json!("-no-user-config")));
    view.retire().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);
}

#[tokio::test]
async fn bitmaps_and_jobs_of_others_are_not_disturbed() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let [mut a, mut b] = models();
    let control = vm.control();
    let bitmap = json!({ "node": "data", "name": "theirs" });
    control.execute("block-dirty-bitmap-add", bitmap, PATIENCE).await.unwrap();
    let target = host.image("target", "raw");
    let target =
        json!({ "driver": "raw", "node-name": "target", "file": { "driver": "file", "filename": target } });
    control.blockdev_add(target).await.unwrap();
    let job = json!({
        "job-id": "theirs", "device": "data", "target": "target", "sync": "none", "filter-node-name": "their-filter",
    });
    control.execute("blockdev-backup", job, PATIENCE).await.unwrap();
    b.write(&vm, 0, 65536, 1).await;
    let view = host.open("nightly", &Known::new()).await;
    assert_eq!(disk(&view, SDA).node, "data");
    a.write(&vm, 0, 65536, 2).await;
    b.write(&vm, 65536, 65536, 2).await;
    assert!(read_all(disk(&view, SDA))[65536..131_072].iter().all(|byte| *byte == 0));
    let known = tokens(&view);
    view.retire().await.unwrap();
    let nodes = control.query_named_block_nodes().await.unwrap();
    let theirs = nodes.iter().flat_map(|node| &node.bitmaps).find(|bitmap| bitmap.name == "theirs");
    assert!(theirs.unwrap().recording);
    let jobs = control.query_jobs().await.unwrap();
    assert_eq!(jobs.len(), 1);
    // Their job ends while our view is open.
    let view = host.open("nightly", &known).await;
    let cancel = json!({ "device": "theirs" });
    control.execute("block-job-cancel", cancel, PATIENCE).await.unwrap();
    b.write(&vm, 131_072, 65536, 3).await;
    let mut copy = b.bytes.clone();
    copy[131_072..][..65536].fill(0);
    assert!(read_all(disk(&view, SDA)) == copy);
    view.retire().await.unwrap();
    assert_eq!(vm.leavings().await, [""; 0]);

    // A job that hides its filter, and a server that is taken: refused, and nothing is left.
    let job = json!({ "job-id": "hidden", "device": "data", "target": "target", "sync": "full" });
    control.execute("blockdev-mirror", job, PATIENCE).await.unwrap();
    let error = LiveView::open(&host.monitor(), &host.options("nightly"), &known).await.unwrap_err();
    assert!(error.to_string().contains("a block job of another program runs on it"), "{error}");
    control
        .execute("block-job-cancel", json!({ "device": "hidden", "force": true }), PATIENCE)
        .await
        .unwrap();
    control.nbd_server_start(&host.path("theirs.sock")).await.unwrap();
    let error = loop {
        match LiveView::open(&host.monitor(), &host.options("nightly"), &known).await {
            Err(error) if error.to_string().contains("a block job") => (),
            other => break other.unwrap_err(),
        }
    };
    assert!(error.to_string().contains("another program uses it"), "{error}");
    assert_eq!(vm.leavings().await, [""; 0]);
}

#[tokio::test]
async fn taking_a_view_holds_writes_for_a_moment() {
    let host = Host::new();
    images(&host);
    let vm = two_disks(&host).await;
    let mut stalls = Vec::new();
    let mut known = Known::new();
    for _ in 0..5 {
        let begin = Instant::now();
        let view = host.open("nightly", &known).await;
        let opened = begin.elapsed();
        stalls.push((view.stall(), opened));
        known = tokens(&view);
        view.retire().await.unwrap();
    }
    println!("stall and time to open, of two disks: {stalls:?}");
    assert!(stalls.iter().all(|(stall, _)| *stall < Duration::from_secs(2)));
    let map = {
        let view = host.open("nightly", &known).await;
        let context = match &disk(&view, VDA).changes {
            Changes::Since { context, .. } => context.clone(),
            Changes::Unknown(why) => panic!("{why}"),
        };
        let map = run("nbdinfo", &[&format!("--map={context}"), &uri(disk(&view, VDA))]);
        view.retire().await.unwrap();
        map
    };
    // Nothing was written in the last period, says another reader, too.
    assert!(map.trim_end().ends_with("clean") && map.lines().count() == 1, "{map}");
    drop(vm);
}
