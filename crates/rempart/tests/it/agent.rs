//! `rempart agent`: a machine backs itself up with a key that only adds, and its files come back.

use crate::backup::Vault;
use crate::mount::Folder;
use crate::rack::{Answer, noise};
use crate::running::{Mounted, Running, refused, tool, until};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: usize = 1 << 20;

/// A machine with a key of its own, and files.
struct Machine {
    vault: Vault,
    key: PathBuf,
    files: PathBuf,
}

impl Machine {
    fn new() -> Machine {
        let vault = Vault::new();
        let (key, files) = (vault.rack.path("web.key"), vault.rack.path("files"));
        let path = key.to_str().unwrap();
        vault.ok(&["repo", "key", "add", "--write-only", "--name", "web", "--new-key-file", path]);
        fs::create_dir_all(files.join("etc")).unwrap();
        fs::write(files.join("etc/fstab"), "/dev/vda / ext4\n").unwrap();
        fs::write(files.join("log"), "one\n".repeat(200_000)).unwrap();
        Machine { vault, key, files }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.vault.command(&[&["agent", "backup"], arguments].concat());
        command.env_remove("REMPART_PASSPHRASE_FILE").env("REMPART_KEY_FILE", &self.key);
        command.env("REMPART_CACHE_DIR", self.vault.rack.path("agent-cache"));
        command
    }

    fn back_up(&self, arguments: &[&str]) -> (Answer, Value) {
        let answer = Answer::of(self.command(&[arguments, &["--json"]].concat()).output().unwrap());
        let told = serde_json::from_str(&answer.out).unwrap_or_default();
        (answer, told)
    }

    /// The path that an entry of one of its files has.
    fn entry(&self, name: &str) -> String {
        self.files.join(name).to_str().unwrap().to_owned()
    }

    fn restored(&self, arguments: &[&str], to: &str) -> PathBuf {
        let to = self.vault.rack.path(to);
        self.vault.ok(&[&["restore", "web", "--to", to.to_str().unwrap()], arguments].concat());
        to.join(self.files.strip_prefix("/").unwrap())
    }
}

fn same(one: &Path, other: &Path) -> bool {
    let diff = Command::new("diff").arg("-r").args([one, other]).output().unwrap();
    diff.status.success()
}

#[test]
fn files_are_backed_up_by_a_key_that_opens_nothing_and_come_back() {
    let machine = Machine::new();
    let vault = &machine.vault;
    let files = machine.files.to_str().unwrap();
    let device = vault.rack.path("device");
    fs::write(&device, [9; 1 << 20]).unwrap();
    let (answer, first) = machine.back_up(&["--path", files, "--device", device.to_str().unwrap()]);
    assert_eq!(answer.code, 0, "{}", answer.err);
    assert_eq!(
        (&first["vm"], &first["files"]["entries"]),
        (&"web".into(), &fs_entries(&machine.files).into())
    );
    assert_eq!(first["consistency"]["level"], "live");

    // Whoever has the key reads nothing with it.
    let mut stolen = machine.vault.command(&["restore", "web", "--to", "/nowhere"]);
    let stolen = stolen.env_remove("REMPART_PASSPHRASE_FILE").env("REMPART_KEY_FILE", &machine.key);
    let stolen = Answer::of(stolen.output().unwrap());
    assert!(stolen.code != 0 && stolen.err.contains("opens nothing"), "{}", stolen.err);
    let (other_name, _) = machine.back_up(&["--path", files, "--name", "shop"]);
    assert!(other_name.code != 0 && other_name.err.contains("of nothing else"), "{}", other_name.err);

    let listed = vault.json(&["files", "web", &machine.entry("etc")]);
    let fstab =
        listed.as_array().unwrap().iter().find(|file| file["path"] == machine.entry("etc/fstab")).unwrap();
    assert_eq!((&fstab["size_bytes"], &fstab["kind"]), (&16.into(), &"file".into()));
    let listed = vault.ok(&["files", "web", &machine.entry("etc/fstab")]);
    assert!(listed.out.contains("-rw-") && listed.out.ends_with("etc/fstab\n"), "{}", listed.out);
    vault.refused(&["files", "web", "/no/such/file"]);

    let verified = vault.json(&["verify", "web"]);
    assert_eq!(verified[1]["damaged"], serde_json::json!([]));
    let to = machine.restored(&["--path", &machine.entry("etc/fstab")], "one");
    assert_eq!(fs::read(to.join("etc/fstab")).unwrap(), b"/dev/vda / ext4\n");
    assert!(!to.join("log").exists());
    let whole = vault.rack.path("all");
    vault.ok(&["restore", "web", "--to", whole.to_str().unwrap()]);
    assert!(same(&whole.join("files").join(machine.files.strip_prefix("/").unwrap()), &machine.files));
    assert!(fs::read(whole.join("device.raw")).unwrap() == [9; 1 << 20]);

    // Only what changed is stored, and what is excluded is not there.
    fs::write(machine.files.join("new.tmp"), "temporary").unwrap();
    fs::write(machine.files.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    let (_, second) = machine.back_up(&["--path", files, "--exclude", "*.tmp"]);
    let new = second["new_bytes"].as_u64().unwrap();
    assert!(new < 64 << 10, "{second}");
    assert_eq!(second["notes"], serde_json::json!(["1 files or folders were excluded"]));
    let to = machine.restored(&[], "second");
    assert!(to.join("etc/hosts").exists() && !to.join("new.tmp").exists());

    // A collection keeps what both have, and a copy has it, too.
    vault.ok(&["gc"]);
    let points = vault.json(&["points", "web"]);
    let point = format!("web@{}", points[1]["point"]);
    vault.ok(&["verify", &point]);
    let (second, passphrase) = (vault.rack.path("copies"), vault.rack.path("passphrase"));
    vault.ok(&["repo", "create", second.to_str().unwrap()]);
    let to = ["--to", second.to_str().unwrap(), "--to-passphrase-file", passphrase.to_str().unwrap()];
    vault.ok(&[&["copy", &point], &to[..]].concat());
    let again = vault.json(&[&["copy", &point], &to[..]].concat());
    assert_eq!(again[0]["was_there"], true);
    vault.ok(&["verify", "web", "--repo", second.to_str().unwrap()]);
}

/// `gc` writes packs of a machine with a key of its own anew, in that machine's domain, and puts its index together.
#[test]
fn what_a_collection_leaves_of_a_machine_comes_back_and_is_known_to_its_next_backup() {
    let machine = Machine::new();
    let vault = &machine.vault;
    let files = machine.files.to_str().unwrap();
    let large = machine.files.join("large");
    let bytes_of = |folder: &str| {
        let lens = vault.files_below(folder).into_iter().map(|file| fs::metadata(file).unwrap().len());
        lens.sum::<u64>()
    };
    let mut content = noise(1, 8 * MIB);
    for round in 0..18 {
        // A part of it is new each time, so that most packs are of some use to who comes later.
        let at = round * 300_000;
        content[at..at + 2 * MIB].copy_from_slice(&noise(round as u64 + 2, 2 * MIB));
        fs::write(&large, &content).unwrap();
        let (answer, _) = machine.back_up(&["--path", files]);
        assert_eq!(answer.code, 0, "{}", answer.err);
    }
    let points = vault.json(&["points", "web"]);
    let points: Vec<String> =
        points.as_array().unwrap().iter().map(|point| format!("web@{}", point["point"])).collect();
    let forgotten: Vec<&str> = points[..17].iter().map(String::as_str).collect();
    vault.ok(&[&["forget"], &forgotten[..]].concat());
    let (packs, segments) = (bytes_of("packs"), vault.files_below("segments").len());
    let looked = vault.json(&["gc", "--dry-run", "--repack", "90"]);
    assert!(looked["sparse_packs"].as_u64() > Some(3), "{looked}");
    let done = vault.json(&["gc", "--repack", "90"]);
    assert!(done["rewritten_packs"].as_u64() > Some(3), "{done}");
    assert!(done["merged_segments"].as_u64() > Some(10), "{done}");
    let left = bytes_of("packs");
    assert!(left < 9 * MIB as u64 && left < packs / 3, "{left} of {packs} bytes are left");
    assert!(vault.files_below("segments").len() < segments / 2);

    let verified = vault.json(&["verify", "web"]);
    assert_eq!(verified[0]["damaged"], serde_json::json!([]), "{verified}");
    assert!(same(&machine.restored(&[], "back"), &machine.files));
    // Also to an agent that has forgotten all that it knew.
    for forgets in [false, true] {
        if forgets {
            fs::remove_dir_all(vault.rack.path("agent-cache")).unwrap();
        }
        fs::write(machine.files.join("etc/hosts"), format!("127.0.0.1 {forgets}\n")).unwrap();
        let there = bytes_of("packs");
        let (answer, told) = machine.back_up(&["--path", files]);
        assert_eq!(answer.code, 0, "{}", answer.err);
        assert!(told["new_bytes"].as_u64().unwrap() < 64 << 10, "{told}");
        assert!(bytes_of("packs") - there < 64 << 10);
        assert!(same(&machine.restored(&[], &format!("back-{forgets}")), &machine.files));
    }
}

/// What there is to be seen of a file without its extended attributes, but for what a folder is long.
fn seen(path: &Path) -> (u32, u32, u32, u64, (i64, i64), u64, Option<PathBuf>) {
    let stat = fs::symlink_metadata(path).unwrap();
    let len = if stat.is_dir() { 0 } else { stat.len() };
    let times = (stat.mtime(), stat.mtime_nsec());
    (stat.mode(), stat.uid(), stat.gid(), len, times, stat.rdev(), fs::read_link(path).ok())
}

/// Everything below a folder, by its path there.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap().map(|entry| entry.unwrap()) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            }
            found.push(entry.path().strip_prefix(folder).unwrap().to_owned());
        }
    }
    found.sort();
    found
}

/// Bytes that a process read, of whatever.
fn read_by(pid: u32) -> u64 {
    let told = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
    told.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn files_of_a_machine_are_shown_beside_its_disks_as_they_were() {
    let machine = Machine::new();
    let vault = &machine.vault;
    let path = |name: &str| machine.files.join(name);
    // Several pages of entries, and much that nobody will ask for.
    fs::create_dir(path("many")).unwrap();
    for number in 0..5000 {
        fs::write(path("many").join(format!("{number:04}")), number.to_string()).unwrap();
    }
    fs::write(path("large"), noise(3, 32 * MIB)).unwrap();
    let sparse = File::create(path("sparse")).unwrap();
    sparse.set_len(64 * MIB as u64).unwrap();
    sparse.write_all_at(&noise(4, 300_000), 20 * MIB as u64 + 77).unwrap();
    fs::write(path("empty"), "").unwrap();
    let strange = path("").join(OsStr::from_bytes(b"\xff\n *'\"\x1b[2J"));
    fs::write(&strange, "strange").unwrap();
    fs::write(path(&"l".repeat(255)), "long").unwrap();
    symlink("/etc/passwd", path("absolute")).unwrap();
    symlink("../no/such/file", path("dangling")).unwrap();
    fs::hard_link(path("log"), path("etc/again")).unwrap();
    tool(&["mkfifo", path("pipe").to_str().unwrap()]);
    tool(&["mknod", path("null").to_str().unwrap(), "c", "1", "3"]);
    fs::write(path("tool"), "#!/bin/sh\n").unwrap();
    chown(path("tool"), Some(1234), Some(4321)).unwrap();
    fs::set_permissions(path("tool"), PermissionsExt::from_mode(0o4751)).unwrap();
    tool(&["touch", "-h", "-d", "1968-07-01 12:00:00.123456789 UTC", path("absolute").to_str().unwrap()]);
    tool(&["touch", "-d", "2001-02-03 04:05:06.987654321 UTC", path("tool").to_str().unwrap()]);
    let device = vault.rack.path("device");
    fs::write(&device, [9; 1 << 20]).unwrap();
    let all = ["--path", machine.files.to_str().unwrap(), "--device", device.to_str().unwrap()];
    let (answer, made) = machine.back_up(&all);
    assert_eq!(answer.code, 0, "{}", answer.err);

    let folder = Folder::new(vault);
    let (mounted, _) = Running::start_json(vault, &["mount", folder.text()]);
    let point = folder.0.join("web").join(made["point"].to_string());
    let beside = fs::read_dir(&point).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(beside.collect::<Vec<_>>(), ["device.files", "device.raw", "files"]);
    assert_eq!(fs::read(point.join("device.raw")).unwrap(), [9; 1 << 20]);
    let shown = point.join("files").join(machine.files.strip_prefix("/").unwrap());

    // Of one file among many, no more is read than that file and the way to it.
    let before = read_by(mounted.pid());
    assert_eq!(fs::read(shown.join("many/4321")).unwrap(), b"4321");
    let took = read_by(mounted.pid()) - before;
    assert!(took < 2 * MIB as u64, "{took} bytes");
    let names: Vec<PathBuf> = below(&machine.files);
    assert_eq!(below(&shown), names);
    assert!(names.len() > 5010);
    for name in &names {
        assert_eq!(seen(&shown.join(name)), seen(&machine.files.join(name)), "{name:?}");
        if fs::symlink_metadata(machine.files.join(name)).unwrap().is_file() {
            assert!(
                fs::read(shown.join(name)).unwrap() == fs::read(machine.files.join(name)).unwrap(),
                "{name:?}"
            );
        }
    }
    assert_eq!(seen(&shown), seen(&machine.files));
    let inode = |name: &str| fs::metadata(shown.join(name)).unwrap().ino();
    assert_eq!(inode("log"), inode("etc/again"), "one file");
    assert_eq!(fs::metadata(shown.join("no")).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fs::metadata(shown.join("log/no")).unwrap_err().raw_os_error(), Some(20), "ENOTDIR");
    // Holes are holes.
    let copy = vault.rack.path("copy");
    tool(&["cp", "--sparse=auto", shown.join("sparse").to_str().unwrap(), copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == fs::read(path("sparse")).unwrap());
    let used = copy.metadata().unwrap().blocks() * 512;
    assert!(used < MIB as u64, "{used} bytes are used");
    let mut part = [0; 100];
    File::open(shown.join("large")).unwrap().read_exact_at(&mut part, 17 * MIB as u64 - 50).unwrap();
    assert!(part == noise(3, 32 * MIB)[17 * MIB - 50..17 * MIB + 50]);
    refused(&["touch", shown.join("tool").to_str().unwrap()]);
    mounted.terminate();
    assert_eq!(mounted.ended(), 0);
}

#[test]
fn what_could_not_be_read_of_a_machine_is_an_error_where_it_is_shown_and_so_is_what_was_lost() {
    let machine = Machine::new();
    let vault = &machine.vault;
    for name in ["secret", "closed"] {
        fs::create_dir_all(machine.files.join(name)).unwrap();
    }
    fs::write(machine.files.join("secret/file"), "root's").unwrap();
    fs::write(machine.files.join("closed/file"), "root's").unwrap();
    // Somebody who is not root runs it.
    fs::create_dir(vault.rack.path("agent-cache")).unwrap();
    assert!(
        Command::new("chown")
            .args(["-R", "65534:65534"])
            .arg(vault.rack.path(""))
            .status()
            .unwrap()
            .success()
    );
    for (name, mode) in [("secret/file", 0o600), ("closed", 0o700)] {
        chown(machine.files.join(name), Some(0), Some(0)).unwrap();
        fs::set_permissions(machine.files.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    let mut command = machine.command(&["--path", machine.files.to_str().unwrap(), "--json"]);
    let answer = Answer::of(command.uid(65534).gid(65534).output().unwrap());
    let made: Value = serde_json::from_str(&answer.out).unwrap_or_else(|_| panic!("{}", answer.err));
    assert_eq!(made["files"]["unread"], 2, "{made}");

    let folder = Folder::new(vault);
    let mut mounted = Running::start(vault, &["mount", folder.text()], "restore points are in");
    let point = folder.0.join("web").join(made["point"].to_string());
    let shown = point.join("files").join(machine.files.strip_prefix("/").unwrap());
    let error = |path: &str| fs::read(shown.join(path)).unwrap_err().raw_os_error();
    assert_eq!(error("secret/file"), Some(5), "EIO: what it holds is not known");
    assert_eq!(fs::read_dir(shown.join("closed")).unwrap_err().raw_os_error(), Some(5), "EIO");
    assert_eq!(fs::read(shown.join("etc/fstab")).unwrap(), b"/dev/vda / ext4\n");
    fs::rename(vault.repo().join("packs"), vault.rack.path("away")).unwrap();
    assert_eq!(error("log"), Some(5), "EIO");
    mounted.until("it is told", |mounted| mounted.log().contains("/log` of `web@"));
    mounted.terminate();
    assert_eq!(mounted.ended(), 0);
}

fn fs_entries(folder: &Path) -> usize {
    let found = Command::new("find").arg(folder).output().unwrap();
    // The folders that lead there are in it, too.
    String::from_utf8(found.stdout).unwrap().lines().count() + folder.ancestors().count() - 2
}

#[test]
fn what_cannot_be_read_is_told_and_all_else_is_there() {
    let machine = Machine::new();
    let secret = machine.files.join("secret");
    fs::write(&secret, "root's").unwrap();
    // Somebody who is not root runs it.
    let root = machine.vault.rack.path("");
    fs::create_dir(machine.vault.rack.path("agent-cache")).unwrap();
    assert!(Command::new("chown").args(["-R", "65534:65534"]).arg(&root).status().unwrap().success());
    std::os::unix::fs::chown(&secret, Some(0), Some(0)).unwrap();
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let command = machine.command(&["--path", machine.files.to_str().unwrap(), "--json"]);
    let mut as_nobody = Command::new("setpriv");
    as_nobody
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
        .arg(command.get_program());
    as_nobody.args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => as_nobody.env(key, value),
            None => as_nobody.env_remove(key),
        };
    }
    let answer = Answer::of(as_nobody.output().unwrap());
    assert_eq!(answer.code, 1, "{}", answer.err);
    assert!(answer.err.contains("1 files or folders could not be read"), "{}", answer.err);
    let told: Value = serde_json::from_str(&answer.out).expect("one JSON value");
    assert_eq!(told["unread"][0]["path"], machine.entry("secret"));
    let listed = machine.vault.json(&["files", "web", &machine.entry("secret")]);
    assert!(listed[0]["unread"].as_str().unwrap().contains("cannot be opened"), "{listed}");
    let to = machine.vault.rack.path("to");
    let restored = machine.vault.refused(&["restore", "web", "--to", to.to_str().unwrap()]);
    assert!(restored.err.contains("was not backed up"), "{}", restored.err);
    let to = to.join(machine.files.strip_prefix("/").unwrap());
    assert!(fs::read(to.join("log")).unwrap() == fs::read(machine.files.join("log")).unwrap());
}

#[test]
fn damage_is_named_by_file_and_mended_by_the_next_backup() {
    let machine = Machine::new();
    let vault = &machine.vault;
    fs::write(machine.files.join("noise"), crate::rack::noise(5, 3 << 20)).unwrap();
    let files = machine.files.to_str().unwrap();
    assert_eq!(machine.back_up(&["--path", files]).0.code, 0);
    let pack =
        vault.files_below("packs").into_iter().max_by_key(|pack| fs::metadata(pack).unwrap().len()).unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let verified = vault.refused(&["verify", "web"]);
    assert!(verified.err.contains(&machine.entry("noise")), "{}", verified.err);
    let to = vault.rack.path("to");
    let restored = vault.refused(&["restore", "web", "--to", to.to_str().unwrap()]);
    assert!(restored.err.contains(&machine.entry("noise")), "{}", restored.err);
    let to = to.join(machine.files.strip_prefix("/").unwrap());
    assert!(to.join("log").exists() && !to.join("noise").exists(), "nothing that is not whole");
    assert_eq!(machine.back_up(&["--path", files]).0.code, 0);
    vault.ok(&["verify", "web"]);
    let first = vault.json(&["points", "web"])[0]["point"].to_string();
    vault.ok(&["verify", &format!("web@{first}")]);
}

/// Stands in for LVM: volumes are files in a folder, and what was told is written down.
const LVM: &str = r#"#!/bin/sh
cd "$(dirname "$0")/volumes" || exit 5
echo "$(basename "$0") $*" >>../told
for last; do :; done
row() {
    printf '{"vg_name":"vg","lv_name":"%s","lv_path":"%s/%s","segtype":"linear",' "$1" "$PWD" "$1"
    printf '"lv_size":"%s","vg_free":"1073741824"}' "$(stat -c %s "$1")"
}
case $(basename "$0") in
lvs)
    case $last in
    lv_tags=rempart) found=$(ls | grep -e -rempart-) ;;
    *) found=$(basename "$last"); [ -e "$found" ] || exit 5 ;;
    esac
    printf '{"report":[{"lv":['
    comma=
    for one in $found; do printf '%s' "$comma"; row "$one"; comma=,; done
    printf ']}]}\n' ;;
lvcreate)
    while [ "$1" != --name ]; do shift; done
    cp "$(basename "$last")" "$2" ;;
lvremove) rm "$(basename "$last")" ;;
esac
"#;

/// LVM itself takes a kernel that has it.
#[test]
fn a_logical_volume_is_read_from_a_snapshot_that_is_removed_also_after_a_kill() {
    let machine = Machine::new();
    let lvm = machine.vault.rack.path("lvm");
    let volumes = lvm.join("volumes");
    fs::create_dir_all(&volumes).unwrap();
    fs::write(volumes.join("data"), crate::rack::noise(6, 8 << 20)).unwrap();
    for program in ["lvs", "lvcreate", "lvremove"] {
        fs::write(lvm.join(program), LVM).unwrap();
        fs::set_permissions(lvm.join(program), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let data = volumes.join("data");
    let data = data.to_str().unwrap();
    let with_lvm = |arguments: &[&str]| {
        let mut command = machine.command(&[&["--device", data, "--json"], arguments].concat());
        command.env("PATH", format!("{}:{}", lvm.display(), std::env::var("PATH").unwrap()));
        command
    };
    let snapshots = || fs::read_dir(&volumes).unwrap().count() - 1;
    let mut killed = with_lvm(&["--bandwidth", "1K"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    until("a snapshot is made", || snapshots() > 0);
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(snapshots(), 1);

    let answer = Answer::of(with_lvm(&["--snapshot-size", "12M"]).output().unwrap());
    assert_eq!(answer.code, 0, "{}", answer.err);
    let told: Value = serde_json::from_str(&answer.out).unwrap();
    assert_eq!(told["consistency"]["level"], "crash");
    assert_eq!(snapshots(), 0);
    let commands = fs::read_to_string(lvm.join("told")).unwrap();
    assert!(commands.contains("--size 12582912b vg/data"), "{commands}");
    let to = machine.vault.rack.path("to");
    machine.vault.ok(&["restore", "web", "--to", to.to_str().unwrap()]);
    assert!(fs::read(to.join("data.raw")).unwrap() == fs::read(data).unwrap());

    let refused = Answer::of(with_lvm(&["--snapshot-size", "2G"]).output().unwrap());
    assert!(refused.code != 0 && refused.err.contains("bytes free"), "{}", refused.err);
    let answer = Answer::of(with_lvm(&["--no-snapshot"]).output().unwrap());
    let told: Value = serde_json::from_str(&answer.out).unwrap();
    assert_eq!(told["consistency"]["level"], "live");
}

#[test]
fn a_subvolume_is_read_from_a_snapshot_that_is_removed_also_after_a_kill() {
    if !fs::read_to_string("/proc/filesystems").unwrap().contains("btrfs") {
        eprintln!("not asked: this kernel mounts no btrfs");
        return;
    }
    let machine = Machine::new();
    let data = machine.vault.rack.path("data");
    let _mounted = Mounted::image(&data, 512 << 20, &["mkfs.btrfs", "-q"]);
    let path = |name: &str| data.join(name).to_str().unwrap().to_owned();
    // More than the packs that may be on their way: what comes behind is read when some of it was sent.
    let noise = crate::rack::noise(8, 80 << 20);
    fs::write(path("a"), &noise).unwrap();
    fs::write(path("b"), &noise[..8 << 20]).unwrap();
    fs::write(path("z"), "before").unwrap();
    tool(&["btrfs", "subvolume", "create", &path("inner")]);
    fs::create_dir(path("other")).unwrap();
    tool(&["mount", "-t", "tmpfs", "none", &path("other")]);
    fs::write(path("inner/x"), "of another subvolume").unwrap();

    let snapshots = || -> Vec<PathBuf> {
        let entries = fs::read_dir(path(".rempart-snapshots")).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let until_there_is_one_but = |left: &[PathBuf]| {
        until("a snapshot is made", || snapshots().iter().any(|snapshot| !left.contains(snapshot)));
    };
    let command = |arguments: &[&str]| {
        machine.command(&[&["--path", data.to_str().unwrap(), "--json"], arguments].concat())
    };
    let mut killed = command(&["--bandwidth", "1K"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    until_there_is_one_but(&[]);
    killed.kill().unwrap();
    killed.wait().unwrap();
    let left = snapshots();
    assert_eq!(left.len(), 1);

    // What changed a moment before it was read is read again next time.
    std::thread::sleep(std::time::Duration::from_secs(3));
    let mut slow = command(&["--bandwidth", "16M"]);
    let slow =
        slow.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    until_there_is_one_but(&left);
    fs::write(path("z"), "after").unwrap();
    fs::remove_file(path("a")).unwrap();
    let answer = Answer::of(slow.wait_with_output().unwrap());
    assert_eq!(answer.code, 0, "{}", answer.err);
    let told: Value = serde_json::from_str(&answer.out).unwrap();
    assert_eq!(told["consistency"]["level"], "crash", "{told}");
    let notes = told["notes"].to_string();
    assert!(notes.contains(&path("inner")) && notes.contains(&path("other")), "{notes}");
    assert_eq!(snapshots(), <[PathBuf; 0]>::default());
    let to = machine.vault.rack.path("to");
    machine.vault.ok(&["restore", "web", "--to", to.to_str().unwrap()]);
    let restored = to.join(data.strip_prefix("/").unwrap());
    let mut names: Vec<_> =
        fs::read_dir(&restored).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a", "b", "inner", "other", "z"]);
    assert!(fs::read(restored.join("a")).unwrap() == noise);
    assert_eq!(fs::read_to_string(restored.join("z")).unwrap(), "before");

    // A snapshot's files are known for those of the snapshot before.
    let answer = Answer::of(command(&[]).output().unwrap());
    let told: Value = serde_json::from_str(&answer.out).unwrap();
    let read = told["files"]["how"]["read_bytes"].as_u64().unwrap();
    assert!(read < 8 << 20, "`b` is as it was: {told}");

    let level = |command: &mut Command| {
        let answer = Answer::of(command.output().unwrap());
        assert_eq!(answer.code, 0, "{}", answer.err);
        let told: Value = serde_json::from_str(&answer.out).unwrap();
        (told["consistency"]["level"].as_str().unwrap().to_owned(), told["consistency"]["why"].to_string())
    };
    assert_eq!(level(&mut command(&["--no-snapshot"])).0, "live");
    let (without, why) = level(command(&[]).env("PATH", "/nowhere"));
    assert!(without == "live" && why.contains("btrfs-progs"), "{why}");
}

/// A file system writes past the cache of its device, which still holds what somebody read before.
#[test]
fn a_device_in_use_is_read_as_it_is_and_not_as_it_was_cached() {
    let machine = Machine::new();
    let data = machine.vault.rack.path("data");
    let _mounted = Mounted::image(&data, 64 << 20, &["mkfs.ext4", "-q", "-b", "4096"]);
    let device = tool(&["findmnt", "-n", "-o", "SOURCE", data.to_str().unwrap()]).trim().to_owned();
    let write = |byte: u8| {
        let file =
            fs::File::options().create(true).write(true).truncate(false).open(data.join("file")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![byte; 1 << 20], 0).unwrap();
        file.sync_all().unwrap();
    };
    write(b'A');
    let before = fs::read(&device).unwrap();
    let at = before.windows(1 << 20).step_by(4096).position(|part| part.iter().all(|byte| *byte == b'A'));
    let at = at.expect("it lies together on the device") * 4096;
    // Whoever has the device open keeps its cache.
    let _open = fs::File::open(&device).unwrap();
    fs::read(&device).unwrap();
    write(b'B');
    let (answer, _) = machine.back_up(&["--device", &device]);
    assert_eq!(answer.code, 0, "{}", answer.err);
    let to = machine.vault.rack.path("to");
    machine.vault.ok(&["restore", "web", "--to", to.to_str().unwrap()]);
    let name = Path::new(&device).file_name().unwrap().to_str().unwrap();
    let restored = fs::read(to.join(format!("{name}.raw"))).unwrap();
    assert!(restored[at..at + (1 << 20)].iter().all(|byte| *byte == b'B'), "what was cached was stored");
}
