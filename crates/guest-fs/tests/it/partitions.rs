use crate::images::{ALL, MIB, bytes_of, look, look_flipped, run, run_with_input, text};
use rempart_guest_fs::{Reason, Survey};
use std::path::Path;

/// A disk with partitions by `script`, of which partition `number` (from MiB `start`) is swap of 16 MiB.
fn make(folder: &Path, script: &str, start: u64) -> Vec<u8> {
    let (disk, swap) = (folder.join("disk"), folder.join("swap"));
    std::fs::write(&disk, vec![0; 64 * MIB as usize]).unwrap();
    run_with_input("sfdisk", &["-q", text(&disk)], script);
    std::fs::write(&swap, vec![7; 16 * MIB as usize]).unwrap();
    run("mkswap", &["-q", text(&swap)]);
    let mut bytes = std::fs::read(&disk).unwrap();
    let swap = std::fs::read(&swap).unwrap();
    bytes[(start * MIB) as usize..][..swap.len()].copy_from_slice(&swap);
    bytes
}

const GPT: &str = "label: gpt\nstart=1MiB, size=8MiB\nstart=16MiB, size=16MiB, type=S\n";
const LOGICAL: &str = "label: dos\nstart=1MiB, size=8MiB\nstart=10MiB, type=E\nstart=11MiB, size=2MiB\nstart=16MiB, size=16MiB, type=S\n";

#[test]
fn a_swap_partition_is_left_out_but_for_what_it_is_found_by() {
    let folder = tempfile::tempdir().unwrap();
    for script in [GPT, LOGICAL, "label: dos\nstart=1MiB, size=8MiB\nstart=16MiB, size=16MiB, type=S\n"] {
        let bytes = make(folder.path(), script, 16);
        let found = look(&bytes, ALL);
        assert_eq!(bytes_of(&found, Reason::Swap), vec![16 * MIB + 4096..32 * MIB], "{script}: {found:?}");
        assert_eq!(found.remarks, []);
    }
}

#[test]
fn a_whole_disk_may_be_swap_or_nothing_known() {
    let folder = tempfile::tempdir().unwrap();
    let swap = make(folder.path(), GPT, 16)[16 * MIB as usize..32 * MIB as usize].to_vec();
    assert_eq!(bytes_of(&look(&swap, ALL), Reason::Swap), vec![4096..16 * MIB]);
    for bytes in [vec![], vec![0; 512], vec![0; MIB as usize], vec![0xff; MIB as usize]] {
        let found = look(&bytes, ALL);
        assert_eq!(found.left_out, [], "{} bytes", bytes.len());
    }
}

/// Volumes of Windows' dynamic disks begin in one place and may go on in another.
#[test]
fn dynamic_disks_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    for script in [
        "label: dos\nstart=16MiB, size=16MiB, type=42\n",
        "label: gpt\nstart=16MiB, size=16MiB, type=AF9B60A0-1431-4F62-BC68-3311714A69AD\n",
    ] {
        let found = look(&make(folder.path(), script, 16), ALL);
        assert_eq!(found.left_out, [], "{script}");
        assert!(found.remarks[0].what.contains("dynamic disk"), "{script}: {:?}", found.remarks);
    }
}

#[test]
fn one_sleeping_swap_partition_keeps_all_of_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let script = "label: gpt\nstart=1MiB, size=14MiB, type=S\nstart=16MiB, size=16MiB, type=S\n";
    let mut bytes = make(folder.path(), script, 16);
    let swap = bytes[16 * MIB as usize..17 * MIB as usize].to_vec();
    bytes[MIB as usize..][..MIB as usize].copy_from_slice(&swap);
    bytes[16 * MIB as usize + 4086..][..9].copy_from_slice(b"S1SUSPEND");
    let found = look(&bytes, ALL);
    assert_eq!(found.left_out, []);
    assert!(found.remarks[0].what.starts_with("partition 2: a machine hibernates"), "{:?}", found.remarks);
}

#[test]
fn a_damaged_table_leaves_nothing_out() {
    let folder = tempfile::tempdir().unwrap();
    for (script, ends) in [(GPT, 17 * 1024), (LOGICAL, 512)] {
        let bytes = make(folder.path(), script, 16);
        let sound = look(&bytes, ALL);
        for at in 440..ends {
            let found = look_flipped(&bytes, at, 0x55);
            // A partition of another size, or elsewhere, holds no swap space that fits it.
            let is_sound = found.left_out.iter().all(|one| {
                let range = &one.range;
                sound
                    .left_out
                    .iter()
                    .any(|known| known.range.start <= range.start && range.end <= known.range.end)
            });
            assert!(is_sound, "{script}: byte {at}: {found:?}");
        }
    }
    let mut circle = make(folder.path(), LOGICAL, 16);
    // The first logical partition's table, at 10 MiB, names itself as the next.
    circle[10 * MIB as usize + 446 + 16 + 8..][..4].fill(0);
    let found: Survey = look(&circle, ALL);
    assert!(found.remarks[0].what.contains("circle"), "{:?}", found.remarks);
}
