//! A log's runs of terms: which term wrote which numbers. It belongs to the log, not to the register.
//!
//! Two logs agree up to the last number that both wrote in the same term (one term has one writer,
//! which never reuses a number in it). Two logs are compared; their tables are never merged.

use crate::{LogPosition, Lsn, Term};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Records from `first` on were written in `term`, until the next run starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Run {
    pub term: Term,
    pub first: Lsn,
}

/// The runs of one log, oldest first. Terms strictly rise; first numbers strictly rise.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize)]
pub struct Lineage {
    runs: Vec<Run>,
}

/// A table from disk or network that no log can have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineageError;

impl fmt::Display for LineageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the runs of a log must rise in term and in number")
    }
}

impl std::error::Error for LineageError {}

impl Lineage {
    /// Runs kept at most. Past it the oldest are forgotten, and a log that diverged that long ago
    /// shares no known point with this one: it is compared in full.
    pub const MAX_RUNS: usize = 256;

    pub fn new() -> Lineage {
        Lineage::default()
    }

    /// Checks a table that came from outside.
    pub fn from_runs(runs: Vec<Run>) -> Result<Lineage, LineageError> {
        let rising = runs.windows(2).all(|w| w[0].term < w[1].term && w[0].first < w[1].first);
        let starts = runs.first().is_none_or(|run| run.first > Lsn::ZERO);
        if rising && starts && runs.len() <= Self::MAX_RUNS {
            Ok(Lineage { runs })
        } else {
            Err(LineageError)
        }
    }

    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub fn last_term(&self) -> Term {
        self.runs.last().map_or(Term::ZERO, |run| run.term)
    }

    /// Notes that the record `first` is the first of `term`. Appending more of the last term changes nothing.
    ///
    /// # Panics
    /// If `term` is older than the last run's, or `first` does not come after the last run's start.
    pub fn append(&mut self, term: Term, first: Lsn) {
        if let Some(last) = self.runs.last() {
            if last.term == term {
                assert!(first >= last.first, "a record of term {term} before the run's start");
                return;
            }
            assert!(last.term < term, "a log's terms rise: {} then {term}", last.term);
            assert!(last.first < first, "a run holds at least one record");
        }
        self.runs.push(Run { term, first });
        if self.runs.len() > Self::MAX_RUNS {
            self.runs.remove(0);
        }
    }

    /// Forgets every run that starts after `end`, the log's new last number.
    pub fn truncate(&mut self, end: Lsn) {
        self.runs.retain(|run| run.first <= end);
    }

    /// The term that wrote `lsn`, if the table reaches that far back. The caller knows that the log holds it.
    pub fn term_at(&self, lsn: Lsn) -> Option<Term> {
        self.runs.iter().rev().find(|run| run.first <= lsn).map(|run| run.term)
    }

    /// `lsn` with its term.
    pub fn position(&self, lsn: Lsn) -> Option<LogPosition> {
        if lsn == Lsn::ZERO {
            return Some(LogPosition::default());
        }
        self.term_at(lsn).map(|term| LogPosition { term, lsn })
    }

    /// The last number that this log, which ends at `end`, and `other`, which ends at `other_end`,
    /// wrote in the same term. `Lsn::ZERO` when they share nothing that the tables know of.
    pub fn common_point(&self, end: Lsn, other: &Lineage, other_end: Lsn) -> Lsn {
        let mut best = Lsn::ZERO;
        for (run, last) in self.spans(end) {
            for (theirs, their_last) in other.spans(other_end) {
                if run.term == theirs.term && run.first == theirs.first {
                    best = best.max(last.min(their_last));
                } else if run.term == theirs.term {
                    // One term starts in one place: only a table that forgot its beginning differs.
                    let first = run.first.max(theirs.first);
                    let shared = last.min(their_last);
                    if shared >= first {
                        best = best.max(shared);
                    }
                }
            }
        }
        best
    }

    fn spans(&self, end: Lsn) -> impl Iterator<Item = (Run, Lsn)> + '_ {
        self.runs.iter().enumerate().filter_map(move |(index, &run)| {
            let last = self.runs.get(index + 1).map_or(end, |next| next.first.previous()).min(end);
            (last >= run.first).then_some((run, last))
        })
    }
}

impl<'de> Deserialize<'de> for Lineage {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            runs: Vec<Run>,
        }
        Lineage::from_runs(Raw::deserialize(deserializer)?.runs).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lineage(runs: &[(u64, u64)]) -> Lineage {
        let mut lineage = Lineage::new();
        for &(epoch, first) in runs {
            lineage.append(Term::new(epoch, 0), Lsn(first));
        }
        lineage
    }

    #[test]
    fn common_point_is_the_last_number_of_equal_term() {
        let a = lineage(&[(1, 1), (3, 11)]);
        let b = lineage(&[(1, 1), (2, 9)]);
        assert_eq!(a.common_point(Lsn(20), &b, Lsn(12)), Lsn(8));
        assert_eq!(b.common_point(Lsn(12), &a, Lsn(20)), Lsn(8));
        assert_eq!(a.common_point(Lsn(20), &a, Lsn(15)), Lsn(15));
        assert_eq!(a.common_point(Lsn(20), &Lineage::new(), Lsn(0)), Lsn(0));
    }

    #[test]
    fn tables_that_no_log_has_are_refused() {
        let run = |epoch, first| Run { term: Term::new(epoch, 0), first: Lsn(first) };
        assert!(Lineage::from_runs(vec![run(1, 1), run(1, 5)]).is_err());
        assert!(Lineage::from_runs(vec![run(1, 5), run(2, 5)]).is_err());
        assert!(Lineage::from_runs(vec![run(1, 0)]).is_err());
        assert!(Lineage::from_runs(vec![run(1, 1), run(2, 2)]).is_ok());
    }

    proptest! {
        /// Against the naive twin: write out the term of every number and compare.
        #[test]
        fn common_point_matches_the_written_out_logs(
            shared in proptest::collection::vec((1u64..4, 1u64..5), 0..4),
            a_tail in proptest::collection::vec((1u64..4, 1u64..5), 0..4),
            b_tail in proptest::collection::vec((1u64..4, 1u64..5), 0..4),
        ) {
            // Branches never share a term after they split: even epochs for one, odd for the other.
            let build = |tail: &[(u64, u64)], parity: u64| {
                let (mut terms, mut epoch) = (Vec::new(), 0);
                for &(step, length) in &shared { epoch += step; terms.extend((0..length).map(|_| epoch)); }
                epoch *= 2;
                for term in &mut terms { *term *= 2; }
                for &(step, length) in tail { epoch += step * 2; terms.extend((0..length).map(|_| epoch + parity)); }
                terms
            };
            let (a, b) = (build(&a_tail, 0), build(&b_tail, 1));
            let table = |terms: &[u64]| {
                let mut lineage = Lineage::new();
                for (index, &epoch) in terms.iter().enumerate() { lineage.append(Term::new(epoch, 0), Lsn(index as u64 + 1)); }
                lineage
            };
            let naive = a.iter().zip(&b).take_while(|(x, y)| x == y).count() as u64;
            prop_assert_eq!(table(&a).common_point(Lsn(a.len() as u64), &table(&b), Lsn(b.len() as u64)), Lsn(naive));
        }
    }
}
