//! The files inside the disks of a point: shown by `mount`, listed by `files`, brought back by `restore --path`.

use crate::backup::Vault;
use crate::mount::{Folder, text};
use crate::rack::noise;
use crate::running::{Running, refused, tool};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const MIB: u64 = 1 << 20;

/// Runs a program that reads what it is to do.
fn scripted(command: &[&str], script: &str) {
    let child =
        Command::new(command[0]).args(&command[1..]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
    let mut child = child.unwrap_or_else(|error| panic!("cannot run `{}`: {error}", command[0]));
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{command:?}");
}

/// Files that every kind of file system can have.
fn plain_tree(vault: &Vault, name: &str) -> PathBuf {
    let folder = vault.rack.path(name);
    std::fs::create_dir_all(folder.join("etc/deep/er")).unwrap();
    std::fs::create_dir(folder.join("many")).unwrap();
    for (path, len) in [
        ("empty", 0),
        ("etc/fstab", 120),
        ("etc/deep/er/A long name with blanks.txt", 4096),
        ("large", 3_000_001),
    ] {
        std::fs::write(folder.join(path), noise(len, len as usize)).unwrap();
    }
    for number in 0..300 {
        std::fs::write(
            folder.join(format!("many/number {number:04} of quite a lot of files.txt")),
            [number as u8; 9],
        )
        .unwrap();
    }
    folder
}

/// The same, and what Linux has besides.
fn unix_tree(vault: &Vault) -> PathBuf {
    let folder = plain_tree(vault, "unix");
    symlink("../large", folder.join("etc/link")).unwrap();
    symlink("/etc/passwd", folder.join("etc/outside")).unwrap();
    std::fs::hard_link(folder.join("large"), folder.join("etc/large again")).unwrap();
    tool(&["mkfifo", text(&folder.join("pipe"))]);
    tool(&["mknod", text(&folder.join("null")), "c", "1", "3"]);
    let sparse = File::create(folder.join("sparse")).unwrap();
    sparse.set_len(60 * MIB).unwrap();
    sparse.write_all_at(b"in the middle", 30 * MIB).unwrap();
    std::fs::set_permissions(folder.join("etc/fstab"), std::fs::Permissions::from_mode(0o4640)).unwrap();
    std::os::unix::fs::chown(folder.join("etc/deep"), Some(1234), Some(70_000)).unwrap();
    tool(&[
        "touch",
        "-h",
        "-d",
        "2001-02-03 04:05:06 UTC",
        text(&folder.join("etc/fstab")),
        text(&folder.join("etc/link")),
    ]);
    tool(&["touch", "-d", "2001-02-03 04:05:06 UTC", text(&folder.join("etc/deep"))]);
    folder
}

/// A disk of `parts`, whole MiB each, with a table that `sfdisk` makes.
fn partitioned(vault: &Vault, name: &str, label: &str, parts: &[&Path]) -> PathBuf {
    let disk = vault.rack.path(name);
    let file = File::create(&disk).unwrap();
    let (mut at, mut script) = (1, format!("label: {label}\n"));
    for part in parts {
        let len = part.metadata().unwrap().len() / MIB;
        script.push_str(&format!("start={at}MiB, size={len}MiB\n"));
        at += len;
    }
    file.set_len((at + 1) * MIB).unwrap();
    scripted(&["sfdisk", "-q", text(&disk)], &script);
    at = 1;
    for part in parts {
        let (from, to, seek) =
            (format!("if={}", text(part)), format!("of={}", text(&disk)), format!("seek={at}"));
        tool(&["dd", &from, &to, "bs=1M", &seek, "conv=notrunc,sparse", "status=none"]);
        at += part.metadata().unwrap().len() / MIB;
    }
    disk
}

fn empty(vault: &Vault, name: &str, mib: u64) -> PathBuf {
    let path = vault.rack.path(name);
    File::create(&path).unwrap().set_len(mib * MIB).unwrap();
    path
}

fn ext4(vault: &Vault, name: &str, tree: &Path) -> PathBuf {
    let image = empty(vault, name, 48);
    tool(&["mke2fs", "-q", "-t", "ext4", "-d", text(tree), text(&image)]);
    image
}

fn ntfs(vault: &Vault, name: &str, tree: &Path) -> PathBuf {
    let (image, folder) = (empty(vault, name, 48), vault.rack.path("ntfs-mounted"));
    tool(&["mkntfs", "-q", "-F", "-f", text(&image)]);
    std::fs::create_dir_all(&folder).unwrap();
    tool(&["ntfs-3g", text(&image), text(&folder)]);
    tool(&["cp", "-r", &format!("{}/.", text(tree)), text(&folder)]);
    tool(&["umount", text(&folder)]);
    image
}

fn fat(vault: &Vault, name: &str, tree: &Path) -> PathBuf {
    let image = empty(vault, name, 40);
    tool(&["mkfs.vfat", "-F", "32", text(&image)]);
    for entry in std::fs::read_dir(tree).unwrap() {
        tool(&["mcopy", "-s", "-m", "-i", text(&image), text(&entry.unwrap().path()), "::/"]);
    }
    image
}

fn assert_same_content(one: &Path, other: &Path) {
    tool(&["diff", "-r", "--no-dereference", text(one), text(other)]);
}

/// Each file's kind, permissions, owner, time to the second, and target; and its size, if that is its own.
fn described(folder: &Path) -> Vec<String> {
    let names =
        tool(&["find", text(folder), "-mindepth", "1", "!", "-name", "lost+found", "-printf", "%P\n"]);
    let mut lines: Vec<String> = names
        .lines()
        .map(|name| {
            let path = folder.join(name);
            let meta = path.symlink_metadata().unwrap();
            let size = if meta.is_dir() { 0 } else { meta.len() };
            let target = std::fs::read_link(&path).unwrap_or_default();
            format!(
                "{name}: {:o} {}:{} {} {size} {target:?}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.mtime()
            )
        })
        .collect();
    lines.sort();
    lines
}

#[track_caller]
fn assert_described_the_same(one: &Path, other: &Path) {
    let (one, other) = (described(one), described(other));
    for (one, other) in one.iter().zip(&other) {
        assert_eq!(one, other);
    }
    assert_eq!(one.len(), other.len());
}

fn mounted(vault: &Vault) -> (Folder, Running, PathBuf) {
    let folder = Folder::new(vault);
    let running = Running::start(vault, &["mount", folder.text()], "1 restore points are in");
    let point = std::fs::read_dir(folder.0.join("shop")).unwrap().next().unwrap().unwrap().path();
    (folder, running, point)
}

#[test]
fn every_file_inside_a_disk_is_shown_and_brought_back() {
    let vault = Vault::new();
    let (unix, plain) = (unix_tree(&vault), plain_tree(&vault, "plain"));
    let parts = [ext4(&vault, "ext4", &unix), ntfs(&vault, "ntfs", &plain), fat(&vault, "fat", &plain)];
    let parts = parts.each_ref().map(PathBuf::as_path);
    let gpt = partitioned(&vault, "gpt.raw", "gpt", &parts);
    let mbr = partitioned(&vault, "mbr.raw", "dos", &[parts[1], parts[0]]);
    vault.ok(&["backup", "shop", "--disk", text(&gpt), "--disk", text(&mbr), "--disk", text(parts[2])]);

    let (folder, running, point) = mounted(&vault);
    let shown = |path: &str| point.join(path);
    for (at, tree) in [
        ("disk0.files/partition-1", &unix),
        ("disk0.files/partition-2", &plain),
        ("disk0.files/partition-3", &plain),
        ("disk1.files/partition-1", &plain),
        ("disk1.files/partition-2", &unix),
        ("disk2.files/whole", &plain),
    ] {
        let shown = shown(at);
        if tree == &unix {
            tool(&[
                "diff",
                "-r",
                "--no-dereference",
                "-x",
                "lost+found",
                "-x",
                "pipe",
                "-x",
                "null",
                text(tree),
                text(&shown),
            ]);
            assert_described_the_same(&shown, tree);
            assert_eq!(
                shown.join("null").metadata().unwrap().rdev(),
                tree.join("null").metadata().unwrap().rdev()
            );
        } else {
            assert_same_content(tree, &shown);
        }
    }
    let about = std::fs::read_to_string(shown("disk0.files/about.txt")).unwrap();
    assert_eq!(about, "partition-1: ext2/3/4, 48 MiB\npartition-2: NTFS, 48 MiB\npartition-3: FAT, 40 MiB\n");
    let copy = vault.rack.path("copy");
    tool(&["cp", "--sparse=auto", text(&shown("disk0.files/partition-1/sparse")), text(&copy)]);
    refused(&["touch", text(&shown("disk0.files/partition-1/new"))]);
    tool(&["cmp", text(&copy), text(&unix.join("sparse"))]);
    tool(&["umount", folder.text()]);
    assert_eq!(running.ended(), 0);

    let to = vault.rack.path("restored");
    vault.ok(&[
        "restore",
        "shop",
        "--disk",
        "disk0",
        "--volume",
        "partition-1",
        "--path",
        "/",
        "--to",
        text(&to),
    ]);
    let _ = std::fs::remove_dir(to.join("lost+found"));
    assert_described_the_same(&to, &unix);
    tool(&["diff", "-r", "--no-dereference", "-x", "pipe", "-x", "null", text(&to), text(&unix)]);
    assert!(to.join("sparse").metadata().unwrap().blocks() < 200, "holes stay holes");
    let inode = |path: &str| to.join(path).metadata().unwrap().ino();
    assert_eq!(inode("large"), inode("etc/large again"), "two names of one file");
    for (volume, back) in [("partition-2", "ntfs-back"), ("partition-3", "fat-back")] {
        let to = vault.rack.path(back);
        vault.ok(&[
            "restore",
            "shop",
            "--disk",
            "disk0",
            "--volume",
            volume,
            "--path",
            "/",
            "--to",
            text(&to),
        ]);
        assert_same_content(&plain, &to);
    }
}

#[test]
fn a_path_is_looked_for_in_every_file_system_of_the_point() {
    let vault = Vault::new();
    let (unix, plain) = (unix_tree(&vault), plain_tree(&vault, "plain"));
    std::fs::write(unix.join("etc/only here"), "yes").unwrap();
    let disk =
        partitioned(&vault, "disk.raw", "gpt", &[&ext4(&vault, "ext4", &unix), &fat(&vault, "fat", &plain)]);
    vault.ok(&["backup", "shop", "--disk", text(&disk)]);

    let volumes = vault.json(&["files", "shop"]);
    let names =
        |key: &str| (0..2).map(|at| volumes[at][key].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(
        (names("volume"), names("file_system")),
        (vec!["partition-1".into(), "partition-2".into()], vec!["ext2/3/4".into(), "FAT".into()])
    );
    let listed = vault.ok(&["files", "shop", "/etc/only here"]).out;
    assert!(listed.starts_with("-rw-r--r--") && listed.ends_with(" /etc/only here\n"), "{listed}");
    let to = vault.rack.path("to");
    vault.ok(&["restore", "shop", "--path", "/etc/only here", "--to", text(&to)]);
    assert_eq!(std::fs::read(to.join("etc/only here")).unwrap(), b"yes");
    assert_eq!(std::fs::read_dir(to.join("etc")).unwrap().count(), 1, "nothing else");

    let both = vault.refused(&["restore", "shop", "--path", "/large", "--to", text(&vault.rack.path("x"))]);
    assert!(both.err.contains("is in 2 file systems") && both.err.contains("--volume"), "{}", both.err);
    let none = vault.refused(&["restore", "shop", "--path", "/nowhere", "--to", text(&vault.rack.path("x"))]);
    assert!(none.err.contains("no file system has `/nowhere`"), "{}", none.err);
    let again = vault.refused(&["restore", "shop", "--path", "/etc/only here", "--to", text(&to)]);
    assert!(again.err.contains("not empty"), "what exists is not overwritten: {}", again.err);
    let disk = vault.refused(&["files", "shop", "/", "--disk", "other"]);
    assert!(disk.err.contains("it has no disk `other`"), "{}", disk.err);
}

/// One that reads a file system can be stopped, or die: others go on, and so does another reader of it.
#[test]
fn a_reader_that_hangs_or_dies_costs_its_own_folder_alone() {
    let vault = Vault::new();
    let (unix, plain) = (unix_tree(&vault), plain_tree(&vault, "plain"));
    for number in 0..20 {
        std::fs::create_dir_all(unix.join(format!("folders/{number}"))).unwrap();
    }
    let disk =
        partitioned(&vault, "disk.raw", "gpt", &[&ext4(&vault, "ext4", &unix), &fat(&vault, "fat", &plain)]);
    vault.ok(&["backup", "shop", "--disk", text(&disk)]);
    let (_folder, mut running, point) = mounted(&vault);
    let (one, other) = (point.join("disk0.files/partition-1"), point.join("disk0.files/partition-2"));
    tool(&["ls", text(&one.join("folders"))]);
    let mut reader = String::new();
    running.until("one process reads", |running| {
        let found = Command::new("pgrep").args(["-P", &running.pid().to_string()]).output().unwrap();
        reader = String::from_utf8(found.stdout).unwrap().trim().to_owned();
        !reader.is_empty() && !reader.contains('\n')
    });
    tool(&["kill", "-STOP", &reader]);
    // More than there are threads that answer the kernel.
    let asking: Vec<_> = (0..20)
        .map(|number| {
            let folder = one.join(format!("folders/{number}"));
            Command::new("ls").arg(folder).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    assert_same_content(&plain, &other);
    tool(&["kill", "-KILL", &reader]);
    let failed = asking.into_iter().map(|mut ls| ls.wait().unwrap().success()).filter(|ok| !ok).count();
    assert_eq!(failed, 1, "who was answered by it has an error, the others wait for the next");
    assert!(
        running
            .log()
            .contains("disk `disk0`, partition-1: the process that reads the file system failed: it died")
    );
    assert!(std::fs::read(one.join("etc/fstab")).unwrap() == noise(120, 120));
    running.terminate();
    assert_eq!(running.ended(), 0);
}

/// A group on two disks, one of them in a partition: one volume goes on from the first to the second, one is striped.
#[test]
fn logical_volumes_are_shown_also_where_they_are_on_several_disks() {
    const EXTENT: u64 = 4;
    let vault = Vault::new();
    let (unix, plain) = (unix_tree(&vault), plain_tree(&vault, "plain"));
    let (linear, striped) = (ext4(&vault, "ext4", &unix), fat(&vault, "fat", &plain));
    let parts = [empty(&vault, "pv0", 64), empty(&vault, "pv1", 64)];
    let devices =
        parts.each_ref().map(|part| tool(&["losetup", "-f", "--show", text(part)]).trim().to_owned());
    let [one, other] = &devices;
    // This kernel need not know of logical volumes.
    let script = format!(
        "set -e; export LVM_SUPPRESS_FD_WARNINGS=1; only='--devices {one},{other}'; off='--driverloaded n -y -an -Zn -Wn'
        pvcreate -q $only {one} {other}; vgcreate -q $only vg-0 {one} {other}
        lvcreate $only $off -l 10 -n root vg-0 {one}:0-9
        lvcreate $only $off -i 2 -I 64k -l 10 -n striped vg-0 {one}:10-14 {other}:4-8
        lvextend $only --driverloaded n -l +2 vg-0/root {other}:2-3"
    );
    let made = Command::new("sh").args(["-c", &script]).output().unwrap();
    for device in &devices {
        tool(&["losetup", "-d", device]);
    }
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let files = parts.each_ref().map(|part| File::options().write(true).open(part).unwrap());
    let put = |part: usize, extent: u64, within: u64, bytes: &[u8]| {
        files[part].write_all_at(bytes, MIB + extent * EXTENT * MIB + within).unwrap();
    };
    let content = std::fs::read(&linear).unwrap();
    let (first, second) = content.split_at((10 * EXTENT * MIB) as usize);
    put(0, 0, 0, first);
    put(1, 2, 0, second);
    for (number, stripe) in (0u64..).zip(std::fs::read(&striped).unwrap().chunks(64 << 10)) {
        let (part, at) = if number % 2 == 0 { (0, 10) } else { (1, 4) };
        put(part, at, number / 2 * (64 << 10), stripe);
    }
    let disk = partitioned(&vault, "disk.raw", "gpt", &[&striped, &parts[0]]);
    vault.ok(&["backup", "shop", "--disk", text(&disk), "--disk", text(&parts[1])]);

    let (_folder, running, point) = mounted(&vault);
    assert_described_the_same(&point.join("disk0.files/vg--0-root"), &unix);
    assert_same_content(&plain, &point.join("disk0.files/vg--0-striped"));
    assert_same_content(&plain, &point.join("disk0.files/partition-1"));
    tool(&["cmp", text(&point.join("disk0.files/vg--0-root/large")), text(&unix.join("large"))]);
    let about = |disk: &str| std::fs::read_to_string(point.join(disk).join("about.txt")).unwrap();
    assert_eq!(about("disk1.files"), "whole: not shown, 64 MiB: a physical volume of LVM\n");
    assert!(about("disk0.files").contains("vg--0-striped: FAT, 40 MiB\n"), "{}", about("disk0.files"));
    running.terminate();
    assert_eq!(running.ended(), 0);
    let to = vault.rack.path("to");
    vault.ok(&["restore", "shop", "--volume", "vg--0-root", "--path", "/etc", "--to", text(&to)]);
    tool(&["diff", "-r", "--no-dereference", text(&to.join("etc")), text(&unix.join("etc"))]);

    // Without the second disk, what is on the first alone is shown.
    vault.ok(&["backup", "half", "--disk", text(&disk)]);
    let half = vault.json(&["files", "half"]).to_string();
    assert!(half.contains("a part on a disk that is not in the point"), "{half}");
}
