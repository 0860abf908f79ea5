//! Foresees the guest's next flush.
//!
//! A guest that commits, commits again and again: it writes a little, flushes, waits. Where the last flushes came after the
//! same number of batches each, the sync that the next one will need starts with the batch before it, on every copy
//! at once: the flush finds it under way, and no message to the peers comes in between. A wrong guess is a sync that nobody
//! waited for; each makes the next guess need more confirmation.

/// Flushes in a row that came after the same number of batches, before the first guess.
const CONFIRMATIONS: u32 = 2;
const MOST_CONFIRMATIONS: u32 = 64;

#[derive(Debug)]
pub(crate) struct FlushHabit {
    /// Since the last flush.
    batches: u32,
    /// Between the two last flushes.
    usual: u32,
    confirmed: u32,
    needed: u32,
}

impl FlushHabit {
    pub fn new() -> FlushHabit {
        FlushHabit { batches: 0, usual: 0, confirmed: 0, needed: CONFIRMATIONS }
    }

    /// The batch sealed last is taken for the last before a flush.
    fn expects_flush(&self) -> bool {
        self.batches == self.usual && self.confirmed >= self.needed
    }

    /// A batch was sealed. True if a flush is expected next.
    pub fn sealed(&mut self) -> bool {
        if self.expects_flush() {
            self.confirmed = 0;
            self.needed = (self.needed * 2).min(MOST_CONFIRMATIONS);
        }
        self.batches = self.batches.saturating_add(1);
        self.expects_flush()
    }

    /// The guest flushes.
    pub fn flushed(&mut self) {
        if self.batches == 0 {
            return;
        }
        if self.expects_flush() {
            self.needed = (self.needed / 2).max(CONFIRMATIONS);
        }
        if self.batches == self.usual {
            self.confirmed = self.confirmed.saturating_add(1);
        } else {
            (self.usual, self.confirmed) = (self.batches, 0);
        }
        self.batches = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays intervals of so many batches; returns guesses that a flush followed, and those that none did.
    fn play(habit: &mut FlushHabit, intervals: impl IntoIterator<Item = u32>) -> (u32, u32) {
        let (mut right, mut wrong) = (0, 0);
        for batches in intervals {
            let mut last = false;
            for _ in 0..batches {
                wrong += u32::from(last);
                last = habit.sealed();
            }
            right += u32::from(last);
            habit.flushed();
        }
        (right, wrong)
    }

    #[test]
    fn a_habit_is_found_and_kept() {
        for batches in [1, 3] {
            let mut habit = FlushHabit::new();
            assert_eq!(play(&mut habit, [batches; 103]), (100, 0));
        }
    }

    #[test]
    fn without_a_habit_hardly_anything_is_guessed() {
        let mut habit = FlushHabit::new();
        let mut seed = 1_u32;
        let random = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            1 + (seed >> 30)
        });
        let (right, wrong) = play(&mut habit, random.take(10_000));
        assert!(right + wrong < 100, "{right} right, {wrong} wrong");
    }

    #[test]
    fn writes_without_a_flush_cost_one_guess() {
        let mut habit = FlushHabit::new();
        play(&mut habit, [1; 10]);
        assert_eq!(play(&mut habit, [10_000]), (0, 1));
    }

    #[test]
    fn a_flush_with_nothing_before_it_says_nothing() {
        let mut habit = FlushHabit::new();
        assert_eq!(play(&mut habit, [1, 0, 1, 0, 0, 1, 1]), (1, 0));
    }
}
