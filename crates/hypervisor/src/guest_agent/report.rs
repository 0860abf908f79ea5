//! What the guest's hooks say they did: a small text file in the guest, which its freeze hook writes anew each time
//! (packaging/guest). Debian's own hook logs failures and reports success, so its word is not enough.
//!
//! ```text
//! stamp 6f1c0b1e-…
//! freeze 50-postgresql ok
//! thaw 50-postgresql ok
//! ```

use std::fmt;

/// Where the hook writes it: on a file system that is never frozen.
pub const PATH: &str = "/run/rempart-fsfreeze/report";

/// More is not read.
pub(super) const LONGEST: usize = 64 << 10;

/// Hooks beyond this are not looked at.
const MOST_HOOKS: usize = 100;
const LONGEST_NAME: usize = 100;

/// What one hook did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookOutcome {
    pub name: String,
    pub frozen: bool,
    /// None while it is not known: it was not its turn yet, or it was undone.
    pub thawed: Option<bool>,
}

/// One freeze, as the guest tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HookReport {
    /// Another one for each freeze.
    pub stamp: String,
    pub hooks: Vec<HookOutcome>,
}

impl HookReport {
    /// Lines that are not understood are left out.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut report = Self::default();
        for line in String::from_utf8_lossy(bytes).lines() {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            match words[..] {
                ["stamp", stamp] => report.stamp = shortened(stamp),
                ["freeze", name, outcome] if report.hooks.len() < MOST_HOOKS => {
                    let (name, frozen) = (shortened(name), outcome == "ok");
                    report.hooks.push(HookOutcome { name, frozen, thawed: None });
                }
                ["thaw", name, outcome] => {
                    let name = shortened(name);
                    if let Some(hook) = report.hooks.iter_mut().rev().find(|hook| hook.name == name) {
                        hook.thawed = Some(outcome == "ok");
                    }
                }
                _ => (),
            }
        }
        report
    }

    /// Hooks that could not undo what they did: their applications may stand still.
    pub fn not_thawed(&self) -> impl Iterator<Item = &str> {
        self.hooks.iter().filter(|hook| hook.thawed == Some(false)).map(|hook| hook.name.as_str())
    }
}

fn shortened(word: &str) -> String {
    word.chars().filter(|c| !c.is_control()).take(LONGEST_NAME).collect()
}

impl fmt::Display for HookReport {
    /// The names of the hooks, and what is wrong with them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, hook) in self.hooks.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            let trouble = match hook {
                HookOutcome { frozen: false, .. } => " (failed)",
                HookOutcome { thawed: Some(false), .. } => " (did not thaw)",
                _ => "",
            };
            write!(f, "{comma}{}{trouble}", hook.name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_report_is_read_and_strange_lines_are_left_out() {
        let text = b"stamp abc\nfreeze 50-db ok\nfreeze 60-queue failed\nnoise\nthaw 50-db failed\nthaw other ok\n\xFF\n";
        let report = HookReport::parse(text);
        assert_eq!(report.stamp, "abc");
        assert_eq!(report.to_string(), "50-db (did not thaw), 60-queue (failed)");
        assert_eq!(report.not_thawed().collect::<Vec<_>>(), ["50-db"]);
    }

    proptest! {
        #[test]
        fn no_report_panics_or_grows_without_bound(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
            let report = HookReport::parse(&bytes);
            prop_assert!(report.hooks.len() <= MOST_HOOKS);
            let _ = report.to_string();
        }
    }
}
