//! The daemon's exports, as NBD's own tools see them.

use crate::rack::{Rack, Server};
use serde_json::Value;
use std::process::Command;

const KIB: u64 = 1024;

/// What `nbdinfo --map` says: offset, length, type.
fn map(node: &Server, context: &str) -> Vec<(u64, u64, u64)> {
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
