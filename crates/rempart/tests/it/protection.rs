//! When `protect` and `unprotect` answer.

use crate::rack::Rack;

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
