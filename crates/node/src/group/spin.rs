//! How long to look for work before sleeping.
//!
//! Waking a sleeping thread takes longer than a small request: where the next event comes soon, looking for it a little
//! while is faster. Where it does not, the processor belongs to others: looking in vain a few times in a row is paid
//! for with a growing number of sleeps without looking.

use std::time::Duration;

/// Two wake-ups' worth.
const LONGEST: Duration = Duration::from_micros(20);
/// Sleeps without looking first, at most. An idle group looks once in so many of its timers.
const MOST_SKIPPED: u32 = 64;

#[derive(Debug, Default)]
pub struct Spin {
    /// Sleeps still to be taken without looking.
    to_skip: u32,
    /// How many the next look in vain costs.
    penalty: u32,
}

impl Spin {
    /// How long to look before this sleep.
    pub fn before_sleep(&mut self) -> Option<Duration> {
        if self.to_skip > 0 {
            self.to_skip -= 1;
            return None;
        }
        Some(LONGEST)
    }

    /// Something came while it was looked for, or nothing did.
    pub fn looked(&mut self, found: bool) {
        if found {
            self.penalty /= 2;
        } else {
            self.to_skip = self.penalty;
            self.penalty = (self.penalty * 2 + 1).min(MOST_SKIPPED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks in so many sleeps of which none finds anything.
    fn looks_in_vain(spin: &mut Spin, sleeps: u32) -> u32 {
        let mut looks = 0;
        for _ in 0..sleeps {
            if spin.before_sleep().is_some() {
                looks += 1;
                spin.looked(false);
            }
        }
        looks
    }

    #[test]
    fn nothing_comes_and_it_hardly_looks_any_more() {
        let mut spin = Spin::default();
        assert!(looks_in_vain(&mut spin, 1000) < 25);
        assert!(looks_in_vain(&mut spin, 1000) < 20);
    }

    #[test]
    fn work_comes_and_it_looks_each_time_again() {
        let mut spin = Spin::default();
        looks_in_vain(&mut spin, 1000);
        let mut sleeps = 0;
        for _ in 0..10 {
            while spin.before_sleep().is_none() {
                sleeps += 1;
            }
            spin.looked(true);
        }
        assert!(sleeps <= MOST_SKIPPED, "{sleeps}");
        assert_eq!(looks_in_vain(&mut spin, 2), 2, "forgiven");
    }
}
