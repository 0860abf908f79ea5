//! Entry points for fuzzers and the replay of their corpora: any bytes, no panic, bounded memory, and nothing is said to lie
//! where there is nothing.
//!
//! The library that reads NTFS is not asked: what it does with damage ends its process.

use crate::disk::{Disk, Section};
use crate::files::{FileSystemKind, Kind, open};
use crate::lvm::{self, Physical};
use crate::{Wanted, survey, volumes};
use std::io;
use std::ops::Range;

/// Disks are this long, whatever is on them.
const LEN: u64 = 32 << 20;
const MOST_FILES: usize = 100;

/// Bytes, and zeroes behind them; and so many zeroes behind the first 4 KiB.
struct Padded<'a>(&'a [u8], u64);

const HEAD: u64 = 4096;

impl Disk for Padded<'_> {
    fn len(&self) -> u64 {
        LEN
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        for (at, byte) in (offset..).zip(buffer) {
            let place =
                if at < HEAD { Some(at) } else { at.checked_sub(self.1).filter(|place| *place >= HEAD) };
            *byte = place.and_then(|place| self.0.get(place as usize)).copied().unwrap_or(0);
        }
        Ok(())
    }
}

/// A file system, of the kind that the first byte says; the next two tell the KiB of zeroes.
///
/// # Panics
/// If a file is said to lie outside of it.
pub fn guest_files(data: &[u8]) {
    let [kind, low, high, data @ ..] = data else { return };
    let kinds = [FileSystemKind::Ext4, FileSystemKind::Fat, FileSystemKind::ExFat, FileSystemKind::Xfs];
    let disk = Padded(data, u64::from(u16::from_le_bytes([*low, *high])) << 10);
    look(&disk, std::slice::from_ref(&(0..LEN)));
    let Ok(mut fs) = open(Section::whole(&disk), kinds[usize::from(*kind) % kinds.len()]) else { return };
    let mut next = vec![fs.root()];
    for _ in 0..MOST_FILES {
        let Some(file) = next.pop() else { break };
        let _ = fs.extended(file);
        match fs.attributes(file).map(|attributes| attributes.kind) {
            Ok(Kind::Folder) => {
                next.extend(fs.list(file).unwrap_or_default().iter().take(MOST_FILES).map(|name| name.file));
            }
            Ok(Kind::File) => {
                if let Ok(content) = fs.content(file) {
                    assert!(content.size > i64::MAX as u64 || content.is_sound(LEN), "{content:?}");
                }
            }
            Ok(Kind::Link) => {
                let _ = fs.target(file);
            }
            _ => {}
        }
    }
}

/// What these disks may be without.
fn look(disk: &Padded<'_>, disks: &[Range<u64>]) {
    if disk.0.windows(4).any(|bytes| bytes == b"NTFS") {
        return;
    }
    let wanted = Wanted { swap: true, free_space: true, is_quiet: true };
    let found = survey(disk, disks, wanted).expect("memory can be read");
    assert!(found.left_out.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start), "{found:?}");
    assert!(found.left_out.iter().all(|one| one.range.start < one.range.end && one.range.end <= LEN));
}

/// Two disks, each a half: partition tables, and what LVM says of itself.
///
/// # Panics
/// If a volume is said to lie outside of them.
pub fn guest_volumes(data: &[u8]) {
    let disk = Padded(data, 0);
    let found = volumes(&disk, &[0..LEN / 2, LEN / 2..LEN], 0).expect("memory can be read");
    for map in found.into_iter().filter_map(|volume| volume.map) {
        assert!(map.is_sound(LEN), "{map:?}");
    }
    look(&disk, &[0..LEN / 2, LEN / 2..LEN]);
    // The same as a group's text, which else a checksum is before.
    let physical = [Physical::saying(String::from_utf8_lossy(data).into_owned(), LEN)];
    for map in lvm::logical(&physical, LEN).into_iter().filter_map(|volume| volume.map.ok()) {
        assert!(map.is_sound(LEN), "{map:?}");
    }
}

#[cfg(test)]
mod tests {
    //! What fuzzers found worth keeping, again on every build, and a few changes of each.

    use super::*;
    use FileSystemKind::{ExFat, Ext4, Fat, Xfs};

    const MUTATIONS: u64 = 100;

    fn replay(target: &str, entry: fn(&[u8])) {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/");
        let mut inputs = 0;
        let mut random = 88_172_645_463_325_252u64;
        let mut draw = |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as usize % below.max(1)
        };
        for file in std::fs::read_dir(format!("{folder}{target}")).expect("the corpus is there") {
            let path = file.expect("the folder can be read").path();
            println!("{}", path.display());
            let input = std::fs::read(&path).expect("the file can be read");
            entry(&input);
            // What is all zeroes is changed seldom.
            let used: Vec<usize> = (0..input.len()).filter(|at| input[*at] != 0).collect();
            for _ in 0..MUTATIONS {
                let mut changed = input.clone();
                for _ in 0..=draw(4) {
                    let at =
                        used.get(draw(used.len())).map_or(0, |at| at + draw(3)).min(changed.len().max(1) - 1);
                    if let Some(byte) = changed.get_mut(at) {
                        *byte = if draw(2) == 0 { *byte ^ 1 << draw(8) } else { draw(256) as u8 };
                    }
                }
                entry(&changed);
            }
            inputs += 1;
        }
        assert!(inputs > 0, "no corpus for {target}");
    }

    /// Else nothing behind the first look is asked.
    #[test]
    fn the_corpus_opens() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/guest_files/");
        let read = |name: &str| std::fs::read(format!("{folder}{name}")).expect("the file can be read");
        for (name, kind) in
            [("ext2", Ext4), ("ext4", Ext4), ("fat12", Fat), ("exfat", ExFat), ("xfs4", Xfs), ("xfs5", Xfs)]
        {
            let data = read(name);
            let gap = u64::from(u16::from_le_bytes([data[1], data[2]])) << 10;
            let disk = Padded(&data[3..], gap);
            let mut fs = open(Section::whole(&disk), kind).expect("it opens");
            let root = fs.root();
            let names = fs.list(root).expect("a folder");
            assert!(names.len() > 1, "{name}: {names:?}");
        }
        let text = std::fs::read_to_string(format!("{folder}../guest_volumes/text")).expect("a text");
        for (len, sound) in [(1 << 40, 1), (4 << 20, 0)] {
            let found = lvm::logical(&[Physical::saying(text.clone(), len)], 1 << 40);
            let is_sound = found.iter().filter(|volume| volume.map.is_ok()).count();
            assert_eq!(is_sound, sound, "on a physical volume of {len} bytes: {found:?}");
        }
    }

    #[test]
    fn guest_files_corpus() {
        replay("guest_files", super::guest_files);
    }

    #[test]
    fn guest_volumes_corpus() {
        replay("guest_volumes", super::guest_volumes);
    }
}
