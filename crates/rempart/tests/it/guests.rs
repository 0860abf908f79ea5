//! Backups of a machine with a guest in it, which writes through its file system all the time: frozen by Debian's guest
//! agent with the hook we ship, as after a power cut, on the peer after its node died, and stopped.

use crate::backup::Vault;
use crate::guest::Guest;
use crate::onto_node;
use crate::rack::Server;
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
/// Far above what a guest takes to boot.
const PATIENCE: Duration = Duration::from_secs(60);

fn run(program: &str, arguments: &[&str]) -> (i32, String) {
    let output = Command::new(program).args(arguments).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last number that the guest told to be on its disk, in this life on this node.
fn synced(node: &Server) -> u64 {
    let console = std::fs::read_to_string(node.home.join("run/vms/shop/console.log")).unwrap_or_default();
    // Whole lines only.
    let lines = console.rsplit_once('\n').map_or("", |(lines, _)| lines).lines();
    lines.filter_map(|line| line.trim().strip_prefix("wrote ")?.parse().ok()).next_back().unwrap_or(0)
}

/// The highest number in the guest's files.
fn highest(image: &Path) -> u64 {
    let image = image.to_str().unwrap();
    let numbers = (0..50).filter_map(|file| {
        let (_, text) = run("debugfs", &["-R", &format!("cat /file-{file}"), image]);
        text.trim().parse::<u64>().ok()
    });
    numbers.max().unwrap_or(0)
}

/// A QEMU that boots a kernel from outside: the guest's disk has no boot loader.
fn qemu(script: &Path) -> String {
    let quoted = Guest::options_for_agent().into_iter().map(|option| format!(" '{option}'"));
    let boots = quoted.collect::<String>();
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *guest=shop*) exec qemu-system-x86_64 \"$@\"{boots};; esac\n\
         exec qemu-system-x86_64 \"$@\"\n"
    );
    std::fs::write(script, text).unwrap();
    std::fs::set_permissions(script, std::fs::Permissions::from_mode(0o755)).unwrap();
    script.to_str().unwrap().to_owned()
}

fn level(backup: &Value) -> &str {
    backup["consistency"]["level"].as_str().unwrap()
}

#[test]
fn a_guest_that_writes_is_backed_up_wherever_it_runs() {
    let vault = Vault::new();
    let program = qemu(&vault.rack.path("qemu"));
    let own = format!("[vm]\nqemu = \"{program}\"\n");
    let mut a = vault.rack.node_with("node-a", "[vm]\n", &own);
    let b = vault.rack.node_with("node-b", "[vm]\n", &own);
    a.ok(&["cluster", "create", "lab"]);
    vault.rack.join(&b, &a);
    let _witness = vault.rack.witness("witness", &a);
    let disk = vault.rack.image("ext4.raw", 24 * MIB, 0);
    assert_eq!(run("mkfs.ext4", &["-q", disk.to_str().unwrap()]).0, 0);
    let orders = vault.rack.image("orders.raw", MIB, 0);
    let (disk, orders) = (disk.to_str().unwrap(), orders.to_str().unwrap());
    a.ok(&[
        "vm",
        "import",
        "shop",
        "--memory",
        "192M",
        "--cpu-model",
        "max",
        "--disk",
        disk,
        "--disk",
        orders,
    ]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.until_mirrored("shop");

    let back_up = |node: &Server, more: &[&str]| -> (Value, u64) {
        let config = node.config();
        let before = synced(node);
        let backup = vault.json(&[&["backup", "shop", "--config", config.to_str().unwrap()], more].concat());
        (backup, before)
    };
    let first = back_up(&a, &[]).0;
    assert_eq!(level(&first), "stopped", "{first}");
    a.ok(&["vm", "start", "shop"]);

    let mut points: BTreeMap<u64, (&str, u64)> = BTreeMap::new();
    let mut keep = |name: &'static str, (backup, before): (Value, u64)| {
        for disk in backup["disks"].as_array().unwrap() {
            assert_eq!(disk["full_because"], Value::Null, "{name}: {backup}");
        }
        points.insert(backup["point"].as_u64().unwrap(), (name, before));
        backup
    };
    a.until("it writes", || synced(&a) > 0);
    let frozen = keep("frozen", back_up(&a, &["--else", "nothing"]));
    assert_eq!(level(&frozen), "application", "{frozen}");
    println!("frozen for {} ms", frozen["consistency"]["pause_ms"]);
    let now = synced(&a);
    a.until("it writes on", || synced(&a) > now);
    let cut = keep("cut", back_up(&a, &["--consistency", "crash"]));
    assert_eq!(level(&cut), "crash", "{cut}");

    a.kill();
    b.until("it runs on the peer", || synced(&b) > 0);
    let moved = keep("frozen", back_up(&b, &[]));
    assert_eq!(level(&moved), "application", "{moved}");
    b.ok(&["vm", "stop", "--force", "shop"]);
    let stopped = keep("stopped", back_up(&b, &[]));
    assert_eq!(level(&stopped), "stopped", "{stopped}");

    for (point, (name, before)) in &points {
        let to = vault.rack.path(&format!("to-{point}"));
        vault.ok(&["restore", &format!("shop@{point}"), "--to", to.to_str().unwrap()]);
        let image = to.join("disk0.raw");
        let path = image.to_str().unwrap();
        if *name == "stopped" {
            // The increments of all of them add up to what is there.
            for disk in [0, 1] {
                let restored = to.join(format!("disk{disk}.raw"));
                let same = run(
                    "qemu-img",
                    &[
                        "compare",
                        "-f",
                        "raw",
                        "-F",
                        "raw",
                        restored.to_str().unwrap(),
                        &b.export("shop", disk),
                    ],
                );
                assert_eq!(same.0, 0, "disk {disk}: {}", same.1);
            }
        }
        let needs_recovery = run("dumpe2fs", &["-h", path]).1.contains("needs_recovery");
        assert_eq!(needs_recovery, *name != "frozen", "{name}");
        if *name == "frozen" {
            // The hook had been there before the moment, and was undone after it.
            assert_eq!(run("debugfs", &["-R", "cat /marker", path]).1, "prepared\n");
        } else {
            let (code, said) = run("e2fsck", &["-fy", path]);
            assert!(code <= 1, "{name}: {said}");
        }
        let (code, said) = run("e2fsck", &["-fn", path]);
        assert_eq!(code, 0, "{name}: {said}");
        assert!(highest(&image) >= *before, "{name}: {} was on the disk", before);
    }

    // It goes back to the first of them, and its guest goes on from there.
    let (point, (_, before)) = points.first_key_value().unwrap();
    let told = onto_node::ok(&vault, &b, &["restore", &format!("shop@{point}"), "--over", "shop", "--yes"]);
    let copy = vault.rack.path("copy.raw");
    assert_eq!(run("nbdcopy", &[&b.export("shop", 0), copy.to_str().unwrap()]).0, 0);
    assert_eq!(run("debugfs", &["-R", "cat /marker", copy.to_str().unwrap()]).1, "prepared\n");
    assert!(highest(&copy) >= *before, "{told}");
    let _ = std::fs::remove_file(b.home.join("run/vms/shop/console.log"));
    b.ok(&["vm", "start", "shop"]);
    b.until("it writes again", || synced(&b) > 0);
}

/// A QEMU of somebody else's, killed at the end.
struct Foreign(Child);

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_guest_of_another_qemu_takes_part() {
    let vault = Vault::new();
    let path = |name: &str| vault.rack.path(name).display().to_string();
    vault.rack.image("system", 24 * MIB, 0);
    vault.rack.image("orders", MIB, 0);
    assert_eq!(run("mkfs.ext4", &["-q", &path("system")]).0, 0);
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-no-user-config", "-M", "q35", "-accel", "tcg,tb-size=128", "-cpu", "max"])
        .args(["-m", "192", "-display", "none", "-serial", &format!("file:{}", path("console"))])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))])
        .args(Guest::options_with_agent(&vault.rack.path("agent")));
    for disk in ["system", "orders"] {
        let node = format!("driver=raw,node-name={disk}-node,file.driver=file,file.filename={}", path(disk));
        command.args(["-blockdev", &node, "-device", &format!("virtio-blk-pci,drive={disk}-node,id={disk}")]);
    }
    let _qemu = Foreign(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
    let writes = || std::fs::read_to_string(path("console")).unwrap_or_default().contains("wrote ");
    let end = Instant::now() + PATIENCE;
    while !writes() {
        assert!(Instant::now() < end, "the guest does not write");
        std::thread::sleep(Duration::from_millis(50));
    }
    let (monitor, agent, views) = (path("qmp"), path("agent"), path("views"));
    let asked = ["backup", "shop", "--qmp", &monitor, "--agent", &agent, "--scratch-dir", &views];
    let frozen = vault.json(&[&asked[..], &["--else", "nothing"]].concat());
    assert_eq!(level(&frozen), "application", "{frozen}");
    let to = path("to");
    vault.ok(&["restore", "shop", "--to", &to]);
    let image = format!("{to}/system.raw");
    assert!(!run("dumpe2fs", &["-h", &image]).1.contains("needs_recovery"));
    assert_eq!(run("e2fsck", &["-fn", &image]).0, 0);
    assert_eq!(run("debugfs", &["-R", "cat /marker", &image]).1, "prepared\n");

    let stopped = vault.json(&[&asked[..], &["--consistency", "saved-state"]].concat());
    assert_eq!(level(&stopped), "saved-state", "{stopped}");
    assert!(stopped["consistency"]["pause_ms"].as_u64().is_some(), "{stopped}");
    assert_eq!(stopped["disks"][0]["full_because"], Value::Null, "{stopped}");
}
