//! What XFS can do without, of file systems that Linux wrote: frozen, in use and unmounted.

use crate::files::tree;
use crate::images::{ALL, MIB, blocks, bytes_of, look, look_flipped, run, sum, text, without};
use crate::xfs::xfs;
use rempart_guest_fs::files::FileSystemKind;
use rempart_guest_fs::{Reason, Wanted};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

const SIZE: u64 = 160 * MIB;

/// The file system as it was at three moments.
struct Made {
    frozen: Vec<u8>,
    in_use: Vec<u8>,
    unmounted: Vec<u8>,
}

/// A file system over old garbage, with files, of which `copy` in the folder is a copy, two swap files, and space that was used
/// and given back. None if this kernel mounts no XFS.
fn make(folder: &Path, options: &[&str]) -> Option<Made> {
    if !std::fs::read_to_string("/proc/filesystems").unwrap().contains("xfs") {
        eprintln!("not asked: this kernel mounts no XFS");
        return None;
    }
    let image = folder.join("disk");
    std::fs::write(&image, vec![0x5a; SIZE as usize]).unwrap();
    // Else it makes none that is small.
    let small = ["TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x", "mkfs.xfs", "-q", "-f", "-K"];
    run("env", &[&small[..], options, &[text(&image)]].concat());
    let script = "set -e; cd $0; rm -rf mounted copy; mkdir mounted; mount -o loop disk mounted; trap 'cd $0; umount mounted' EXIT
        cd mounted; mkdir etc many given-back; echo 127.0.0.1 localhost > etc/hosts
        head -c 9000000 /dev/urandom > large; head -c 30000000 /dev/urandom > given-back/large
        for a in $(seq 400); do head -c 9000 /dev/urandom > given-back/$a; cp given-back/$a many/$a; done
        head -c 8M /dev/urandom > swapfile; fallocate -l 4M swap2; chmod 600 swap*; mkswap -q -L swappy swapfile; mkswap -q swap2
        sync; rm -r given-back; cp -a . ../copy; cd ..
        fsfreeze -f mounted; cp disk frozen; fsfreeze -u mounted
        echo later > mounted/later; sync mounted/later; cp disk in_use; rm mounted/later; umount mounted; trap - EXIT; cp disk unmounted";
    run("bash", &["-c", script, text(folder)]);
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    Some(Made { frozen: read("frozen"), in_use: read("in_use"), unmounted: read("unmounted") })
}

/// Of version 4, without checksums, which Linux mounts no more.
fn make_old(folder: &Path) -> Vec<u8> {
    let files = folder.join("files");
    let _ = std::fs::remove_dir_all(&files);
    std::fs::create_dir(&files).unwrap();
    std::fs::write(files.join("large"), vec![0x77; 9_000_000]).unwrap();
    xfs(folder, &files, &["-m", "crc=0"])
}

#[test]
fn an_old_one_without_checksums_is_understood() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = make_old(folder.path());
    let files = tree(&bytes, FileSystemKind::Xfs);
    let found = look(&bytes, ALL);
    assert_eq!(found.remarks, []);
    let free = bytes_of(&found, Reason::FreeSpace);
    assert!(sum(&free) > 60 * MIB, "{free:?}");
    free.iter().for_each(|range| bytes[range.start as usize..range.end as usize].fill(0xee));
    let image = folder.path().join("disk");
    std::fs::write(&image, &bytes).unwrap();
    run("xfs_repair", &["-n", text(&image)]);
    assert!(tree(&bytes, FileSystemKind::Xfs) == files);
}

/// Whatever bytes are wrong: no panic, and nothing is left out that is not there or that is there twice.
#[test]
fn damage_without_checksums_ends_in_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = make_old(folder.path());
    let image = folder.path().join("disk");
    let told = run("xfs_logprint", &["-t", text(&image)]);
    let (_, log) = told.split_once("daddr:").unwrap();
    let log = log.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 512;
    let tree = u32::from_be_bytes(bytes[512 + 16..][..4].try_into().unwrap()) as usize * 4096;
    let root = (0..bytes.len() / 256).map(|place| place * 256).find(|at| bytes[*at..][..2] == *b"IN");
    let root = root.expect("inodes");
    let places = [0..256, 512..740, tree..tree + 64, log..log + 1536, root..root + 512];
    let mut random = 88_172_645_463_325_252u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize
    };
    let (mut kept, mut left_out) = (0, 0);
    for _ in 0..3000 {
        let mut changed = Vec::new();
        for _ in 0..1 + next() % 3 {
            let places = &places[next() % places.len()];
            let at = places.start + next() % places.len();
            changed.push((at, bytes[at]));
            bytes[at] = if next() % 2 == 0 { bytes[at] ^ 1 << (next() % 8) } else { next() as u8 };
        }
        let found = look(&bytes, ALL).left_out;
        if found.is_empty() {
            kept += 1
        } else {
            left_out += 1
        }
        assert!(
            found.iter().all(|one| one.range.start < one.range.end && one.range.end <= bytes.len() as u64)
        );
        assert!(found.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start));
        for (at, byte) in changed.into_iter().rev() {
            bytes[at] = byte;
        }
    }
    assert!(kept > 300 && left_out > 300, "{kept} refused, {left_out} not: the damage is where it matters");
}

/// Blocks that its own programs call free, those for the trees of free space among them.
fn free_by_xfs_db(image: &Path, block: u64) -> BTreeSet<u64> {
    let number = |command: &[&str]| -> u64 {
        let told = run("xfs_db", &[&["-r"], command, &[text(image)]].concat());
        told.trim().rsplit(' ').next().unwrap().parse().unwrap()
    };
    let group = number(&["-c", "sb 0", "-c", "p agblocks"]);
    assert_eq!(number(&["-c", "sb 0", "-c", "p blocksize"]), block);
    let told = run("xfs_db", &["-r", "-c", "freesp -d", text(image)]);
    let numbers = told.lines().map(|line| {
        let numbers = line.split_whitespace().map(|number| number.parse::<u64>().ok());
        numbers.collect::<Option<Vec<u64>>>()
    });
    let extents = numbers.flatten().filter(|numbers| numbers.len() == 3);
    let blocks = extents.flat_map(|extent| {
        let start = extent[0] * group + extent[1];
        start..start + extent[2]
    });
    blocks.collect()
}

/// Of one that was frozen and of one that was unmounted: what is left out is free, and without it every file is as it was.
#[test]
fn without_what_is_left_out_every_file_is_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (options, block) in [
        (&[][..], 4096),
        (&["-b", "size=1024", "-d", "agcount=7"], 1024),
        (&["-m", "reflink=1,rmapbt=1", "-l", "su=32k"], 4096),
    ] {
        let Some(made) = make(folder, options) else { return };
        for (bytes, moment) in [(made.frozen, "frozen"), (made.unmounted, "unmounted")] {
            let found = look(&bytes, ALL);
            assert_eq!(found.remarks, [], "{options:?}, {moment}");
            let free = blocks(&bytes_of(&found, Reason::FreeSpace), block);
            let known = free_by_xfs_db(&folder.join(moment), block);
            assert!(free.is_subset(&known), "{options:?}, {moment}");
            assert!(
                known.len() - free.len() < 100,
                "{options:?}, {moment}: {} of {}",
                free.len(),
                known.len()
            );
            let swap = sum(&bytes_of(&found, Reason::PageFile));
            assert_eq!(swap, 12 * MIB - 2 * 4096, "{options:?}, {moment}: all but two headers");

            std::fs::write(folder.join("restored"), without(&found, bytes)).unwrap();
            if moment == "unmounted" {
                run("xfs_repair", &["-n", text(&folder.join("restored"))]);
            }
            let script = "set -e; cd $0; mount -o loop restored mounted; trap 'umount mounted' EXIT
                diff -r -x 'swap*' copy mounted; test \"$(swaplabel mounted/swapfile | grep -c swappy)\" = 1
                cmp -n 4096 copy/swap2 mounted/swap2; umount mounted; trap - EXIT; xfs_repair -n restored";
            run("bash", &["-c", script, text(folder)]);
        }
        let in_use = look(&made.in_use, ALL);
        assert_eq!(in_use.left_out, [], "{options:?}");
        assert!(in_use.remarks[0].what.contains("mounted and was not frozen"), "{:?}", in_use.remarks);
    }
}

/// Whatever single bit is wrong of what has checksums, no block that a file has is left out.
#[test]
fn a_flipped_bit_costs_space_and_never_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let Some(made) = make(folder.path(), &["-d", "agcount=2"]) else { return };
    let (bytes, image) = (made.unmounted, folder.path().join("unmounted"));
    let sound = look(&bytes, ALL);
    let is_known = |range: &Range<u64>| {
        sound.left_out.iter().any(|known| known.range.start <= range.start && range.end <= known.range.end)
    };
    let place = |commands: &[&str]| {
        let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
        let told = run("xfs_db", &[&["-r"], &commands[..], &["-c", "daddr", text(&image)]].concat());
        told.trim().rsplit(' ').next().unwrap().parse::<usize>().unwrap() * 512
    };
    let tree = place(&["agf 0", "addr bnoroot"]);
    let swap = (0..bytes.len() / 512)
        .map(|sector| sector * 512)
        .find(|at| bytes[*at..][..2] == *b"IN" && bytes[at + 56..at + 64] == (8 * MIB).to_be_bytes())
        .expect("the swap file's inode");
    let places = [0..264, 512..512 + 224, tree..tree + 4096, swap..swap + 512];
    let mut random = 88_172_645_463_325_252u64;
    let mut refused = 0;
    for _ in 0..800 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let places = &places[(random >> 40) as usize % places.len()];
        let (at, bit) = (places.start + (random >> 8) as usize % places.len(), random & 7);
        let found = look_flipped(&bytes, at, 1 << bit);
        refused += usize::from(!found.remarks.is_empty());
        assert!(found.left_out.iter().all(|one| is_known(&one.range)), "byte {at}, bit {bit}");
    }
    assert!(refused > 700, "{refused} of 800 were noticed: the flips are where it matters");
}

#[test]
fn one_that_sleeps_or_wants_repair_or_has_its_log_elsewhere_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let Some(made) = make(folder.path(), &["-m", "reflink=1"]) else { return };
    // What other files have, too, may be theirs by now.
    let script =
        "set -e; cd $0; cp unmounted shared; mount -o loop shared mounted; trap 'umount mounted' EXIT
        cp --reflink=always mounted/swapfile mounted/copy";
    run("bash", &["-c", script, text(folder.path())]);
    let shared = look(&std::fs::read(folder.path().join("shared")).unwrap(), ALL);
    assert_eq!(
        sum(&bytes_of(&shared, Reason::PageFile)),
        4 * MIB - 4096,
        "the other one: {:?}",
        shared.remarks
    );
    let is_left_alone = |bytes: &[u8], why: &str| {
        for wanted in [ALL, Wanted { swap: false, ..ALL }] {
            let found = look(bytes, wanted);
            assert_eq!(found.left_out, [], "{why}");
            assert!(found.remarks[0].what.contains(why), "{:?}", found.remarks);
        }
    };
    // A record behind one that has not arrived: others may have.
    let told = run("xfs_logprint", &["-t", text(&folder.path().join("unmounted"))]);
    let number = |name: &str| -> usize {
        let (_, told) = told.split_once(name).unwrap();
        told.split_whitespace().next().unwrap().parse().unwrap()
    };
    let behind = (number("daddr:") + number("head:") + 4) * 512;
    let mut bytes = made.unmounted.clone();
    bytes[behind..behind + 4].copy_from_slice(&1u32.to_be_bytes());
    is_left_alone(&bytes, "mounted and was not frozen");

    let mut bytes = made.unmounted;
    let header = bytes_of(&look(&bytes, ALL), Reason::PageFile)[0].start as usize - 10;
    assert_eq!(&bytes[header..header + 10], b"SWAPSPACE2");
    bytes[header..header + 9].copy_from_slice(b"S1SUSPEND");
    is_left_alone(&bytes, "hibernates");

    let image = folder.path().join("unmounted");
    let told = run("xfs_db", &["-r", "-c", "sb 0", "-c", "p features_incompat", text(&image)]);
    let told = told.trim().rsplit("0x").next().unwrap();
    let wants_repair = u32::from_str_radix(told, 16).unwrap() | 0x10;
    let set = format!("write features_incompat {wants_repair}");
    run("xfs_db", &["-x", "-c", "sb 0", "-c", &set, text(&image)]);
    is_left_alone(&std::fs::read(&image).unwrap(), "wants to be repaired");

    let mut bytes = make_old(folder.path());
    // The first group's tree: a run that is one block longer.
    let tree = u32::from_be_bytes(bytes[512 + 16..][..4].try_into().unwrap()) as usize * 4096;
    assert_eq!(&bytes[tree..tree + 6], b"ABTB\0\0", "a leaf");
    let count = usize::from(bytes[tree + 7]) + usize::from(bytes[tree + 6]) * 256;
    let last = tree + 16 + (count - 1) * 8;
    let start = u32::from_be_bytes(bytes[last..last + 4].try_into().unwrap());
    bytes[last..last + 4].copy_from_slice(&(start - 1).to_be_bytes());
    let len = u32::from_be_bytes(bytes[last + 4..last + 8].try_into().unwrap());
    bytes[last + 4..last + 8].copy_from_slice(&(len + 1).to_be_bytes());
    let found = look(&bytes, ALL);
    assert_eq!(found.left_out, []);
    assert!(found.remarks[0].what.contains("miscounts"), "{:?}", found.remarks);
    bytes[last..last + 4].copy_from_slice(&start.to_be_bytes());
    bytes[last + 4..last + 8].copy_from_slice(&len.to_be_bytes());
    bytes[126] = 1;
    is_left_alone(&bytes, "damaged");
    bytes[126] = 0;
    bytes[48..56].fill(0);
    is_left_alone(&bytes, "log is on another device");
}
