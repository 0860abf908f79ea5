//! Swap and free space are left out of backups; whoever looks for them can do nothing else.

use crate::backup::Vault;
use crate::rack::{PROGRAM, noise};
use crate::running::tool;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const MIB: u64 = 1 << 20;

/// An ext4 file system with a file, 40 MiB; then 20 MiB of used swap space. Each a partition.
fn disk(vault: &Vault) -> PathBuf {
    let path = |name: &str| vault.rack.path(name).to_str().unwrap().to_owned();
    let (disk, files, fs, swap) = (path("disk.raw"), path("files"), path("fs"), path("swap"));
    let make = |path: &str, size: u64, content: u64| {
        std::fs::write(path, noise(content, (size * MIB) as usize)).unwrap();
    };
    std::fs::create_dir(&files).unwrap();
    make(&format!("{files}/file"), 5, 1);
    make(&fs, 40, 2);
    tool(&["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-E", "nodiscard", "-d", &files, &fs]);
    make(&swap, 20, 3);
    tool(&["mkswap", "-q", &swap]);
    let file = File::create(&disk).unwrap();
    file.set_len(64 * MIB).unwrap();
    let table = "label: gpt\nstart=1MiB, size=40MiB\nstart=41MiB, size=20MiB, type=S\n";
    let mut sfdisk = Command::new("sfdisk").args(["-q", &disk]).stdin(Stdio::piped()).spawn().unwrap();
    sfdisk.stdin.take().unwrap().write_all(table.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    file.write_all_at(&std::fs::read(&fs).unwrap(), MIB).unwrap();
    file.write_all_at(&std::fs::read(&swap).unwrap(), 41 * MIB).unwrap();
    vault.rack.path("disk.raw")
}

#[test]
fn swap_and_free_space_are_left_out_and_the_rest_comes_back() {
    let vault = Vault::new();
    let disk = disk(&vault);
    let content = std::fs::read(&disk).unwrap();
    let image = disk.to_str().unwrap();
    let back_up =
        |arguments: &[&str]| vault.json(&[&["backup", "shop", "--disk", image], arguments].concat());
    let left_out = |told: &serde_json::Value| told["disks"][0]["left_out_bytes"].as_u64().unwrap() / MIB;

    let all = back_up(&["--include", "swap,free-space"]);
    assert_eq!(left_out(&all), 0, "{all}");
    let restored = vault.restored(&format!("shop@{}", all["point"]), "all");
    assert!(restored[0] == content);

    let without_swap = back_up(&["--include", "free-space"]);
    assert_eq!(left_out(&without_swap), 19, "whole chunks of it: {without_swap}");

    let least = back_up(&[]);
    assert!(left_out(&least) > 45, "{least}");
    assert_eq!(least["notes"].as_array().unwrap().len(), 0, "{least}");
    let restored = vault.restored(&format!("shop@{}", least["point"]), "least").remove(0);
    let swap = (41 * MIB) as usize..(41 * MIB + 4096) as usize;
    assert!(restored[swap.clone()] == content[swap], "its header, which holds its UUID");
    assert!(restored[42 * MIB as usize..61 * MIB as usize].iter().all(|byte| *byte == 0));
    let fs = vault.rack.path("restored-fs");
    std::fs::write(&fs, &restored[MIB as usize..41 * MIB as usize]).unwrap();
    let fs = fs.to_str().unwrap();
    tool(&["e2fsck", "-fn", fs]);
    let file = vault.rack.path("file");
    tool(&["debugfs", "-R", &format!("dump /file {}", file.display()), fs]);
    assert!(std::fs::read(&file).unwrap() == noise(1, 5 * MIB as usize));
}

/// Of each disk its own.
#[test]
fn of_two_disks_each_has_its_own_ranges() {
    let vault = Vault::new();
    let (disk, swap) = (disk(&vault), vault.rack.path("swap-disk"));
    let content = [std::fs::read(&disk).unwrap(), noise(8, 32 * MIB as usize)];
    std::fs::write(&swap, &content[1]).unwrap();
    tool(&["mkswap", "-q", swap.to_str().unwrap()]);
    let disks = [disk, swap].map(|disk| disk.to_str().unwrap().to_owned());
    let disks = ["backup", "shop", "--include", "free-space", "--disk", &disks[0], "--disk", &disks[1]];
    let told = vault.json(&disks);
    let left_out = |disk: usize| told["disks"][disk]["left_out_bytes"].as_u64().unwrap() / MIB;
    assert_eq!((left_out(0), left_out(1)), (19, 31), "{told}");
    let restored = vault.restored(&format!("shop@{}", told["point"]), "both");
    let swap = (41 * MIB) as usize;
    assert!(restored[0][..swap] == content[0][..swap]);
    assert!(restored[0][swap + MIB as usize..swap + 20 * MIB as usize].iter().all(|byte| *byte == 0));
    assert!(
        restored[1][4096..MIB as usize / 8] == content[1][4096..MIB as usize / 8],
        "a chunk with a header"
    );
    assert!(restored[1][MIB as usize..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_cannot_be_left_out_is_told() {
    let vault = Vault::new();
    let disk = disk(&vault);
    // As while it is mounted.
    let partition = format!("{}?offset={MIB}", disk.display());
    tool(&["debugfs", "-w", "-R", "feature needs_recovery", &partition]);
    let told = vault.json(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
    assert_eq!(told["disks"][0]["left_out_bytes"].as_u64().unwrap() / MIB, 19, "swap alone: {told}");
    let note =
        "disk0: partition 1: an ext4 file system that is mounted and was not frozen: all of it is backed up";
    assert_eq!(told["notes"], serde_json::json!([note]));
}

/// The process that reads a guest's file systems: it runs under a filter of system calls before it reads the first byte.
#[test]
fn whoever_looks_at_a_disk_is_confined() {
    let mut child = Command::new(PROGRAM)
        .arg("look-at-disk")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let question =
        br#"{"wanted":{"swap":true,"free_space":true,"is_quiet":false},"sizes":[1048576,1048576]}"#;
    to.write_all(&(question.len() as u64).to_ne_bytes()).unwrap();
    to.write_all(question).unwrap();
    let mut request = [0; 16];
    from.read_exact(&mut request).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    assert!(status.contains("Seccomp:\t2"), "a filter: {status}");
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    // Garbage from the disk ends in an answer.
    let mut answer = Vec::new();
    loop {
        let (offset, len) = request.split_at(8);
        let number = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
        if number(offset) == u64::MAX {
            answer.resize(number(len) as usize, 0);
            from.read_exact(&mut answer).unwrap();
            break;
        }
        to.write_all(&1u64.to_ne_bytes()).unwrap();
        to.write_all(&noise(9, number(len) as usize)).unwrap();
        from.read_exact(&mut request).unwrap();
    }
    assert_eq!(String::from_utf8(answer).unwrap(), r#"{"left_out":[],"remarks":[]}"#);
    assert!(child.wait().unwrap().success());
}
