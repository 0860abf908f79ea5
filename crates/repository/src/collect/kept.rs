//! Which packs a collection keeps.

use crate::log::{Number, Numbers};

/// Packs that hold what backups reach: a bit for each number.
#[derive(Debug, Clone, Default)]
pub struct Kept {
    packs: Bits,
    survivors: Bits,
}

impl Kept {
    pub fn contains(&self, pack: Number) -> bool {
        self.packs.contains(pack.into())
    }

    /// Keeps a pack for a chunk that a backup reaches. `lies_elsewhere`: another live pack holds that chunk, too, and may
    /// be condemned because this one is kept.
    pub fn keep(&mut self, pack: Number, lies_elsewhere: bool) {
        self.packs.insert(pack.into());
        if lies_elsewhere {
            self.survivors.insert(pack.into());
        }
    }

    pub fn packs(&self) -> Numbers {
        self.packs.numbers()
    }

    pub(super) fn survivors(&self) -> Numbers {
        self.survivors.numbers()
    }
}

/// A set of numbers, a bit each.
#[derive(Debug, Clone, Default)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    fn place(number: u64) -> (usize, u64) {
        ((number / 64) as usize, 1 << (number % 64))
    }

    pub fn contains(&self, number: u64) -> bool {
        let (word, bit) = Bits::place(number);
        self.0.get(word).is_some_and(|bits| bits & bit != 0)
    }

    pub fn insert(&mut self, number: u64) {
        let (word, bit) = Bits::place(number);
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= bit;
    }

    fn numbers(&self) -> Numbers {
        let set = |(word, bits): (usize, &u64)| {
            let (word, bits) = (word as Number * 64, *bits);
            (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word + bit)
        };
        self.0.iter().enumerate().flat_map(set).collect()
    }
}

/// A set of numbers that knows of each how many are before it.
#[derive(Debug)]
pub(super) struct Ranks {
    bits: Bits,
    /// Before each word.
    before: Vec<u32>,
}

impl Ranks {
    pub fn of(numbers: &Numbers) -> Ranks {
        let mut bits = Bits::default();
        numbers.iter().for_each(|number| bits.insert(number.into()));
        let mut count = 0;
        let before = bits.0.iter().map(|word| {
            count += word.count_ones();
            count - word.count_ones()
        });
        Ranks { before: before.collect(), bits }
    }

    /// How many are before it, if it is one of them.
    pub fn get(&self, number: Number) -> Option<usize> {
        let (word, bit) = Bits::place(number.into());
        let bits = *self.bits.0.get(word)?;
        (bits & bit != 0).then(|| (self.before[word] + (bits & (bit - 1)).count_ones()) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_places_in_a_list() {
        let numbers: Vec<Number> =
            (0..1000).filter(|number| number % 7 < 2 || (64..130).contains(number)).collect();
        let ranks = Ranks::of(&numbers.iter().copied().collect());
        for number in 0..1100 {
            assert_eq!(ranks.get(number), numbers.binary_search(&number).ok(), "{number}");
        }
        assert_eq!(Ranks::of(&Numbers::new()).get(0), None);
    }

    #[test]
    fn keeps_what_it_is_told() {
        let mut kept = Kept::default();
        for pack in [0, 63, 64, 1000] {
            kept.keep(pack, pack == 64);
        }
        assert_eq!(kept.packs(), [0, 63, 64, 1000].into_iter().collect());
        assert_eq!(kept.survivors(), [64].into_iter().collect());
        assert!(kept.contains(63) && !kept.contains(62) && !kept.contains(1_000_000));
    }
}
