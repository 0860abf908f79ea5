//! Changes to a machine, and what `compare` finds.

use crate::rack::Rack;
use std::os::unix::fs::FileExt;

#[test]
fn disks_come_grow_and_go_on_both_copies_and_a_machine_is_deleted() {
    let rack = Rack::new();
    let (a, b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.ok(&["vm", "disk", "add", "shop", "--size", "2M"]);
    a.io("shop", 1, &["write -P 5 1M 64k", "flush"]);
    a.ok(&["vm", "disk", "resize", "shop", "1", "4M"]);
    a.io("shop", 1, &["write -P 6 3M 64k", "flush"]);
    assert_eq!(a.vm("shop")["mirrored"], true);
    let equal = a.run(&["compare", "shop"]);
    assert!(equal.code == 0 && equal.err.contains("both copies of `shop` are equal"), "{}", equal.err);

    b.ok(&["failover", "shop"]);
    b.io("shop", 0, &["read -P 7 0 1M"]);
    b.io("shop", 1, &["read -P 0 0 1M", "read -P 5 1M 64k", "read -P 6 3M 64k"]);
    b.until_mirrored("shop");
    let images = || [&a, &b].map(|node| node.data("vms/shop/disk1.raw").exists());
    assert_eq!(images(), [true, true]);
    b.ok(&["vm", "disk", "remove", "shop", "1", "--yes"]);
    assert_eq!(images(), [false, false]);
    assert_eq!(b.json(&["vm", "show", "shop"])["disks"].as_array().unwrap().len(), 1);
    b.io("shop", 0, &["write -P 9 0 64k", "flush"]);
    assert_eq!(b.vm("shop")["mirrored"], true);

    let mirrored = b.refused(&["vm", "delete", "shop", "--yes"]);
    assert!(mirrored.err.contains("it is mirrored"), "{}", mirrored.err);
    b.ok(&["unprotect", "shop"]);
    b.ok(&["vm", "delete", "shop", "--yes"]);
    assert!(b.vm("shop").is_null());
    assert!(!b.data("vms/shop").exists());
    // Its name is free again.
    b.import("shop", &[&rack.image("other.raw", 1 << 20, 8)]);
    b.io("shop", 0, &["read -P 8 0 1M"]);
}

#[test]
fn compare_tells_where_the_copies_differ() {
    const REFUSED: i32 = 4;
    const PLACE: u64 = 3 * 64 * 1024;
    let rack = Rack::new();
    let (a, mut b, _witness) = rack.cluster();
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.until("the copying is over", || a.vm("shop")["resync"]["running"] != true);
    b.kill();
    let image = std::fs::File::options().read(true).write(true).open(b.data("vms/shop/disk0.raw")).unwrap();
    let mut byte = [0];
    image.read_exact_at(&mut byte, PLACE + 17).unwrap();
    assert_eq!(byte, [7]);
    image.write_all_at(&[8], PLACE + 17).unwrap();
    image.sync_all().unwrap();
    b.start();
    // What status says may be from before its daemon was missed: refused is who has no peer that holds everything.
    a.until("the copies can be compared", || a.run(&["compare", "shop"]).code != REFUSED);
    let answer = a.refused(&["compare", "shop"]);
    assert_eq!(answer.code, 1, "{}", answer.err);
    assert!(answer.err.contains("the copies of `shop` differ in 1 extents of 64 KiB"), "{}", answer.err);
    assert!(answer.err.contains(&format!("first differences: disk 0 offset {PLACE}")), "{}", answer.err);
}
