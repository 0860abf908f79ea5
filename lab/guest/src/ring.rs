//! Records lie in a ring of slots: record n in slot (n − 1) mod slots.

use crate::record::Record;

/// Slot of a record.
pub fn slot_of(sequence: u64, slots: u64) -> u64 {
    assert!(sequence >= 1 && slots >= 1);
    (sequence - 1) % slots
}

/// Finds the newest record of a ring in O(log slots) reads.
///
/// Writing goes round: slots up to the newest record hold the current lap, the rest the lap before or nothing.
/// `read` gives the valid record of a slot. A ring with damage may yield an older record, which the caller's checks
/// against the other disk and against what was acknowledged then expose.
pub fn newest<E>(
    slots: u64,
    mut read: impl FnMut(u64) -> Result<Option<Record>, E>,
) -> Result<Option<Record>, E> {
    let Some(first) = read(0)? else { return Ok(None) };
    let mut newest = first;
    let (mut known, mut beyond) = (0, slots);
    while beyond - known > 1 {
        let middle = known + (beyond - known) / 2;
        match read(middle)? {
            Some(record) if record.sequence == first.sequence + middle => {
                newest = record;
                known = middle;
            }
            _ => beyond = middle,
        }
    }
    Ok(Some(newest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(slots: u64, written: u64) -> Vec<Option<Record>> {
        let mut ring = vec![None; slots as usize];
        for sequence in 1..=written {
            ring[slot_of(sequence, slots) as usize] =
                Some(Record { sequence, boot_nonce: 1, uptime_ms: 0, previous_checksum: 0, checksum: 0 });
        }
        ring
    }

    #[test]
    fn the_newest_record_is_found_at_every_fill_and_lap() {
        for slots in 1..12 {
            for written in 0..40 {
                let ring = ring(slots, written);
                let found = newest(slots, |slot| Ok::<_, ()>(ring[slot as usize])).unwrap();
                assert_eq!(found.map_or(0, |record| record.sequence), written, "{slots} slots");
            }
        }
    }
}
