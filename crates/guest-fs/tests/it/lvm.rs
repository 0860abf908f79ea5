//! Logical volumes on two disks, by LVM's own programs.

use crate::ext4::{self, SIZE};
use crate::images::{ALL, MIB, bytes_of, look, look_at_disks, run, sum, text, without};
use rempart_guest_fs::Reason;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

const EXTENT: u64 = 4 * MIB;
const STRIPE: u64 = 64 << 10;
/// A physical volume on all of the first disk, and one in a partition of the second.
const DISKS: [u64; 2] = [160 * MIB, 100 * MIB];
const PARTITION: u64 = 8 * MIB;

/// Where extent `extent` of a physical volume lies, on both disks counted as one.
fn place(physical: usize, extent: u64) -> u64 {
    [MIB, DISKS[0] + PARTITION + MIB][physical] + extent * EXTENT
}

/// Of 24 extents, the first 20 on one physical volume.
fn root(at: u64) -> u64 {
    let extent = at / EXTENT;
    at % EXTENT + if extent < 20 { place(0, extent) } else { place(1, extent - 20 + 2) }
}

/// Of 6 extents, in turns.
fn striped(at: u64) -> u64 {
    let (stripe, within) = (at / STRIPE, at % STRIPE);
    let physical = (stripe % 2) as usize;
    place(physical, [30, 8][physical]) + stripe / 2 * STRIPE + within
}

fn swap(at: u64) -> u64 {
    place(0, 24) + at
}

fn pieces(size: u64) -> impl Iterator<Item = Range<usize>> {
    (0..size / STRIPE).map(|piece| (piece * STRIPE) as usize..((piece + 1) * STRIPE) as usize)
}

fn put(disks: &mut [u8], volume: &[u8], place: fn(u64) -> u64) {
    for piece in pieces(volume.len() as u64) {
        disks[place(piece.start as u64) as usize..][..piece.len()].copy_from_slice(&volume[piece]);
    }
}

fn get(disks: &[u8], size: u64, place: fn(u64) -> u64) -> Vec<u8> {
    pieces(size)
        .flat_map(|piece| &disks[place(piece.start as u64) as usize..][..piece.len()])
        .copied()
        .collect()
}

fn swap_space(folder: &Path, size: u64) -> Vec<u8> {
    let image = folder.join("swap");
    std::fs::write(&image, vec![0xa5; size as usize]).unwrap();
    run("mkswap", &["-q", "-f", text(&image)]);
    std::fs::read(&image).unwrap()
}

/// Both disks, one behind the other: a file system that goes on from one to the other, swap on one, and on both in turns.
fn make(folder: &Path, more: &str) -> Vec<u8> {
    let names = ["disk0", "disk1"].map(|name| folder.join(name));
    for (name, size) in names.iter().zip(DISKS) {
        let _ = std::fs::remove_file(name);
        File::create(name).unwrap().set_len(size).unwrap();
    }
    let [one, other] = names.each_ref().map(|name| text(name));
    // This kernel need not know of logical volumes.
    let script = format!(
        "set -e; export LVM_SUPPRESS_FD_WARNINGS=1
        printf 'label: gpt\\nstart=8MiB, size=88MiB\\n' | sfdisk -q {other}
        one=$(losetup -f --show {one}); trap 'losetup -d $one' EXIT
        other=$(losetup -f --show -o {PARTITION} --sizelimit {} {other}); trap 'losetup -d $one $other' EXIT
        only=\"--devices $one,$other\"; off='--driverloaded n -y -an -Zn -Wn'
        pvcreate -q $only $one $other; vgcreate -q $only vg $one $other
        lvcreate $only $off -l 20 -n root vg $one:0-19; lvextend $only --driverloaded n -l +4 vg/root $other:2-5
        lvcreate $only $off -l 4 -n swap vg $one:24-27
        lvcreate $only $off -i 2 -I 64k -l 6 -n striped vg $one:30-32 $other:8-10
        {more}",
        88 * MIB
    );
    run("bash", &["-c", &script]);
    let mut disks: Vec<u8> = names.iter().flat_map(|name| std::fs::read(name).unwrap()).collect();
    put(&mut disks, &ext4::make(folder, &["-t", "ext4", "-b", "4096"]), root);
    put(&mut disks, &swap_space(folder, 16 * MIB), swap);
    put(&mut disks, &swap_space(folder, 24 * MIB), striped);
    disks
}

#[test]
fn what_logical_volumes_can_do_without_is_found_on_all_their_disks() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let disks = make(folder, "");
    let found = look_at_disks(&disks, &DISKS, ALL);
    assert_eq!(found.remarks, []);
    let alone = look(&get(&disks, SIZE, root), ALL);
    for reason in [Reason::FreeSpace, Reason::PageFile] {
        assert_eq!(sum(&bytes_of(&found, reason)), sum(&bytes_of(&alone, reason)), "{reason:?}");
    }
    assert_eq!(sum(&bytes_of(&found, Reason::Swap)), 40 * MIB - 2 * 4096, "all but two headers");
    assert!(found.left_out.iter().any(|one| one.range.start >= DISKS[0]), "on both disks");

    let restored = without(&found, disks.clone());
    ext4::assert_restored(folder, &get(&restored, SIZE, root));
    for (place, size) in [(swap as fn(u64) -> u64, 16 * MIB), (striped, 24 * MIB)] {
        let (before, after) = (get(&disks, size, place), get(&restored, size, place));
        assert!(before[..4096] == after[..4096] && after[4096..].iter().all(|byte| *byte == 0));
    }
    // As of a machine whose second disk is not backed up.
    let half = look_at_disks(&disks[..DISKS[0] as usize], &DISKS[..1], ALL);
    assert_eq!(sum(&bytes_of(&half, Reason::Swap)), 16 * MIB - 4096);
    assert_eq!(half.left_out.len(), 1, "{:?}", half.left_out);
    let told = &half.remarks[0];
    assert_eq!((told.disk, half.remarks.len()), (None, 2));
    let why =
        "vg-root: a logical volume with a part on a disk that is not in the point: all of it is backed up";
    assert_eq!(told.what, why);
}

/// A snapshot shows what its origin has given away, as long as nobody writes over it.
#[test]
fn the_origin_of_a_snapshot_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    // Without a kernel that knows of them no snapshot is made: its group is written as LVM writes it, and read back.
    let more = "vgcfgbackup -q $only -f $PWD/group vg
        sed -i -e 's/\\tlogical_volumes {/&\\n\\t\\tsnapshot0 {\\nid = \"snapsh-ot00-0000-0000-0000-0000-000000\"\\nstatus = [\"READ\", \"WRITE\"]\\n\
        segment_count = 1\\nsegment1 {\\nstart_extent = 0\\nextent_count = 24\\ntype = \"snapshot\"\\n\
        chunk_size = 8\\norigin = \"root\"\\ncow_store = \"striped\"\\n}\\n}\\n/' $PWD/group
        vgcfgrestore -q --driverloaded n $only -f $PWD/group vg; rm $PWD/group";
    let disks = make(folder.path(), &format!("cd {}; {more}", text(folder.path())));
    let found = look_at_disks(&disks, &DISKS, ALL);
    assert_eq!(sum(&bytes_of(&found, Reason::Swap)), 16 * MIB - 4096, "what has no snapshot");
    assert_eq!(found.left_out.len(), 1, "{:?}", found.left_out);
    let why = "vg-root: a logical volume that others are made of: all of it is backed up";
    assert_eq!((found.remarks.len(), &found.remarks[0].what[..]), (1, why));
}

#[test]
fn a_machine_that_sleeps_in_a_logical_volume_keeps_all_disks() {
    let folder = tempfile::tempdir().unwrap();
    let mut disks = make(folder.path(), "");
    let header = swap(0) as usize + 4086;
    assert_eq!(&disks[header..header + 10], b"SWAPSPACE2");
    disks[header..header + 9].copy_from_slice(b"S1SUSPEND");
    let found = look_at_disks(&disks, &DISKS, ALL);
    assert_eq!(found.left_out, []);
    let why = "vg-swap: a machine hibernates in this swap space: all of the machine is backed up";
    assert_eq!((found.remarks.len(), &found.remarks[0].what[..]), (1, why));
}

/// Two disks that say that they are the same: nobody knows which of them the guest uses.
#[test]
fn a_copy_of_a_disk_of_a_group_makes_it_nobodys() {
    let folder = tempfile::tempdir().unwrap();
    let disks = make(folder.path(), "");
    let three = [&disks[..], &disks[..DISKS[0] as usize]].concat();
    let found = look_at_disks(&three, &[DISKS[0], DISKS[1], DISKS[0]], ALL);
    assert_eq!(found.left_out, []);
    assert!(found.remarks.iter().all(|told| told.what.contains("there twice")), "{:?}", found.remarks);
}

/// What took the place of a file system does not always take away what it began with.
#[test]
fn a_file_system_that_something_else_was_put_over_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = ext4::make(folder.path(), &["-t", "ext4", "-b", "4096"]);
    assert!(look(&bytes, ALL).left_out.len() > 1);
    let len = bytes.len();
    let raid = b"\xfc\x4e\x2b\xa9";
    for (at, sign, what) in [
        (0, &b"LUKS\xba\xbe"[..], "LUKS"),
        (4096, raid, "RAID"),
        (len - 8192, raid, "RAID"),
        (len - 65536, raid, "RAID"),
        (0x1_0040, b"_BHRfS_M", "Btrfs"),
        (0, b"XFSB", "an ext4 and an XFS"),
        (0x4000, b"\x01\x01\0\0\0\0\0\0\0\0\0\x01", "ZFS"),
        (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcache"),
    ] {
        let mut bytes = bytes.clone();
        bytes[at..at + sign.len()].copy_from_slice(sign);
        let found = look(&bytes, ALL);
        assert_eq!(found.left_out, [], "{what} at {at}");
        assert!(found.remarks[0].what.contains(what), "{what} at {at}: {:?}", found.remarks);
    }
    // A disk of a machine inside of the machine, in one of its partitions.
    let (image, disk) = (folder.path().join("disk"), folder.path().join("whole"));
    std::fs::write(&image, &bytes).unwrap();
    run(
        "bash",
        &["-c", "printf 'label: dos\nstart=1MiB, size=8MiB\n' | sfdisk -q --wipe never $0", text(&image)],
    );
    File::create(&disk).unwrap().set_len(110 * MIB).unwrap();
    run("bash", &["-c", "printf 'label: gpt\nstart=1MiB, size=96MiB\n' | sfdisk -q $0", text(&disk)]);
    let file = File::options().write(true).open(&disk).unwrap();
    file.write_all_at(&std::fs::read(&image).unwrap(), MIB).unwrap();
    let found = look(&std::fs::read(&disk).unwrap(), ALL);
    assert_eq!(found.left_out, []);
    assert!(found.remarks[0].what.contains("partitions of its own"), "{:?}", found.remarks);
}
