//! How long to look for work before sleeping.
//!
//! Waking a sleeping thread, on a processor that sleeps as well, takes longer than a small request: where the next event
//! comes soon, looking for it is faster, and cheaper for whoever sends it. How soon is learnt as KVM learns how long to
//! poll for a halted guest (`halt_poll_ns`): the window grows while events come a little after it, and closes with
//! the first that takes long.

use std::time::Duration;

/// The first window.
const SHORTEST: Duration = Duration::from_micros(10);
/// What takes longer is slept for. A peer's answer on a fast network takes half of it; KVM's default is the same.
const LONGEST: Duration = Duration::from_micros(200);

#[derive(Debug, Default)]
pub struct Spin {
    window: Duration,
}

impl Spin {
    /// How long to look before sleeping; zero is not at all.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// Something came, so long after the wait for it began.
    pub fn waited(&mut self, took: Duration) {
        if took >= LONGEST {
            self.window = Duration::ZERO;
        } else if took > self.window {
            self.window = (self.window * 2).clamp(SHORTEST, LONGEST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE: Duration = Duration::from_millis(250);

    fn after(waits: impl IntoIterator<Item = Duration>) -> Duration {
        let mut spin = Spin::default();
        waits.into_iter().for_each(|took| spin.waited(took));
        spin.window()
    }

    #[test]
    fn an_idle_group_never_looks() {
        assert_eq!(after([LATE; 10]), Duration::ZERO);
    }

    #[test]
    fn the_window_grows_until_what_comes_falls_into_it() {
        let took = Duration::from_micros(70);
        assert_eq!(after([took; 3]), Duration::from_micros(40));
        assert_eq!(after([took; 4]), Duration::from_micros(80));
        assert_eq!(after([took; 100]), Duration::from_micros(80), "and no further");
        assert_eq!(after([LONGEST - Duration::from_micros(1); 100]), LONGEST);
    }

    #[test]
    fn one_long_wait_closes_it() {
        let took = Duration::from_micros(70);
        assert_eq!(after([took, took, took, took, LATE]), Duration::ZERO);
    }
}
