//! A record: 4 KiB that prove their own number, their integrity and which record came before.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `RMPTREC1` |
//! | 8 | 8 | sequence, from 1 |
//! | 16 | 8 | nonce of the boot that wrote it |
//! | 24 | 8 | guest uptime, ms |
//! | 32 | 4 | checksum of record `sequence − 1` |
//! | 36 | 4 | checksum: CRC-32 of the whole record with this field zero |
//! | 40 | 4056 | filler that depends on sequence and nonce |
//!
//! Integers are little-endian. The chain of checksums makes the records one history: two copies that hold records of
//! different histories cannot both look right.

/// Size of a record and of its slot on disk.
pub const RECORD_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"RMPTREC1";
const CHECKSUM_AT: usize = 36;
const HEADER_BYTES: usize = 40;

/// What a record says, without its filler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    pub sequence: u64,
    pub boot_nonce: u64,
    pub uptime_ms: u64,
    pub previous_checksum: u32,
    pub checksum: u32,
}

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// All zeroes: never written.
    Empty,
    Valid(Record),
    /// Not zero and not a record: torn, rotten or foreign. Carries the sequence the bytes claim.
    Damaged {
        claimed_sequence: u64,
    },
}

impl Slot {
    pub fn record(self) -> Option<Record> {
        match self {
            Slot::Valid(record) => Some(record),
            _ => None,
        }
    }
}

/// Writes record `sequence` into `slot` and returns its checksum.
pub fn encode(
    slot: &mut [u8],
    sequence: u64,
    boot_nonce: u64,
    uptime_ms: u64,
    previous_checksum: u32,
) -> u32 {
    assert_eq!(slot.len(), RECORD_BYTES);
    slot[0..8].copy_from_slice(MAGIC);
    slot[8..16].copy_from_slice(&sequence.to_le_bytes());
    slot[16..24].copy_from_slice(&boot_nonce.to_le_bytes());
    slot[24..32].copy_from_slice(&uptime_ms.to_le_bytes());
    slot[32..36].copy_from_slice(&previous_checksum.to_le_bytes());
    let mut state = sequence.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ boot_nonce | 1;
    for word in slot[HEADER_BYTES..].chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    let checksum = checksum_of(slot);
    slot[CHECKSUM_AT..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
    checksum
}

/// Reads a slot; every bit of it counts.
pub fn decode(slot: &[u8]) -> Slot {
    assert_eq!(slot.len(), RECORD_BYTES);
    if slot.iter().all(|byte| *byte == 0) {
        return Slot::Empty;
    }
    let sequence = le64(slot, 8);
    let checksum = le32(slot, CHECKSUM_AT);
    if &slot[0..8] != MAGIC || checksum_of(slot) != checksum {
        return Slot::Damaged { claimed_sequence: sequence };
    }
    Slot::Valid(Record {
        sequence,
        boot_nonce: le64(slot, 16),
        uptime_ms: le64(slot, 24),
        previous_checksum: le32(slot, 32),
        checksum,
    })
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// CRC-32 (IEEE) of a record, its checksum field taken as zero.
fn checksum_of(slot: &[u8]) -> u32 {
    let crc = crc32(!0, &slot[..CHECKSUM_AT]);
    let crc = crc32(crc, &[0; 4]);
    !crc32(crc, &slot[HEADER_BYTES..])
}

fn crc32(mut crc: u32, bytes: &[u8]) -> u32 {
    for byte in bytes {
        crc = CRC_TABLE[((crc ^ u32::from(*byte)) & 0xFF) as usize] ^ (crc >> 8);
    }
    crc
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { 0xEDB8_8320 ^ (crc >> 1) } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_agrees_with_the_published_check_value() {
        assert_eq!(!crc32(!0, b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn a_record_reads_back_and_any_flipped_bit_shows() {
        let mut slot = vec![0; RECORD_BYTES];
        let checksum = encode(&mut slot, 7, 0xABCD, 1234, 99);
        assert_eq!(
            decode(&slot),
            Slot::Valid(Record {
                sequence: 7,
                boot_nonce: 0xABCD,
                uptime_ms: 1234,
                previous_checksum: 99,
                checksum
            })
        );
        for at in [0, 9, 17, 25, 33, CHECKSUM_AT, HEADER_BYTES, RECORD_BYTES - 1] {
            slot[at] ^= 1;
            assert!(matches!(decode(&slot), Slot::Damaged { .. }), "flipped bit in byte {at} was missed");
            slot[at] ^= 1;
        }
        assert_eq!(decode(&[0; RECORD_BYTES]), Slot::Empty);
    }
}
