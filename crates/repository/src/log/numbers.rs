//! Sets of packs by their running numbers.

use super::codec::{Reader, Writer};
use std::fmt;
use std::ops::RangeInclusive;

/// The running number of a pack or index segment: the log counts them in the order in which they appear.
pub type Number = u32;

/// Runs of a set that was read, at most: more than all packs of the largest repository.
const RUNS: usize = 1 << 21;

/// A set of numbers, as sorted runs that neither touch nor overlap.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Numbers(Vec<(Number, Number)>);

impl Numbers {
    pub const fn new() -> Numbers {
        Numbers(Vec::new())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> u64 {
        self.0.iter().map(|&(first, last)| u64::from(last - first) + 1).sum()
    }

    pub fn runs(&self) -> impl Iterator<Item = RangeInclusive<Number>> + '_ {
        self.0.iter().map(|&(first, last)| first..=last)
    }

    pub fn iter(&self) -> impl Iterator<Item = Number> + '_ {
        self.runs().flatten()
    }

    pub fn last(&self) -> Option<Number> {
        self.0.last().map(|&(_, last)| last)
    }

    pub fn contains(&self, number: Number) -> bool {
        let after = self.0.partition_point(|&(first, _)| first <= number);
        after > 0 && self.0[after - 1].1 >= number
    }

    pub fn union(&self, other: &Numbers) -> Numbers {
        combine(self, other, |here, there| here || there)
    }

    pub fn difference(&self, other: &Numbers) -> Numbers {
        combine(self, other, |here, there| here && !there)
    }

    pub fn intersection(&self, other: &Numbers) -> Numbers {
        combine(self, other, |here, there| here && there)
    }

    /// Whether they share a number. Looks at the runs of the smaller only.
    pub fn intersects(&self, other: &Numbers) -> bool {
        let (few, many) = if self.0.len() <= other.0.len() { (self, other) } else { (other, self) };
        few.0.iter().any(|&(first, last)| {
            let ahead = many.0.partition_point(|&(_, end)| end < first);
            many.0.get(ahead).is_some_and(|&(start, _)| start <= last)
        })
    }

    /// Puts a number above all others at the end.
    pub(super) fn push(&mut self, number: Number) {
        match self.0.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => {
                assert!(self.last().is_none_or(|last| last < number), "numbers are pushed in order");
                self.0.push((number, number));
            }
        }
    }

    /// For each run: how far behind the one before, and how many more than one.
    pub(super) fn encode(&self, writer: &mut Writer) {
        let mut free = 0;
        writer.list(&self.0, |writer, &(first, last)| {
            writer.short(u64::from(first) - free);
            writer.short(u64::from(last - first));
            // Between two runs at least one number is missing.
            free = u64::from(last) + 2;
        });
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Option<Numbers> {
        let mut free = 0u64;
        let runs = reader.list(RUNS, |reader| {
            let first = free.checked_add(reader.short()?)?;
            let last = first.checked_add(reader.short()?)?;
            free = last.checked_add(2)?;
            Some((Number::try_from(first).ok()?, Number::try_from(last).ok()?))
        })?;
        Some(Numbers(runs))
    }
}

/// The numbers that `keep` says yes to, told whether they are in one and in the other set. Not those in neither.
fn combine(one: &Numbers, other: &Numbers, keep: impl Fn(bool, bool) -> bool) -> Numbers {
    let edges = |set: &Numbers| {
        set.0.iter().flat_map(|&(first, last)| [u64::from(first), u64::from(last) + 1]).collect::<Vec<_>>()
    };
    let (one, other) = (edges(one), edges(other));
    let (mut i, mut j) = (0, 0);
    let mut runs: Vec<(Number, Number)> = Vec::new();
    let mut start = None;
    loop {
        let edge = match (one.get(i), other.get(j)) {
            (Some(&a), Some(&b)) => a.min(b),
            (Some(&edge), None) | (None, Some(&edge)) => edge,
            (None, None) => break,
        };
        i += usize::from(one.get(i) == Some(&edge));
        j += usize::from(other.get(j) == Some(&edge));
        // Behind an odd number of edges one is inside.
        match (start, keep(i % 2 == 1, j % 2 == 1)) {
            (None, true) => start = Some(edge),
            (Some(first), false) => {
                let number = |edge: u64| Number::try_from(edge).expect("an edge inside is a number");
                runs.push((number(first), number(edge - 1)));
                start = None;
            }
            _ => {}
        }
    }
    assert!(start.is_none(), "every run ends");
    Numbers(runs)
}

impl FromIterator<Number> for Numbers {
    fn from_iter<I: IntoIterator<Item = Number>>(numbers: I) -> Numbers {
        let mut sorted: Vec<Number> = numbers.into_iter().collect();
        sorted.sort_unstable();
        sorted.dedup();
        let mut set = Numbers::new();
        sorted.into_iter().for_each(|number| set.push(number));
        set
    }
}

impl fmt::Debug for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.runs()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn any_set() -> impl Strategy<Value = BTreeSet<Number>> {
        let number = prop_oneof![0u32..40, (u32::MAX - 20)..=u32::MAX];
        proptest::collection::btree_set(number, 0..30)
    }

    fn of(set: &BTreeSet<Number>) -> Numbers {
        set.iter().copied().collect()
    }

    proptest! {
        #[test]
        fn is_as_a_plain_set(a in any_set(), b in any_set()) {
            let (one, other) = (of(&a), of(&b));
            prop_assert_eq!(one.iter().collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(one.len(), a.len() as u64);
            prop_assert_eq!(one.union(&other), of(&a.union(&b).copied().collect()));
            prop_assert_eq!(one.difference(&other), of(&a.difference(&b).copied().collect()));
            prop_assert_eq!(one.intersection(&other), of(&a.intersection(&b).copied().collect()));
            prop_assert_eq!(one.intersects(&other), !a.is_disjoint(&b));
            for number in &b {
                prop_assert_eq!(one.contains(*number), a.contains(number));
            }
        }

        #[test]
        fn reads_back_what_was_written(a in any_set()) {
            let mut writer = Writer::default();
            of(&a).encode(&mut writer);
            let mut reader = Reader(&writer.0);
            prop_assert_eq!(Numbers::decode(&mut reader), Some(of(&a)));
            prop_assert_eq!(reader.at_end(), Some(()));
        }

        #[test]
        fn has_one_encoding(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut reader = Reader(&bytes);
            if let Some(set) = Numbers::decode(&mut reader) {
                let read = bytes.len() - reader.0.len();
                let mut writer = Writer::default();
                set.encode(&mut writer);
                prop_assert_eq!(&writer.0[..], &bytes[..read]);
            }
        }
    }
}
