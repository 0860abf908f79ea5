//! Sets of packs by their running numbers.

use super::codec::{Reader, Writer};
use std::cmp::Ordering;
use std::collections::HashSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// The running number of a pack or index segment: the log counts them in the order in which they appear.
pub type Number = u32;

/// Runs of a set that was read, at most: more than all packs of the largest repository.
const RUNS: usize = 1 << 21;
/// A page has `1 << PAGE` numbers.
const PAGE: u32 = 14;

/// A set of numbers. Copies share its pages, and so does what is made of it where it is the same.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Numbers(Vec<Page>);

/// Those of a set that differ in their lowest bits only.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Page {
    /// Their highest bits.
    place: u32,
    /// Sorted runs of the lowest bits, first and last, that neither touch nor overlap. There is one at least.
    runs: Arc<Vec<(u16, u16)>>,
}

impl Page {
    fn of(number: Number) -> (u32, u16) {
        (number >> PAGE, (number & Page::LAST as u32) as u16)
    }

    /// The last of all that a page can have.
    const LAST: u16 = ((1 << PAGE) - 1) as u16;

    fn runs(&self) -> impl Iterator<Item = RangeInclusive<Number>> + '_ {
        let first = self.place << PAGE;
        self.runs.iter().map(move |&(start, end)| first + Number::from(start)..=first + Number::from(end))
    }
}

impl Numbers {
    pub const fn new() -> Numbers {
        Numbers(Vec::new())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> u64 {
        self.runs().map(|run| u64::from(run.end() - run.start()) + 1).sum()
    }

    /// They neither touch nor overlap.
    pub fn runs(&self) -> impl Iterator<Item = RangeInclusive<Number>> + '_ {
        let mut parts = self.0.iter().flat_map(Page::runs).peekable();
        std::iter::from_fn(move || {
            let (first, mut last) = parts.next()?.into_inner();
            while let Some(part) = parts.next_if(|part| last.checked_add(1) == Some(*part.start())) {
                last = *part.end();
            }
            Some(first..=last)
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = Number> + '_ {
        self.0.iter().flat_map(Page::runs).flatten()
    }

    pub fn last(&self) -> Option<Number> {
        self.0.last().and_then(|page| page.runs().last()).map(|run| *run.end())
    }

    pub fn contains(&self, number: Number) -> bool {
        let (place, low) = Page::of(number);
        let Ok(page) = self.0.binary_search_by_key(&place, |page| page.place) else { return false };
        let runs = &self.0[page].runs;
        let after = runs.partition_point(|&(first, _)| first <= low);
        after > 0 && runs[after - 1].1 >= low
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

    /// Whether they share a number.
    pub fn intersects(&self, other: &Numbers) -> bool {
        let mut pairs = pairs(&self.0, &other.0);
        pairs.any(|(one, other)| one.zip(other).is_some_and(|(one, other)| share_a_number(one, other)))
    }

    /// Shares each page with the first of the `known` that has the same numbers.
    pub(super) fn share(&mut self, known: &mut Shared) {
        for page in &mut self.0 {
            match known.0.get(page) {
                Some(same) => *page = same.clone(),
                None => drop(known.0.insert(page.clone())),
            }
        }
    }

    /// Puts a number above all others at the end.
    pub(super) fn push(&mut self, number: Number) {
        assert!(self.last().is_none_or(|last| last < number), "numbers are pushed in order");
        self.push_run(number, number);
    }

    /// Puts numbers above all others at the end.
    fn push_run(&mut self, first: Number, last: Number) {
        let ((from, _), (to, _)) = (Page::of(first), Page::of(last));
        for place in from..=to {
            let start = if place == from { Page::of(first).1 } else { 0 };
            let end = if place == to { Page::of(last).1 } else { Page::LAST };
            match self.0.last_mut().filter(|page| page.place == place) {
                None => self.0.push(Page { place, runs: Arc::new(vec![(start, end)]) }),
                Some(page) => {
                    let runs = Arc::make_mut(&mut page.runs);
                    let (_, before) = runs.last_mut().expect("no page is empty");
                    if *before + 1 == start {
                        *before = end;
                    } else {
                        runs.push((start, end));
                    }
                }
            }
        }
    }

    /// For each run: how far behind the one before, and how many more than one.
    pub(super) fn encode(&self, writer: &mut Writer) {
        let mut free = 0;
        writer.short(self.runs().count() as u64);
        for run in self.runs() {
            writer.short(u64::from(*run.start()) - free);
            writer.short(u64::from(run.end() - run.start()));
            // Between two runs at least one number is missing.
            free = u64::from(*run.end()) + 2;
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Option<Numbers> {
        let mut free = 0u64;
        let mut set = Numbers::new();
        reader.list(RUNS, |reader| {
            let first = free.checked_add(reader.short()?)?;
            let last = first.checked_add(reader.short()?)?;
            free = last.checked_add(2)?;
            set.push_run(Number::try_from(first).ok()?, Number::try_from(last).ok()?);
            Some(())
        })?;
        Some(set)
    }
}

/// Pages of sets that are in memory once.
#[derive(Default)]
pub(super) struct Shared(HashSet<Page>);

/// The pages of one and of the other set, those of the same place together.
fn pairs<'p>(
    mut one: &'p [Page],
    mut other: &'p [Page],
) -> impl Iterator<Item = (Option<&'p Page>, Option<&'p Page>)> {
    fn first<'p>(pages: &mut &'p [Page]) -> Option<&'p Page> {
        pages.split_off_first()
    }
    std::iter::from_fn(move || {
        let order = match (one.first(), other.first()) {
            (None, None) => return None,
            (Some(here), Some(there)) => here.place.cmp(&there.place),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
        };
        Some(match order {
            Ordering::Less => (first(&mut one), None),
            Ordering::Equal => (first(&mut one), first(&mut other)),
            Ordering::Greater => (None, first(&mut other)),
        })
    })
}

fn share_a_number(one: &Page, other: &Page) -> bool {
    if Arc::ptr_eq(&one.runs, &other.runs) {
        return true;
    }
    // The runs of the smaller are looked for.
    let (few, many) = if one.runs.len() <= other.runs.len() { (one, other) } else { (other, one) };
    few.runs.iter().any(|&(first, last)| {
        let ahead = many.runs.partition_point(|&(_, end)| end < first);
        many.runs.get(ahead).is_some_and(|&(start, _)| start <= last)
    })
}

/// The numbers that `keep` says yes to, told whether they are in one and in the other set. Not those in neither.
fn combine(one: &Numbers, other: &Numbers, keep: impl Fn(bool, bool) -> bool) -> Numbers {
    let mut pages = Vec::new();
    for pair in pairs(&one.0, &other.0) {
        let page = match pair {
            (Some(here), None) => keep(true, false).then(|| here.clone()),
            (None, Some(there)) => keep(false, true).then(|| there.clone()),
            (Some(here), Some(there)) if Arc::ptr_eq(&here.runs, &there.runs) => {
                keep(true, true).then(|| here.clone())
            }
            (Some(here), Some(there)) => {
                let runs = combine_runs(&here.runs, &there.runs, &keep);
                match [here, there].into_iter().find(|page| *page.runs == runs) {
                    Some(same) => Some(same.clone()),
                    None if runs.is_empty() => None,
                    None => Some(Page { place: here.place, runs: Arc::new(runs) }),
                }
            }
            (None, None) => unreachable!("a pair is of one page at least"),
        };
        pages.extend(page);
    }
    Numbers(pages)
}

fn combine_runs(
    one: &[(u16, u16)],
    other: &[(u16, u16)],
    keep: &impl Fn(bool, bool) -> bool,
) -> Vec<(u16, u16)> {
    // No page's last number is the last of its type.
    fn edges(runs: &[(u16, u16)]) -> impl Iterator<Item = u16> + '_ {
        runs.iter().flat_map(|&(first, last)| [first, last + 1])
    }
    let (mut one, mut other) = (edges(one).peekable(), edges(other).peekable());
    let (mut here, mut there) = (false, false);
    let mut runs = Vec::new();
    let mut start = None;
    loop {
        let edge = match (one.peek(), other.peek()) {
            (Some(&a), Some(&b)) => a.min(b),
            (Some(&edge), None) | (None, Some(&edge)) => edge,
            (None, None) => break,
        };
        here ^= one.next_if_eq(&edge).is_some();
        there ^= other.next_if_eq(&edge).is_some();
        match (start, keep(here, there)) {
            (None, true) => start = Some(edge),
            (Some(first), false) => {
                runs.push((first, edge - 1));
                start = None;
            }
            _ => {}
        }
    }
    assert!(start.is_none(), "every run ends");
    runs
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

/// How many pages the sets have, those that they share counted once.
#[cfg(test)]
pub(super) fn pages_in_memory<'s>(sets: impl IntoIterator<Item = &'s Numbers>) -> usize {
    let pages: HashSet<_> =
        sets.into_iter().flat_map(|set| &set.0).map(|page| Arc::as_ptr(&page.runs)).collect();
    pages.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn any_set() -> impl Strategy<Value = BTreeSet<Number>> {
        let pages = (1..=3u32).prop_flat_map(|page| (page << PAGE) - 6..(page << PAGE) + 6);
        let number = prop_oneof![0u32..40, (u32::MAX - 20)..=u32::MAX, pages];
        let several = proptest::collection::btree_set(number, 0..30);
        // With whole pages, too.
        let long = (0u32..3 << PAGE, 1u32..3 << PAGE).prop_map(|(first, len)| (first..first + len).collect());
        (several, prop_oneof![3 => Just(BTreeSet::new()), 1 => long]).prop_map(|(one, other)| &one | &other)
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
            prop_assert_eq!(one.last(), a.last().copied());
            // Between two runs is a number that is in neither.
            let runs: Vec<_> = one.runs().collect();
            prop_assert!(runs.windows(2).all(|pair| pair[1].start() - pair[0].end() > 1));
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
        fn what_is_made_of_a_set_is_shared_where_it_is_the_same(a in any_set(), b in any_set()) {
            let (one, other) = (of(&a), of(&b));
            let made = [one.clone(), one.union(&other), one.difference(&other), one.intersection(&other)];
            for page in made.iter().flat_map(|made| &made.0) {
                for same in one.0.iter().filter(|same| *same == page) {
                    prop_assert!(Arc::ptr_eq(&same.runs, &page.runs), "of page {}", page.place);
                }
            }
            let mut shared = Shared::default();
            let (mut here, mut there) = (of(&a), of(&a));
            here.share(&mut shared);
            there.share(&mut shared);
            prop_assert_eq!(&here, &one);
            prop_assert_eq!(&there, &one);
            prop_assert_eq!(pages_in_memory([&here, &there]), here.0.len());
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
