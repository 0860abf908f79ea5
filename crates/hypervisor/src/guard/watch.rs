//! The guard's decisions: no clock, no socket, no process.
//!
//! The one promise: when the lease is over, the vCPUs are known to stand still within [`Watch::guard_stop`], or QEMU
//! is killed then. Three things prove that they do; `MayRun` is everything else:
//!
//! ```text
//!              cont, or thaw and cont
//!   Still ───────────────────────────────► MayRun ──┐ lease over, or `pause`: stop sent
//!     ▲                                      │  ▲    │ half of `guard_stop` later: frozen
//!     │ STOP, or stop's answer, unless a     │  └────┘ RESUME or thaw that nobody here asked for
//!     │ cont is on its way behind it         │
//!     │ cont refused                         │ `guard_stop` after the end of the lease
//!     │ all threads of QEMU are stopped      ▼
//!     └───────────────────────────────────  killed
//! ```
//!
//! QEMU's own `stop` is the good way: the guest's clock stops too, and the monitor stays usable. But QEMU waits for
//! the devices' I/O in flight before it says STOP, and with a dead daemon, or one that lost its peer, that I/O does
//! not end. Killing the guest for it would turn every longer fault into a reboot. So then QEMU is stopped by the
//! kernel (SIGSTOP), which tells its parent when the last thread stands; the `stop` that was sent takes effect when it
//! goes on, before anything else is done.
//!
//! A QEMU that somebody else had stopped before is killed instead: it never heard of our `stop`, and would run on as
//! soon as that somebody lets it.

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
    /// The kernel says that all of QEMU's threads are stopped.
    Frozen,
    /// The kernel says that they go on.
    Thawed,
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
    /// SIGSTOP.
    Freeze,
    /// SIGCONT.
    Thaw,
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

/// Whether QEMU's threads are stopped by a signal, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freeze {
    No,
    /// SIGSTOP was sent, and is not confirmed yet.
    Asked,
    Ours,
    Others,
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
    /// How many `cont` were sent and not answered. A STOP before the last of them took effect proves nothing.
    conts_in_flight: u32,
    /// The first of them took effect.
    cont_took_effect: bool,
    /// There was more than one: what an error among their answers means is not clear.
    conts_overlapped: bool,
    /// Why `stop` was sent, while the vCPUs may still run.
    stopping: Option<PauseCause>,
    /// When to stop waiting for it.
    freeze_at: MonotonicTime,
    freeze: Freeze,
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
            conts_in_flight: 0,
            cont_took_effect: false,
            conts_overlapped: false,
            stopping: None,
            freeze_at: MonotonicTime::FAR_FUTURE,
            freeze: Freeze::No,
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
        let lease = match self.lease {
            Lease::Unlimited => None,
            Lease::UntilBoottimeNs(until) if self.stopping == Some(PauseCause::Lease) => {
                Some(MonotonicTime(until) + self.guard_stop)
            }
            Lease::UntilBoottimeNs(until) => Some(MonotonicTime(until)),
        };
        let freeze = (self.stopping.is_some() && self.freeze == Freeze::No).then_some(self.freeze_at);
        lease.into_iter().chain(freeze).min()
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
            Input::ContAnswered(answer) => self.cont_answered(answer, out),
            Input::Renew(asker, lease) => self.renew(asker, lease, now, out),
            Input::Pause(asker) => self.pause(asker, now, out),
            Input::Resume(asker) => self.resume(asker, now, out),
            Input::Kill(asker) => {
                self.kill(ExitCause::Request, out);
                out.push(Action::Answer(asker, Ok(())));
            }
            Input::Frozen => self.frozen(out),
            Input::Thawed => self.thawed(out),
            Input::Tick => {}
        }
        self.watch_lease(now, out);
        self.watch_stop(now, out);
    }

    /// A `stop` that is not confirmed in half the time gets help.
    fn watch_stop(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        let waiting = self.vcpus == Vcpus::MayRun && self.stopping.is_some() && self.killed.is_none();
        if waiting && self.freeze == Freeze::No && now >= self.freeze_at {
            self.freeze = Freeze::Asked;
            out.push(Action::Freeze);
        }
    }

    fn watch_lease(&mut self, now: MonotonicTime, out: &mut Vec<Action>) {
        let Lease::UntilBoottimeNs(until) = self.lease else { return };
        let until = MonotonicTime(until);
        if self.killed.is_some() || self.vcpus != Vcpus::MayRun || now < until {
            return;
        }
        if self.stopping != Some(PauseCause::Lease) {
            out.push(Action::TellLeaseExpired);
            if self.stopping.is_none() || self.conts_in_flight > 0 {
                out.push(Action::SendStop);
            }
            self.stopping = Some(PauseCause::Lease);
            // Counted from the end of the lease, not from now: the peer counts from there too, and this process may
            // have slept. That holds for the end below as well.
            self.freeze_at = self.freeze_at.min(until + self.guard_stop / 2);
        }
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

    fn pause(&mut self, asker: Asker, now: MonotonicTime, out: &mut Vec<Action>) {
        self.run_at_start = false;
        match self.vcpus {
            Vcpus::Still(_) => out.push(Action::Answer(asker, Ok(()))),
            Vcpus::MayRun => {
                self.pause_askers.push(asker);
                if self.stopping.is_none() {
                    self.stopping = Some(PauseCause::Request);
                    self.freeze_at = now + self.guard_stop / 2;
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
                Vcpus::MayRun if self.conts_in_flight == 0 => out.push(Action::Answer(asker, Ok(()))),
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
        self.conts_overlapped = self.conts_in_flight > 0;
        self.cont_took_effect &= self.conts_overlapped;
        self.conts_in_flight += 1;
        if self.freeze == Freeze::Ours {
            self.thaw(out);
        }
        out.push(Action::SendCont);
    }

    /// QEMU says so.
    fn stands_still(&mut self, out: &mut Vec<Action>) {
        let conts_to_come = self.conts_in_flight.saturating_sub(self.cont_took_effect.into());
        if conts_to_come == 0 && self.vcpus == Vcpus::MayRun {
            self.set_still(out);
        }
    }

    fn set_still(&mut self, out: &mut Vec<Action>) {
        let cause = self.stopping.take().unwrap_or(PauseCause::Qemu);
        self.freeze_at = MonotonicTime::FAR_FUTURE;
        self.vcpus = Vcpus::Still(cause);
        out.push(Action::TellPaused(cause));
        out.extend(self.pause_askers.drain(..).map(|asker| Action::Answer(asker, Ok(()))));
    }

    fn frozen(&mut self, out: &mut Vec<Action>) {
        match self.freeze {
            Freeze::Asked if self.vcpus == Vcpus::MayRun => {
                self.freeze = Freeze::Ours;
                self.set_still(out);
            }
            // QEMU's own word came first, and is better: its monitor can be used.
            Freeze::Asked => self.thaw(out),
            Freeze::No => self.freeze = Freeze::Others,
            Freeze::Ours | Freeze::Others => {}
        }
    }

    fn thaw(&mut self, out: &mut Vec<Action>) {
        self.freeze = Freeze::No;
        out.push(Action::Thaw);
    }

    fn thawed(&mut self, out: &mut Vec<Action>) {
        match self.freeze {
            // Somebody else did. Until QEMU says STOP, its vCPUs may run.
            Freeze::Ours => {
                self.freeze = Freeze::No;
                self.vcpus = Vcpus::MayRun;
                out.push(Action::TellResumed);
            }
            Freeze::Others => self.freeze = Freeze::No,
            Freeze::No | Freeze::Asked => {}
        }
    }

    fn runs(&mut self, out: &mut Vec<Action>) {
        self.cont_took_effect = true;
        self.vcpus = Vcpus::MayRun;
        out.push(Action::TellResumed);
        out.extend(self.resume_askers.drain(..).map(|asker| Action::Answer(asker, Ok(()))));
    }

    fn cont_answered(&mut self, answer: Result<(), String>, out: &mut Vec<Action>) {
        self.conts_in_flight = self.conts_in_flight.saturating_sub(1);
        let took_effect = std::mem::take(&mut self.cont_took_effect);
        match answer {
            Ok(()) if took_effect => {}
            // There was no RESUME event if it waits for an incoming migration: it may run at any time from now on.
            Ok(()) => {
                self.runs(out);
                self.cont_took_effect = false;
            }
            Err(error) => {
                out.extend(
                    self.resume_askers.drain(..).map(|asker| Action::Answer(asker, Err(error.clone()))),
                );
                // If in doubt, it may run: `stop` will show.
                if !self.conts_overlapped && !took_effect && self.vcpus == Vcpus::MayRun {
                    self.set_still(out);
                }
            }
        }
        self.conts_overlapped &= self.conts_in_flight > 0;
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
