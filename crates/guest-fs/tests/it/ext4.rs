use crate::images::{ALL, MIB, blocks, bytes_of, look, look_flipped, run, sum, text, without};
use rempart_guest_fs::{Reason, Survey, Wanted};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

pub const SIZE: u64 = 96 * MIB;

/// A file system over old garbage, with files, a swap file among them, and space that was used and given back.
pub fn make(folder: &Path, options: &[&str]) -> Vec<u8> {
    let (image, files) = (folder.join("disk"), folder.join("files"));
    let _ = std::fs::remove_dir_all(&files);
    std::fs::create_dir_all(files.join("etc")).unwrap();
    for (name, bytes) in [("etc/hosts", 100), ("large", 9_000_000), ("given-back", 15_000_000)] {
        let content: Vec<u8> =
            (0..bytes).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        std::fs::write(files.join(name), content).unwrap();
    }
    let swap = files.join("swapfile");
    std::fs::write(&swap, vec![0xa5; 8 * MIB as usize]).unwrap();
    run("mkswap", &["-q", "-U", "clear", "-L", "swappy", text(&swap)]);
    // Zeroes would become a hole on the way into the file system.
    let mut header = std::fs::read(&swap).unwrap();
    header[..1024].fill(0xb0);
    header[2048..3072].fill(0xb0);
    std::fs::write(&swap, header).unwrap();
    std::fs::write(&image, vec![0x5a; SIZE as usize]).unwrap();
    run("mke2fs", &[&["-q", "-F", "-E", "nodiscard", "-d", text(&files)], options, &[text(&image)]].concat());
    run("debugfs", &["-w", "-R", "rm /given-back", text(&image)]);
    std::fs::read(&image).unwrap()
}

/// What its own programs call free, without the groups that nobody wrote to.
fn free_by_dumpe2fs(image: &Path, block: u64) -> BTreeSet<u64> {
    let mut free = BTreeSet::new();
    let mut is_written = false;
    for line in run("dumpe2fs", &[text(image)]).lines() {
        if line.starts_with("Group ") {
            is_written = !line.contains("BLOCK_UNINIT");
        }
        let Some(list) = line.trim().strip_prefix("Free blocks: ").filter(|_| is_written) else { continue };
        for run in list.split(", ").filter(|run| !run.is_empty()) {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            free.extend(first.parse::<u64>().unwrap()..=last.parse::<u64>().unwrap());
        }
    }
    assert!(!free.is_empty(), "blocks of {block}");
    free
}

/// What is left out is what its own programs call free, and without it every file is as it was.
#[test]
fn without_what_is_left_out_every_file_is_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (options, block) in [
        (&["-t", "ext4", "-b", "4096"][..], 4096),
        (&["-t", "ext4", "-b", "1024"], 1024),
        (&["-t", "ext4", "-O", "^metadata_csum,^64bit", "-b", "4096"], 4096),
        (&["-t", "ext4", "-O", "metadata_csum_seed", "-b", "4096"], 4096),
        (&["-t", "ext4", "-O", "^has_journal", "-g", "4096", "-b", "4096"], 4096),
        (&["-t", "ext4", "-O", "^flex_bg", "-I", "128", "-b", "4096"], 4096),
    ] {
        let bytes = make(folder, options);
        let found = look(&bytes, ALL);
        assert_eq!(found.remarks, [], "{options:?}");
        let free = bytes_of(&found, Reason::FreeSpace);
        assert_eq!(blocks(&free, block), free_by_dumpe2fs(&folder.join("disk"), block), "{options:?}");
        let swap = bytes_of(&found, Reason::PageFile);
        assert_eq!(sum(&swap), 8 * MIB - 4096, "{options:?}: all but its header");

        assert_restored(folder, &without(&found, bytes));
    }
}

/// Its files are as they were when [`make`] made it, and its programs are content.
pub fn assert_restored(folder: &Path, restored: &[u8]) {
    let (image, out) = (folder.join("restored"), folder.join("out"));
    std::fs::write(&image, restored).unwrap();
    run("e2fsck", &["-fn", text(&image)]);
    for file in ["etc/hosts", "large"] {
        run("debugfs", &["-R", &format!("dump /{file} {}", text(&out)), text(&image)]);
        assert!(
            std::fs::read(&out).unwrap() == std::fs::read(folder.join("files").join(file)).unwrap(),
            "{file}"
        );
    }
    run("debugfs", &["-R", &format!("dump /swapfile {}", text(&out)), text(&image)]);
    assert!(run("swaplabel", &[text(&out)]).contains("swappy"), "the guest finds its swap file again");
}

#[test]
fn only_what_was_asked_for_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = make(folder.path(), &["-t", "ext4", "-b", "4096"]);
    let only = |swap, free_space| look(&bytes, Wanted { swap, free_space, is_quiet: false });
    assert_eq!(sum(&bytes_of(&only(true, false), Reason::FreeSpace)), 0);
    assert!(sum(&bytes_of(&only(true, false), Reason::PageFile)) > 0);
    assert_eq!(sum(&bytes_of(&only(false, true), Reason::PageFile)), 0);
    assert!(sum(&bytes_of(&only(false, true), Reason::FreeSpace)) > 0);
    assert_eq!(only(false, false), Survey::default());
}

#[test]
fn a_journal_that_is_not_empty_is_the_truth_and_nothing_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    for (options, spoil, why) in [
        (&["-t", "ext4"][..], "feature needs_recovery", "mounted and was not frozen"),
        (&["-t", "ext4", "-O", "^has_journal"], "ssv state 0", "mounted and was not frozen"),
        (&["-t", "ext4"], "ssv state 3", "with errors"),
    ] {
        make(folder.path(), options);
        let image = folder.path().join("disk");
        run("debugfs", &["-w", "-R", spoil, text(&image)]);
        let found = look(&std::fs::read(&image).unwrap(), ALL);
        assert_eq!(found.left_out, [], "{spoil}");
        assert!(found.remarks[0].what.contains(why), "{spoil}: {:?}", found.remarks);
    }
}

#[test]
fn where_a_machine_hibernates_nothing_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = make(folder.path(), &["-t", "ext4", "-b", "4096"]);
    let start = bytes_of(&look(&bytes, ALL), Reason::PageFile)[0].start as usize;
    assert_eq!(&bytes[start - 10..start], b"SWAPSPACE2");
    bytes[start - 10..start - 1].copy_from_slice(b"S1SUSPEND");
    for wanted in [ALL, Wanted { swap: false, ..ALL }] {
        let found = look(&bytes, wanted);
        assert_eq!(found.left_out, []);
        assert!(found.remarks[0].what.contains("hibernates"), "{:?}", found.remarks);
    }
}

/// With checksums, whatever single bit is wrong, no block that a file has is left out.
#[test]
fn a_flipped_bit_costs_space_and_never_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = make(folder.path(), &["-t", "ext4", "-b", "4096"]);
    let sound = look(&bytes, ALL);
    let is_known = |range: &Range<u64>| {
        sound.left_out.iter().any(|known| known.range.start <= range.start && range.end <= known.range.end)
    };
    let mut random = 88_172_645_463_325_252u64;
    let groups = run("dumpe2fs", &[text(&folder.path().join("disk"))]);
    let (_, told) = groups.split_once("Block bitmap at ").expect("it has a bitmap");
    let bitmap =
        told.split(' ').next().and_then(|block| block.parse::<usize>().ok()).expect("a block") * 4096;
    let mut refused = 0;
    for _ in 0..1500 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // The superblock and the descriptors, or the one group's bitmap.
        let places = if random >> 32 & 1 == 0 { 1024..4096 + 64 } else { bitmap..bitmap + 4096 };
        let (at, bit) = (places.start + (random >> 8) as usize % places.len(), random & 7);
        let found = look_flipped(&bytes, at, 1 << bit);
        refused += usize::from(!found.remarks.is_empty());
        assert!(found.left_out.iter().all(|one| is_known(&one.range)), "byte {at}, bit {bit}");
    }
    assert!(refused > 1000, "{refused} of 1500 were noticed: the flips are where it matters");
}
