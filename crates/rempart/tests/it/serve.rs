//! Restore points over NBD, as other people's programs see them.

use crate::backup::Vault;
use crate::rack::noise;
use crate::running::{Running, refused, tool};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

const MIB: usize = 1 << 20;

/// A point of a disk with holes and one without.
fn two_disks(vault: &Vault) -> [PathBuf; 2] {
    let disks = ["sparse.raw", "full.raw"].map(|name| vault.rack.path(name));
    let sparse = File::create(&disks[0]).unwrap();
    sparse.set_len(64 * MIB as u64).unwrap();
    sparse.write_all_at(&noise(1, 2 * MIB), 5 * MIB as u64).unwrap();
    sparse.write_all_at(&noise(2, MIB + 512), 40 * MIB as u64 + 512).unwrap();
    std::fs::write(&disks[1], noise(3, 3 * MIB)).unwrap();
    let [one, two] = disks.each_ref().map(|disk| disk.to_str().unwrap());
    vault.ok(&["backup", "shop", "--disk", one, "--disk", two]);
    disks
}

fn socket(vault: &Vault) -> String {
    vault.rack.path("s").to_str().unwrap().to_owned()
}

#[test]
fn several_clients_read_a_point_at_once() {
    let vault = Vault::new();
    let disks = two_disks(&vault);
    let reference = disks.each_ref().map(|disk| disk.to_str().unwrap());
    let socket = socket(&vault);
    let (serving, told) = Running::start_json(&vault, &["serve", "shop", "--socket", &socket]);
    assert_eq!(told["exports"][1]["disk"], "disk1");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={socket}");

    let listed: Value = serde_json::from_str(&tool(&["nbdinfo", "--list", "--json", &uri("")])).unwrap();
    let exports: Vec<(&str, u64, bool)> = listed["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|export| {
            let number = export["export-size"].as_u64().unwrap();
            (export["export-name"].as_str().unwrap(), number, export["is_read_only"] == true)
        })
        .collect();
    assert_eq!(exports, [("disk0", 64 * MIB as u64, true), ("disk1", 3 * MIB as u64, true)]);

    let copies =
        ["one", "two", "three", "four"].map(|name| vault.rack.path(name).to_str().unwrap().to_owned());
    let [first, second, third, fourth] = copies.each_ref().map(String::as_str);
    std::thread::scope(|scope| {
        scope.spawn(|| tool(&["nbdcopy", &uri(""), first]));
        scope.spawn(|| tool(&["qemu-img", "convert", "-f", "raw", "-O", "raw", &uri("disk0"), second]));
        scope.spawn(|| tool(&["nbdcopy", "--no-extents", &uri("disk1"), third]));
        scope.spawn(|| tool(&["qemu-img", "convert", "-f", "raw", "-O", "qcow2", &uri("disk0"), fourth]));
    });
    for (copy, original) in [(first, 0), (second, 0), (third, 1)] {
        assert!(std::fs::read(copy).unwrap() == std::fs::read(reference[original]).unwrap(), "{copy}");
    }
    tool(&["qemu-img", "compare", "-f", "raw", "-F", "qcow2", reference[0], fourth]);
    for (export, original) in [("disk0", reference[0]), ("disk1", reference[1])] {
        tool(&["qemu-img", "compare", "-f", "raw", "-F", "raw", original, &uri(export)]);
    }
    let map: Value = serde_json::from_str(&tool(&["nbdinfo", "--map", "--json", &uri("disk0")])).unwrap();
    let data = map.as_array().unwrap().iter().filter(|run| run["type"] == 0);
    let data: u64 = data.map(|run| run["length"].as_u64().unwrap()).sum();
    assert!((3 * MIB as u64..=4 * MIB as u64).contains(&data), "holes are told: {map}");

    let write = refused(&["qemu-io", "-f", "raw", "-c", "write 0 512", &uri("disk0")]);
    assert!(write.contains("Permission denied"), "{write}");
    serving.terminate();
    assert_eq!(serving.ended(), 0);
    assert!(!std::fs::exists(&socket).unwrap(), "its socket goes with it");
}

#[test]
fn a_socket_that_was_left_behind_is_taken_and_one_that_is_served_is_not() {
    let vault = Vault::new();
    two_disks(&vault);
    let socket = socket(&vault);
    let (killed, _) = Running::start_json(&vault, &["serve", "shop", "--socket", &socket]);
    drop(killed);
    assert!(std::fs::exists(&socket).unwrap());
    let (_serving, _) = Running::start_json(&vault, &["serve", "shop", "--socket", &socket]);
    let twice = vault.refused(&["serve", "shop", "--socket", &socket]);
    assert!(twice.err.contains("somebody listens there already"), "{}", twice.err);

    let (on_loopback, told) = Running::start_json(&vault, &["serve", "shop", "--listen", "127.0.0.1:0"]);
    let uri = told["uri"].as_str().unwrap();
    assert_eq!(tool(&["nbdinfo", "--size", uri]).trim(), (64 * MIB).to_string());
    on_loopback.terminate();
    assert_eq!(on_loopback.ended(), 0);
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let vault = Vault::new();
    two_disks(&vault);
    let socket = socket(&vault);
    let (serving, _) = Running::start_json(&vault, &["serve", "shop", "--socket", &socket]);
    let silent = UnixStream::connect(&socket).unwrap();
    for seed in 0..20 {
        let mut client = UnixStream::connect(&socket).unwrap();
        let mut greeting = [0; 18];
        client.read_exact(&mut greeting).unwrap();
        let mut sent = noise(seed, 100_000);
        if seed % 2 == 0 {
            // Flags it offered, and then garbage where an option is.
            sent[..4].copy_from_slice(&[0, 0, 0, 3]);
        }
        let _ = client.write_all(&sent);
        let _ = client.read_to_end(&mut Vec::new());
    }
    let uri = format!("nbd+unix:///disk1?socket={socket}");
    assert_eq!(tool(&["nbdinfo", "--size", &uri]).trim(), (3 * MIB).to_string());
    drop(silent);
    serving.terminate();
    assert_eq!(serving.ended(), 0);
}

#[test]
fn a_pack_that_goes_while_it_is_served_is_an_error_that_names_the_bytes() {
    let vault = Vault::new();
    let disks = two_disks(&vault);
    let socket = socket(&vault);
    let arguments = ["serve", "shop", "--socket", &socket, "--memory", "1M"];
    let mut serving = Running::start(&vault, &arguments, "is served at");
    let uri = format!("nbd+unix:///disk1?socket={socket}");
    let reference = disks[1].to_str().unwrap();
    tool(&["qemu-img", "compare", "-f", "raw", "-F", "raw", reference, &uri]);
    let away = vault.rack.path("away");
    std::fs::rename(vault.repo().join("packs"), &away).unwrap();
    let read = refused(&["qemu-io", "-r", "-f", "raw", "-c", "read 0 3M", &uri]);
    assert!(read.contains("Input/output error"), "{read}");
    serving.until("it is told", |serving| serving.log().contains("of disk `disk1` cannot be read"));
    std::fs::rename(&away, vault.repo().join("packs")).unwrap();
    tool(&["qemu-img", "compare", "-f", "raw", "-F", "raw", reference, &uri]);
    serving.terminate();
    assert_eq!(serving.ended(), 0);
}
