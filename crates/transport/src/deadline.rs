//! Deadlines of our own: no wait on a peer is longer than we decided.

use rempart_types::MonotonicTime;
use std::time::Duration;

/// How long each kind of wait may last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// TCP connection, TLS handshake and greeting together, on both sides.
    pub handshake: Duration,
    /// A peer from whom something is expected and nothing comes for that long is gone.
    pub silence: Duration,
    /// The kernel gives up on bytes that stay unacknowledged for that long (TCP_USER_TIMEOUT).
    pub unacknowledged: Duration,
}

impl Default for Deadlines {
    fn default() -> Deadlines {
        Deadlines {
            handshake: Duration::from_secs(3),
            silence: Duration::from_millis(1500),
            unacknowledged: Duration::from_secs(5),
        }
    }
}

/// Notices a silent peer. Knows no clock: it is told the time.
#[derive(Debug, Clone)]
pub struct SilenceDetector {
    limit: Duration,
    last_heard: MonotonicTime,
    expecting_since: Option<MonotonicTime>,
}

impl SilenceDetector {
    pub fn new(limit: Duration, now: MonotonicTime) -> SilenceDetector {
        SilenceDetector { limit, last_heard: now, expecting_since: None }
    }

    /// Bytes came, whatever they were.
    pub fn heard(&mut self, now: MonotonicTime) {
        self.last_heard = self.last_heard.max(now);
    }

    /// Something is owed from now on, if it was not already.
    pub fn expect(&mut self, now: MonotonicTime) {
        self.expecting_since.get_or_insert(now);
    }

    /// Nothing is owed any more.
    pub fn satisfied(&mut self) {
        self.expecting_since = None;
    }

    /// When the peer counts as silent unless it is heard before. Never, while nothing is expected.
    pub fn deadline(&self) -> Option<MonotonicTime> {
        // An idle peer owes nothing: its old silence must not count against a new question.
        self.expecting_since.map(|since| since.max(self.last_heard) + self.limit)
    }

    pub fn is_silent(&self, now: MonotonicTime) -> bool {
        self.deadline().is_some_and(|deadline| now >= deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(millis: u64) -> MonotonicTime {
        MonotonicTime(millis * 1_000_000)
    }

    #[test]
    fn an_idle_peer_is_never_silent_and_a_question_starts_the_clock() {
        let mut detector = SilenceDetector::new(Duration::from_millis(100), at(0));
        assert!(!detector.is_silent(at(10_000)));
        detector.expect(at(10_000));
        detector.expect(at(10_050));
        assert!(!detector.is_silent(at(10_099)));
        assert_eq!(detector.deadline(), Some(at(10_100)));
        assert!(detector.is_silent(at(10_100)));
        detector.heard(at(10_090));
        assert!(!detector.is_silent(at(10_189)));
        assert!(detector.is_silent(at(10_190)));
        detector.satisfied();
        assert!(!detector.is_silent(at(99_999)));
    }
}
