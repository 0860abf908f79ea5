//! Names of objects.

use std::fmt;
use thiserror::Error;

/// Bytes of a name, at most.
const LONGEST: usize = 200;

/// A relative path of lowercase letters, digits, `-`, `.` and `/`: valid in every place, and never pointing out of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// A text that is no name of an object.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "`{0}` is no name of an object: parts of `a-z`, `0-9`, `-` and `.`, joined by `/`, none starting with `.`"
)]
pub struct InvalidName(String);

impl Name {
    pub fn new(text: impl Into<String>) -> Result<Name, InvalidName> {
        let text = text.into();
        let part_fits = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
        };
        if text.len() <= LONGEST && text.split('/').all(part_fits) {
            Ok(Name(text))
        } else {
            Err(InvalidName(text))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_inside_its_place() {
        for good in ["log/0000000000000001", "packs/ab-1/ff", "repository"] {
            assert_eq!(Name::new(good).expect("a name").as_str(), good);
        }
        for bad in ["", "/etc", "a//b", "../x", "a/../b", ".tmp", "a/.b", "A", "a b", "a\0", "a/"] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
        assert!(Name::new("a".repeat(LONGEST)).is_ok());
        assert!(Name::new("a".repeat(LONGEST + 1)).is_err());
    }
}
