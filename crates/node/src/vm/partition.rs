//! Does a disk hold what its partition table promises? A truncated copy of an image must not be taken for the disk.
//!
//! MBR: four entries at byte 446, start and length in sectors, little-endian (UEFI 2.10, 5.2.1).
//! GPT: header in sector 1, "EFI PART", last usable sector at byte 48 (UEFI 2.10, 5.3.2).

/// Bytes from the start of the disk that [`required_bytes`] wants to see.
pub const HEAD_BYTES: usize = 1024;

const SECTOR: u64 = 512;

/// The size that the table in `head` needs at least; `None` without a table. Extended partitions are counted by
/// their outer entry.
pub fn required_bytes(head: &[u8]) -> Option<u64> {
    if head.len() < 512 || head[510..512] != [0x55, 0xaa] {
        return None;
    }
    let entries: Vec<&[u8]> = (0..4).map(|i| &head[446 + 16 * i..462 + 16 * i]).collect();
    if entries.iter().any(|entry| entry[4] == 0xee) {
        let header = head.get(512..1024)?;
        if &header[..8] != b"EFI PART" {
            return None;
        }
        let last_usable = u64::from_le_bytes(header[48..56].try_into().expect("eight bytes"));
        return last_usable.checked_add(1)?.checked_mul(SECTOR);
    }
    // A boot sector of a file system carries the same signature; a real entry is active or not, and has a type.
    if entries.iter().any(|entry| entry[0] & 0x7f != 0) {
        return None;
    }
    let word = |bytes: &[u8]| u64::from(u32::from_le_bytes(bytes.try_into().expect("four bytes")));
    let end = |entry: &&[u8]| (word(&entry[8..12]) + word(&entry[12..16])) * SECTOR;
    entries.iter().filter(|entry| entry[4] != 0 && word(&entry[12..16]) != 0).map(end).max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mbr(kind: u8, start: u32, sectors: u32) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[450] = kind;
        head[454..458].copy_from_slice(&start.to_le_bytes());
        head[458..462].copy_from_slice(&sectors.to_le_bytes());
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        head
    }

    #[test]
    fn the_end_of_the_last_partition_counts() {
        assert_eq!(required_bytes(&mbr(0x83, 2048, 4096)), Some(6144 * 512));
        assert_eq!(required_bytes(&vec![0; HEAD_BYTES]), None);
        let mut gpt = mbr(0xee, 1, u32::MAX);
        gpt[512..520].copy_from_slice(b"EFI PART");
        gpt[560..568].copy_from_slice(&9999u64.to_le_bytes());
        assert_eq!(required_bytes(&gpt), Some(10_000 * 512));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_fall_over(head in proptest::collection::vec(any::<u8>(), 0..HEAD_BYTES + 1)) {
            required_bytes(&head);
        }
    }
}
