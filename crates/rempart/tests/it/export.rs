//! The daemon's exports, as NBD's own tools see them.

use crate::rack::{Rack, Server};
use serde_json::Value;
use std::process::Command;

const KIB: u64 = 1024;

/// What `nbdinfo --map` says: offset, length, type.
pub fn map(node: &Server, context: &str) -> Vec<(u64, u64, u64)> {
    let map = format!("--map={context}");
    let output = Command::new("nbdinfo").args([&map, "--json", &node.export("shop", 0)]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let runs: Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |run: &Value, key: &str| run[key].as_u64().unwrap();
    runs.as_array()
        .unwrap()
        .iter()
        .map(|run| (number(run, "offset"), number(run, "length"), number(run, "type")))
        .collect()
}

fn at(runs: &[(u64, u64, u64)], offset: u64) -> u64 {
    let run = runs.iter().find(|(start, length, _)| (*start..start + length).contains(&offset));
    run.expect("the map covers the disk").2
}

#[test]
fn the_maps_of_an_export_tell_holes_and_when_extents_changed() {
    const NOTHING: u64 = 3;
    const DATA: u64 = 0;
    let rack = Rack::new();
    let node = rack.node("node-a");
    // An image with content in its first 64 KiB only.
    let image = rack.image("disk.raw", 64 << 10, 7);
    std::fs::File::options().write(true).open(&image).unwrap().set_len(4 << 20).unwrap();
    node.import("shop", &[&image]);

    let before = map(&node, "base:allocation");
    assert_eq!(before.iter().map(|run| run.1).sum::<u64>(), 4 << 20);
    assert_eq!((at(&before, 0), at(&before, 1 << 20)), (DATA, NOTHING), "{before:?}");
    let first = map(&node, "rempart:changed-at");
    assert_eq!(first.len(), 1, "imported all at once: {first:?}");

    node.io("shop", 0, &["write -P 9 1M 4k", "flush"]);
    let after = map(&node, "base:allocation");
    assert_eq!((at(&after, 0), at(&after, 1 << 20), at(&after, 2 << 20)), (DATA, DATA, NOTHING), "{after:?}");
    let changed = map(&node, "rempart:changed-at");
    let newest = at(&changed, 1 << 20);
    assert!(newest > at(&first, 0));
    assert_eq!(
        changed,
        [
            (0, 1024 * KIB, at(&first, 0)),
            (1024 * KIB, 64 * KIB, newest),
            (1088 * KIB, 3008 * KIB, at(&first, 0)),
        ]
    );

    // Given back, and read as zeroes.
    node.io("shop", 0, &["discard 1M 64k", "flush"]);
    node.until("the hole is told", || at(&map(&node, "base:allocation"), 1 << 20) == NOTHING);
    assert!(at(&map(&node, "rempart:changed-at"), 1 << 20) > newest);
    node.io("shop", 0, &["read -P 0 1M 64k"]);

    // nbdcopy uses the map; what it copies is the disk.
    let copy = rack.path("copy.raw");
    let copied = Command::new("nbdcopy").arg(node.export("shop", 0)).arg(&copy).status().unwrap();
    assert!(copied.success());
    let bytes = std::fs::read(&copy).unwrap();
    assert!(
        bytes[..64 << 10].iter().all(|&byte| byte == 7) && bytes[64 << 10..].iter().all(|&byte| byte == 0)
    );
}

/// A disk that was never written holds nothing, and no change.
#[test]
fn a_new_disk_is_one_hole() {
    let rack = Rack::new();
    let node = rack.node("node-a");
    node.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    node.ok(&["vm", "disk", "add", "shop", "--size", "8M"]);
    for (context, expected) in [("base:allocation", 3), ("rempart:changed-at", 0)] {
        let map = format!("--map={context}");
        let output =
            Command::new("nbdinfo").args([&map, "--json", &node.export("shop", 1)]).output().unwrap();
        let runs: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(runs[0]["length"].as_u64(), Some(8 << 20), "{runs}");
        assert_eq!(runs[0]["type"].as_u64(), Some(expected), "{runs}");
    }
}

#[test]
fn a_running_machine_is_told_that_its_disk_grew() {
    let rack = Rack::new();
    let node = rack.node("node-a");
    node.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    node.ok(&["vm", "start", "shop"]);
    node.until("it runs", || node.vm("shop")["state"] == "running");
    node.ok(&["vm", "disk", "resize", "shop", "0", "4M"]);
    assert_eq!(node.json(&["vm", "show", "shop"])["disks"][0]["size_bytes"], 4 << 20);
    node.io("shop", 0, &["write -P 9 3M 64k", "read -P 9 3M 64k"]);
    let smaller = node.refused(&["vm", "disk", "resize", "shop", "0", "1M"]);
    assert!(smaller.err.contains("a disk grows"), "{}", smaller.err);
    node.ok(&["vm", "stop", "--force", "shop"]);
}

/// A folder as GnuTLS clients want it, from a node's own.
fn credentials(rack: &Rack, name: &str, node: &Server) -> String {
    let folder = rack.path(name);
    std::fs::create_dir(&folder).unwrap();
    for (ours, theirs) in
        [("ca.pem", "ca-cert.pem"), ("certificate.pem", "client-cert.pem"), ("key.pem", "client-key.pem")]
    {
        std::fs::copy(node.data("pki").join(ours), folder.join(theirs)).unwrap();
    }
    folder.to_str().unwrap().to_owned()
}

#[test]
fn over_tcp_disks_are_served_to_members_by_tls_only_and_for_reading() {
    let rack = Rack::new();
    let port = Rack::free_address().port();
    let listen = format!("[nbd]\nlisten = \"127.0.0.1:{port}\"");
    let a = rack.node_with("node-a", "[nbd]", &listen);
    a.ok(&["cluster", "create", "lab"]);
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.import("mail", &[&rack.image("mail.raw", 2 << 20, 8)]);
    let folder = credentials(&rack, "member", &a);
    let cluster = a.json(&["cluster", "members"])["cluster_id"].as_str().unwrap().to_owned();
    // Certificates name the cluster; libnbd wants the name that it dials, so the client's machine must know that name.
    let host = format!("member.{cluster}.rempart.internal");
    let hosts = rack.path("hosts");
    std::fs::write(&hosts, format!("127.0.0.1 localhost {host}\n")).unwrap();
    let info = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        let script = "mount --bind \"$0\" /etc/hosts && exec nbdinfo \"$@\"";
        command.args(["-m", "sh", "-c", script]).arg(&hosts).args(arguments).output().unwrap()
    };
    let export = |name: &str, folder: &str| format!("nbds://{host}:{port}/{name}?tls-certificates={folder}");
    for (name, size) in [("shop/disk0", "1048576"), ("mail/disk0", "2097152")] {
        let output = info(&["--size", &export(name, &folder)]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), size, "{said}\n{}", a.log());
    }
    let list = info(&["--list", "--json", &export("", &folder)]);
    let list = String::from_utf8(list.stdout).unwrap();
    assert!(list.contains("mail/disk0") && list.contains("shop/disk0"), "{list}");

    // In the clear: nothing, not even a name.
    let clear = info(&["--size", &format!("nbd://127.0.0.1:{port}/shop/disk0")]);
    assert!(!clear.status.success());
    assert!(!info(&["--size", &export("shop/disk7", &folder)]).status.success());

    // A member of another cluster is nobody here.
    let stranger = rack.node("stranger");
    stranger.ok(&["cluster", "create", "other"]);
    let strangers = credentials(&rack, "strangers", &stranger);
    let refused = info(&["--size", &export("shop/disk0", &strangers)]);
    assert!(!refused.status.success(), "{}", String::from_utf8_lossy(&refused.stdout));

    // QEMU verifies the name, and copies the disk.
    let creds = format!("tls-creds-x509,id=t,endpoint=client,dir={folder},sanity-check=no");
    let options = |name: &str| {
        format!("driver=nbd,host=127.0.0.1,port={port},export={name},tls-creds=t,tls-hostname={host}")
    };
    let copy = rack.path("copy.raw");
    let copied = Command::new("qemu-img")
        .args(["convert", "-O", "raw", "--object", &creds, "--image-opts", &options("shop/disk0")])
        .arg(&copy)
        .output()
        .unwrap();
    assert!(copied.status.success(), "{}\n{}", String::from_utf8_lossy(&copied.stderr), a.log());
    assert_eq!(std::fs::read(&copy).unwrap(), vec![7; 1 << 20]);
    let wrong_name = Command::new("qemu-img")
        .args([
            "info",
            "--object",
            &creds,
            "--image-opts",
            &options("shop/disk0").replace(&cluster, "elsewhere"),
        ])
        .output()
        .unwrap();
    assert!(!wrong_name.status.success());
    let written = Command::new("qemu-io")
        .args(["--object", &creds, "--image-opts", "-c", "write -P 1 0 4k", &options("shop/disk0")])
        .output()
        .unwrap();
    let said = [written.stdout, written.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("Permission denied"), "a read-only export is not opened for writing: {said}");
    a.io("shop", 0, &["read -P 7 0 1M"]);
}
