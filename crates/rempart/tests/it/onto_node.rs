//! Machines that come back from a repository onto nodes: new ones, and over those that are there.

use crate::backup::Vault;
use crate::golden::Transcript;
use crate::rack::{Answer, Server, noise};
use crate::running::{Mounted, Running, tool};
use rempart_api::{Client, OpenRestore, RestoreDisk, RestoreOnto, RestoreRequest, ViewRequest};
use serde_json::Value;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

const MIB: usize = 1 << 20;
/// A repository's chunk.
const CHUNK: usize = 128 << 10;

/// A command on the repository, with the daemon of `node`.
pub fn run(vault: &Vault, node: &Server, arguments: &[&str]) -> Answer {
    vault.run(&[arguments, &["--config", node.config().to_str().unwrap()]].concat())
}

#[track_caller]
pub fn ok(vault: &Vault, node: &Server, arguments: &[&str]) -> Value {
    let answer = run(vault, node, &[arguments, &["--json"]].concat());
    assert_eq!(answer.code, 0, "{arguments:?}: {}\n{}", answer.err, node.log());
    serde_json::from_str(&answer.out).expect("one JSON value")
}

#[track_caller]
pub fn refused(vault: &Vault, node: &Server, arguments: &[&str], code: i32, why: &str) {
    let answer = run(vault, node, arguments);
    assert_eq!(answer.code, code, "{arguments:?}: {}", answer.err);
    assert!(answer.err.contains(why), "{arguments:?}: {}", answer.err);
}

fn point(backup: &Value) -> String {
    format!("{}@{}", backup["vm"].as_str().unwrap(), backup["point"])
}

/// What a disk holds, as its guest would read it.
fn content(vault: &Vault, node: &Server, vm: &str, disk: u16) -> Vec<u8> {
    let copy = vault.rack.path("copy.raw");
    let _ = std::fs::remove_file(&copy);
    tool(&["nbdcopy", &node.export(vm, disk), copy.to_str().unwrap()]);
    std::fs::read(copy).unwrap()
}

#[track_caller]
pub fn holds(vault: &Vault, node: &Server, vm: &str, disk: u16, expected: &[u8]) {
    assert!(content(vault, node, vm, disk) == expected, "disk {disk} of {vm} on {} is another", node.name);
}

/// The definition and the UEFI variables.
pub fn machine(node: &Server, vm: &str) -> (Value, Option<String>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = Client::new(node.home.join("run/api.sock"));
    let open = runtime.block_on(client.open_view(vm, &ViewRequest::default())).unwrap();
    (open.view.definition.clone(), open.view.nvram_hex.clone())
}

pub fn leads(node: &Server, vm: &str) {
    node.until("it leads", || node.vm(vm)["role"] == "primary");
}

/// A large disk of which little is written, and a small one.
fn two_disks(vault: &Vault) -> [(PathBuf, Vec<u8>); 2] {
    let mut first = vec![0; 24 * MIB];
    first[..3 * MIB + 5000].copy_from_slice(&noise(1, 3 * MIB + 5000));
    first[20 * MIB..21 * MIB].copy_from_slice(&noise(2, MIB));
    // Its last chunk is a part of one.
    let second = noise(3, 2 * MIB + 512);
    [("one.raw", first), ("two.raw", second)].map(|(name, content)| {
        let path = vault.rack.path(name);
        std::fs::write(&path, &content).unwrap();
        (path, content)
    })
}

#[test]
fn a_machine_comes_back_as_a_new_one_on_another_node() {
    let vault = Vault::new();
    let (a, b) = vault.rack.pair();
    let [(one, first), (two, second)] = two_disks(&vault);
    let nvram = vault.rack.path("vars.fd");
    let mut variables = std::fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").expect("package ovmf");
    *variables.last_mut().unwrap() = 7;
    std::fs::write(&nvram, variables).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    a.ok(&[
        &["vm", "import", "shop", "--disk", &text(&one), "--disk", &text(&two), "--memory", "96M"][..],
        &["--cpus", "2", "--firmware", "uefi", "--nvram", &text(&nvram), "--autostart"],
        &["--bridge", "rp-none", "--mac", "52:54:00:00:00:07"],
    ]
    .concat());
    a.run(&["vm", "stop", "shop", "--force"]);
    let shop = point(&vault.back_up(&a));
    let (was, variables) = machine(&a, "shop");

    refused(&vault, &b, &["restore", &shop, "--vm", "copy"], 4, "it has no bridge `rp-none`");
    let same = ["restore", &shop, "--vm", "copy", "--same-identity"];
    refused(&vault, &a, &same, 1, "`shop` has the address 52:54:00:00:00:07");
    let told = ok(&vault, &b, &["restore", &shop, "--vm", "copy", "--no-network"]);
    assert_eq!((&told["machine"], &told["disks"][1]["index"]), (&"copy".into(), &1.into()), "{told}");

    leads(&b, "copy");
    holds(&vault, &b, "copy", 0, &first);
    holds(&vault, &b, "copy", 1, &second);
    let written = b.data("vms/copy/disk0.raw").metadata().unwrap().blocks() * 512;
    assert!(written < 6 * MIB as u64, "holes stay holes: {written}");
    let (is, its_variables) = machine(&b, "copy");
    for same in ["memory_bytes", "cpus", "cpu_model", "machine_type", "firmware", "boot_order"] {
        assert_eq!(is[same], was[same], "{same}");
    }
    assert_eq!((variables.is_some(), its_variables), (true, variables));
    assert_eq!(
        (&is["name"], &is["autostart"], &is["nics"]),
        (&"copy".into(), &false.into(), &Value::Array(vec![]))
    );
    assert_ne!(is["uuid"], was["uuid"]);
    assert_ne!(is["disks"][0]["uuid"], was["disks"][0]["uuid"]);
    assert_eq!(b.vm("copy")["state"], "stopped");

    refused(
        &vault,
        &b,
        &["restore", &shop, "--vm", "copy", "--no-network"],
        1,
        "there is a virtual machine `copy` already",
    );
    // It is a machine as any other: its disks are written, it is backed up, it starts.
    b.io("copy", 0, &["write -P 9 10M 4096", "flush"]);
    let again = ok(&vault, &b, &["backup", "copy"]);
    assert_eq!(again["consistency"]["level"], "stopped");
    b.ok(&["vm", "start", "copy"]);
    assert_eq!(b.vm("copy")["state"], "running");
    b.ok(&["vm", "stop", "copy", "--force"]);
}

#[test]
fn a_point_that_does_not_say_what_machine_it_is_of_is_told_it() {
    let vault = Vault::new();
    let b = vault.rack.node("node-b");
    let [(one, first), (two, _)] = two_disks(&vault);
    vault.ok(&["backup", "old", "--disk", one.to_str().unwrap(), "--disk", two.to_str().unwrap()]);
    refused(&vault, &b, &["restore", "old", "--vm", "new"], 2, "give it memory, such as `--memory 4G`");
    ok(&vault, &b, &["restore", "old", "--vm", "new", "--memory", "128M", "--cpus", "3"]);
    leads(&b, "new");
    holds(&vault, &b, "new", 0, &first);
    let (is, _) = machine(&b, "new");
    assert_eq!((&is["memory_bytes"], &is["cpus"]), (&(128 * MIB).into(), &3.into()));
}

#[test]
fn a_mirrored_machine_goes_back_to_a_point_on_both_nodes() {
    let vault = Vault::new();
    let (a, b, _witness) = vault.rack.cluster();
    let [(one, mut first), (two, second)] = two_disks(&vault);
    a.import("shop", &[&one, &two]);
    a.ok(&["protect", "shop", "--peer", "node-b", "--wait"]);
    let old = point(&vault.back_up(&a));
    let at_old = first.clone();
    // In a chunk that held something, in a hole, and a hole where there was something.
    a.io("shop", 0, &["write -P 7 1M 4096", "write -P 8 9M 8192", "discard 20M 1M", "flush"]);
    first[MIB..MIB + 4096].fill(7);
    first[9 * MIB..9 * MIB + 8192].fill(8);
    first[20 * MIB..21 * MIB].fill(0);
    a.io("shop", 1, &["write -P 5 1M 512", "flush"]);
    let mut other = second.clone();
    other[MIB..MIB + 512].fill(5);

    let over = ["restore", &old, "--over", "shop"];
    refused(&vault, &a, &over, 4, "would overwrite what `shop` holds");
    let agreed = [&over[..], &["--yes"]].concat();
    a.ok(&["vm", "start", "shop"]);
    refused(&vault, &a, &agreed, 4, "it runs");
    a.ok(&["vm", "stop", "shop", "--force"]);
    refused(&vault, &b, &agreed, 1, "this node does not lead it");

    let told = ok(&vault, &a, &agreed);
    let written = |told: &Value, disk: usize| told["disks"][disk]["written_bytes"].as_u64().unwrap();
    assert_eq!(
        written(&told, 0),
        (10 * CHUNK) as u64,
        "one changed, one to be zeroed, eight to come back: {told}"
    );
    assert_eq!(written(&told, 1), CHUNK as u64, "{told}");
    holds(&vault, &a, "shop", 0, &at_old);
    holds(&vault, &a, "shop", 1, &second);
    a.until_mirrored("shop");
    assert_eq!(a.json(&["compare", "shop"])["different_extents"], 0);

    // What it held before is a point, and comes back; one disk of it alone, too.
    let before = told["before"].as_str().unwrap().to_owned();
    let told =
        ok(&vault, &a, &["restore", &before, "--over", "shop", "--disk", "disk1", "--yes", "--no-backup"]);
    assert_eq!((&told["before"], told["disks"].as_array().unwrap().len()), (&Value::Null, 1), "{told}");
    holds(&vault, &a, "shop", 0, &at_old);
    holds(&vault, &a, "shop", 1, &other);
    ok(&vault, &a, &["restore", &before, "--over", "shop", "--yes"]);
    holds(&vault, &a, "shop", 0, &first);

    // Its chain goes on, and its peer has all of it.
    let next = vault.back_up(&a);
    assert_eq!(next["disks"][0]["full_because"], Value::Null, "{next}");
    assert!(vault.restored(&point(&next), "next") == [first.clone(), other.clone()]);
    a.until_mirrored("shop");
    b.ok(&["failover", "shop", "--planned"]);
    leads(&b, "shop");
    holds(&vault, &b, "shop", 0, &first);
    holds(&vault, &b, "shop", 1, &other);
    b.ok(&["vm", "start", "shop"]);
}

/// A machine with a point, whose second disk takes a while to come back.
fn with_long_restore(vault: &Vault, node: &Server) -> (String, [Vec<u8>; 2]) {
    let contents = [noise(1, 2 * MIB), noise(2, 64 * MIB)];
    let paths = ["one.raw", "two.raw"].map(|name| vault.rack.path(name));
    for (path, content) in paths.iter().zip(&contents) {
        std::fs::write(path, content).unwrap();
    }
    node.import("shop", &[&paths[0], &paths[1]]);
    leads(node, "shop");
    (point(&vault.back_up(node)), contents)
}

fn restore(vault: &Vault, node: &Server, arguments: &[&str]) -> Child {
    let mut command = vault.command(&[arguments, &["--config", node.config().to_str().unwrap()]].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_restore_that_is_killed_leaves_nothing_that_looks_like_a_machine() {
    let vault = Vault::new();
    let mut a = vault.rack.node("node-a");
    let (shop, [first, second]) = with_long_restore(&vault, &a);
    let half = a.data("vms/copy/disk1.raw");
    let arguments = ["restore", &shop, "--vm", "copy"];

    let mut killed = restore(&vault, &a, &arguments);
    a.until("it writes its second disk", || half.exists());
    assert_eq!(a.vm("copy"), Value::Null);
    killed.kill().unwrap();
    assert_eq!(killed.wait().unwrap().signal(), Some(9), "it was not at its end");
    a.until("its directory is gone", || !a.data("vms/copy").exists());

    // The daemon, too; the command notices.
    let cut_off = restore(&vault, &a, &arguments);
    a.until("it writes its second disk", || half.exists());
    a.kill();
    let told = Answer::of(cut_off.wait_with_output().unwrap());
    assert_eq!(told.code, 3, "{}", told.err);
    assert!(a.data("vms/copy/unfinished").exists());
    a.start();
    assert!(!a.data("vms/copy").exists());
    assert_eq!(a.vm("copy"), Value::Null);

    ok(&vault, &a, &arguments);
    leads(&a, "copy");
    holds(&vault, &a, "copy", 0, &first);
    holds(&vault, &a, "copy", 1, &second);
}

#[test]
fn a_machine_that_is_half_restored_does_not_start_until_it_is_whole() {
    let vault = Vault::new();
    let (mut a, b, _witness) = vault.rack.cluster();
    let (shop, [first, second]) = with_long_restore(&vault, &a);
    a.ok(&["protect", "shop", "--peer", "node-b", "--wait"]);
    let now = [vec![1; first.len()], vec![2; second.len()]];
    for disk in 0..2 {
        a.io("shop", disk, &[&format!("write -P {} 0 {}", disk + 1, now[usize::from(disk)].len()), "flush"]);
    }
    let config = a.config().to_str().unwrap().to_owned();
    let arguments = ["restore", &shop, "--over", "shop", "--yes", "--config", &config];
    let killed = Running::start(&vault, &arguments, "disk0: ");
    let told = killed.log();
    let before = told.split('`').find(|text| text.starts_with("shop@")).unwrap().to_owned();
    // SIGKILL.
    drop(killed);

    let is_half = |node: &Server| {
        let refused = node.refused(&["vm", "start", "shop"]);
        assert_eq!(refused.code, 4, "{}", refused.err);
        assert!(
            refused.err.contains(&format!("a restore of `{shop}` onto it has not ended")),
            "{}",
            refused.err
        );
        assert!(refused.err.contains(&format!("with `{before}` instead")), "{}", refused.err);
    };
    is_half(&a);
    refused(&vault, &a, &["backup", "shop"], 4, "onto it has not ended");
    let status = a.vm("shop").to_string();
    assert!(status.contains("has not ended"), "{status}");
    // Neither after a start of the daemon, nor on its peer.
    a.until_mirrored("shop");
    a.kill();
    leads(&b, "shop");
    is_half(&b);
    a.start();
    b.until_mirrored("shop");

    // There it is gone on with; what it held first is what is kept.
    let one = ["restore", &shop, "--over", "shop", "--disk", "disk0", "--yes"];
    refused(&vault, &b, &one, 4, "disk 1 would stay half restored");
    let told = ok(&vault, &b, &["restore", &shop, "--over", "shop", "--yes"]);
    assert_eq!(told["before"], before.as_str());
    holds(&vault, &b, "shop", 0, &first);
    holds(&vault, &b, "shop", 1, &second);
    b.until_mirrored("shop");
    assert_eq!(b.json(&["compare", "shop"])["different_extents"], 0);
    b.ok(&["vm", "start", "shop"]);
    b.ok(&["vm", "stop", "shop", "--force"]);
    ok(&vault, &b, &["restore", &before, "--over", "shop", "--yes"]);
    holds(&vault, &b, "shop", 0, &now[0]);
    holds(&vault, &b, "shop", 1, &now[1]);
}

#[test]
fn what_cannot_be_restored_onto_a_node_is_refused() {
    let vault = Vault::new();
    let a = vault.rack.node("node-a");
    let [(one, _), (two, second)] = two_disks(&vault);
    a.import("shop", &[&one, &two]);
    a.import("mail", &[&two]);
    leads(&a, "shop");
    leads(&a, "mail");
    vault.back_up(&a);
    // Nothing else is said of where that is.
    let odd = vault.rack.path("odd.raw");
    std::fs::write(&odd, &second[..5000]).unwrap();
    vault.ok(&["backup", "odd", "--disk", odd.to_str().unwrap()]);
    std::fs::write(vault.rack.path("wrong"), "horse correct\n").unwrap();
    let wrong = vault.rack.path("wrong").to_str().unwrap().to_owned();
    let mut transcript = Transcript::default();
    for arguments in [
        &["restore", "nobody", "--vm", "copy"][..],
        &["restore", "shop@99", "--vm", "copy"],
        &["restore", "shop", "--vm", "copy", "--passphrase-file", &wrong],
        &["restore", "shop", "--vm", "shop"],
        &["restore", "shop", "--vm", "A copy"],
        &["restore", "shop", "--vm", "copy", "--disk", "disk0"],
        &["restore", "shop", "--vm", "copy", "--to", &wrong],
        &["restore", "shop", "--vm", "copy", "--memory", "5"],
        &["restore", "shop", "--vm", "copy", "--bridge", "rp-none"],
        &["restore", "shop", "--to", &wrong, "--memory", "4G"],
        &["restore", "odd", "--vm", "copy"],
        &["restore", "shop", "--over", "nobody", "--yes"],
        &["restore", "shop", "--over", "shop"],
        &["restore", "shop", "--over", "mail", "--yes"],
        &["restore", "shop", "--over", "mail", "--disk", "disk0", "--yes"],
        &["restore", "shop", "--over", "shop", "--disk", "disk7", "--yes"],
        &["restore", "shop", "--over", "shop", "--vm", "copy"],
    ] {
        let answer = run(&vault, &a, arguments);
        assert_ne!(answer.code, 0, "{arguments:?}: {}", answer.err);
        transcript.told(&format!("rempart {}", arguments.join(" ")), answer.code, &answer.out, &answer.err);
    }
    let folder = vault.rack.path("").to_str().unwrap().to_owned();
    transcript.check("onto-node-refuses.txt", &[(folder, "FOLDER/")]);
    assert_eq!(a.json(&["vm", "list"]).as_array().unwrap().len(), 2);
    assert_eq!(a.data("vms").read_dir().unwrap().count(), 2);
}

/// A restore that is open, and writes nothing.
fn open(node: &Server, name: &str, onto: RestoreOnto) -> (tokio::runtime::Runtime, OpenRestore) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let client = Client::new(node.home.join("run/api.sock"));
    let disks = vec![RestoreDisk { index: 0, size_bytes: MIB as u64 }];
    let request = RestoreRequest { name: name.to_owned(), disks, nvram_hex: None, onto };
    let open = runtime.block_on(client.open_restore(&request)).unwrap();
    (runtime, open)
}

#[test]
fn a_name_is_one_restores_at_a_time() {
    let vault = Vault::new();
    let a = vault.rack.node("node-a");
    let image = vault.rack.image("disk.raw", MIB, 7);
    a.import("shop", &[&image]);
    leads(&a, "shop");
    let shop = point(&vault.back_up(&a));
    let busy = "is being made, deleted or overwritten just now";

    let (definition, _) = machine(&a, "shop");
    let new = RestoreOnto::NewMachine { definition, same_identity: false, needed_bytes: 0 };
    let (runtime, restore) = open(&a, "copy", new);
    refused(&vault, &a, &["restore", &shop, "--vm", "copy"], 1, busy);
    let import = a.refused(&["vm", "import", "copy", "--disk", image.to_str().unwrap(), "--memory", "64M"]);
    assert!(import.err.contains(busy), "{}", import.err);
    // Nothing was written: it is no machine, whatever its client says.
    let client = Client::new(a.home.join("run/api.sock"));
    let path = format!("/v1/restores/{}/finish", restore.ready.id);
    let job: rempart_api::Job = runtime.block_on(client.post(&path, &())).unwrap();
    let ended = runtime.block_on(client.wait(job.id, |_| {})).unwrap_err();
    assert!(ended.message.contains("is no restored disk"), "{ended}");
    drop(restore);
    a.until("its directory is gone", || !a.data("vms/copy").exists());
    ok(&vault, &a, &["restore", &shop, "--vm", "copy"]);

    let (_runtime, restore) = open(&a, "shop", RestoreOnto::Machine);
    refused(&vault, &a, &["restore", &shop, "--over", "shop", "--yes"], 1, busy);
    assert!(a.refused(&["vm", "delete", "shop", "--yes"]).err.contains(busy));
    drop(restore);
    a.until("it may be deleted", || a.run(&["vm", "delete", "shop", "--yes"]).code == 0);
}

#[test]
fn a_node_without_room_takes_no_machine() {
    let vault = Vault::new();
    let disk = vault.rack.path("disk.raw");
    std::fs::write(&disk, noise(1, 20 * MIB)).unwrap();
    vault.ok(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
    let mut b = vault.rack.initialised("node-b");
    let vms = b.data("vms");
    std::fs::create_dir_all(&vms).unwrap();
    let data = b.data("");
    let kept = vault.rack.path("kept");
    tool(&["cp", "-a", data.to_str().unwrap(), kept.to_str().unwrap()]);
    tool(&["mount", "-t", "tmpfs", "-o", "size=16M", "none", data.to_str().unwrap()]);
    let small = Mounted(data.clone());
    tool(&["cp", "-a", &format!("{}/.", kept.display()), data.to_str().unwrap()]);
    b.start();
    refused(
        &vault,
        &b,
        &["restore", "shop", "--vm", "shop", "--memory", "64M"],
        4,
        "its disks need 20971520 bytes",
    );
    assert_eq!(vms.read_dir().unwrap().count(), 0);
    b.kill();
    drop(small);
}
