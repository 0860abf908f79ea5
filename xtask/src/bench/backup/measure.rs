//! One command, measured.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::interrupt;
use crate::workspace::shown;

/// How often a command's memory is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Bytes of what it said last that an error repeats.
const LAST_SAID: usize = 4096;

/// What a command took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Taken {
    pub seconds: f64,
    /// Of all processors, the commands that it started among them.
    pub processor_seconds: f64,
    /// The most that it had to itself at one time, as seen every 10 ms: not its program, nor files it mapped.
    pub anonymous_bytes: u64,
}

impl Taken {
    /// One after the other.
    pub fn and(self, next: Taken) -> Taken {
        Taken {
            seconds: self.seconds + next.seconds,
            processor_seconds: self.processor_seconds + next.processor_seconds,
            anonymous_bytes: self.anonymous_bytes.max(next.anonymous_bytes),
        }
    }
}

/// Free memory that is touched before a command is measured, at most: a restore's file and what is read for it.
const AT_HAND: u64 = 9 << 30;
/// Free memory that is left alone.
const LEFT: u64 = 2 << 30;

/// Has free memory at hand. The host of a virtual machine may take back what has been free for a moment, and gives it again page by
/// page, at several times the cost of what is done with it: who runs first would pay for that.
pub fn have_memory_at_hand() -> Result<()> {
    interrupt::check()?;
    let free = fs::read_to_string("/proc/meminfo")?;
    let free = free.lines().find_map(|line| kibibytes(line.strip_prefix("MemFree:")?)).unwrap_or(0);
    let touched = vec![1u8; free.saturating_sub(LEFT).min(AT_HAND).try_into()?];
    drop(std::hint::black_box(touched));
    Ok(())
}

/// The bytes that a line of proc(5) tells of.
fn kibibytes(told: &str) -> Option<u64> {
    Some(told.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// Runs a command to its end. Its output goes nowhere; what it says of errors is part of the error.
pub fn run(command: &mut Command) -> Result<Taken> {
    run_to_status(command, 0)
}

/// Runs a command that is to end with that exit status.
pub fn run_to_status(command: &mut Command, expected: i32) -> Result<Taken> {
    interrupt::check()?;
    let before = children_seconds();
    let begun = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{}`", shown(command)))?;
    let mut stderr = child.stderr.take().expect("it is piped");
    let over = AtomicBool::new(false);
    let (said, status, seconds, anonymous_bytes) = thread::scope(|scope| {
        let said = scope.spawn(move || {
            let mut said = Vec::new();
            let _ = std::io::Read::read_to_end(&mut stderr, &mut said);
            let last = &said[said.len().saturating_sub(LAST_SAID)..];
            String::from_utf8_lossy(last).into_owned()
        });
        let (id, over) = (child.id(), &over);
        let memory = scope.spawn(move || watch_memory(id, over));
        let status = wait(&mut child);
        let seconds = begun.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        let said = said.join().expect("it does not panic");
        (said, status, seconds, memory.join().expect("it does not panic"))
    });
    let status = status?;
    if status.code() != Some(expected) {
        bail!("`{}` failed: {status}\n{}", shown(command), said.trim_end());
    }
    Ok(Taken { seconds, processor_seconds: children_seconds() - before, anonymous_bytes })
}

fn wait(child: &mut Child) -> Result<std::process::ExitStatus> {
    loop {
        // A short poll: the end must be seen when it is, and an interrupt, too.
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if let Err(interrupted) = interrupt::check() {
            child.kill()?;
            child.wait()?;
            return Err(interrupted);
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn watch_memory(id: u32, over: &AtomicBool) -> u64 {
    let mut most = 0;
    while !over.load(Ordering::Relaxed) {
        most = most.max(anonymous_bytes(id).unwrap_or(0));
        thread::sleep(LOOK);
    }
    most
}

/// `RssAnon` of proc(5); nothing once it is gone.
fn anonymous_bytes(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    status.lines().find_map(|line| kibibytes(line.strip_prefix("RssAnon:")?))
}

/// Processor time of all that this process started and that ended.
fn children_seconds() -> f64 {
    // SAFETY: all zeroes is a rusage, and getrusage fills the one it is given.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
