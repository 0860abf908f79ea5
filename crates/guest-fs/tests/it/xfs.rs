//! XFS: what mkfs makes of a prototype, and what Linux makes.

use crate::files::{Tree, assert_same, look, tree, tree_of, unix};
use crate::images::{MIB, Memory, run, text};
use rempart_guest_fs::Section;
use rempart_guest_fs::files::{FileSystemKind, Kind, open};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What mkfs.xfs makes files of: one name a line, and `$` at the end of a folder.
fn prototype(folder: &Path, text_of: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let meta = path.symlink_metadata().unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let mode = meta.mode();
        let (user, group) =
            (if mode & 0o4000 != 0 { 'u' } else { '-' }, if mode & 0o2000 != 0 { 'g' } else { '-' });
        let line = format!("{user}{group}{:03o} {} {}", mode & 0o777, meta.uid(), meta.gid());
        if meta.is_dir() {
            text_of.push_str(&format!("{name} d{line}\n"));
            prototype(&path, text_of);
            text_of.push_str("$\n");
        } else if meta.is_symlink() {
            text_of.push_str(&format!("{name} l{line} {}\n", std::fs::read_link(&path).unwrap().display()));
        } else if meta.is_file() {
            text_of.push_str(&format!("{name} -{line} {}\n", path.display()));
        } else {
            text_of.push_str(&format!("{name} p{line}\n"));
        }
    }
}

pub fn xfs(folder: &Path, files: &Path, options: &[&str]) -> Vec<u8> {
    let (image, script, named) = (folder.join("disk"), folder.join("prototype"), folder.join("named"));
    // Prototypes take no blanks in names, and nothing that is not text.
    let _ = std::fs::remove_dir_all(&named);
    run("cp", &["-a", text(files), text(&named)]);
    // A long link of theirs has no header, and a large file no end.
    run("find", &[text(&named), "-type", "l", "-size", "+100c", "-delete"]);
    run("find", &[text(&named), "-size", "+30M", "-delete"]);
    let odd = "find . -depth -name '*[^-A-Za-z0-9_.]*' | while IFS= read -r a; do \
               mv \"$a\" \"$(dirname \"$a\")/$(basename \"$a\" | tr -c 'A-Za-z0-9.\n' _)\" || rm -f \"$a\"; done; \
               find . -name '*[^-A-Za-z0-9_.]*' -delete";
    run("sh", &["-c", &format!("cd {} && LC_ALL=C && export LC_ALL && {odd}", text(&named))]);
    let mut prototype_text = "/none\n0 0\nd--755 0 0\n".to_owned();
    prototype(&named, &mut prototype_text);
    prototype_text.push_str("$\n");
    std::fs::write(&script, prototype_text).unwrap();
    std::fs::write(&image, vec![0; 96 * MIB as usize]).unwrap();
    // Else it makes none that is small.
    let small = ["TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x", "mkfs.xfs", "-q", "-f", "-p", text(&script)];
    run("env", &[&small[..], options, &[text(&image)]].concat());
    std::fs::read(&image).unwrap()
}

#[test]
fn xfs_has_every_file() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    unix(&files);
    for options in [
        &[][..],
        &["-m", "crc=0"],
        &["-m", "bigtime=0", "-i", "nrext64=1"],
        &["-b", "size=1024"],
        &["-n", "size=16k"],
    ] {
        let bytes = xfs(folder.path(), &files, options);
        let disk = Memory::new(&bytes);
        assert_eq!(look(&disk)[0].kind, Some(FileSystemKind::Xfs), "{options:?}");
        let without_times = |mut tree: Tree| {
            for node in tree.values_mut() {
                // Nor does a prototype know of two names of a file, and of bits that are not permissions.
                (node.seconds, node.links, node.mode) = (0, 0, node.mode & !0o1000);
            }
            tree
        };
        let expected = without_times(tree_of(&folder.path().join("named")));
        assert!(expected.len() > 700, "{}", expected.len());
        assert_same(&without_times(tree(&bytes, FileSystemKind::Xfs)), &expected, &format!("{options:?}"));
    }
}

/// What Linux makes that prototypes cannot: long links, many attributes, folders and files with trees.
#[test]
fn xfs_of_linux_has_every_file() {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !known.contains("xfs") {
        eprintln!("not asked: this kernel mounts no XFS");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (files, image, mounted) =
        (folder.path().join("files"), folder.path().join("disk"), folder.path().join("mounted"));
    unix(&files);
    std::fs::create_dir(&mounted).unwrap();
    for options in [&[][..], &["-b", "size=1024", "-n", "size=8192"]] {
        std::fs::write(&image, vec![0; 160 * MIB as usize]).unwrap();
        let small = ["TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x", "mkfs.xfs", "-q", "-f"];
        run("env", &[&small[..], options, &[text(&image)]].concat());
        let script = "set -e; mount -o loop $0 $1; trap 'umount $1' EXIT; cp -a $2/. $1; cd $1
            mkdir names; for a in $(seq 6000); do : > names/a-name-that-is-not-short-$a; done
            for a in $(seq 1 2 1500); do printf x | dd of=pieces bs=1 seek=$((a * 4096)) conv=notrunc status=none; done
            touch -d @5000000000 one
            setfattr -n user.colour -v blue one; setfattr -n security.selinux -v label_t one
            for a in $(seq 60); do setfattr -n user.number-$a -v $a-and-some-more-bytes large; done
            mknod console c 5 1; cd /; cp -a $1/. $3";
        let copy = folder.path().join("copy");
        let _ = std::fs::remove_dir_all(&copy);
        run("bash", &["-c", script, text(&image), text(&mounted), text(&files), text(&copy)]);
        let bytes = std::fs::read(&image).unwrap();
        let mut found = tree(&bytes, FileSystemKind::Xfs);
        assert_eq!(found.remove(&b"/console"[..]).unwrap().kind, Kind::CharacterDevice);
        std::fs::remove_file(copy.join("console")).unwrap();
        assert_same(&found, &tree_of(&copy), &format!("{options:?}"));
        let disk = Memory::new(&bytes);
        let mut fs = open(Section::whole(&disk), FileSystemKind::Xfs).unwrap();
        let root = fs.list(fs.root()).unwrap();
        let number = |name: &[u8]| root.iter().find(|entry| entry.name == name).unwrap().file;
        let expected = [("security.selinux", "label_t"), ("user.colour", "blue")];
        let expected = expected.map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
        assert_eq!(fs.extended(number(b"one")).unwrap(), expected, "{options:?}");
        assert_eq!(fs.extended(number(b"large")).unwrap().len(), 60, "{options:?}");
        assert_eq!(fs.attributes(number(b"console")).unwrap().device, (5, 1));
        assert!(fs.content(number(b"pieces")).unwrap().extents.len() > 300, "in many pieces");
    }
}
