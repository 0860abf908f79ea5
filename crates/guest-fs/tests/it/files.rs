//! Every file of file systems that other programs made.

use crate::images::{MIB, Memory, run, run_with_input, text};
use crate::xfs::xfs;
use rempart_guest_fs::files::{Content, FileSystemKind, Kind, open};
use rempart_guest_fs::{Disk, Section, Volume, volumes};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

/// What is at a path.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    pub kind: Kind,
    pub mode: u32,
    owner: (u32, u32),
    pub seconds: i64,
    pub links: u32,
    /// Of a file; where a link leads.
    bytes: Vec<u8>,
}

pub type Tree = BTreeMap<Vec<u8>, Node>;

pub fn bytes_of(disk: &dyn Disk, content: &Content) -> Vec<u8> {
    assert!(content.is_sound(disk.len()), "{content:?}");
    let mut bytes = content.inline.clone();
    bytes.resize(content.size as usize, 0);
    for extent in &content.extents {
        disk.read(extent.bytes.start, &mut bytes[extent.at as usize..extent.end() as usize]).unwrap();
    }
    bytes
}

/// All that a file system has, but for what its own programs put there.
pub fn tree(bytes: &[u8], kind: FileSystemKind) -> Tree {
    let disk = Memory::new(bytes);
    let mut fs = open(Section::whole(&disk), kind).unwrap();
    let mut found = Tree::new();
    let mut folders = vec![(Vec::new(), fs.root())];
    while let Some((path, folder)) = folders.pop() {
        for entry in fs.list(folder).unwrap() {
            if path.is_empty() && (entry.name == b"lost+found" || entry.name == b"System Volume Information")
            {
                continue;
            }
            let path = [&path[..], b"/", &entry.name].concat();
            let shown = String::from_utf8_lossy(&path).into_owned();
            let attributes = fs.attributes(entry.file).unwrap();
            assert_eq!(attributes.kind, entry.kind, "{shown}");
            let bytes = match attributes.kind {
                Kind::Folder => {
                    folders.push((path.clone(), entry.file));
                    Vec::new()
                }
                Kind::File => {
                    bytes_of(&disk, &fs.content(entry.file).unwrap_or_else(|e| panic!("{shown}: {e}")))
                }
                Kind::Link => fs.target(entry.file).unwrap(),
                _ => Vec::new(),
            };
            let node = Node {
                kind: attributes.kind,
                mode: attributes.mode,
                owner: (attributes.owner, attributes.group),
                seconds: attributes.modified.0,
                links: if attributes.kind == Kind::Folder { 0 } else { attributes.links },
                bytes,
            };
            assert_eq!(found.insert(path, node), None, "{shown}");
        }
    }
    found
}

/// The same, of a folder here.
pub fn tree_of(folder: &Path) -> Tree {
    let mut found = Tree::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(here) = folders.pop() {
        for entry in std::fs::read_dir(&here).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let (kind, bytes) = if meta.is_dir() {
                folders.push(path.clone());
                (Kind::Folder, Vec::new())
            } else if meta.is_symlink() {
                (Kind::Link, std::fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec())
            } else if meta.is_file() {
                (Kind::File, std::fs::read(&path).unwrap())
            } else {
                (Kind::Pipe, Vec::new())
            };
            let node = Node {
                kind,
                mode: meta.mode() & 0o7777,
                owner: (meta.uid(), meta.gid()),
                seconds: meta.mtime(),
                links: if kind == Kind::Folder { 0 } else { meta.nlink() as u32 },
                bytes,
            };
            let name = path.strip_prefix(folder).unwrap().as_os_str().as_bytes();
            found.insert([b"/", name].concat(), node);
        }
    }
    found
}

pub fn noise(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| ((at ^ seed).wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

/// Files of many lengths in folders of some depth, one of them with many names.
fn common(folder: &Path) {
    std::fs::create_dir_all(folder.join("a/b/c d")).unwrap();
    std::fs::create_dir(folder.join("many")).unwrap();
    for (name, len) in [
        ("empty", 0),
        ("one", 1),
        ("a/small", 700),
        ("a/b/A Longer Name, with büro in it.txt", 5000),
        ("a/b/c d/block", 4096),
        ("large", 9_000_001),
    ] {
        std::fs::write(folder.join(name), noise(len, len as usize)).unwrap();
    }
    for number in 0..700 {
        let name = format!("many/file number {number:05} of a folder that has a lot of them");
        std::fs::write(folder.join(name), number.to_string()).unwrap();
    }
}

pub fn unix(folder: &Path) {
    common(folder);
    symlink("short", folder.join("link")).unwrap();
    symlink("/a/target/that-is-rather-long/".repeat(20), folder.join("a/long link")).unwrap();
    std::fs::hard_link(folder.join("one"), folder.join("a/one again")).unwrap();
    run("mkfifo", &[text(&folder.join("pipe"))]);
    let odd = OsStr::from_bytes(b"\xff odd \\ \n name");
    std::fs::write(folder.join(odd), "odd").unwrap();
    let sparse = std::fs::File::create(folder.join("sparse")).unwrap();
    sparse.set_len(40 * MIB).unwrap();
    sparse.write_all_at(&noise(5, 70_000), 12 * MIB + 4096).unwrap();
    sparse.write_all_at(b"end", 40 * MIB - 3).unwrap();
    let mode = |name: &str, mode| {
        std::fs::set_permissions(folder.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode("one", 0o4711);
    mode("a/b", 0o1700);
    std::os::unix::fs::chown(folder.join("a/small"), Some(70_000), Some(4_000_000_000)).unwrap();
    for (name, seconds) in [("large", 0), ("a/b/c d/block", 1_700_000_000)] {
        let file = std::fs::File::options().write(true).open(folder.join(name)).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    }
}

pub fn assert_same(found: &Tree, expected: &Tree, what: &str) {
    let names =
        |tree: &Tree| tree.keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    for (name, node) in expected {
        let is_same = found[name] == *node;
        let short = |node: &Node| {
            format!("{:?}", Node { bytes: node.bytes.iter().take(40).copied().collect(), ..*node })
        };
        assert!(
            is_same,
            "{what}: {}: {} is not {}",
            String::from_utf8_lossy(name),
            short(&found[name]),
            short(node)
        );
    }
}

pub fn look(disk: &dyn Disk) -> Vec<Volume> {
    volumes(disk, std::slice::from_ref(&(0..disk.len())), 0).unwrap()
}

fn mke2fs(folder: &Path, files: &Path, options: &[&str]) -> Vec<u8> {
    let image = folder.join("disk");
    std::fs::write(&image, vec![0x5a; 96 * MIB as usize]).unwrap();
    run("mke2fs", &[&["-q", "-F", "-E", "nodiscard", "-d", text(files)], options, &[text(&image)]].concat());
    std::fs::read(&image).unwrap()
}

const EXT4: [&[&str]; 6] = [
    &["-t", "ext4", "-b", "4096"],
    &["-t", "ext4", "-b", "1024"],
    &["-t", "ext4", "-O", "^metadata_csum,^64bit,^dir_index"],
    &["-t", "ext3", "-b", "2048"],
    &["-t", "ext2", "-b", "1024"],
    &["-t", "ext4", "-O", "metadata_csum_seed,large_dir", "-I", "128"],
];

#[test]
fn ext4_has_every_file_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    unix(&files);
    for options in EXT4 {
        let expected = tree_of(&files);
        let bytes = mke2fs(folder.path(), &files, options);
        let disk = Memory::new(&bytes);
        let volumes = look(&disk);
        let [volume] = &volumes[..] else { panic!("{volumes:?}") };
        assert_eq!(
            (&volume.name[..], volume.kind, &volume.note),
            ("whole", Some(FileSystemKind::Ext4), &None)
        );
        assert_same(&tree(&bytes, FileSystemKind::Ext4), &expected, &format!("{options:?}"));
        let mut fs = open(Section::whole(&disk), FileSystemKind::Ext4).unwrap();
        let root = fs.list(fs.root()).unwrap();
        let sparse = root.iter().find(|entry| entry.name == b"sparse").unwrap();
        let content = fs.content(sparse.file).unwrap();
        let kept: u64 = content.extents.iter().map(|extent| extent.bytes.end - extent.bytes.start).sum();
        assert!(kept < 100_000, "holes are no data: {kept}");
    }
}

#[test]
fn ext4_tells_attributes_and_devices() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    common(&files);
    for options in [EXT4[0], EXT4[5]] {
        mke2fs(folder.path(), &files, options);
        let image = folder.path().join("disk");
        let acl = folder.path().join("acl");
        // Version 2; user rw, user 1000 r, group r, mask r, others none.
        let entries =
            [(1, 6, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)];
        let entry = |(tag, may, who): (u8, u8, u32)| [&[tag, 0, may, 0][..], &who.to_le_bytes()].concat();
        let list = [vec![2, 0, 0, 0], entries.map(entry).concat()].concat();
        std::fs::write(&acl, &list).unwrap();
        run_with_input(
            "debugfs",
            &["-w", "-f", "-", text(&image)],
            &format!(
                "ea_set -f {} /one system.posix_acl_access\nea_set /one user.colour blue\nea_set /one security.selinux system_u:object_r:etc_t:s0\n\
             mknod console c 5 1\nmknod disk b 259 3\n\
             sif /empty mtime @5000000000\nsif /empty mtime_extra 1\n",
                text(&acl)
            ),
        );
        let bytes = std::fs::read(&image).unwrap();
        let disk = Memory::new(&bytes);
        let mut fs = open(Section::whole(&disk), FileSystemKind::Ext4).unwrap();
        let root = fs.list(fs.root()).unwrap();
        let number = |name: &[u8]| root.iter().find(|entry| entry.name == name).unwrap().file;
        let colour = (b"user.colour".to_vec(), b"blue".to_vec());
        let label = (b"security.selinux".to_vec(), b"system_u:object_r:etc_t:s0".to_vec());
        let list = (b"system.posix_acl_access".to_vec(), list);
        assert_eq!(fs.extended(number(b"one")).unwrap(), [label, list, colour], "{options:?}");
        if options == EXT4[0] {
            assert_eq!(fs.attributes(number(b"empty")).unwrap().modified, (5_000_000_000, 0));
        }
        let mut device = |name: &[u8]| {
            let attributes = fs.attributes(number(name)).unwrap();
            (attributes.kind, attributes.device)
        };
        assert_eq!(device(b"console"), (Kind::CharacterDevice, (5, 1)));
        assert_eq!(device(b"disk"), (Kind::BlockDevice, (259, 3)));
    }
}

/// As a machine leaves it that lost power: what is new is in the journal only.
#[test]
fn what_the_journal_of_ext4_holds_is_read_in_its_place() {
    const BLOCK: usize = 4096;
    let folder = tempfile::tempdir().unwrap();
    let (files, later) = (folder.path().join("files"), folder.path().join("later"));
    common(&files);
    std::fs::write(&later, noise(77, 300_000)).unwrap();
    for (options, journal) in
        [("^metadata_csum,^64bit", ""), ("64bit", "-c"), ("metadata_csum", "-v 2"), ("metadata_csum", "-v 3")]
    {
        let old = mke2fs(folder.path(), &files, &["-t", "ext4", "-b", "4096", "-O", options]);
        let image = folder.path().join("disk");
        let commands =
            format!("write {} new\nrm /one\nkill_file /one\nln /large /a/large too\n", text(&later));
        run_with_input("debugfs", &["-w", "-f", "-", text(&image)], &commands);
        let new = std::fs::read(&image).unwrap();
        assert!(new != old);
        // Its changed blocks, as transactions over the old ones; then one that was never committed.
        std::fs::write(&image, &old).unwrap();
        let changed =
            (0..old.len() / BLOCK).filter(|at| old[at * BLOCK..][..BLOCK] != new[at * BLOCK..][..BLOCK]);
        let mut script = format!("jo {journal}\n");
        for (number, block) in changed.enumerate() {
            let file = folder.path().join(format!("block{number}"));
            std::fs::write(&file, &new[block * BLOCK..][..BLOCK]).unwrap();
            script.push_str(&format!("jw -b {block} {}\n", text(&file)));
        }
        script.push_str("jc\n");
        run_with_input("debugfs", &["-w", "-f", "-", text(&image)], &script);
        let dirty = std::fs::read(&image).unwrap();
        let disk = Memory::new(&dirty);
        let found = look(&disk);
        assert!(found[0].note.as_ref().is_some_and(|note| note.contains("journal")), "{found:?}");
        assert_same(&tree(&dirty, FileSystemKind::Ext4), &tree(&new, FileSystemKind::Ext4), options);
    }
}

fn fat(folder: &Path, files: &Path, options: &[&str], mib: u64) -> Vec<u8> {
    let image = folder.join("disk");
    std::fs::write(&image, vec![0; (mib * MIB) as usize]).unwrap();
    run("mkfs.vfat", &[options, &[text(&image)]].concat());
    for entry in std::fs::read_dir(files).unwrap() {
        run("mcopy", &["-s", "-m", "-i", text(&image), text(&entry.unwrap().path()), "::/"]);
    }
    std::fs::read(&image).unwrap()
}

/// As a file system shows it that knows neither owners nor permissions, and only even seconds.
fn without_owners(mut tree: Tree) -> Tree {
    for node in tree.values_mut() {
        let mode = if node.kind == Kind::Folder { 0o755 } else { 0o644 };
        (node.mode, node.owner, node.seconds) = (mode, (0, 0), node.seconds / 2);
    }
    tree
}

#[test]
fn fat_of_all_three_widths_has_every_file() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    common(&files);
    // Seconds that FAT can have; its clock has no time zone.
    let expected = without_owners(tree_of(&files));
    for (options, mib) in [
        (&["-F", "12", "-s", "64"][..], 60),
        (&["-F", "16"], 60),
        (&["-F", "32"], 60),
        (&["-F", "32", "-S", "4096"], 300),
    ] {
        let bytes = fat(folder.path(), &files, options, mib);
        let disk = Memory::new(&bytes);
        let found = look(&disk);
        assert_eq!((found.len(), found[0].kind), (1, Some(FileSystemKind::Fat)), "{options:?}");
        let mut found = without_owners(tree(&bytes, FileSystemKind::Fat));
        for (name, node) in &mut found {
            if node.kind == Kind::Folder {
                node.seconds = expected[name].seconds;
            }
        }
        assert_same(&found, &expected, &format!("{options:?}"));
    }
}

/// Where the contents of files lie.
fn contents(bytes: &[u8], kind: FileSystemKind) -> Vec<Range<u64>> {
    let disk = Memory::new(bytes);
    let mut fs = open(Section::whole(&disk), kind).unwrap();
    let (mut found, mut folders) = (Vec::new(), vec![fs.root()]);
    while let Some(folder) = folders.pop() {
        for name in fs.list(folder).unwrap() {
            match name.kind {
                Kind::Folder => folders.push(name.file),
                Kind::File => found
                    .extend(fs.content(name.file).unwrap().extents.into_iter().map(|extent| extent.bytes)),
                _ => {}
            }
        }
    }
    found
}

/// Whatever bits are wrong: no panic, no end that does not come, nothing outside of the file system.
#[test]
fn damage_is_an_error_of_what_is_damaged() {
    const MOST: usize = 3000;
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    unix(&files);
    let plain = folder.path().join("plain");
    common(&plain);
    let images = [
        (FileSystemKind::Ext4, mke2fs(folder.path(), &files, EXT4[2])),
        (FileSystemKind::Ext4, mke2fs(folder.path(), &files, EXT4[4])),
        (FileSystemKind::Fat, fat(folder.path(), &plain, &["-F", "16"], 32)),
        (FileSystemKind::ExFat, exfat(folder.path(), &plain)),
        (FileSystemKind::Xfs, xfs(folder.path(), &files, &[])),
    ];
    let mut random = 88_172_645_463_325_252u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for (kind, bytes) in images {
        // Where something is that is no file's content.
        let contents = contents(&bytes, kind);
        let blocks: Vec<usize> = (0..bytes.len() / 1024)
            .filter(|at| bytes[at * 1024..][..1024].iter().any(|byte| !matches!(byte, 0 | 0x5a)))
            .filter(|at| !contents.iter().any(|content| content.contains(&(*at as u64 * 1024))))
            .collect();
        let mut damaged = bytes.clone();
        let (mut refused, mut read) = (0, 0);
        for round in 0..40 {
            let mut places = Vec::new();
            for _ in 0..1 + round % 20 {
                let at = blocks[next() as usize % blocks.len()] * 1024 + next() as usize % 1024;
                places.push(at);
                damaged[at] = next() as u8;
            }
            let disk = Memory::new(&damaged);
            match open(Section::whole(&disk), kind) {
                Err(_) => refused += 1,
                Ok(mut fs) => {
                    let mut next = vec![fs.root()];
                    let mut seen = std::collections::BTreeSet::new();
                    while let Some(file) = next.pop().filter(|_| seen.len() < MOST) {
                        if !seen.insert(file) {
                            continue;
                        }
                        match fs.attributes(file).map(|attributes| attributes.kind) {
                            Ok(Kind::Folder) => match fs.list(file) {
                                Ok(names) => next.extend(names.iter().map(|name| name.file)),
                                Err(_) => refused += 1,
                            },
                            Ok(Kind::File) => match fs.content(file) {
                                Ok(content) => {
                                    let is_long = content.size > i64::MAX as u64;
                                    assert!(content.is_sound(disk.len()) || is_long, "{content:?}");
                                    read += content.extents.len();
                                }
                                Err(_) => refused += 1,
                            },
                            Ok(Kind::Link) => refused += usize::from(fs.target(file).is_err()),
                            Ok(_) => {}
                            Err(_) => refused += 1,
                        }
                        refused += usize::from(fs.extended(file).is_err());
                    }
                }
            }
            for at in places {
                damaged[at] = bytes[at];
            }
        }
        assert!(
            refused > 0 && read > 1000,
            "{kind:?}: {refused} errors, {read} pieces: the damage is where it matters"
        );
    }
}

fn exfat(folder: &Path, files: &Path) -> Vec<u8> {
    let (image, mounted) = (folder.join("disk"), folder.join("mounted"));
    std::fs::write(&image, vec![0; 40 * MIB as usize]).unwrap();
    run("mkfs.exfat", &["-c", "4K", text(&image)]);
    std::fs::create_dir_all(&mounted).unwrap();
    let device = run("losetup", &["-f", "--show", text(&image)]).trim().to_owned();
    let script = "mount.exfat-fuse $0 $1 && cp -r $2/. $1; done=$?; umount $1; losetup -d $0; exit $done";
    run("sh", &["-c", script, &device, text(&mounted), text(files)]);
    std::fs::read(&image).unwrap()
}

#[test]
fn exfat_has_every_file() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    common(&files);
    // As many entries as make some cross the ends of clusters, and a name of many entries.
    std::fs::write(files.join(format!("a/{}", "long name ".repeat(20))), "long").unwrap();
    let bytes = exfat(folder.path(), &files);
    let disk = Memory::new(&bytes);
    assert_eq!(look(&disk)[0].kind, Some(FileSystemKind::ExFat));
    let without_times = |mut tree: Tree| {
        tree.values_mut().for_each(|node| node.seconds = 0);
        without_owners(tree)
    };
    assert_same(
        &without_times(tree(&bytes, FileSystemKind::ExFat)),
        &without_times(tree_of(&files)),
        "exFAT",
    );
}
