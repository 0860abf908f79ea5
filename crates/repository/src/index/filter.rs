//! A small set in memory that may say yes for a chunk that is not there, but never no for one that is.
//!
//! A blocked Bloom filter: all bits of an id lie in one line of the processor's cache. Ids are hashes already, so their own
//! bits choose.

/// Bits for each entry, where there is room: about 1 in 80 new chunks are looked for in vain.
const BITS: u64 = 10;
/// Bits set for each entry, at most.
const MOST_PROBES: u32 = 6;
/// Bytes, at most. With 84 million entries, 10 TiB in chunks of 128 KiB, 1 in 8 new chunks are looked for in vain: what
/// reads one block costs little beside compressing it.
const MOST_BYTES: u64 = 48 << 20;
/// Bytes of a line.
pub(super) const LINE: usize = 64;

pub(super) struct Filter {
    bytes: Vec<u8>,
    /// Bits set for each entry.
    probes: u32,
}

impl Filter {
    /// For so many entries.
    pub fn new(entries: u64) -> Filter {
        let size = Filter::size(entries);
        // The fewer bits there are for each, the fewer are best set.
        let bits = (8 * size).checked_div(entries).unwrap_or(BITS) as f64;
        let probes = (bits * std::f64::consts::LN_2).round() as u32;
        Filter { bytes: vec![0; size as usize], probes: probes.clamp(1, MOST_PROBES) }
    }

    /// Bytes of a filter for so many entries.
    pub fn size(entries: u64) -> u64 {
        let wanted = (entries * BITS).div_ceil(8 * LINE as u64) * LINE as u64;
        wanted.min(MOST_BYTES)
    }

    /// One that was [written](Self::bytes). `None` if it cannot have been.
    pub fn from_bytes(bytes: Vec<u8>, probes: u32) -> Option<Filter> {
        let possible = bytes.len().is_multiple_of(LINE) && (1..=MOST_PROBES).contains(&probes);
        possible.then_some(Filter { bytes, probes })
    }

    pub fn probes(&self) -> u32 {
        self.probes
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn insert(&mut self, id: &[u8; 16]) {
        let line = self.line(id);
        for bit in self.bits(id) {
            self.bytes[line + bit / 8] |= 1 << (bit % 8);
        }
    }

    pub fn may_hold(&self, id: &[u8; 16]) -> bool {
        if self.bytes.is_empty() {
            return false;
        }
        let line = self.line(id);
        self.bits(id).all(|bit| self.bytes[line + bit / 8] & 1 << (bit % 8) != 0)
    }

    /// Where the line of an id begins.
    fn line(&self, id: &[u8; 16]) -> usize {
        let [chosen, _] = halves(id);
        let lines = (self.bytes.len() / LINE) as u128;
        ((u128::from(chosen) * lines) >> 64) as usize * LINE
    }

    /// Bits of a line: nine bits of the id's second half choose each.
    fn bits(&self, id: &[u8; 16]) -> impl Iterator<Item = usize> + use<> {
        let [_, chosen] = halves(id);
        (0..self.probes).map(move |probe| (chosen >> (9 * probe)) as usize % (8 * LINE))
    }
}

fn halves(id: &[u8; 16]) -> [u64; 2] {
    let (one, two) = id.split_at(8);
    [one, two].map(|half| u64::from_be_bytes(half.try_into().expect("8 bytes")))
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
        let again = Filter::from_bytes(filter.bytes().to_vec(), filter.probes()).expect("it was written");
        assert!((0..ENTRIES).all(|number| again.may_hold(&id(number))));
        assert!(!Filter::new(0).may_hold(&id(0)));
        assert!(
            Filter::from_bytes(vec![0; LINE], 0).is_none() && Filter::from_bytes(vec![0; 1], 6).is_none()
        );
    }

    #[test]
    fn its_memory_is_bounded_and_what_is_left_is_used_well() {
        // As for 84 million entries in all the room there is, in small: bits for each are what counts.
        let large = Filter::new(84_000_000);
        assert_eq!((large.bytes().len() as u64, large.probes()), (MOST_BYTES, 3));
        const ENTRIES: u64 = 20_000;
        let bytes = vec![0; (MOST_BYTES * ENTRIES / 84_000_000) as usize / LINE * LINE];
        let mut filter = Filter::from_bytes(bytes, large.probes()).expect("it can be");
        (0..ENTRIES).for_each(|number| filter.insert(&id(number)));
        assert!((0..ENTRIES).all(|number| filter.may_hold(&id(number))));
        let wrong = (ENTRIES..2 * ENTRIES).filter(|number| filter.may_hold(&id(*number))).count() as u64;
        assert!(wrong < ENTRIES / 6, "{wrong} of {ENTRIES}");
    }
}
