//! Machines that run from a restore point: real QEMUs without a guest, whose disks are written through their monitors.

use crate::backup::Vault;
use crate::onto_node;
use crate::rack::noise;
use crate::running::{Mounted, Running, tool};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 64 << 10;

struct Lab {
    // Dropped after what runs in it, and before the folder that it is mounted in.
    small: Option<Mounted>,
    vault: Vault,
    /// What the disk should be.
    expected: Vec<u8>,
    folder: PathBuf,
}

/// Ends the QEMU that a test leaves behind.
impl Drop for Lab {
    fn drop(&mut self) {
        if let Ok(pid) = std::fs::read_to_string(self.folder.join("qemu.pid")) {
            let _ = std::process::Command::new("kill").args(["-KILL", pid.trim()]).status();
        }
    }
}

impl Lab {
    fn new() -> Lab {
        let vault = Vault::new();
        let disk = vault.rack.path("disk.raw");
        let file = File::create(&disk).unwrap();
        file.set_len(64 * MIB).unwrap();
        file.write_all_at(&noise(1, 3 * MIB as usize), 5 * MIB).unwrap();
        vault.ok(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
        let folder = vault.rack.path("vm");
        Lab { small: None, expected: std::fs::read(&disk).unwrap(), vault, folder }
    }

    fn recover(&self, ready: &str) -> Running {
        self.recover_with(&[], ready)
    }

    fn recover_with(&self, more: &[&str], ready: &str) -> Running {
        let pid_file = self.folder.join("qemu.pid");
        let to = self.folder.to_str().unwrap();
        let arguments = [
            &["recover", "--instant", "shop", "--to", to][..],
            more,
            &["--"],
            &["-machine", "q35,accel=tcg", "-m", "64M", "-nodefaults", "-display", "none"],
            &["-pidfile", pid_file.to_str().unwrap(), "-device", "virtio-blk-pci,id=disk-0,drive={disk0}"],
        ];
        Running::start(&self.vault, &arguments.concat(), ready)
    }

    /// What is not in memory can be read no more, or again.
    fn take_packs_away(&self) {
        std::fs::rename(self.vault.repo().join("packs"), self.vault.rack.path("away")).unwrap();
    }

    fn bring_packs_back(&self) {
        std::fs::rename(self.vault.rack.path("away"), self.vault.repo().join("packs")).unwrap();
    }

    fn command(&self, name: &str, arguments: Value) -> Value {
        let mut stream = UnixStream::connect(self.folder.join("monitor.sock")).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut answer = || loop {
            let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            if line["event"].is_null() {
                return line;
            }
        };
        answer();
        for command in
            [json!({ "execute": "qmp_capabilities" }), json!({ "execute": name, "arguments": arguments })]
        {
            stream.write_all(format!("{command}\n").as_bytes()).unwrap();
            let told = answer();
            assert!(told["error"].is_null(), "{command}: {told}");
            if command["execute"] == name {
                return told["return"].clone();
            }
        }
        unreachable!()
    }

    /// As a guest would that flushes.
    fn write(&mut self, offset: u64, fill: u8) {
        for io in [format!("write -P {fill} {offset} {BLOCK}"), "flush".to_owned()] {
            // As the device itself, which lets nobody else write.
            let line = format!("qemu-io -d /machine/peripheral/disk-0/virtio-backend \"{io}\"");
            let told = self.command("human-monitor-command", json!({ "command-line": line }));
            assert_eq!(told, "", "{io}");
        }
        self.expected[offset as usize..(offset + BLOCK) as usize].fill(fill);
    }

    fn kill_qemu(&self) {
        let pid = std::fs::read_to_string(self.folder.join("qemu.pid")).unwrap();
        tool(&["kill", "-KILL", pid.trim()]);
    }

    /// The image that is left, once nothing runs any more.
    fn check_image(&self) {
        let image = self.folder.join("disk0.qcow2");
        let info = tool(&["qemu-img", "info", "-U", "--output=json", image.to_str().unwrap()]);
        assert!(!info.contains("backing"), "it stands on its own: {info}");
        let copy = self.vault.rack.path("copy.raw");
        let copy = copy.to_str().unwrap();
        tool(&["qemu-img", "check", "-q", "-U", image.to_str().unwrap()]);
        tool(&["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), copy]);
        assert!(std::fs::read(copy).unwrap() == self.expected);
    }

    fn status(&self) -> Value {
        self.vault.json(&["recover", "--status", "--to", self.folder.to_str().unwrap()])
    }
}

const MOVED: &str = "needs the repository no more";
const RUNS: &str = "its disks are moved meanwhile";

#[test]
fn a_machine_runs_at_once_and_needs_the_repository_no_more_in_the_end() {
    let mut lab = Lab::new();
    let recovering = lab.recover(RUNS);
    assert_eq!(recovering.ended(), 0);
    let status = lab.status();
    assert_eq!(
        (&status["state"], &status["disks"][0]["is_moved"]),
        (&json!("running"), &json!(true)),
        "{status}"
    );
    std::fs::remove_dir_all(lab.vault.repo()).unwrap();
    lab.write(20 * MIB, 9);
    lab.command("quit", json!({}));
    lab.check_image();
}

/// QEMU forgets the repository before what it read of it needs to be on the disk.
#[test]
fn a_kill_of_qemu_just_after_the_move_loses_nothing() {
    let lab = Lab::new();
    assert_eq!(lab.recover(RUNS).ended(), 0);
    lab.kill_qemu();
    lab.check_image();
}

#[test]
fn what_was_flushed_survives_a_kill_of_qemu_and_one_of_the_server() {
    let mut lab = Lab::new();
    lab.take_packs_away();
    let mut recovering = lab.recover(RUNS);
    recovering.until("the move fails", |running| running.log().contains("tries again"));
    lab.write(20 * MIB, 9);
    // Over what is in the repository.
    lab.write(6 * MIB, 8);
    let status = lab.status();
    assert_eq!(
        (&status["is_attended"], &status["disks"][0]["is_moved"]),
        (&json!(true), &json!(false)),
        "{status}"
    );
    let to = lab.folder.to_str().unwrap().to_owned();
    let twice = lab.vault.refused(&["recover", "--instant", "shop", "--to", &to, "--", "-S"]);
    assert!(twice.err.contains("another command recovers there just now"), "{}", twice.err);

    lab.kill_qemu();
    assert_eq!(recovering.ended(), 0, "it is off, and kept");
    assert_eq!(lab.status()["state"], "off");
    let forget = ["forget", "shop@2"];
    let kept = lab.vault.refused(&forget);
    assert!(kept.err.contains(&format!("by `rempart recover --to {to}` on ")), "{}", kept.err);
    let mut recovering = lab.recover(RUNS);
    recovering.until("the move fails", |running| running.log().contains("tries again"));
    lab.write(30 * MIB, 7);
    drop(recovering);
    lab.vault.refused(&forget);

    // The server was killed, the machine runs on.
    lab.write(31 * MIB, 6);
    lab.bring_packs_back();
    let mut recovering = lab.recover(RUNS);
    assert!(recovering.log().contains("runs already"), "{}", recovering.log());
    recovering.until("it is moved", |running| running.log().contains(MOVED));
    assert_eq!(recovering.ended(), 0);
    lab.vault.ok(&forget);
    lab.command("quit", json!({}));
    lab.check_image();
}

#[test]
fn a_machine_that_is_stopped_goes_on_later_or_is_finished_without_running() {
    let mut lab = Lab::new();
    lab.take_packs_away();
    let mut recovering = lab.recover(RUNS);
    recovering.until("the move fails", |running| running.log().contains("tries again"));
    lab.write(40 * MIB, 5);
    recovering.terminate();
    assert_eq!(recovering.ended(), 0);
    assert_eq!(lab.status()["state"], "off", "QEMU went with it, in order");
    lab.bring_packs_back();
    let to = lab.folder.to_str().unwrap();
    let told = lab.vault.json(&["recover", "--finish", "--to", to]);
    assert_eq!(told["is_moved"], true);
    lab.check_image();
}

#[test]
fn a_kill_of_qemu_in_the_middle_of_the_move_loses_nothing() {
    let mut lab = Lab::new();
    let recovering = lab.recover_with(&["--limit", "1M"], RUNS);
    lab.write(20 * MIB, 9);
    let start = Instant::now();
    // What there is lies between 5 and 8 MiB.
    while lab.status()["disks"][0]["done_bytes"].as_u64().is_none_or(|done| done <= 5 * MIB) {
        assert!(start.elapsed() < Duration::from_secs(60), "{}", recovering.log());
    }
    lab.kill_qemu();
    assert_eq!(recovering.ended(), 0);
    assert_eq!(lab.status()["disks"][0]["is_moved"], false);
    assert_eq!(lab.recover(RUNS).ended(), 0);
    lab.command("quit", json!({}));
    lab.check_image();
}

#[test]
fn a_move_that_failed_goes_on_when_the_repository_is_there_again() {
    let lab = Lab::new();
    lab.take_packs_away();
    let mut recovering = lab.recover(RUNS);
    recovering.until("the move fails", |running| running.log().contains("tries again"));
    lab.bring_packs_back();
    assert_eq!(recovering.ended(), 0);
    lab.command("quit", json!({}));
    lab.check_image();
}

#[test]
fn a_full_disk_is_waited_for() {
    let mut lab = Lab::new();
    let small = lab.vault.rack.path("small");
    lab.small = Some(Mounted::at(&small, &["-t", "tmpfs", "-o", "size=2M", "none"]));
    lab.folder = small.join("vm");
    let mut recovering = lab.recover(RUNS);
    recovering.until("the move fails", |running| running.log().contains("No space left on device"));
    assert_eq!(lab.status()["state"], "running");
    tool(&["mount", "-o", "remount,size=32M", small.to_str().unwrap()]);
    assert_eq!(recovering.ended(), 0);
    lab.command("quit", json!({}));
    lab.check_image();
}

#[test]
fn a_folder_is_of_one_point_and_nothing_else() {
    let lab = Lab::new();
    let to = |path: &Path| path.to_str().unwrap().to_owned();
    let folder = to(&lab.folder);
    let machine = lab.vault.refused(&["recover", "--instant", "shop", "--to", &folder]);
    assert!(machine.err.contains("no definition of a machine"), "{}", machine.err);
    let other = lab.vault.rack.path("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("mine"), "").unwrap();
    let refused = lab.vault.refused(&["recover", "--instant", "shop", "--to", &to(&other), "--", "-S"]);
    assert!(refused.err.contains("there is something else in it"), "{}", refused.err);
    let disk = lab.vault.rack.path("disk.raw");
    let newer = lab.vault.json(&["backup", "shop", "--disk", &to(&disk)])["point"].to_string();
    let newer = format!("shop@{newer}");
    let refused = lab.vault.refused(&["recover", "--instant", &newer, "--to", &folder, "--", "-S"]);
    assert!(refused.err.contains("is recovered there"), "{}", refused.err);
    let nothing = lab.vault.refused(&["recover", "--status", "--to", &to(&other)]);
    assert!(nothing.err.contains("nothing is recovered there"), "{}", nothing.err);
    let bad = lab.vault.refused(&["recover", "--instant", "shop", "--to", &folder, "--", "-no-such-option"]);
    assert!(bad.err.contains("no-such-option"), "QEMU's own words: {}", bad.err);
}

#[test]
fn a_machine_of_ours_runs_by_its_definition() {
    let mut lab = Lab::new();
    let node = lab.vault.rack.node("node-a");
    node.import("store", &[&lab.vault.rack.image("one.raw", 4 << 20, 7)]);
    let config = node.config();
    lab.vault.json(&["backup", "store", "--config", config.to_str().unwrap()]);
    let to = lab.folder.to_str().unwrap();
    lab.vault.ok(&["recover", "--instant", "store", "--to", to]);
    assert_eq!(lab.command("query-status", json!({}))["status"], "running");
    lab.expected = vec![7; 4 << 20];
    lab.write(2 * MIB, 1);
    lab.command("quit", json!({}));
    lab.check_image();
}

#[test]
fn a_machine_with_uefi_has_its_own_variables() {
    // Other ones than a new machine would get.
    const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.ms.fd";
    let lab = Lab::new();
    let node = lab.vault.rack.node("node-a");
    let image = lab.vault.rack.image("one.raw", 4 << 20, 7);
    let import = ["vm", "import", "store", "--memory", "128M", "--disk", image.to_str().unwrap()];
    node.ok(&[&import[..], &["--firmware", "uefi", "--nvram", VARIABLES]].concat());
    let config = node.config();
    let point =
        lab.vault.json(&["backup", "store", "--config", config.to_str().unwrap()])["point"].to_string();
    let mount = lab.vault.rack.path("mnt");
    std::fs::create_dir(&mount).unwrap();
    let (mounted, _) = Running::start_json(&lab.vault, &["mount", mount.to_str().unwrap(), "store"]);
    let variables = std::fs::read(mount.join("store").join(point).join("nvram")).unwrap();
    mounted.terminate();
    assert_eq!(mounted.ended(), 0);
    assert!(variables == std::fs::read(VARIABLES).unwrap());

    lab.vault.ok(&["recover", "--instant", "store", "--to", lab.folder.to_str().unwrap()]);
    assert_eq!(lab.command("query-status", json!({}))["status"], "running");
    lab.command("quit", json!({}));
    let own = std::fs::read(lab.folder.join("nvram.fd")).unwrap();
    let word: Vec<u8> = "Microsoft".bytes().collect();
    assert!(own.windows(word.len()).any(|window| window == word), "its keys are in there");
}

/// Moved, and not moved.
#[test]
fn a_recovered_machine_becomes_one_of_a_node() {
    let mut lab = Lab::new();
    let (a, b) = (lab.vault.rack.node("node-a"), lab.vault.rack.node("node-b"));
    let image = lab.vault.rack.path("one.raw");
    let mut held = noise(7, 8 << 20);
    held[4 << 20..6 << 20].fill(0);
    std::fs::write(&image, &held).unwrap();
    let import = ["vm", "import", "store", "--memory", "128M", "--disk", image.to_str().unwrap()];
    a.ok(&[&import[..], &["--firmware", "uefi", "--cpus", "2"]].concat());
    onto_node::leads(&a, "store");
    onto_node::ok(&lab.vault, &a, &["backup", "store"]);
    for (name, limit, ready) in [("moved", None, MOVED), ("cut-off", Some("1M"), RUNS)] {
        lab.folder = lab.vault.rack.path(name);
        lab.expected.clone_from(&held);
        let to = lab.folder.to_str().unwrap().to_owned();
        let mut arguments = vec!["recover", "--instant", "store", "--to", &to];
        arguments.extend(limit.iter().flat_map(|limit| ["--limit", limit]));
        let recovering = Running::start(&lab.vault, &arguments, ready);
        lab.write(5 * MIB, 1);
        let finish = ["recover", "--finish", "--to", &to, "--vm", name];
        if limit.is_some() {
            onto_node::refused(&lab.vault, &b, &finish, 1, "another command recovers there");
            recovering.terminate();
        } else {
            onto_node::refused(&lab.vault, &b, &finish, 4, "the machine runs");
            lab.command("quit", json!({}));
        }
        assert_eq!(recovering.ended(), 0);

        let without = [&finish[..4], &["--cpus", "2"]].concat();
        onto_node::refused(&lab.vault, &b, &without, 2, "are of a new machine");
        let told = onto_node::ok(&lab.vault, &b, &finish);
        assert_eq!(told["machine"], name);
        onto_node::leads(&b, name);
        onto_node::holds(&lab.vault, &b, name, 0, &lab.expected);
        let (definition, variables) = onto_node::machine(&b, name);
        assert_eq!((&definition["cpus"], &definition["firmware"]), (&json!(2), &json!("uefi")));
        let own = std::fs::read(lab.folder.join("nvram.fd")).unwrap();
        let hex = |text: String, byte: &u8| text + &format!("{byte:02x}");
        assert!(variables == Some(own.iter().fold(String::new(), hex)));
        let again = ["recover", "--instant", "store", "--to", &to];
        onto_node::refused(
            &lab.vault,
            &b,
            &again,
            4,
            &format!("is the virtual machine `{name}` of a node since"),
        );
    }
    b.ok(&["vm", "start", "moved"]);
}

/// In a network namespace with a bridge of its own: the TAP is QEMU's, as long as that lives.
#[test]
fn a_network_is_joined_only_when_it_is_wanted() {
    const WITH_BRIDGE: &str =
        "ip link add br-shop type bridge && ip link set br-shop up && exec \"$0\" \"$@\"";
    let mut lab = Lab::new();
    let node = lab.vault.rack.node("node-a");
    let image = lab.vault.rack.image("one.raw", 1 << 20, 7);
    let import = ["vm", "import", "store", "--memory", "64M", "--disk", image.to_str().unwrap()];
    node.ok(&[&import[..], &["--bridge", "br-shop"]].concat());
    let config = node.config();
    lab.vault.json(&["backup", "store", "--config", config.to_str().unwrap()]);
    for (folder, more, taps) in [("apart", None, 0), ("joined", Some("--network"), 1)] {
        lab.folder = lab.vault.rack.path(folder);
        let mut recover = vec!["recover", "--instant", "store", "--to", lab.folder.to_str().unwrap()];
        recover.extend(more);
        let command = lab.vault.command(&recover);
        let mut inside = std::process::Command::new("unshare");
        inside.args(["--net", "sh", "-c", WITH_BRIDGE]).arg(command.get_program()).args(command.get_args());
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let ended = inside.output().unwrap();
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        let pid = std::fs::read_to_string(lab.folder.join("qemu.pid")).unwrap();
        let devices = std::fs::read_to_string(format!("/proc/{}/net/dev", pid.trim())).unwrap();
        let found = devices.lines().filter(|line| line.trim_start().starts_with("rp")).count();
        assert!(devices.contains("br-shop") && found == taps, "{devices}");
        lab.command("quit", json!({}));
    }
}
