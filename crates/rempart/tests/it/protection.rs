//! When `protect` and `unprotect` answer.

use crate::rack::{Rack, Server};

#[test]
fn protect_answers_when_the_peer_is_in_sync_and_unprotect_when_it_left() {
    let rack = Rack::new();
    let (a, b, mut witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 4 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    assert_eq!(a.vm("shop")["mirrored"], true, "at the very moment of the answer");
    a.io("shop", 0, &["write -P 9 1M 64k", "flush"]);

    // Without the witness nobody can leave: the peer's copy stays, and the order can be repeated.
    witness.kill();
    let answer = a.refused(&["unprotect", "shop"]);
    assert_eq!(answer.code, 3, "{}", answer.err);
    assert!(answer.err.contains("`node-b` has not left the in-sync set of `shop`"), "{}", answer.err);
    assert!(b.data("vms/shop/vm.json").exists());
    witness.start();
    a.ok(&["unprotect", "shop"]);
    assert_eq!(a.vm("shop")["in_sync"], serde_json::json!(["node-a"]));
    assert!(!b.data("vms/shop").exists());
    a.io("shop", 0, &["read -P 9 1M 64k", "read -P 7 0 1M"]);
}

#[test]
fn protect_without_waiting_answers_at_once_and_the_copying_goes_on() {
    let rack = Rack::new();
    let (a, _b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 4 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b", "--no-wait"]);
    a.until_mirrored("shop");
}

/// The times that a machine's copy goes by here, as they are recorded.
fn recorded_lease(node: &Server) -> serde_json::Value {
    let record = std::fs::read_to_string(node.data("vms/shop/vm.json")).unwrap();
    serde_json::from_str::<serde_json::Value>(&record).unwrap()["config"]["timing"]["lease_ms"].clone()
}

/// A lease ends in time only if the node that waits for its end waits by the same times.
#[test]
fn copies_go_by_the_same_times() {
    let rack = Rack::new();
    let (a, mut b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    let (ours, longer) = ("[timing]\n", "[timing]\nlease_ms = 4000\nguard_stop_ms = 1500\n");
    b.kill();
    b.configure(ours, longer);
    b.start();
    let answer = a.refused(&["protect", "shop", "--peer", "node-b"]);
    assert_eq!(answer.code, 4, "{}", answer.err);
    for part in [
        "its timing.lease_ms is 4000, the primary's 3000",
        "its timing.guard_stop_ms is 1500, the primary's 1000",
        "make [timing] the same",
    ] {
        assert!(answer.err.contains(part), "{part}: {}", answer.err);
    }
    assert!(!b.data("vms/shop").exists(), "nothing was begun");

    b.kill();
    b.configure(longer, ours);
    b.start();
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    assert_eq!((recorded_lease(&a), recorded_lease(&b)), (3000.into(), 3000.into()));
    assert_eq!(b.vm("shop")["conditions"], serde_json::json!([]));

    // Changed afterwards: the copies keep what they agreed upon, and say so.
    b.kill();
    b.configure(ours, longer);
    b.start();
    a.until_mirrored("shop");
    let told = b.vm("shop")["conditions"].to_string();
    assert!(told.contains("lease_ms is 3000, configured 4000"), "{told}");
    assert_eq!(recorded_lease(&b), 3000);

    // A machine with one copy goes by its node's own times again.
    a.ok(&["unprotect", "shop"]);
    assert!(recorded_lease(&a).is_null());
    a.refused(&["protect", "shop", "--peer", "node-b"]);
}

/// A guard keeps the time that it was started with, whatever the next daemon's configuration says.
#[test]
fn a_machine_whose_guard_is_slower_than_agreed_is_not_protected() {
    let rack = Rack::new();
    let (slow, quick) = ("[timing]\nguard_stop_ms = 1500\n", "[timing]\n");
    let mut a = rack.node_with("node-a", quick, slow);
    let b = rack.node("node-b");
    a.ok(&["cluster", "create", "lab"]);
    rack.join(&b, &a);
    let _witness = rack.witness("witness", &a);
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["vm", "start", "shop"]);
    a.until("it runs", || a.vm("shop")["state"] == "running");
    let process = a.vm("shop")["qemu_pid"].clone();
    a.kill();
    a.configure(slow, quick);
    a.start();
    a.until("it runs", || a.vm("shop")["state"] == "running");
    assert_eq!(a.vm("shop")["qemu_pid"], process);
    let answer = a.refused(&["protect", "shop", "--peer", "node-b"]);
    assert_eq!(answer.code, 4, "{}", answer.err);
    assert!(answer.err.contains("with a guard_stop_ms of 1500, [timing] says 1000"), "{}", answer.err);
    a.ok(&["vm", "stop", "--force", "shop"]);
    a.ok(&["vm", "start", "shop"]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
}

/// QEMU refuses a processor that it does not have when the machine starts: at a takeover that is too late.
#[test]
fn a_peer_must_have_the_processor() {
    use std::os::unix::fs::PermissionsExt;
    let rack = Rack::new();
    let qemu = rack.path("qemu");
    let write = |text: &str| {
        // A new file each time: the old one may be running.
        let new = rack.path("qemu.new");
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&new, &qemu).unwrap();
    };
    let refuse = "case \"$*\" in *Nehalem*) echo \"unable to find CPU model 'Nehalem'\" >&2; exit 1;; esac";
    write(&format!("#!/bin/sh\n{refuse}\nexec qemu-system-x86_64 \"$@\"\n"));
    let a = rack.node("node-a");
    let b = rack.node_with("node-b", "[vm]\n", &format!("[vm]\nqemu = \"{}\"\n", qemu.display()));
    a.ok(&["cluster", "create", "lab"]);
    rack.join(&b, &a);
    let _witness = rack.witness("witness", &a);
    let image = rack.image("disk.raw", 1 << 20, 7);
    let model = ["--memory", "64M", "--cpu-model", "Nehalem"];
    a.ok(&[&["vm", "import", "shop", "--disk", image.to_str().unwrap()][..], &model].concat());
    let answer = a.refused(&["protect", "shop", "--peer", "node-b"]);
    assert_eq!(answer.code, 4, "{}", answer.err);
    assert!(answer.err.contains("it cannot give the machine its processor"), "{}", answer.err);
    assert!(answer.err.contains("unable to find CPU model 'Nehalem'"), "{}", answer.err);
    assert!(!b.data("vms/shop").exists(), "nothing was begun");
    write("#!/bin/sh\nexec qemu-system-x86_64 \"$@\"\n");
    a.ok(&["protect", "shop", "--peer", "node-b"]);
}

#[test]
fn nodes_with_renewed_certificates_go_on_trusting_each_other() {
    let rack = Rack::new();
    let (a, mut b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    for node in [&a, &b] {
        let files =
            || ["pki/key.pem", "pki/certificate.pem"].map(|file| std::fs::read(node.data(file)).unwrap());
        let before = files();
        node.ok(&["cluster", "renew"]);
        let after = files();
        assert!(before[0] != after[0] && before[1] != after[1], "a key and a certificate of its own");
    }
    // New connections between the running daemons and with the witness.
    a.import("mail", &[&rack.image("mail.raw", 1 << 20, 8)]);
    a.ok(&["protect", "mail", "--peer", "node-b"]);
    // What was saved is what was shown.
    b.kill();
    a.io("shop", 0, &["write -P 9 0 64k", "flush"]);
    b.start();
    a.until_mirrored("shop");
    a.until_mirrored("mail");
    b.ok(&["failover", "shop"]);
    b.io("shop", 0, &["read -P 9 0 64k", "read -P 7 64k 64k"]);
}
