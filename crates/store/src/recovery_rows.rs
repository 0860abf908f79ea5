//! Which rows of recovery's decision table applied.

use std::fmt;

/// A set of rows of the table in docs/formats/store.md, by their letters, `A` to `T`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct RecoveryRows(u32);

impl RecoveryRows {
    pub(crate) fn add(&mut self, row: char) {
        assert!(row.is_ascii_uppercase(), "{row:?} is no row");
        self.0 |= 1 << (row as u8 - b'A');
    }

    pub(crate) fn add_if(&mut self, row: char, applies: bool) {
        if applies {
            self.add(row);
        }
    }

    pub(crate) fn union(self, other: RecoveryRows) -> RecoveryRows {
        RecoveryRows(self.0 | other.0)
    }

    pub fn contains(self, row: char) -> bool {
        self.iter().any(|met| met == row)
    }

    pub fn iter(self) -> impl Iterator<Item = char> {
        ('A'..='Z').filter(move |&row| self.0 >> (row as u8 - b'A') & 1 == 1)
    }
}

impl fmt::Debug for RecoveryRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.iter().collect::<String>())
    }
}
