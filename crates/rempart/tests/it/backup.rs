//! Backups by the command line: of disks, where no daemon runs, and of machines that two nodes mirror.

use crate::export::map;
use crate::golden::Transcript;
use crate::rack::{Answer, PROGRAM, Rack, Server, noise};
use rempart_objects::Directory;
use rempart_repository::log::Session;
use rempart_repository::{AnyKey, Repository, SessionId, Unlock};
use rempart_types::WallTime;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

const MIB: usize = 1 << 20;

/// A repository, and what is around it.
pub struct Vault {
    pub rack: Rack,
}

impl Vault {
    /// An empty repository, opened by a passphrase.
    pub fn new() -> Vault {
        let vault = Vault { rack: Rack::new() };
        std::fs::write(vault.rack.path("passphrase"), "correct horse\n").unwrap();
        vault.ok(&["repo", "create", vault.repo().to_str().unwrap()]);
        vault
    }

    /// The same, opened by a key file, which takes much less time.
    pub fn opened_by_file() -> Vault {
        let vault = Vault { rack: Rack::new() };
        let (repo, key) = (vault.repo(), vault.rack.path("key"));
        vault.ok(&["repo", "create", repo.to_str().unwrap(), "--new-key-file", key.to_str().unwrap()]);
        vault
    }

    pub fn repo(&self) -> PathBuf {
        self.rack.path("repo")
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments)
            .env("REMPART_REPOSITORY", self.repo())
            .env("REMPART_CACHE_DIR", self.rack.path("cache"))
            .stdin(Stdio::null());
        for (variable, file) in [("REMPART_PASSPHRASE_FILE", "passphrase"), ("REMPART_KEY_FILE", "key")] {
            let file = self.rack.path(file);
            if file.exists() {
                command.env(variable, file);
            }
        }
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Answer {
        Answer::of(self.command(arguments).output().unwrap())
    }

    pub fn ok(&self, arguments: &[&str]) -> Answer {
        let answer = self.run(arguments);
        assert_eq!(answer.code, 0, "{arguments:?}: {}", answer.err);
        answer
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        let answer = self.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&answer.out).expect("one JSON value")
    }

    pub fn refused(&self, arguments: &[&str]) -> Answer {
        let answer = self.run(arguments);
        assert_ne!(answer.code, 0, "{arguments:?}: {}", answer.err);
        answer
    }

    /// The name of the one point there will be, of a disk whose bytes differ everywhere.
    fn filled(&self) -> (PathBuf, Vec<u8>) {
        let content: Vec<u8> =
            (0..3 * MIB as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let disk = self.rack.path("disk.raw");
        std::fs::write(&disk, &content).unwrap();
        self.ok(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
        (disk, content)
    }

    /// By the daemon of `node`.
    pub fn back_up(&self, node: &Server) -> Value {
        let config = node.config();
        self.json(&["backup", "shop", "--config", config.to_str().unwrap()])
    }

    pub fn restored(&self, point: &str, folder: &str) -> Vec<Vec<u8>> {
        let to = self.rack.path(folder);
        self.ok(&["restore", point, "--to", to.to_str().unwrap()]);
        let disks = (0..).map_while(|disk| std::fs::read(to.join(format!("disk{disk}.raw"))).ok());
        disks.collect()
    }

    pub fn files_below(&self, folder: &str) -> Vec<PathBuf> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        walk(&self.repo().join(folder), &mut found);
        found
    }
}

/// What a command told of its progress; nothing else is on stderr.
fn progress_of(answer: &Answer) -> Vec<Value> {
    let lines =
        answer.err.lines().map(|line| serde_json::from_str::<Value>(line).expect("one JSON value a line"));
    lines.map(|line| line["progress"].clone()).collect()
}

#[test]
fn programs_are_told_the_progress() {
    let vault = Vault::new();
    let (disk, _) = vault.filled();
    // Of 8 MiB, 5 are a hole.
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(8 * MIB as u64).unwrap();
    let disk = disk.to_str().unwrap();
    let backup = vault.ok(&["backup", "other", "--disk", disk, "--json", "--progress", "json"]);
    serde_json::from_str::<Value>(&backup.out).expect("the result is on stdout");
    let told = progress_of(&backup);
    let last = told.last().expect("the end is told");
    assert_eq!(last["phase"], "back up other");
    assert_eq!((&last["done_bytes"], &last["total_bytes"]), (&Value::from(3 * MIB), &Value::from(3 * MIB)));
    assert_eq!(last["remaining_bytes"], 0);
    assert!(last["new_bytes"].as_u64().unwrap() < 100_000, "only nodes of its tree: {last}");
    for (command, to) in
        [("restore", &["--to", vault.rack.path("back").to_str().unwrap()][..]), ("verify", &[])]
    {
        let answer = vault.ok(&[&[command, "other", "--json", "--progress", "json"], to].concat());
        let last = progress_of(&answer).pop().expect("the end is told");
        assert_eq!(
            (&last["done_bytes"], &last["total_bytes"]),
            (&Value::from(3 * MIB), &Value::from(3 * MIB))
        );
    }
    let silent = vault.ok(&["verify", "other", "--json", "--progress", "none"]);
    assert_eq!(silent.err, "");
}

#[test]
fn a_disk_comes_back_as_it_was() {
    let vault = Vault::new();
    let (disk, first) = vault.filled();
    let mut second = first.clone();
    second[MIB..MIB + 100].fill(9);
    std::fs::write(&disk, &second).unwrap();
    let backup = vault.json(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
    assert_eq!(backup["read_bytes"], 3 * MIB);
    let new = backup["new_bytes"].as_u64().unwrap();
    assert!((128 * 1024 + 1..128 * 1024 + 1024).contains(&new), "one chunk, and the node above it: {backup}");
    let points = vault.json(&["points"]);
    let points: Vec<String> =
        points.as_array().unwrap().iter().map(|point| format!("shop@{}", point["point"])).collect();
    for (point, content, folder) in [(&points[0], &first, "one"), (&points[1], &second, "two")] {
        let to = vault.rack.path(folder);
        vault.ok(&["restore", point, "--to", to.to_str().unwrap()]);
        assert!(std::fs::read(to.join("disk0.raw")).unwrap() == *content, "{point}");
    }
    let again = vault.refused(&["restore", "shop", "--to", vault.rack.path("two").to_str().unwrap()]);
    assert!(again.err.contains("File exists"), "nothing is overwritten: {}", again.err);
    let verified = vault.json(&["verify", "shop", &points[0]]);
    assert_eq!(verified[0]["sound_bytes"], 3 * MIB);
}

#[test]
fn a_qcow2_image_is_read_as_the_disk_it_is() {
    let vault = Vault::new();
    let image = vault.rack.path("disk.qcow2");
    let image = image.to_str().unwrap();
    for command in [
        &["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"][..],
        &["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 5M 1M", image],
    ] {
        assert!(
            Command::new(command[0]).args(&command[1..]).stdout(Stdio::null()).status().unwrap().success()
        );
    }
    let backup = vault.json(&["backup", "shop", "--disk", image, "--format", "qcow2"]);
    assert!(backup["read_bytes"].as_u64().unwrap() <= 2 * MIB as u64, "only what is allocated: {backup}");
    let to = vault.rack.path("back");
    vault.ok(&["restore", "shop", "--to", to.to_str().unwrap()]);
    let restored = std::fs::read(to.join("disk0.raw")).unwrap();
    assert_eq!(restored.len(), 64 * MIB);
    let written = 5 * MIB..6 * MIB;
    assert!(restored.iter().enumerate().all(|(at, byte)| *byte == if written.contains(&at) { 7 } else { 0 }));
}

/// A loop device, for as long as this is there.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Loop {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Loop(String::from_utf8(made.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_backed_up_and_brought_back_onto_another() {
    let vault = Vault::new();
    let (_, content) = vault.filled();
    let source = Loop::new(&vault.rack.path("disk.raw"));
    let backup = vault.json(&["backup", "device", "--disk", &source.0]);
    assert_eq!((&backup["read_bytes"], &backup["new_bytes"]), (&(3 * MIB).into(), &0.into()));
    let target = vault.rack.image("target.raw", 4 * MIB, 9);
    let device = Loop::new(&target);
    vault.ok(&["restore", "device", "--device", &device.0, "--yes"]);
    drop(device);
    let restored = std::fs::read(target).unwrap();
    assert!(restored[..3 * MIB] == content && restored[3 * MIB..].iter().all(|byte| *byte == 9));
}

#[test]
fn all_machines_of_a_node_are_backed_up_and_one_that_fails_keeps_no_other_from_it() {
    let vault = Vault::new();
    let (a, b) = vault.rack.pair();
    for (vm, fill) in [("mail", 1), ("shop", 2), ("test", 3)] {
        a.import(vm, &[&vault.rack.image(&format!("{vm}.raw"), MIB, fill)]);
    }
    let config = |node: &Server| node.config().to_str().unwrap().to_owned();
    let config_a = config(&a);
    let all = ["backup", "--all", "--exclude", "test", "--config", &config_a];
    let told = vault.json(&all);
    let told: Vec<_> =
        told.as_array().unwrap().iter().map(|vm| (&vm["vm"], &vm["consistency"]["level"])).collect();
    assert_eq!(told, [(&"mail".into(), &"stopped".into()), (&"shop".into(), &"stopped".into())]);
    assert!(vault.restored("mail", "mail") == [vec![1; MIB]]);

    let some = vault.run(&["backup", "nobody", "shop", "--config", &config_a, "--json"]);
    assert_eq!(some.code, 1, "{}", some.err);
    let told: Value = serde_json::from_str(&some.out).unwrap();
    assert_eq!((&told[0]["vm"], &told[0]["error"]["kind"]), (&"nobody".into(), &"not-found".into()));
    assert_eq!(told[1]["disks"][0]["full_because"], Value::Null, "{told}");
    assert!(some.err.contains("1 of 2 machines were not backed up"), "{}", some.err);

    // It has no guest that could take part.
    a.ok(&["vm", "start", "shop"]);
    let running = vault.back_up(&a);
    let why = running["consistency"]["why"].as_str().unwrap();
    assert!(
        running["consistency"]["level"] == "crash" && why.contains("nothing in it has opened"),
        "{running}"
    );
    let refused = vault.refused(&["backup", "shop", "--else", "nothing", "--config", &config_a]);
    assert!(refused.code == 4 && refused.err.contains("nothing in it has opened"), "{}", refused.err);

    assert_eq!(vault.json(&["backup", "--all", "--config", &config(&b)]), serde_json::json!([]));
    let wrong = vault.refused(&["backup", "--all", "--exclude", "tset", "--config", &config_a]);
    assert!(wrong.err.contains("no machine `tset`"), "{}", wrong.err);
    let disk = vault.rack.path("mail.raw");
    vault.refused(&["backup", "mail", "shop", "--disk", disk.to_str().unwrap()]);
}

/// As of a machine that moves between two nodes' looks.
#[test]
fn two_backups_of_one_machine_at_once_are_two_points() {
    let vault = Vault::opened_by_file();
    let (disk, mut content) = vault.filled();
    content[MIB..3 * MIB].copy_from_slice(&noise(8, 2 * MIB));
    std::fs::write(&disk, &content).unwrap();
    let entries = vault.files_below("log").len();
    let begin = || {
        let arguments = ["backup", "shop", "--disk", disk.to_str().unwrap(), "--bandwidth", "512K", "--json"];
        vault.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut both = [begin(), begin()];
    // Each says that it is there before it reads anything.
    while vault.files_below("log").len() < entries + 2 {
        assert!(both.iter_mut().all(|one| one.try_wait().unwrap().is_none()), "they do not overlap");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(both.iter_mut().all(|one| one.try_wait().unwrap().is_none()), "they do not overlap");
    for one in both {
        let answer = Answer::of(one.wait_with_output().unwrap());
        assert_eq!(answer.code, 0, "{}", answer.err);
    }
    let points = vault.json(&["points", "shop"]);
    let numbers: Vec<_> =
        points.as_array().unwrap().iter().map(|point| point["point"].as_u64().unwrap()).collect();
    assert_eq!(numbers.len(), 3, "{points}");
    for number in &numbers[1..] {
        assert!(vault.restored(&format!("shop@{number}"), &format!("to-{number}")) == [content.clone()]);
    }
    // The next one relies on one of them, and a collection keeps what either needs.
    let next = vault.json(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
    assert_eq!(next["new_bytes"], 0, "{next}");
    vault.ok(&["forget", &format!("shop@{}", numbers[2])]);
    vault.ok(&["gc"]);
    assert!(vault.restored(&format!("shop@{}", numbers[1]), "kept") == [content.clone()]);
    assert!(vault.restored("shop", "newest") == [content]);
}

#[test]
fn one_flipped_bit_is_found_named_and_mended_by_the_next_backup() {
    let vault = Vault::new();
    let (disk, content) = vault.filled();
    let packs = vault.files_below("packs");
    let pack = packs.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    flip(pack);

    let check = vault.refused(&["repo", "check"]);
    assert!(check.err.contains(pack.file_name().unwrap().to_str().unwrap()), "{}", check.err);
    let verify = vault.refused(&["verify", "shop"]);
    assert!(verify.err.contains("disk0, bytes ") && verify.err.contains("shop@"), "{}", verify.err);
    let restore = vault.refused(&["restore", "shop", "--to", vault.rack.path("no").to_str().unwrap()]);
    assert!(restore.err.contains("it is not what was written"), "{}", restore.err);

    vault.ok(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
    vault.ok(&["verify", "shop"]);
    let to = vault.rack.path("back");
    vault.ok(&["restore", "shop", "--to", to.to_str().unwrap()]);
    assert!(std::fs::read(to.join("disk0.raw")).unwrap() == content);
}

/// Whoever holds the place has no key of it.
#[test]
fn a_repository_is_checked_without_a_key() {
    let vault = Vault::new();
    vault.filled();
    std::fs::remove_file(vault.rack.path("passphrase")).unwrap();
    let sound = vault.json(&["repo", "check"]);
    assert_eq!((&sound["sound_points"], &sound["sound_keys"]), (&1.into(), &1.into()), "{sound}");
    assert!(sound["sound_packs"].as_u64() > Some(0) && sound["sound_segments"].as_u64() > Some(0), "{sound}");
    assert_eq!(sound["damaged"], serde_json::json!([]));
    let key = vault.files_below("keys").remove(0);
    flip(&key);
    let check = vault.refused(&["repo", "check"]);
    assert!(check.err.contains(key.file_name().unwrap().to_str().unwrap()), "{}", check.err);
}

fn flip(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, &bytes).unwrap();
}

/// What a point says of itself is damaged in the log: its machine's next backup and all others' points go on.
#[test]
fn a_point_whose_entry_is_damaged_is_told_and_the_others_are_there() {
    let vault = Vault::opened_by_file();
    let (disk, content) = vault.filled();
    let disk = disk.to_str().unwrap();
    let back_up = |vm: &str| vault.json(&["backup", vm, "--disk", disk])["point"].as_u64().unwrap();
    let [mail, newest] = ["mail", "shop"].map(back_up);
    let first = vault.json(&["points", "shop"])[0]["point"].as_u64().unwrap();
    let entry = |point: u64| vault.repo().join(format!("log/{point:016x}"));
    let whole = std::fs::read(entry(newest)).unwrap();

    // Nothing stands for it but the entry itself.
    flip(&entry(newest));
    let points = vault.ok(&["points"]);
    assert!(
        points.err.contains(&format!("`log/{newest:016x}` counts for nothing, and may have been")),
        "{}",
        points.err
    );
    let refused = vault.refused(&["restore", "shop", "--to", vault.rack.path("no").to_str().unwrap()]);
    assert!(refused.err.contains("which restore point of `shop` is the newest"), "{}", refused.err);
    assert!(refused.err.contains(&format!("`shop@{first}`")), "{}", refused.err);
    assert!(vault.restored(&format!("shop@{first}"), "first") == [content.clone()]);
    std::fs::write(entry(newest), whole).unwrap();

    // The log was folded since: it is known that there is a point.
    fold(&vault);
    flip(&entry(newest));
    let points = vault.refused(&["points"]);
    assert!(points.err.contains(&format!("point {newest} cannot be read")), "{}", points.err);
    assert!(points.out.contains(&format!("mail@{mail}")) && points.out.contains(&format!("shop@{first}")));
    let check = vault.refused(&["repo", "check"]);
    assert!(check.err.contains(&format!("log/{newest:016x}")), "{}", check.err);
    for wanted in ["shop".to_owned(), format!("shop@{newest}")] {
        let refused = vault.refused(&["restore", &wanted, "--to", vault.rack.path("no").to_str().unwrap()]);
        assert!(refused.err.contains(&format!("`rempart forget @{newest}`")), "{}", refused.err);
    }
    assert!(vault.restored("mail", "mail") == [content.clone()]);
    assert!(vault.restored(&format!("shop@{first}"), "first-again") == [content.clone()]);
    vault.ok(&["verify", "mail"]);

    let backup = vault.ok(&["backup", "shop", "--disk", disk]);
    assert!(backup.err.contains(&format!("`shop@{newest}`, cannot be read")), "{}", backup.err);
    assert!(vault.restored("shop", "next") == [content]);
    vault.refused(&["points"]);
    vault.ok(&["forget", &format!("@{newest}")]);
    vault.ok(&["points"]);
    vault.ok(&["repo", "check"]);
}

/// Each of these is there twice.
#[test]
fn a_repository_is_read_where_what_it_begins_with_is_damaged() {
    let vault = Vault::opened_by_file();
    let (_, content) = vault.filled();
    fold(&vault);
    let newest = |folder: &str| vault.files_below(folder).into_iter().max().unwrap();
    let description = vault.repo().join("repository");
    let damaged = [description.clone(), newest("checkpoints"), newest("copies/log")];
    let damaged = damaged.map(|file| match file.strip_prefix(vault.repo().join("copies")) {
        Ok(original) => vault.repo().join(original),
        Err(_) => file,
    });
    damaged.iter().for_each(|file| flip(file));
    let check = vault.refused(&["repo", "check"]);
    for file in &damaged {
        let name = file.strip_prefix(vault.repo()).unwrap().to_str().unwrap();
        assert!(check.err.contains(name), "{name}: {}", check.err);
    }
    assert!(vault.restored("shop", "back") == [content.clone()]);
    vault.ok(&["gc"]);
    vault.ok(&["repo", "check"]);

    std::fs::remove_file(&description).unwrap();
    let check = vault.refused(&["repo", "check"]);
    assert!(check.err.contains("`repository`"), "{}", check.err);
    assert!(vault.restored("shop", "again") == [content]);
    vault.ok(&["gc"]);
    vault.ok(&["repo", "check"]);
}

/// As a collection does once the log is long.
fn fold(vault: &Vault) {
    let place = Arc::new(Directory::open(&vault.repo()).unwrap());
    let AnyKey::Opens(key) = AnyKey::load(&vault.rack.path("key")).unwrap() else { panic!("it opens") };
    let repository = Repository::open(place, &vault.rack.path("cache"), Unlock::KeyFile(&key)).unwrap();
    let now = WallTime(1);
    let mut session =
        Session::open(repository.log().unwrap(), repository.signer(), SessionId::random(), now).unwrap();
    session.checkpoint(now).unwrap();
    session.end(now).unwrap();
}

#[test]
fn what_goes_wrong_is_said() {
    let vault = Vault::new();
    let (disk, _) = vault.filled();
    let disk = disk.to_str().unwrap();
    std::fs::write(vault.rack.path("wrong"), "horse correct\n").unwrap();
    std::fs::write(vault.rack.path("exposed"), "x").unwrap();
    let folder = vault.rack.path("");
    let folder = folder.to_str().unwrap();
    let path = |name: &str| vault.rack.path(name).to_str().unwrap().to_owned();
    let mut transcript = Transcript::default();
    for arguments in [
        &["repo", "create", &path("repo")][..],
        &["repo", "create", &path("other"), "--chunk-size", "100K"],
        &["points", "--repo", &path("nowhere")],
        &["points", "--repo", folder],
        &["points", "--passphrase-file", &path("wrong")],
        &["points", "--passphrase-file", &path("missing")],
        &["backup", "shop", "--disk", &path("missing.raw")],
        &["backup", "shop", "--disk", disk, "--format", "qcow2"],
        &["restore", "nobody", "--to", &path("to")],
        &["restore", "shop@99", "--to", &path("to")],
        &["restore", "shop@x", "--to", &path("to")],
        &["restore", "shop", "--disk", "disk7", "--to", &path("to")],
        &["restore", "shop", "--device", disk, "--yes"],
        &["restore", "shop", "--device", disk],
        &["serve", "shop", "--listen", "0.0.0.0:10809"],
        &["serve", "shop", "--socket", disk],
        &["serve", "nobody", "--socket", &path("socket")],
        &["mount", &path("repo")],
        &["restore", "shop", "--to", &path("to"), "--format", "vdi"],
        &["restore", "shop", "--device", disk, "--yes", "--format", "qcow2"],
        &["export", "shop", "--to", disk],
        &["mount", &path("nowhere")],
    ] {
        let answer = vault.refused(arguments);
        transcript.told(&format!("rempart {}", arguments.join(" ")), answer.code, &answer.out, &answer.err);
    }
    transcript.check("backup-refuses.txt", &[(folder.to_owned(), "FOLDER/")]);
}

/// What its guest gives back is neither read nor stored, and comes back as zeroes.
#[test]
fn what_a_machine_discards_is_not_backed_up_any_more() {
    const DISCARDED: std::ops::Range<usize> = 16 * MIB..48 * MIB;
    let vault = Vault::new();
    let node = vault.rack.node("node-a");
    let mut content = noise(5, 64 * MIB);
    let image = vault.rack.path("disk.raw");
    std::fs::write(&image, &content).unwrap();
    node.import("shop", &[&image]);
    let first = vault.back_up(&node);
    assert!(first["new_bytes"].as_u64().unwrap() >= 64 * MIB as u64, "{first}");

    node.io("shop", 0, &["discard 16M 32M", "flush"]);
    content[DISCARDED].fill(0);
    node.until("the hole is told", || {
        let hole = map(&node, "base:allocation").into_iter().find(|run| run.0 == 16 << 20);
        hole.is_some_and(|hole| (hole.1, hole.2) == (32 << 20, 3))
    });
    let second = vault.back_up(&node);
    let disk = &second["disks"][0];
    assert_eq!(disk["full_because"], Value::Null, "{second}");
    // 64 chunks that did not change are read all the same, and compared.
    assert!(disk["read_bytes"].as_u64().unwrap() <= 9 * MIB as u64, "{second}");
    assert!(second["stored_bytes"].as_u64().unwrap() < 100_000, "{second}");
    assert!(vault.restored(&format!("shop@{}", second["point"]), "second") == [content.clone()]);

    // Nor by who reads all of the machine.
    let other = vault.rack.path("other").to_str().unwrap().to_owned();
    vault.ok(&["repo", "create", &other]);
    let config = node.config();
    let all = vault.json(&["backup", "shop", "--repo", &other, "--config", config.to_str().unwrap()]);
    assert_eq!(all["read_bytes"], 32 * MIB, "{all}");
}

/// Written, moved by plan, its primary killed: what changed is known all the same, and every point is what it was.
#[test]
fn a_mirrored_machine_keeps_its_chain_wherever_it_runs() {
    let vault = Vault::new();
    let (mut a, mut b, _witness) = vault.rack.cluster();
    let sizes = [8 * MIB, 4 * MIB];
    a.import("shop", &[&vault.rack.image("one.raw", sizes[0], 1), &vault.rack.image("two.raw", sizes[1], 2)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.until_mirrored("shop");
    let mut expected = [vec![1; sizes[0]], vec![2; sizes[1]]];
    let mut points: Vec<(u64, [Vec<u8>; 2])> = Vec::new();

    let first = vault.back_up(&a);
    assert_eq!(first["disks"][0]["full_because"], "it is the first backup of this disk");
    points.push((first["point"].as_u64().unwrap(), expected.clone()));

    let step = |node: &Server, fill: u8, offset: usize, points: &mut Vec<_>, expected: &mut [Vec<u8>; 2]| {
        node.io("shop", 0, &[&format!("write -P {fill} {offset} 4096")]);
        expected[0][offset..offset + 4096].fill(fill);
        let backup = vault.back_up(node);
        for disk in backup["disks"].as_array().unwrap() {
            assert_eq!(disk["full_because"], Value::Null, "{backup}");
        }
        // The chunk that changed, and what is audited of the others; not all of both disks.
        assert!(backup["new_bytes"].as_u64().unwrap() < 300 * 1024, "{backup}");
        points.push((backup["point"].as_u64().unwrap(), expected.clone()));
    };
    step(&a, 7, MIB, &mut points, &mut expected);
    b.ok(&["failover", "shop", "--planned"]);
    b.until("it leads", || b.vm("shop")["role"] == "primary");
    step(&b, 8, 2 * MIB, &mut points, &mut expected);
    b.until_mirrored("shop");
    a.ok(&["failback", "shop"]);
    a.until("it leads", || a.vm("shop")["role"] == "primary");
    a.until_mirrored("shop");
    a.kill();
    b.until("it took over", || b.vm("shop")["role"] == "primary");
    step(&b, 9, 3 * MIB, &mut points, &mut expected);
    // Its daemon is killed, and comes back where it was.
    a.start();
    b.until_mirrored("shop");
    b.kill();
    a.until("it took over again", || a.vm("shop")["role"] == "primary");
    b.start();
    a.until_mirrored("shop");
    step(&a, 10, 4 * MIB, &mut points, &mut expected);
    // A disk that grew.
    a.ok(&["vm", "disk", "resize", "shop", "0", "10M"]);
    expected[0].resize(10 * MIB, 0);
    step(&a, 11, 9 * MIB + 8192, &mut points, &mut expected);

    for (point, content) in points {
        let restored = vault.restored(&format!("shop@{point}"), &format!("to-{point}"));
        assert!(restored == content, "point {point}");
    }
}
