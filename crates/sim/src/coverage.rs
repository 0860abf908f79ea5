//! How often each thing that can happen did happen. A campaign that never met a fault proves nothing about it.

use std::collections::BTreeMap;
use std::fmt;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A fault of the world was played.
    Fault,
    /// A row of the store's recovery table was taken.
    Recovery,
    /// A core reached a state or made a decision.
    Reached,
    /// A checker compared something.
    Checked,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Fault => "fault",
            Kind::Recovery => "recovery",
            Kind::Reached => "reached",
            Kind::Checked => "checked",
        })
    }
}

/// Counters by name. Names that a campaign must reach are declared up front, so that a zero shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    counts: BTreeMap<(Kind, &'static str), u64>,
}

impl Coverage {
    pub fn declare(&mut self, kind: Kind, names: &[&'static str]) {
        for &name in names {
            self.counts.entry((kind, name)).or_insert(0);
        }
    }

    pub fn count(&mut self, kind: Kind, name: &'static str) {
        self.add(kind, name, 1);
    }

    pub fn add(&mut self, kind: Kind, name: &'static str, times: u64) {
        *self.counts.entry((kind, name)).or_insert(0) += times;
    }

    pub fn get(&self, kind: Kind, name: &'static str) -> u64 {
        self.counts.get(&(kind, name)).copied().unwrap_or(0)
    }

    pub fn merge(&mut self, other: &Coverage) {
        for (&(kind, name), &times) in &other.counts {
            self.add(kind, name, times);
        }
    }

    /// What was declared and happened less often than `least`.
    pub fn below(&self, least: u64) -> impl Iterator<Item = (Kind, &'static str, u64)> + '_ {
        self.iter().filter(move |&(_, _, times)| times < least)
    }

    pub fn iter(&self) -> impl Iterator<Item = (Kind, &'static str, u64)> + '_ {
        self.counts.iter().map(|(&(kind, name), &times)| (kind, name, times))
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, name, times) in self.iter() {
            writeln!(f, "{kind:<10} {name:<44} {times:>12}")?;
        }
        Ok(())
    }
}
