//! How often each thing that can happen did happen. A campaign that never met a fault proves nothing about it.

use std::collections::{BTreeMap, BTreeSet};
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

impl Kind {
    const ALL: [Kind; 4] = [Kind::Fault, Kind::Recovery, Kind::Reached, Kind::Checked];
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
    declared: BTreeSet<(Kind, &'static str)>,
}

impl Coverage {
    pub fn declare(&mut self, kind: Kind, names: &[&'static str]) {
        for &name in names {
            self.counts.entry((kind, name)).or_insert(0);
            self.declared.insert((kind, name));
        }
    }

    /// Names that show even if they were never met.
    pub fn note(&mut self, kind: Kind, names: &[&'static str]) {
        for &name in names {
            self.add(kind, name, 0);
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
        self.declared.extend(&other.declared);
    }

    /// Adds what another campaign printed.
    pub fn add_printed(&mut self, text: &str) {
        for line in text.lines() {
            let Some((kind, rest)) = line.split_once(' ') else { continue };
            let Some(kind) = Kind::ALL.into_iter().find(|known| known.to_string() == kind) else { continue };
            let Some((name, times)) = rest.trim_end().rsplit_once(' ') else { continue };
            let (name, Ok(times)) = (name.trim(), times.parse()) else { continue };
            let known = self.counts.keys().find(|(at, known)| *at == kind && *known == name);
            // A name that this campaign never met: there are few, and this program ends soon.
            let name = known.map_or_else(|| &*name.to_owned().leak(), |&(_, known)| known);
            self.add(kind, name, times);
        }
    }

    /// What was declared and happened less often than `least`.
    pub fn below(&self, least: u64) -> impl Iterator<Item = (Kind, &'static str, u64)> + '_ {
        self.iter().filter(move |&(kind, name, times)| times < least && self.declared.contains(&(kind, name)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_tables_add_up() {
        let mut first = Coverage::default();
        first.declare(Kind::Fault, &["power loss", "bit rot"]);
        first.add(Kind::Fault, "power loss", 2);
        first.add(Kind::Reached, "peer in step", 3);
        let mut sum = Coverage::default();
        sum.declare(Kind::Fault, &["power loss", "bit rot"]);
        for _ in 0..2 {
            sum.add_printed(&format!("{first}9 seeds in 1 s\nfault\nfault x y\n"));
        }
        assert_eq!(sum.get(Kind::Fault, "power loss"), 4);
        assert_eq!(sum.get(Kind::Reached, "peer in step"), 6);
        assert_eq!(sum.below(5).map(|(_, name, _)| name).collect::<Vec<_>>(), ["bit rot", "power loss"]);
    }
}
