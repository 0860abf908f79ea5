//! Restore points as files, through the kernel.

use crate::backup::Vault;
use crate::rack::noise;
use crate::running::{Running, refused, tool};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// Unmounts what a test that failed left behind.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(vault: &Vault) -> Folder {
        let folder = vault.rack.path("mnt");
        std::fs::create_dir(&folder).unwrap();
        Folder(folder)
    }

    pub fn text(&self) -> &str {
        self.0.to_str().unwrap()
    }

    fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.lines().any(|line| line.split(' ').nth(1) == Some(self.text()))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.is_mounted() {
            let _ = std::process::Command::new("umount").args(["-l", self.text()]).status();
        }
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A file system with a file in it, and much room.
fn file_system(vault: &Vault) -> PathBuf {
    let content = vault.rack.path("content");
    std::fs::create_dir(&content).unwrap();
    std::fs::write(content.join("hello"), "good day\n").unwrap();
    std::fs::write(content.join("noise"), noise(5, 3 * MIB as usize)).unwrap();
    let disk = vault.rack.path("disk.raw");
    File::create(&disk).unwrap().set_len(200 * MIB).unwrap();
    tool(&["mkfs.ext4", "-q", "-d", text(&content), text(&disk)]);
    disk
}

#[test]
fn a_mounted_disk_is_the_disk_with_its_holes() {
    let vault = Vault::new();
    let disk = file_system(&vault);
    vault.ok(&["backup", "shop", "--disk", text(&disk)]);
    let first = vault.json(&["points"])[0]["point"].to_string();
    let reference = vault.rack.path("first.raw");
    tool(&["cp", text(&disk), text(&reference)]);
    File::options().write(true).open(&disk).unwrap().write_all_at(b"changed", 150 * MIB).unwrap();
    let second = vault.json(&["backup", "shop", "--disk", text(&disk)])["point"].to_string();

    let folder = Folder::new(&vault);
    let (mounted, told) = Running::start_json(&vault, &["mount", folder.text()]);
    assert_eq!(told["points"], 2);
    let file = |point: &str| folder.0.join("shop").join(point).join("disk0.raw");
    let (old, new) = (file(&first), file(&second));
    assert_eq!((old.metadata().unwrap().len(), old.metadata().unwrap().mode() & 0o777), (200 * MIB, 0o400));
    tool(&["cmp", text(&old), text(&reference)]);
    tool(&["cmp", text(&new), text(&disk)]);
    tool(&["e2fsck", "-fn", text(&old)]);
    assert!(tool(&["debugfs", "-R", "cat /hello", text(&old)]).contains("good day\n"));

    let copy = vault.rack.path("copy.raw");
    tool(&["cp", "--sparse=auto", text(&old), text(&copy)]);
    tool(&["cmp", text(&copy), text(&reference)]);
    let used = copy.metadata().unwrap().blocks() * 512;
    assert!(used < 20 * MIB, "{used} bytes are used: holes stay holes");

    refused(&["touch", text(&old)]);
    refused(&["dd", "if=/dev/zero", &format!("of={}", text(&new)), "count=1", "conv=notrunc"]);
    let others = refused(&["setpriv", "--reuid=65534", "--clear-groups", "ls", folder.text()]);
    assert!(others.contains("Permission denied"), "{others}");
    tool(&["umount", folder.text()]);
    assert_eq!(mounted.ended(), 0, "it ends when somebody unmounts it");
}

#[test]
fn it_is_unmounted_at_the_end_also_when_files_are_open() {
    let vault = Vault::new();
    let disk = file_system(&vault);
    vault.ok(&["backup", "shop", "--disk", text(&disk)]);
    let folder = Folder::new(&vault);
    for open in [false, true] {
        let (mounted, _) = Running::start_json(&vault, &["mount", folder.text(), "shop"]);
        assert!(folder.is_mounted());
        let point = std::fs::read_dir(folder.0.join("shop")).unwrap().next().unwrap().unwrap().path();
        let held = open.then(|| File::open(point.join("disk0.raw")).unwrap());
        mounted.terminate();
        assert_eq!(mounted.ended(), 0);
        assert!(!folder.is_mounted());
        drop(held);
    }
    std::fs::write(folder.0.join("mine"), "").unwrap();
    let hidden = vault.refused(&["mount", folder.text()]);
    assert!(hidden.err.contains("the folder is not empty"), "{}", hidden.err);
}

#[test]
fn a_machines_definition_and_a_pack_that_goes_are_seen_there() {
    let vault = Vault::new();
    let node = vault.rack.node("node-a");
    node.import("shop", &[&vault.rack.image("one.raw", 4 << 20, 7)]);
    let point = vault.back_up(&node)["point"].to_string();
    let folder = Folder::new(&vault);
    let arguments = ["mount", folder.text(), &format!("shop@{point}")];
    let mut mounted = Running::start(&vault, &arguments, "restore points are in");
    let point = folder.0.join("shop").join(point);
    let definition: Value =
        serde_json::from_slice(&std::fs::read(point.join("definition.json")).unwrap()).unwrap();
    assert!(definition.is_object(), "{definition}");
    let disk = point.join("disk0.raw");
    std::fs::rename(vault.repo().join("packs"), vault.rack.path("away")).unwrap();
    let error = std::fs::read(&disk).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5), "EIO: {error}");
    mounted.until("it is told", |mounted| mounted.log().contains("of disk `disk0` cannot be read"));
    mounted.terminate();
    assert_eq!(mounted.ended(), 0);
}
