//! The observer: stands outside both nodes, with a port on each side, and writes down what the guest says.
//!
//! It hears the guest's broadcasts and probes it with a packet every few milliseconds from either side. A machine is
//! known by the nonce it draws at boot: two nonces heard at one time are two running copies.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use lab_guest::report::{Body, ECHO_PORT, REPORT_PORT, Report};

use crate::guest::GUEST_ADDRESS;
use crate::interrupt;
use crate::lab::{Lab, Side};

const PROBE_INTERVAL: Duration = Duration::from_millis(20);
/// How long a receiver waits before it looks whether it is to end.
const POLL: Duration = Duration::from_millis(100);

/// Everything heard so far.
#[derive(Debug, Default, Clone)]
pub struct Notes {
    /// In the order of their first sign of life.
    pub boots: Vec<Boot>,
    /// Times without an acknowledgement that are longer than the guest's pace.
    gaps: Vec<Gap>,
    last_acknowledgement: Option<Instant>,
    newest_acknowledged: u64,
    last_answer: Option<Instant>,
    /// The same for answers to probes.
    silences: Vec<Gap>,
}

/// Shorter gaps are the guest's pace.
const NOTABLE_GAP: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy)]
pub struct Gap {
    pub from: Instant,
    pub length: Duration,
}

/// One life of the machine.
#[derive(Debug, Clone)]
pub struct Boot {
    pub nonce: u64,
    pub first_seen: Instant,
    pub last_seen: Instant,
    pub last_seen_at: BTreeMap<Side, Instant>,
    /// Newest records on disk 1 and 2 when it started.
    pub found: Option<(u64, u64)>,
    /// Highest number any boot had acknowledged when this one first spoke.
    pub acknowledged_before: u64,
    pub first_acknowledged: Option<(u64, Instant)>,
    pub last_acknowledged: Option<(u64, Instant)>,
    pub longest_stall: Duration,
    /// What its disks or its own checks complained about.
    pub broken: Vec<String>,
}

impl Boot {
    fn new(nonce: u64, now: Instant, acknowledged_before: u64) -> Boot {
        Boot {
            nonce,
            first_seen: now,
            last_seen: now,
            last_seen_at: BTreeMap::new(),
            found: None,
            acknowledged_before,
            first_acknowledged: None,
            last_acknowledged: None,
            longest_stall: Duration::ZERO,
            broken: Vec::new(),
        }
    }
}

impl Notes {
    pub fn newest_boot(&self) -> Option<&Boot> {
        self.boots.last()
    }

    /// Highest number acknowledged by any boot.
    pub fn newest_acknowledged(&self) -> u64 {
        self.newest_acknowledged
    }

    /// Two copies heard at one time, and for how long.
    pub fn overlap(&self) -> Option<Duration> {
        let mut overlap = None;
        for (index, later) in self.boots.iter().enumerate() {
            for earlier in &self.boots[..index] {
                let shared = earlier.last_seen.saturating_duration_since(later.first_seen);
                if shared > Duration::ZERO {
                    overlap = overlap.max(Some(shared));
                }
            }
        }
        overlap
    }

    /// The longest time without an acknowledged record that began after `since`, counting the present one.
    pub fn longest_gap_since(&self, since: Instant) -> Duration {
        longest(&self.gaps, self.last_acknowledgement, since)
    }

    /// The longest time without an answer to a probe that began after `since`, counting the present one.
    pub fn longest_silence_since(&self, since: Instant) -> Duration {
        longest(&self.silences, self.last_answer, since)
    }

    fn hear(&mut self, report: Report, side: Side, now: Instant) {
        let known = self.boots.iter().position(|boot| boot.nonce == report.boot_nonce);
        let index = known.unwrap_or_else(|| {
            self.boots.push(Boot::new(report.boot_nonce, now, self.newest_acknowledged));
            self.boots.len() - 1
        });
        let boot = &mut self.boots[index];
        boot.last_seen = now;
        boot.last_seen_at.insert(side, now);
        match report.body {
            Body::Up { newest_on_disk_1, newest_on_disk_2 } => {
                boot.found = Some((newest_on_disk_1, newest_on_disk_2));
            }
            Body::Acknowledged { sequence, took_us } => {
                boot.longest_stall = boot.longest_stall.max(Duration::from_micros(took_us));
                boot.first_acknowledged.get_or_insert((sequence, now));
                if boot.last_acknowledged.is_none_or(|(last, _)| sequence > last) {
                    boot.last_acknowledged = Some((sequence, now));
                    note_gap(&mut self.gaps, &mut self.last_acknowledgement, now);
                }
                self.newest_acknowledged = self.newest_acknowledged.max(sequence);
            }
            Body::Beat { longest_stall_us, .. } => {
                boot.longest_stall = boot.longest_stall.max(Duration::from_micros(longest_stall_us));
            }
            Body::Broken { what } => {
                if !boot.broken.contains(&what) {
                    boot.broken.push(what);
                }
            }
        }
    }
}

fn longest(gaps: &[Gap], last: Option<Instant>, since: Instant) -> Duration {
    let ended = gaps.iter().filter(|gap| gap.from + gap.length >= since).map(|gap| gap.length).max();
    let present = last.map_or(Duration::ZERO, |last| last.elapsed());
    ended.unwrap_or_default().max(present)
}

fn note_gap(gaps: &mut Vec<Gap>, last: &mut Option<Instant>, now: Instant) {
    if let Some(from) = last.replace(now) {
        let length = now.saturating_duration_since(from);
        if length >= NOTABLE_GAP {
            gaps.push(Gap { from, length });
        }
    }
}

#[derive(Debug)]
pub struct Observer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    notes: Mutex<Notes>,
    heard: Condvar,
    ending: AtomicBool,
}

impl Observer {
    pub fn start(lab: &Lab) -> Result<Observer> {
        let shared = Arc::new(Shared::default());
        let mut threads = Vec::new();
        for side in Side::ALL {
            let (reports, probes) = lab.observer(side).within(|| {
                let reports = UdpSocket::bind(("0.0.0.0", REPORT_PORT))?;
                let probes = UdpSocket::bind("0.0.0.0:0")?;
                reports.set_read_timeout(Some(POLL))?;
                probes.set_read_timeout(Some(PROBE_INTERVAL))?;
                Ok((reports, probes))
            })?;
            let its = shared.clone();
            threads.push(thread::spawn(move || its.listen(side, &reports)));
            let its = shared.clone();
            threads.push(thread::spawn(move || its.probe(side, &probes)));
        }
        Ok(Observer { shared, threads })
    }

    /// What was heard so far.
    pub fn notes(&self) -> Notes {
        self.shared.lock().clone()
    }

    /// Returns as soon as `wanted` finds something in the notes; looks at each report.
    pub fn wait<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut wanted: impl FnMut(&Notes) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + deadline;
        let mut notes = self.shared.lock();
        loop {
            if let Some(found) = wanted(&notes) {
                return Ok(found);
            }
            interrupt::check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("waited {:.1} s in vain for {what}", deadline.as_secs_f64());
            }
            notes = self.shared.heard.wait_timeout(notes, left.min(POLL)).expect("no panic while noting").0;
        }
    }

    /// Leaves a boot out of account from now on: its end was checked by other means.
    pub fn forget_boot(&self, index: usize) {
        let mut notes = self.shared.lock();
        let boot = &mut notes.boots[index];
        boot.last_seen = boot.first_seen;
    }

    /// Waits until `count` more records are acknowledged; returns the newest.
    pub fn wait_for_records(&self, count: u64, deadline: Duration) -> Result<u64> {
        let start = self.shared.lock().newest_acknowledged;
        self.wait(&format!("{count} more acknowledged records"), deadline, |notes| {
            (notes.newest_acknowledged >= start + count).then_some(notes.newest_acknowledged)
        })
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.shared.ending.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().expect("no panic while noting")
    }

    fn hear(&self, report: Report, side: Side, answered: bool) {
        let now = Instant::now();
        let mut notes = self.lock();
        notes.hear(report, side, now);
        if answered {
            let Notes { silences, last_answer, .. } = &mut *notes;
            note_gap(silences, last_answer, now);
        }
        self.heard.notify_all();
    }

    fn listen(&self, side: Side, socket: &UdpSocket) {
        let mut datagram = [0; 1024];
        while !self.ending.load(Relaxed) {
            match socket.recv(&mut datagram) {
                Ok(length) => {
                    if let Ok(Ok(report)) = std::str::from_utf8(&datagram[..length]).map(str::parse) {
                        self.hear(report, side, false);
                    }
                }
                Err(error) if is_timeout(&error) => {}
                Err(error) => return eprintln!("observer: listen: {error}"),
            }
        }
    }

    /// Sends a probe each interval and takes what comes back in between. Failing to send is what a cut link does.
    fn probe(&self, side: Side, socket: &UdpSocket) {
        let mut datagram = [0; 1024];
        let mut next = Instant::now();
        while !self.ending.load(Relaxed) {
            if Instant::now() >= next {
                let _ = socket.send_to(b"probe", (GUEST_ADDRESS, ECHO_PORT));
                next = Instant::now() + PROBE_INTERVAL;
            }
            // No answer, or an unreachable guest, is what there is to observe.
            let Ok(length) = socket.recv(&mut datagram) else { continue };
            let text = std::str::from_utf8(&datagram[..length]).unwrap_or_default();
            if let Some(Ok(report)) = text.strip_prefix("probe ").map(str::parse) {
                self.hear(report, side, true);
            }
        }
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(nonce: u64) -> Report {
        let body = Body::Beat { last_acknowledged: 0, longest_stall_us: 0, in_flight_us: 0 };
        Report { boot_nonce: nonce, uptime_ms: 0, body }
    }

    #[test]
    fn two_copies_are_told_from_one_that_restarted() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut notes = Notes::default();
        notes.hear(beat(1), Side::A, at(0));
        notes.hear(beat(1), Side::A, at(100));
        notes.hear(beat(2), Side::B, at(5000));
        assert_eq!(notes.overlap(), None);
        notes.hear(beat(1), Side::A, at(5400));
        assert_eq!(notes.overlap(), Some(Duration::from_millis(400)));
    }

    #[test]
    fn a_gap_is_the_time_between_two_acknowledgements() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut notes = Notes::default();
        for (sequence, ms) in [(1, 0), (2, 5), (3, 905), (4, 910)] {
            let body = Body::Acknowledged { sequence, took_us: 10 };
            notes.hear(Report { boot_nonce: 1, uptime_ms: ms, body }, Side::A, at(ms));
        }
        assert_eq!(notes.gaps.len(), 1);
        assert_eq!(notes.gaps[0].length, Duration::from_millis(900));
        assert_eq!(notes.newest_acknowledged(), 4);
    }
}
