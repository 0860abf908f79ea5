//! Entry points for fuzzers and the replay of their corpora: any bytes, no panic, and what is accepted holds together.

/// A time in cron's form with a window behind it, a schedule of the configuration, a line of a history.
///
/// # Panics
/// If a schedule is due when it cannot be.
pub fn schedule(data: &[u8]) {
    crate::schedule::fuzz::fuzz(&String::from_utf8_lossy(data));
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    //! What fuzzers found worth keeping, again on every build, and a few changes of each.

    use super::replay::replay;

    #[test]
    fn schedule_corpus() {
        replay("schedule", super::schedule);
    }
}
