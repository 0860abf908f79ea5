//! Restoring in the formats of other programs.

use crate::backup::Vault;
use crate::rack::noise;
use crate::running::{Mounted, tool};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const MIB: u64 = 1 << 20;

fn disk_with_holes(vault: &Vault) -> PathBuf {
    let disk = vault.rack.path("disk.raw");
    let file = File::create(&disk).unwrap();
    file.set_len(64 * MIB).unwrap();
    file.write_all_at(&noise(1, 3 * MIB as usize), 5 * MIB).unwrap();
    file.write_all_at(b"the last bytes", 64 * MIB - 14).unwrap();
    vault.ok(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
    disk
}

#[test]
fn every_format_holds_the_disk() {
    let vault = Vault::new();
    let disk = disk_with_holes(&vault);
    let to = vault.rack.path("to");
    for format in ["raw", "qcow2", "vmdk", "vhdx"] {
        let restore = ["restore", "shop", "--to", to.to_str().unwrap(), "--format", format, "--compare"];
        vault.ok(&restore);
        let image = to.join(format!("disk0.{format}"));
        let image = image.to_str().unwrap();
        tool(&["qemu-img", "compare", "-f", "raw", "-F", format, disk.to_str().unwrap(), image]);
        let used =
            std::fs::metadata(image).map(|file| std::os::unix::fs::MetadataExt::blocks(&file) * 512).unwrap();
        assert!(used < 24 * MIB, "{format}: {used} bytes are used: holes stay holes");
        let twice = vault.refused(&restore);
        assert!(twice.err.contains("File exists"), "{format}: {}", twice.err);
    }
    let mut names: Vec<_> = std::fs::read_dir(&to)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["disk0.qcow2", "disk0.raw", "disk0.vhdx", "disk0.vmdk"], "nothing else is left");

    let file = vault.rack.path("a,b.qcow2");
    let told = vault.json(&["export", "shop", "--to", file.to_str().unwrap(), "--format", "qcow2"]);
    assert_eq!(told["format"], "qcow2");
    tool(&["qemu-img", "check", "-q", file.to_str().unwrap()]);
}

#[test]
fn a_full_disk_and_a_damaged_chunk_leave_no_image() {
    let vault = Vault::new();
    disk_with_holes(&vault);
    let small = Mounted::at(&vault.rack.path("small"), &["-t", "tmpfs", "-o", "size=1M", "none"]);
    let folder = small.0.to_str().unwrap();
    let left = || std::fs::read_dir(&small.0).unwrap().count();
    for format in ["raw", "qcow2"] {
        let full = vault.refused(&["restore", "shop", "--to", folder, "--format", format]);
        assert!(full.err.contains("No space left on device"), "{format}: {}", full.err);
        assert_eq!(left(), 0, "{format}");
    }
    let packs = vault.files_below("packs");
    let pack = packs.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(pack, &bytes).unwrap();
    let to = vault.rack.path("to");
    let damaged = vault.refused(&["restore", "shop", "--to", to.to_str().unwrap(), "--format", "qcow2"]);
    assert!(damaged.err.contains("of disk `disk0` cannot be read"), "{}", damaged.err);
    assert!(damaged.err.contains("it is not what was written"), "{}", damaged.err);
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 0);
}
