//! What the guest says, and the threads that go on saying it while a disk request hangs.

use std::fs::File;
use std::io::{self, Read};
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use lab_guest::report::{Body, ECHO_PORT, Report};

const BEAT_INTERVAL: Duration = Duration::from_millis(100);
const IDLE: u64 = u64::MAX;

#[derive(Debug)]
pub struct Voice {
    socket: UdpSocket,
    report_to: String,
    boot_nonce: u64,
    started: Instant,
    last_acknowledged: AtomicU64,
    longest_stall_us: AtomicU64,
    /// Since when, in µs after the start, a record is being written; `IDLE` when none is.
    writing_since_us: AtomicU64,
}

impl Voice {
    pub fn new(report_to: &str) -> io::Result<Voice> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_broadcast(true)?;
        let mut nonce = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut nonce)?;
        Ok(Voice {
            socket,
            report_to: report_to.to_owned(),
            boot_nonce: u64::from_le_bytes(nonce),
            started: Instant::now(),
            last_acknowledged: AtomicU64::new(0),
            longest_stall_us: AtomicU64::new(0),
            writing_since_us: AtomicU64::new(IDLE),
        })
    }

    pub fn boot_nonce(&self) -> u64 {
        self.boot_nonce
    }

    pub fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    pub fn writing(&self, busy: bool) {
        self.writing_since_us.store(if busy { self.now_us() } else { IDLE }, Relaxed);
    }

    pub fn acknowledged(&self, sequence: u64, took_us: u64) {
        self.writing(false);
        self.last_acknowledged.store(sequence, Relaxed);
        self.longest_stall_us.fetch_max(took_us, Relaxed);
        self.say(Body::Acknowledged { sequence, took_us });
    }

    pub fn broken(&self, what: &str) {
        println!("lab-guest: BROKEN {what}");
        self.say(Body::Broken { what: what.to_owned() });
    }

    pub fn broken_for_ever(&self, what: &str) -> ! {
        loop {
            self.broken(what);
            thread::sleep(Duration::from_secs(1));
        }
    }

    /// A report that cannot be sent is lost: the network may be cut on purpose.
    pub fn say(&self, body: Body) {
        let _ = self.socket.send_to(self.report(body).to_string().as_bytes(), &self.report_to);
    }

    fn report(&self, body: Body) -> Report {
        Report { boot_nonce: self.boot_nonce, uptime_ms: self.uptime_ms(), body }
    }

    fn beat(&self) -> Body {
        let since = self.writing_since_us.load(Relaxed);
        let in_flight_us = if since == IDLE { 0 } else { self.now_us().saturating_sub(since) };
        Body::Beat {
            last_acknowledged: self.last_acknowledged.load(Relaxed),
            longest_stall_us: self.longest_stall_us.load(Relaxed).max(in_flight_us),
            in_flight_us,
        }
    }
}

/// Says that the machine runs, however long its disks take.
pub fn spawn_beat(voice: Arc<Voice>) {
    thread::spawn(move || {
        loop {
            voice.say(voice.beat());
            thread::sleep(BEAT_INTERVAL);
        }
    });
}

/// Answers each probe with the probe's bytes and a beat.
pub fn spawn_echo(voice: Arc<Voice>) {
    thread::spawn(move || {
        let socket = match UdpSocket::bind(("0.0.0.0", ECHO_PORT)) {
            Ok(socket) => socket,
            Err(error) => voice.broken_for_ever(&format!("bind the echo port: {error}")),
        };
        let mut probe = [0; 512];
        loop {
            let Ok((length, from)) = socket.recv_from(&mut probe) else { continue };
            let mut answer = probe[..length].to_vec();
            answer.push(b' ');
            answer.extend_from_slice(voice.report(voice.beat()).to_string().as_bytes());
            let _ = socket.send_to(&answer, from);
        }
    });
}
