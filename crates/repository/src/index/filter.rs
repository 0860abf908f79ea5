//! A small set in memory that may say yes for a chunk that is not there, but never no for one that is.
//!
//! A blocked Bloom filter: all bits of an id lie in one line of the processor's cache. Ids are hashes already, so their own
//! bits choose.

/// Bits for each entry: about 1 in 80 new chunks are looked for in vain.
const BITS: u64 = 10;
/// Bits set for each entry.
const PROBES: u32 = 6;
/// Bytes of a line.
pub(super) const LINE: usize = 64;

pub(super) struct Filter {
    bytes: Vec<u8>,
}

impl Filter {
    /// For so many entries.
    pub fn new(entries: u64) -> Filter {
        Filter { bytes: vec![0; Filter::size(entries) as usize] }
    }

    /// Bytes of a filter for so many entries.
    pub fn size(entries: u64) -> u64 {
        (entries * BITS).div_ceil(8 * LINE as u64) * LINE as u64
    }

    pub fn from_bytes(bytes: Vec<u8>) -> Filter {
        assert!(bytes.len().is_multiple_of(LINE), "a filter is made of lines");
        Filter { bytes }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn insert(&mut self, id: &[u8; 16]) {
        let line = self.line(id);
        for bit in bits(id) {
            self.bytes[line + bit / 8] |= 1 << (bit % 8);
        }
    }

    pub fn may_hold(&self, id: &[u8; 16]) -> bool {
        if self.bytes.is_empty() {
            return false;
        }
        let line = self.line(id);
        bits(id).all(|bit| self.bytes[line + bit / 8] & 1 << (bit % 8) != 0)
    }

    /// Where the line of an id begins.
    fn line(&self, id: &[u8; 16]) -> usize {
        let [chosen, _] = halves(id);
        let lines = (self.bytes.len() / LINE) as u128;
        ((u128::from(chosen) * lines) >> 64) as usize * LINE
    }
}

fn halves(id: &[u8; 16]) -> [u64; 2] {
    let (one, two) = id.split_at(8);
    [one, two].map(|half| u64::from_be_bytes(half.try_into().expect("8 bytes")))
}

/// Bits of a line: nine bits of the id's second half choose each.
fn bits(id: &[u8; 16]) -> impl Iterator<Item = usize> {
    let [_, chosen] = halves(id);
    (0..PROBES).map(move |probe| (chosen >> (9 * probe)) as usize % (8 * LINE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> [u8; 16] {
        blake3::hash(&number.to_le_bytes()).as_bytes()[..16].try_into().expect("16 bytes")
    }

    #[test]
    fn it_never_denies_and_seldom_errs() {
        const ENTRIES: u64 = 20_000;
        let mut filter = Filter::new(ENTRIES);
        assert_eq!(filter.bytes().len() as u64, Filter::size(ENTRIES));
        for number in 0..ENTRIES {
            filter.insert(&id(number));
        }
        assert!((0..ENTRIES).all(|number| filter.may_hold(&id(number))));
        let wrong = (ENTRIES..2 * ENTRIES).filter(|number| filter.may_hold(&id(*number))).count() as u64;
        assert!(wrong < ENTRIES / 60, "{wrong} of {ENTRIES}");
        let again = Filter::from_bytes(filter.bytes().to_vec());
        assert!((0..ENTRIES).all(|number| again.may_hold(&id(number))));
        assert!(!Filter::new(0).may_hold(&id(0)));
    }
}
