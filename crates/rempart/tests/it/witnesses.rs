//! Machines that came before the witness, and witnesses that are lost.

use crate::rack::{Rack, Server};
use serde_json::Value;
use std::path::PathBuf;

fn record(node: &Server, vm: &str) -> Value {
    let text = std::fs::read_to_string(node.data("vms").join(vm).join("vm.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The node's register files, and whether each is closed.
fn local_registers(node: &Server) -> Vec<(PathBuf, bool)> {
    let entries = std::fs::read_dir(node.data("registers")).unwrap();
    let files = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "json"));
    files.map(|path| (path.clone(), std::fs::read_to_string(&path).unwrap().contains("Tombstone"))).collect()
}

#[test]
fn a_machine_imported_before_the_witness_is_protected_later() {
    let rack = Rack::new();
    let (a, b) = rack.pair();
    a.import("shop", &[&rack.image("disk.raw", 4 << 20, 7)]);
    assert_eq!(record(&a, "shop")["place"], "local");
    let answer = a.refused(&["protect", "shop", "--peer", "node-b"]);
    assert!(answer.err.contains("the cluster has no witness"), "{}", answer.err);
    a.io("shop", 0, &["write -P 9 0 64k", "flush"]);

    let mut witness = rack.witness("witness", &a);
    witness.kill();
    let answer = a.refused(&["protect", "shop", "--peer", "node-b"]);
    assert_eq!(answer.code, 3, "{}", answer.err);
    assert_eq!(record(&a, "shop")["place"], "local");
    assert!(!b.data("vms/shop").exists(), "nothing was begun");
    a.io("shop", 0, &["write -P 10 64k 64k", "flush"]);

    witness.start();
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    assert_eq!(record(&a, "shop")["place"], "witness");
    let registers = local_registers(&a);
    assert!(matches!(registers.as_slice(), [(_, true)]), "{registers:?}");
    b.ok(&["failover", "shop"]);
    b.io("shop", 0, &["read -P 9 0 64k", "read -P 10 64k 64k", "read -P 7 128k 64k"]);
}

/// Its daemon dies at any moment of the move, again and again, until the move is done.
#[test]
fn a_move_survives_the_death_of_the_daemon_at_any_moment() {
    let rack = Rack::new();
    let (mut a, _b) = rack.pair();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    let _witness = rack.witness("witness", &a);
    for round in 0..8_u64 {
        let mut protect = a.spawn(&["protect", "shop", "--peer", "node-b", "--no-wait"]);
        std::thread::sleep(std::time::Duration::from_millis(5 + 10 * round));
        a.kill();
        protect.wait().unwrap();
        a.start();
        a.until("it leads", || a.vm("shop")["role"] == "primary" && a.vm("shop")["frozen"] == false);
        a.io("shop", 0, &[&format!("write -P {} {}k 4k", round + 1, 4 * round), "flush"]);
    }
    if a.vm("shop")["protected_by"] == serde_json::json!([]) {
        a.ok(&["protect", "shop", "--peer", "node-b"]);
    }
    a.until_mirrored("shop");
    assert_eq!(record(&a, "shop")["place"], "witness");
    let registers = local_registers(&a);
    assert!(matches!(registers.as_slice(), [(_, true)]), "{registers:?}");
    for round in 0..8_u64 {
        a.io("shop", 0, &[&format!("read -P {} {}k 4k", round + 1, 4 * round)]);
    }
}

/// Whether a node's loss would be survived: the register must take a change.
fn survives_the_loss_of_its_peer(a: &Server, b: &mut Server) {
    b.kill();
    a.until("it goes on alone", || a.vm("shop")["in_sync"] == serde_json::json!(["node-a"]));
    a.io("shop", 0, &["write -P 11 0 64k", "flush"]);
    b.start();
    a.until_mirrored("shop");
}

#[test]
fn a_witness_whose_state_is_lost_is_told_again_and_trusted_again() {
    let rack = Rack::new();
    let (mut a, mut b, mut witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    witness.kill();
    std::fs::remove_dir_all(witness.data("state")).unwrap();
    witness.start();
    a.until("trusted", || a.log().contains("trusts the witness's new state"));
    b.until("trusted", || b.log().contains("trusts the witness's new state"));
    survives_the_loss_of_its_peer(&a, &mut b);
    // A register that is new altogether, and a daemon that starts with the new state known.
    a.import("mail", &[&rack.image("mail.raw", 1 << 20, 8)]);
    a.kill();
    a.start();
    // Its peer may have been faster.
    let mirrored = |node: &Server| node.vm("shop")["mirrored"] == true;
    a.until("mirrored", || mirrored(&a) || mirrored(&b));
    a.ok(&["protect", "mail", "--peer", "node-b"]);
}

#[test]
fn a_lost_witness_is_replaced_by_another_machine() {
    let rack = Rack::new();
    let (a, mut b, mut witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    witness.kill();
    let second = a.refused(&["cluster", "token", "--role", "witness"]);
    assert!(second.err.contains("`rempart cluster remove witness`"), "{}", second.err);
    a.ok(&["cluster", "remove", "witness"]);
    let _other = rack.witness("witness-2", &a);
    a.until("it serves", || {
        a.log().contains("the witness serves the register again")
            || b.log().contains("the witness serves the register again")
    });
    survives_the_loss_of_its_peer(&a, &mut b);
    // The removed one comes back: nobody listens to it.
    witness.start();
    a.import("mail", &[&rack.image("mail.raw", 1 << 20, 8)]);
    a.ok(&["protect", "mail", "--peer", "node-b"]);
}

#[test]
fn a_dead_node_is_replaced_by_another_machine() {
    let rack = Rack::new();
    let (a, mut b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    b.kill();
    a.until("it goes on alone", || a.vm("shop")["in_sync"] == serde_json::json!(["node-a"]));
    a.io("shop", 0, &["write -P 9 0 64k", "flush"]);
    let early = a.refused(&["cluster", "remove", "node-b"]);
    assert!(early.err.contains("rempart unprotect shop"), "{}", early.err);
    let unprotected = a.run(&["unprotect", "shop"]);
    assert_eq!(unprotected.code, 0, "{}", unprotected.err);
    let warned = unprotected.err.lines().any(|line| {
        line.starts_with("warning: ") && line.contains("`node-b`") && line.contains("its copy remains")
    });
    assert!(warned, "{}", unprotected.err);
    a.ok(&["cluster", "remove", "node-b"]);
    let c = rack.node("node-c");
    rack.join(&c, &a);
    a.ok(&["protect", "shop", "--peer", "node-c"]);
    c.ok(&["failover", "shop"]);
    c.io("shop", 0, &["read -P 9 0 64k", "read -P 7 64k 64k"]);
    // The removed node comes back with its copy: its certificate is worth nothing any more.
    b.start();
    b.until("it is turned away", || [&a, &b, &c].iter().any(|node| node.log().contains("evoked")));
    assert_ne!(b.vm("shop")["role"], "primary");
}

/// The peer is gone for good and the witness with it: who was removed is not waited for.
#[test]
fn a_witness_is_replaced_after_a_node_was_given_up() {
    let rack = Rack::new();
    let (a, mut b, mut witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    b.kill();
    a.until("it goes on alone", || a.vm("shop")["in_sync"] == serde_json::json!(["node-a"]));
    witness.kill();
    a.ok(&["unprotect", "shop"]);
    a.ok(&["cluster", "remove", "node-b"]);
    a.ok(&["cluster", "remove", "witness"]);
    let _other = rack.witness("witness-2", &a);
    let c = rack.node("node-c");
    rack.join(&c, &a);
    a.until("it serves", || a.log().contains("the witness serves the register again"));
    a.ok(&["protect", "shop", "--peer", "node-c"]);
}

/// Its log takes nothing: what an order writes there waits, and the order with it, unless it can do without.
#[test]
fn a_frozen_machine_is_stopped_by_force_only() {
    let rack = Rack::new();
    let (a, mut b, mut witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.until_mirrored("shop");
    a.ok(&["vm", "start", "shop"]);
    a.until("it runs", || a.vm("shop")["state"] == "running");
    witness.kill();
    b.kill();
    a.until("it is frozen", || a.vm("shop")["frozen"] == true);

    let answer = a.refused(&["vm", "stop", "--force", "shop"]);
    assert!(answer.err.contains("`shop` is stopped, but"), "{}", answer.err);
    assert_ne!(a.vm("shop")["state"], "running");
    let answer = a.refused(&["vm", "stop", "shop"]);
    assert!(answer.err.contains("it is frozen") && answer.err.contains("--force"), "{}", answer.err);

    b.start();
    witness.start();
    a.until("it is recorded", || record(&a, "shop")["config"]["should_run"] == false);
}
