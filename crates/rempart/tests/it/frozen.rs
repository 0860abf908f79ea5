//! `rempart agent --freeze`: file systems stand still while their device is read, and go on whatever happens to who froze them.

use crate::backup::Vault;
use crate::rack::{Answer, noise};
use crate::running::{Mounted, refused, tool, until};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{PipeReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Bytes that a pipe holds.
const PIPE: usize = 64 * 1024;

/// A file system on a loop device, with a repository elsewhere.
struct Scene {
    // Before what it lies in is removed.
    _mounted: Mounted,
    vault: Vault,
    data: PathBuf,
    device: String,
}

impl Drop for Scene {
    /// What a test that failed left frozen would hold up everybody who wants to remove it.
    fn drop(&mut self) {
        let thaw = Command::new("fsfreeze").arg("--unfreeze").arg(&self.data).stderr(Stdio::null()).status();
        assert!(thaw.is_ok(), "there is an fsfreeze");
    }
}

fn device_of(place: &Path) -> String {
    tool(&["findmnt", "-n", "-o", "SOURCE", place.to_str().unwrap()]).trim().to_owned()
}

/// A loop device, until this is dropped. Its partitions go with it, so that nobody who gets the same device later has them.
struct Loop(String);

impl Loop {
    fn of(file: &str) -> Loop {
        Loop(tool(&["losetup", "--find", "--show", "--partscan", file]).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        for command in [["partx", "--delete"], ["losetup", "--detach"]] {
            let _ = Command::new(command[0]).args([command[1], &self.0]).stderr(Stdio::null()).status();
        }
    }
}

impl Scene {
    fn new(mkfs: &[&str]) -> Scene {
        let vault = Vault::opened_by_file();
        let data = vault.rack.path("data");
        let mounted = Mounted::image(&data, 320 * MIB, mkfs);
        fs::write(data.join("noise"), noise(21, 8 << 20)).unwrap();
        let device = device_of(&data);
        Scene { _mounted: mounted, vault, data, device }
    }

    fn ext4() -> Scene {
        Scene::new(&["mkfs.ext4", "-q"])
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let fixed = ["agent", "backup", "--name", "web", "--device", &self.device, "--freeze"];
        self.vault.command(&[&fixed, arguments].concat())
    }

    fn back_up(&self, arguments: &[&str]) -> (Answer, Value) {
        let answer = Answer::of(self.command(&[arguments, &["--json"]].concat()).output().unwrap());
        let told = serde_json::from_str(&answer.out).unwrap_or_default();
        (answer, told)
    }

    fn refused(&self, arguments: &[&str], why: &str) {
        let (answer, _) = self.back_up(arguments);
        assert!(answer.code == 4 && answer.err.contains(why), "{}: {}", answer.code, answer.err);
        fs::write(self.data.join("free"), "it stands still no more").unwrap();
    }

    /// One that has everything frozen, and does not end before somebody hears what it says.
    fn unheard(&self, arguments: &[&str]) -> (Unheard, Writer) {
        let writer = Writer::new(&self.data);
        let (said, mut full) = std::io::pipe().unwrap();
        full.write_all(&[b'\n'; PIPE]).unwrap();
        // As a shell starts it: in a group of its own.
        let child = self.command(arguments).stderr(full).process_group(0).spawn().unwrap();
        let unheard = Unheard { child, said };
        until("the writer waits", || writer.stands_still());
        (unheard, writer)
    }
}

struct Unheard {
    child: Child,
    said: PipeReader,
}

impl Unheard {
    /// The process that thaws.
    fn watch(&self) -> u32 {
        let own = self.child.id().to_string();
        let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: u32 = entry.unwrap().file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let parent = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.to_owned();
            (parent == own).then_some(pid)
        });
        let found: Vec<u32> = processes.collect();
        assert_eq!(found.len(), 1, "it has one child");
        found[0]
    }

    fn signal(&self, signal: &str, pid: impl std::fmt::Display) {
        tool(&["kill", signal, "--", &pid.to_string()]);
    }

    /// What it says, and its exit code.
    fn heard(mut self) -> (String, Option<i32>) {
        let mut said = String::new();
        self.said.read_to_string(&mut said).unwrap();
        (said, self.child.wait().unwrap().code())
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes numbers into a file, one after the other, each of them synced.
struct Writer {
    written: Arc<AtomicU64>,
    thread: PathBuf,
    is_over: Arc<AtomicBool>,
}

impl Writer {
    fn new(folder: &Path) -> Writer {
        let file = File::create(folder.join("numbers")).unwrap();
        let (written, is_over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (tell, told) = std::sync::mpsc::channel();
        let (count, end) = (written.clone(), is_over.clone());
        std::thread::spawn(move || {
            tell.send(PathBuf::from("/proc").join(fs::read_link("/proc/thread-self").unwrap())).unwrap();
            while !end.load(Ordering::Relaxed) {
                let next = count.load(Ordering::Relaxed) + 1;
                file.write_all_at(&next.to_le_bytes(), 0).unwrap();
                file.sync_all().unwrap();
                count.store(next, Ordering::Relaxed);
            }
        });
        Writer { written, thread: told.recv().unwrap(), is_over }
    }

    fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// It waits in the kernel, and got no further for 300 ms.
    fn stands_still(&self) -> bool {
        let (before, start) = (self.written(), Instant::now());
        while start.elapsed() < Duration::from_millis(300) {
            let stat = fs::read_to_string(self.thread.join("stat")).unwrap();
            if self.written() != before || !stat.rsplit_once(')').unwrap().1.starts_with(" D") {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        before > 0
    }

    /// Far sooner than the time is over.
    #[track_caller]
    fn goes_on(&self) {
        let before = self.written();
        until("the writer goes on", || self.written() > before + 1);
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // What it has open keeps its file system from going away; one that waits in the kernel does so until that is thawed.
        let start = Instant::now();
        while self.thread.exists() && start.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// `check` is a program of a shell that is told the image.
fn stands_still_until_it_is_read(mkfs: &[&str], check: &str, mount: &str) {
    let scene = Scene::new(mkfs);
    let (unheard, writer) = scene.unheard(&["--freeze-timeout", "10m"]);
    let frozen_at = writer.written();
    let (said, code) = unheard.heard();
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("consistency: file-system: `") && said.contains("nobody could write for"),
        "{said}"
    );
    assert!(said.contains("were left out (free-space)"), "{said}");
    writer.goes_on();

    let to = scene.vault.rack.path("to");
    scene.vault.ok(&["restore", "web", "--to", to.to_str().unwrap()]);
    let image = to.join(format!("{}.raw", scene.device.strip_prefix("/dev/").unwrap()));
    let restored = scene.vault.rack.path("restored");
    let mounted = Mounted::at(&restored, &["-o", mount, image.to_str().unwrap()]);
    let numbers = fs::read(restored.join("numbers")).unwrap();
    let number = u64::from_le_bytes(numbers[..].try_into().unwrap());
    assert!(number == frozen_at || number == frozen_at + 1, "{number} of {frozen_at}");
    assert!(fs::read(restored.join("noise")).unwrap() == noise(21, 8 << 20));
    drop(mounted);
    tool(&["sh", "-c", check, "sh", image.to_str().unwrap(), restored.to_str().unwrap()]);

    let point = &scene.vault.json(&["points", "web"])[0];
    assert_eq!(point["consistency"]["level"], "file-system", "{point}");
    let (answer, whole) = scene.back_up(&["--include", "free-space"]);
    assert_eq!((answer.code, &whole["disks"][0]["left_out_bytes"]), (0, &0.into()), "{}", answer.err);
}

#[test]
fn an_ext4_stands_still_while_its_device_is_read_and_no_longer() {
    stands_still_until_it_is_read(&["mkfs.ext4", "-q"], "e2fsck -f -n $1", "loop,ro,noload");
}

#[test]
fn an_xfs_stands_still_while_its_device_is_read_and_no_longer() {
    // It always calls for its log to be read, in which nothing is that matters.
    let check = "mount -o loop,nouuid $1 $2 && umount $2 && xfs_repair -n $1";
    stands_still_until_it_is_read(&["mkfs.xfs", "-q"], check, "loop,ro,norecovery,nouuid");
}

#[test]
fn who_is_killed_holds_up_nobody() {
    let scene = Scene::ext4();
    let before = scene.vault.json(&["points"]);
    // With all of its group, as a shell does it.
    let (unheard, writer) = scene.unheard(&["--freeze-timeout", "1h"]);
    unheard.signal("-KILL", -i64::from(unheard.child.id()));
    writer.goes_on();
    drop((unheard, writer));
    for signal in ["-TERM", "-INT", "-HUP"] {
        let (unheard, writer) = scene.unheard(&["--freeze-timeout", "1h"]);
        unheard.signal(signal, unheard.child.id());
        writer.goes_on();
    }
    // Its watch is told to end, or killed itself.
    for signal in ["-TERM", "-KILL"] {
        let (unheard, writer) = scene.unheard(&["--freeze-timeout", "1h"]);
        unheard.signal(signal, unheard.watch());
        writer.goes_on();
        let (said, code) = unheard.heard();
        assert!(code == Some(4) && said.contains("it was thawed before it was read"), "{said}");
    }
    // Everybody who hears it is told to end at once, as where a service is stopped.
    let (unheard, writer) = scene.unheard(&["--freeze-timeout", "1h"]);
    let watch = unheard.watch();
    unheard.signal("-STOP", watch);
    for pid in [watch, unheard.child.id()] {
        unheard.signal("-TERM", pid);
    }
    unheard.signal("-CONT", watch);
    writer.goes_on();
    assert_eq!(scene.vault.json(&["points"]), before, "none of them made a point");
}

#[test]
fn when_the_time_is_over_everything_goes_on_and_the_point_is_not_called_frozen() {
    let scene = Scene::ext4();
    // It can do nothing itself.
    let (unheard, writer) = scene.unheard(&["--freeze-timeout", "3s"]);
    unheard.signal("-STOP", unheard.child.id());
    writer.goes_on();
    unheard.signal("-CONT", unheard.child.id());
    let (said, code) = unheard.heard();
    assert!(
        code == Some(4) && said.contains("3 s were not enough") && said.contains("--freeze-timeout"),
        "{said}"
    );
    assert_eq!(scene.vault.json(&["points"]), Value::Array(Vec::new()));
    drop(writer);

    let (unheard, writer) = scene.unheard(&["--freeze-timeout", "3s", "--else", "live"]);
    writer.goes_on();
    let (said, code) = unheard.heard();
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains("left out"), "it was in use: {said}");
    let point = &scene.vault.json(&["points", "web"])[0];
    assert_eq!(point["consistency"]["level"], "live", "{point}");
    assert!(point["consistency"]["why"].as_str().unwrap().contains("3 s were not enough"), "{point}");

    // An administrator does not want to wait.
    let (unheard, writer) = scene.unheard(&["--freeze-timeout", "1h"]);
    tool(&["fsfreeze", "--unfreeze", scene.data.to_str().unwrap()]);
    writer.goes_on();
    let (said, code) = unheard.heard();
    assert!(code == Some(4) && said.contains("it was thawed before it was read"), "{said}");
}

#[test]
fn what_the_backup_itself_writes_to_does_not_stand_still() {
    let scene = Scene::ext4();
    let path = |name: &str| scene.data.join(name).to_str().unwrap().to_owned();
    let cache = path("cache");
    scene.refused(&["--cache-dir", &cache], "the cache (`");
    let mut logged = scene.command(&[]);
    let logged = Answer::of(logged.stdout(File::create(path("out")).unwrap()).output().unwrap());
    assert!(logged.code == 4 && logged.err.contains("the standard output (`"), "{}", logged.err);
    let key = scene.vault.rack.path("key-2").to_str().unwrap().to_owned();
    let with = |place: &str| {
        scene.vault.ok(&["repo", "create", place, "--new-key-file", &key]);
        scene.refused(&["--repo", place, "--key-file", &key], "the repository (`");
        fs::remove_file(&key).unwrap();
    };
    with(&path("repo"));
    // In a file on it.
    let inner = scene.vault.rack.path("inner");
    let image = path("inner.img");
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    tool(&["mkfs.ext4", "-q", &image]);
    let mounted = Mounted::at(&inner, &["-o", "loop", &image]);
    with(inner.join("repo").to_str().unwrap());
    drop(mounted);
    // On an overlay that writes to it.
    for name in ["upper", "work"] {
        fs::create_dir(path(name)).unwrap();
    }
    let over = format!("lowerdir=/etc,upperdir={},workdir={}", path("upper"), path("work"));
    let overlay = scene.vault.rack.path("overlay");
    let _overlay = Mounted::at(&overlay, &["-t", "overlay", "overlay", "-o", &over]);
    with(overlay.join("repo").to_str().unwrap());
    assert_eq!(scene.vault.json(&["points"]), Value::Array(Vec::new()));
}

#[test]
fn what_others_froze_is_theirs_and_what_cannot_stand_still_is_told() {
    let scene = Scene::ext4();
    let data = scene.data.to_str().unwrap();
    tool(&["fsfreeze", "--freeze", data]);
    let (answer, _) = scene.back_up(&[]);
    assert!(answer.code == 4 && answer.err.contains("another program froze it"), "{}", answer.err);
    let (answer, told) = scene.back_up(&["--else", "live"]);
    let consistency = &told["consistency"];
    assert_eq!((answer.code, &consistency["level"]), (0, &"live".into()), "{}", answer.err);
    assert!(consistency["why"].as_str().unwrap().contains("another program froze it"), "{told}");
    assert_eq!(
        (&consistency["pause_ms"], &told["disks"][0]["left_out_bytes"]),
        (&Value::Null, &0.into()),
        "{told}"
    );
    // It still is.
    tool(&["fsfreeze", "--unfreeze", data]);

    // Mounted where nobody here sees it.
    let hidden = scene.vault.rack.path("hidden.img");
    File::create(&hidden).unwrap().set_len(32 * MIB).unwrap();
    tool(&["mkfs.ext4", "-q", hidden.to_str().unwrap()]);
    let device = Loop::of(hidden.to_str().unwrap());
    let device = &device.0;
    let place = scene.vault.rack.path("place");
    fs::create_dir(&place).unwrap();
    let place = place.to_str().unwrap();
    let mount = format!("mount {device} {place} && echo ready && read line");
    let mut elsewhere = Command::new("unshare");
    let elsewhere = elsewhere.args(["--mount", "--propagation", "private", "sh", "-c", &mount]);
    let mut elsewhere = elsewhere.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut ready = [0; 6];
    elsewhere.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    scene.refused(&["--device", device], "something has it in use that is not mounted here");
    drop(elsewhere.stdin.take());
    elsewhere.wait().unwrap();
    // Nobody has it mounted any more, nor can anybody.
    let (unheard, writer) = scene.unheard(&["--device", device]);
    assert!(refused(&["mount", device, place]).contains("already mounted or mount point busy"));
    let (said, code) = unheard.heard();
    assert_eq!(code, Some(0), "{said}");
    drop(writer);

    // A program writes to it, and knows of no freezing.
    let foreign = scene.vault.rack.path("foreign");
    let image = scene.vault.rack.path("foreign.img").to_str().unwrap().to_owned();
    File::create(&image).unwrap().set_len(32 * MIB).unwrap();
    tool(&["mkfs.ntfs", "-q", "-F", &image]);
    let _foreign = Mounted::at(&foreign, &["-t", "ntfs-3g", "-o", "loop", &image]);
    scene.refused(&["--device", &device_of(&foreign)], "its file system cannot be frozen");
    let plain = scene.vault.rack.path("plain");
    fs::write(&plain, [7; 1 << 20]).unwrap();
    scene.refused(&["--device", plain.to_str().unwrap()], "it is no block device");
}

#[test]
fn partitions_and_what_lies_in_files_of_each_other_stand_still_together() {
    let scene = Scene::ext4();
    // A file system in a file of the first, and a disk with partitions, of which one is mounted.
    let image = scene.data.join("inner.img").to_str().unwrap().to_owned();
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    tool(&["mkfs.ext4", "-q", &image]);
    let inner = scene.vault.rack.path("inner");
    let _inner = Mounted::at(&inner, &["-o", "loop", &image]);
    let disk = scene.vault.rack.path("disk.img").to_str().unwrap().to_owned();
    File::create(&disk).unwrap().set_len(96 * MIB).unwrap();
    let table = format!("printf 'label: gpt\\n,32M\\n,32M\\n' | sfdisk -q {disk}");
    tool(&["sh", "-c", &table]);
    let device = Loop::of(&disk);
    // Not every kernel looks for them itself.
    tool(&["partx", "--update", &device.0]);
    let device = &device.0;
    for partition in ["p1", "p2"] {
        tool(&["mkfs.ext4", "-q", &format!("{device}{partition}")]);
    }
    let part = scene.vault.rack.path("part");
    let mounted = Mounted::at(&part, &[&format!("{device}p1")]);
    let writers = [&inner, &part].map(|place| Writer::new(place));
    let arguments = ["--device", &device_of(&inner), "--device", device, "--freeze-timeout", "10m"];
    let (unheard, writer) = scene.unheard(&arguments);
    for writer in &writers {
        until("the writer waits", || writer.stands_still());
    }
    let place = scene.vault.rack.path("place");
    fs::create_dir(&place).unwrap();
    refused(&["mount", &format!("{device}p2"), place.to_str().unwrap()]);
    let (said, code) = unheard.heard();
    assert_eq!(code, Some(0), "{said}");
    for writer in writers.iter().chain([&writer]) {
        writer.goes_on();
    }
    let point = &scene.vault.json(&["points", "web"])[0];
    assert_eq!(point["consistency"]["level"], "file-system", "{point}");
    let why = point["consistency"]["why"].as_str().unwrap();
    let [data, inner, _] = [&scene.data, &inner, &part].map(|place| {
        let told = why.find(&format!("`{}`", place.display()));
        told.unwrap_or_else(|| panic!("{}: {why}", place.display()))
    });
    assert!(inner < data, "what lies in the file of another is frozen before that: {why}");
    drop((writers, writer, mounted));
}
