//! The guard's decisions: no clock, no socket, no process.
//!
//! The one promise: when the lease is over, the vCPUs are known to stand still within [`Watch::guard_stop`], or QEMU
//! is killed then. What is *known* comes from QEMU's own events alone:
//!
//! ```text
//!               cont sent                       lease over, or `pause`: stop sent
//!   Still ────────────────────► MayRun ───────────────────────────────────────┐
//!     ▲                           │  ▲                                        │
//!     │ cont refused              │  └─ RESUME nobody here asked for          │
//!     ├───────────────────────────┤                                           │
//!     │ STOP, or stop's answer,   │                                           │
//!     │ unless a cont is on its   │ `guard_stop` after the end of the lease   │
//!     │ way behind it             ▼                                           │
//!     └──────────────────────── MayRun ◄──────────────────────────────────────┘
//!                                 └──► killed
//! ```
//!
//! QEMU announces STOP as soon as the vCPUs stand still and the devices were told, and only then waits for I/O in
//! flight. With a dead daemon that wait does not end, so `stop` gets no answer and `query-status` neither: the event
//! is the confirmation.

use crate::machine::{ExitCause, Lease, PauseCause, RunState};
use rempart_types::MonotonicTime;
use std::time::Duration;

/// A lease longer than this is a bug of whoever asks for it, and would defeat its purpose.
pub(crate) const LONGEST_LEASE: Duration = Duration::from_secs(60);

/// What came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    /// QEMU is up; its vCPUs have not run.
    MonitorReady,
    /// QEMU's STOP event.
    Stopped,
    /// QEMU's RESUME event.
    Resumed,
    StopAnswered,
    ContAnswered(Result<(), String>),
    Renew(Asker, Lease),
    Pause(Asker),
    Resume(Asker),
    Kill(Asker),
    Tick,
}

/// Who waits for an answer: a connection and the number of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asker {
    pub connection: u64,
    pub request: u64,
}

/// What is to be done, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    SendStop,
    SendCont,
    /// SIGKILL, now.
    Kill,
    Answer(Asker, Result<(), String>),
    TellPaused(PauseCause),
    TellResumed,
    TellLeaseExpired,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vcpus {
    /// They cannot run until somebody resumes them.
    Still(PauseCause),
    MayRun,
}

/// The state of one watched machine.
#[derive(Debug)]
pub(crate) struct Watch {
    lease: Lease,
    guard_stop: Duration,
    /// Let them run as soon as QEMU is up.
    run_at_start: bool,
    up: bool,
    vcpus: Vcpus,
    /// `cont` was sent and had no effect yet: a STOP before that effect proves nothing.
    cont_in_flight: bool,
    /// Why `stop` was sent, while the vCPUs may still run.
    stopping: Option<PauseCause>,
    killed: Option<ExitCause>,
    pause_askers: Vec<Asker>,
    resume_askers: Vec<Asker>,
}

impl Watch {
    pub(crate) fn new(lease: Lease, guard_stop: Duration, run_at_start: bool) -> Self {
        Self {
            lease,
            guard_stop,
            run_at_start,
            up: false,
            vcpus: Vcpus::Still(PauseCause::NotStarted),
            cont_in_flight: false,
            stopping: None,
            killed: None,
            pause_askers: Vec::new(),
            resume_askers: Vec::new(),
        }
    }

    pub(crate) fn lease(&self) -> Lease {
        self.lease
    }

    pub(crate) fn run_state(&self) -> RunState {
        match self.vcpus {
            _ if !self.up => RunState::Starting,
            Vcpus::Still(_) => RunState::Paused,
            Vcpus::MayRun if self.stopping.is_some() => RunState::Pausing,
            Vcpus::MayRun => RunState::Running,
        }
    }

    pub(crate) fn pause_cause(&self) -> Option<PauseCause> {
        match self.vcpus {
            Vcpus::Still(cause) => Some(cause),
            Vcpus::MayRun => None,
        }
    }

    /// Why it was killed, if it was.
    pub(crate) fn killed(&self) -> Option<ExitCause> {
        self.killed
    }

    /// Whether nothing can go wrong now: what a hardware watchdog may be told.
    pub(crate) fn is_safe(&self, now: MonotonicTime) -> bool {
        matches!(self.vcpus, Vcpus::Still(_)) || !self.lease.is_over(now)
    }

    /// When to be called with [`Input::Tick`].
    pub(crate) fn next_wake(&self) -> Option<MonotonicTime> {
        if self.killed.is_some() || self.vcpus != Vcpus::MayRun {
            return None;
        }
        let Lease::UntilBoottimeNs(until) = self.lease else { return None };
        let until = MonotonicTime(until);
        Some(if self.stopping == Some(PauseCause::Lease) { until + self.guard_stop } else { until })
    }

    pub(crate) fn handle(&mut self, input: Input, now: MonotonicTime, out: &mut Vec<Action>) {
        match input {
            Input::MonitorReady => {
                self.up = true;
                if self.run_at_start {
                    self.send_cont(now, out);
                }
            }
            Input::Stopped | Input::StopAnswered => self.stands_still(out),
            Input::Resumed => self.runs(out),
            Input::ContAnswered(Ok(())) => {
                // Without a RESUME event if it waits for an incoming migration: it may run at any time from now on.
                if self.cont_in_flight {
                    self.runs(out);
                }
            }
            Input::ContAnswered(Err(error)) => self.cont_refused(error, out),
            Input::Renew(asker, lease) => self.renew(asker, lease, now, out),
            Input::Pause(asker) => self.pause(asker, out),
            Input::Resume(asker) => self.resume(asker, now, out),
            Input::Kill(asker) => {
                self.kill(ExitCause::Request, out);
                out.push(Action::Answer(asker, Ok(())));
            }
            Input::Tick => {}
        }
        self.watch_lease(now, out);
    }

    fn watch_lease(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        let Lease::UntilBoottimeNs(until) = self.lease else { return };
        let until = MonotonicTime(until);
        if self.killed.is_some() || self.vcpus != Vcpus::MayRun || now < until {
            return;
        }
        if self.stopping != Some(PauseCause::Lease) {
            out.push(Action::TellLeaseExpired);
            if self.stopping.is_none() || self.cont_in_flight {
                out.push(Action::SendStop);
            }
            self.stopping = Some(PauseCause::Lease);
        }
        // Counted from the end of the lease, not from now: the peer counts from there too, and this process may have
        // slept.
        if now >= until + self.guard_stop {
            self.kill(ExitCause::Lease, out);
        }
    }

    fn renew(&mut self, asker: Asker, lease: Lease, now: MonotonicTime, out: &mut Vec<Action>) {
        let answer = match (self.lease, lease) {
            (_, Lease::UntilBoottimeNs(until)) if MonotonicTime(until).since(now) > LONGEST_LEASE => {
                Err(format!("a lease is at most {} s long", LONGEST_LEASE.as_secs()))
            }
            (Lease::UntilBoottimeNs(old), Lease::UntilBoottimeNs(new)) => {
                self.lease = Lease::UntilBoottimeNs(old.max(new));
                Ok(())
            }
            (_, new) => {
                self.lease = new;
                Ok(())
            }
        };
        out.push(Action::Answer(asker, answer));
    }

    fn pause(&mut self, asker: Asker, out: &mut Vec<Action>) {
        self.run_at_start = false;
        match self.vcpus {
            Vcpus::Still(_) => out.push(Action::Answer(asker, Ok(()))),
            Vcpus::MayRun => {
                self.pause_askers.push(asker);
                if self.stopping.is_none() {
                    self.stopping = Some(PauseCause::Request);
                    out.push(Action::SendStop);
                }
            }
        }
    }

    fn resume(&mut self, asker: Asker, now: MonotonicTime, out: &mut Vec<Action>) {
        let refusal = if self.killed.is_some() {
            "it was killed"
        } else if !self.up {
            "QEMU is not up yet"
        } else if self.lease.is_over(now) {
            "its lease is over"
        } else if self.stopping.is_some() {
            "it is being paused"
        } else {
            match self.vcpus {
                Vcpus::MayRun if !self.cont_in_flight => out.push(Action::Answer(asker, Ok(()))),
                Vcpus::MayRun => self.resume_askers.push(asker),
                Vcpus::Still(_) => {
                    self.resume_askers.push(asker);
                    self.send_cont(now, out);
                }
            }
            return;
        };
        out.push(Action::Answer(asker, Err(refusal.into())));
    }

    fn send_cont(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        if self.lease.is_over(now) {
            self.vcpus = Vcpus::Still(PauseCause::Lease);
            out.push(Action::TellLeaseExpired);
            out.push(Action::TellPaused(PauseCause::Lease));
            return;
        }
        self.vcpus = Vcpus::MayRun;
        self.cont_in_flight = true;
        out.push(Action::SendCont);
    }

    fn stands_still(&mut self, out: &mut Vec<Action>) {
        if self.cont_in_flight || self.vcpus != Vcpus::MayRun {
            return;
        }
        let cause = self.stopping.take().unwrap_or(PauseCause::Qemu);
        self.vcpus = Vcpus::Still(cause);
        out.push(Action::TellPaused(cause));
        out.extend(self.pause_askers.drain(..).map(|asker| Action::Answer(asker, Ok(()))));
    }

    fn runs(&mut self, out: &mut Vec<Action>) {
        self.cont_in_flight = false;
        self.vcpus = Vcpus::MayRun;
        out.push(Action::TellResumed);
        out.extend(self.resume_askers.drain(..).map(|asker| Action::Answer(asker, Ok(()))));
    }

    fn cont_refused(&mut self, error: String, out: &mut Vec<Action>) {
        self.cont_in_flight = false;
        let cause = self.stopping.take().unwrap_or(PauseCause::Qemu);
        self.vcpus = Vcpus::Still(cause);
        out.push(Action::TellPaused(cause));
        out.extend(self.resume_askers.drain(..).map(|asker| Action::Answer(asker, Err(error.clone()))));
        out.extend(self.pause_askers.drain(..).map(|asker| Action::Answer(asker, Ok(()))));
    }

    fn kill(&mut self, cause: ExitCause, out: &mut Vec<Action>) {
        if self.killed.is_none() {
            self.killed = Some(cause);
            out.push(Action::Kill);
        }
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
