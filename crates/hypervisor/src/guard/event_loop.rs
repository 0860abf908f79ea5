//! Carries out what [`Watch`] decides: the guard's one loop over its sockets, QEMU and the clock.

use super::connection::Connection;
use super::gate::Gate;
use super::protocol::{
    Command, FromGuard, GuardEvent, GuardStatus, MOST_KEPT, Outcome, PROTOCOL_VERSION, Request, StartReport,
};
use super::watch::{Action, Asker, Input, Watch};
use super::watchdog::Watchdog;
use super::{report, spawn};
use crate::clock::boottime;
use crate::error::{Error, ErrorKind, Result};
use crate::lines::LineBuffer;
use crate::machine::{ExitCause, ExitRecord};
use crate::process::ProcessIdentity;
use crate::qmp::message::{self, Event, Message};
use crate::run_dir::{FILES_VERSION, Launch, RunDir, State};
use crate::tap;
use rempart_types::MonotonicTime;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Signal, WaitId, WaitIdOptions};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::Duration;

/// Daemons at once: the one, its successor, and some that are dead but not noticed yet.
const MOST_CONNECTIONS: usize = 16;

/// Numbers of the guard's own commands to QEMU; only these two answers matter.
const STOP_COMMAND: u64 = 1;
const CONT_COMMAND: u64 = 2;
const OTHER_COMMAND: u64 = 3;

#[derive(Debug)]
pub(super) struct Guard {
    run_dir: RunDir,
    launch: Launch,
    watch: Watch,
    qemu: Child,
    qemu_pidfd: OwnedFd,
    /// None after QEMU closed it.
    monitor: Option<UnixStream>,
    monitor_lines: LineBuffer,
    timer: OwnedFd,
    signals: OwnedFd,
    listener: UnixListener,
    connections: BTreeMap<u64, Connection>,
    last_connection: u64,
    kept: Vec<(String, OwnedFd)>,
    gate: Option<Gate>,
    watchdog: Option<Watchdog>,
    guest_shut_down: bool,
    quit_by_monitor: bool,
    start_reported: bool,
    actions: Vec<Action>,
}

/// What poll() found ready.
#[derive(Debug, Default)]
struct Ready {
    listener: bool,
    signals: bool,
    monitor: bool,
    gate: bool,
    qemu_ended: bool,
    connections: Vec<u64>,
}

impl Guard {
    /// Makes the machine's network, starts QEMU and opens the guard's socket.
    pub(super) fn start(run_dir: RunDir) -> Result<Self> {
        let launch = run_dir.read_launch()?;
        run_dir.remove("exit.json")?;
        let signals = take_signals().map_err(|error| Error::io("take over signals", error))?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Boottime,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )
        .map_err(|error| Error::io("make a timer", error))?;
        let watchdog = launch.watchdog.as_deref().map(Watchdog::open).transpose()?;
        let mut taps = Vec::new();
        for wanted in &launch.taps {
            taps.push(tap::open(&wanted.interface, &tap::find_bridge(&wanted.bridge)?)?);
        }
        let guard_stop = Duration::from_millis(launch.guard_stop_ms);
        let gate = if launch.network_gate && !taps.is_empty() {
            let interfaces = launch.taps.iter().map(|tap| tap.interface.clone()).collect();
            let mut gate = Gate::set_up(&launch.machine, interfaces, guard_stop)?;
            gate.renew(launch.lease, boottime())?;
            Some(gate)
        } else {
            None
        };
        run_dir.remove("guard.sock")?;
        let listener = UnixListener::bind(run_dir.file("guard.sock"))
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|error| Error::io("open the guard's socket", error))?;
        let identify = |pid: u32| {
            ProcessIdentity::of(pid)
                .and_then(|identity| identity.ok_or_else(|| io::ErrorKind::NotFound.into()))
                .map_err(|error| Error::io("find a process of the machine", error))
        };
        let guard = identify(std::process::id())?;
        let machine = launch.machine.clone();
        let state = State { version: FILES_VERSION, machine, guard, qemu: None };
        run_dir.write_state(&state)?;
        let (qemu, monitor) = spawn::start_qemu(&run_dir, &launch, &taps)
            .map_err(|error| start_error(&launch.command[0], error))?;
        drop(taps);
        // From here on an error ends this process, and QEMU with it.
        let qemu_pidfd = i32::try_from(qemu.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()))
            .map_err(|error| Error::io("watch QEMU", error))?;
        run_dir.write_state(&State { qemu: Some(identify(qemu.id())?), ..state })?;
        Ok(Self {
            watch: Watch::new(launch.lease, guard_stop, launch.run_vcpus),
            run_dir,
            launch,
            qemu,
            qemu_pidfd,
            monitor: Some(monitor),
            monitor_lines: LineBuffer::new(message::LONGEST_LINE),
            timer,
            signals,
            listener,
            connections: BTreeMap::new(),
            last_connection: 0,
            kept: Vec::new(),
            gate,
            watchdog,
            guest_shut_down: false,
            quit_by_monitor: false,
            start_reported: false,
            actions: Vec::new(),
        })
    }

    /// Watches until QEMU is gone.
    pub(super) fn run(mut self) -> Result<()> {
        loop {
            let ready = self.wait().map_err(|error| Error::io("wait for the machine", error))?;
            // Renewals first: one that arrived while this process slept may still hold.
            for id in ready.connections {
                self.serve(id);
            }
            if ready.listener {
                self.accept();
            }
            if ready.monitor {
                self.read_monitor();
            }
            if ready.gate
                && let Some(gate) = &mut self.gate
                && let Err(error) = gate.check(boottime())
            {
                self.gate_failed(&error);
            }
            if ready.signals {
                self.read_signals();
            }
            self.decide(Input::Tick);
            if let Some(watchdog) = &mut self.watchdog {
                let now = boottime();
                watchdog.tick(self.watch.is_safe(now), now);
            }
            if ready.qemu_ended {
                return self.finish();
            }
        }
    }

    fn wait(&mut self) -> io::Result<Ready> {
        let wakes = [self.watch.next_wake(), self.watchdog.as_ref().map(Watchdog::next_wake)];
        self.arm(wakes.into_iter().flatten().min())?;
        let readable = PollFlags::IN;
        let mut fds = vec![
            PollFd::new(&self.timer, readable),
            PollFd::new(&self.qemu_pidfd, readable),
            PollFd::new(&self.signals, readable),
            PollFd::new(&self.listener, readable),
        ];
        let fixed = fds.len();
        for connection in self.connections.values() {
            let both = if connection.wants_to_write() { readable | PollFlags::OUT } else { readable };
            fds.push(PollFd::new(connection, both));
        }
        let connected = fds.len();
        fds.extend(self.monitor.as_ref().map(|monitor| PollFd::new(monitor, readable)));
        let with_monitor = fds.len();
        let gate_errors = self.gate.as_ref().and_then(Gate::errors);
        fds.extend(gate_errors.as_ref().map(|errors| PollFd::new(errors, readable)));
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None))?;
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(Ready {
            qemu_ended: is_ready(&fds[1]),
            signals: is_ready(&fds[2]),
            listener: is_ready(&fds[3]),
            connections: self
                .connections
                .keys()
                .zip(&fds[fixed..connected])
                .filter(|(_, fd)| is_ready(fd))
                .map(|(id, _)| *id)
                .collect(),
            monitor: fds[connected..with_monitor].iter().any(is_ready),
            gate: fds[with_monitor..].iter().any(is_ready),
        })
    }

    /// Sets the timer; a time that has passed fires at once.
    fn arm(&self, wake: Option<MonotonicTime>) -> io::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // All zero would mean never.
        let it_value = wake.map_or(zero, |wake| Timespec {
            tv_sec: (wake.0 / 1_000_000_000) as i64,
            tv_nsec: (wake.0 % 1_000_000_000).max(1) as i64,
        });
        let setting = Itimerspec { it_interval: zero, it_value };
        // Setting it also forgets an expiry that was not read.
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &setting)?;
        Ok(())
    }

    fn decide(&mut self, input: Input) {
        let mut actions = std::mem::take(&mut self.actions);
        self.watch.handle(input, boottime(), &mut actions);
        for action in actions.drain(..) {
            self.carry_out(action);
        }
        self.actions = actions;
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::SendStop => self.send_to_qemu(STOP_COMMAND, "stop"),
            Action::SendCont => self.send_to_qemu(CONT_COMMAND, "cont"),
            Action::Freeze => {
                tracing::warn!(machine = self.launch.machine, "QEMU waits for its disks: freezing it");
                self.signal_qemu(Signal::STOP);
            }
            Action::Thaw => self.signal_qemu(Signal::CONT),
            Action::Kill => {
                tracing::warn!(machine = self.launch.machine, cause = ?self.watch.killed(), "killing QEMU");
                self.signal_qemu(Signal::KILL);
            }
            Action::Answer(asker, Ok(())) => self.answer(asker, Outcome::Fine, Vec::new()),
            Action::Answer(asker, Err(error)) => self.refuse(asker, error),
            Action::TellPaused(cause) => {
                tracing::info!(machine = self.launch.machine, ?cause, "paused");
                self.tell(GuardEvent::Paused(cause));
                self.report_start();
            }
            Action::TellResumed => {
                tracing::info!(machine = self.launch.machine, "running");
                self.tell(GuardEvent::Resumed);
                self.report_start();
            }
            Action::TellLeaseExpired => {
                tracing::warn!(machine = self.launch.machine, "the lease is over");
                self.tell(GuardEvent::LeaseExpired);
            }
        }
    }

    fn signal_qemu(&self, signal: Signal) {
        if let Err(error) = crate::process::signal(&self.qemu_pidfd, signal) {
            tracing::error!(%error, ?signal, "cannot signal QEMU");
        }
    }

    /// QEMU is up, and its vCPUs are as they were asked to be.
    fn report_start(&mut self) {
        if !self.start_reported {
            self.start_reported = true;
            report(&StartReport::Ready);
        }
    }

    fn send_to_qemu(&mut self, id: u64, command: &str) {
        let line = message::command(id, command, &serde_json::Value::Null);
        let Some(monitor) = &mut self.monitor else { return };
        // A socket that takes no more belongs to a QEMU that hangs: the deadline takes care of it.
        if let Err(error) = monitor.write_all(&line) {
            tracing::warn!(%error, command, "cannot reach QEMU's monitor");
        }
    }

    /// Takes what QEMU said; false when that is all.
    fn read_monitor(&mut self) -> bool {
        let mut bytes = [0; 16 * 1024];
        let Some(monitor) = &mut self.monitor else { return false };
        match monitor.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(_) | Ok(0) => {
                self.monitor = None;
                return false;
            }
            Ok(count) => self.monitor_lines.push(&bytes[..count]),
        }
        loop {
            match self.monitor_lines.next_line().map(|line| line.map(|line| message::parse(&line))) {
                Ok(Some(Ok(message))) => self.hear(message),
                Ok(None) => return true,
                Ok(Some(Err(error))) => tracing::warn!(%error, "a line of QEMU's monitor is not understood"),
                Err(error) => {
                    // Deaf from now on: nothing can be confirmed, so the end of the lease kills.
                    tracing::error!(%error, "QEMU's monitor is not usable any more");
                    self.monitor = None;
                    return false;
                }
            }
        }
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Greeting { .. } => self.send_to_qemu(0, "qmp_capabilities"),
            // The main loop answers only when every disk is open: QEMU is up.
            Message::Return { id: Some(0), .. } => {
                self.decide(Input::MonitorReady);
                if !self.launch.run_vcpus {
                    self.report_start();
                }
            }
            Message::Return { id: Some(STOP_COMMAND), .. } => self.decide(Input::StopAnswered),
            Message::Return { id: Some(CONT_COMMAND), .. } => self.decide(Input::ContAnswered(Ok(()))),
            Message::Error { id: Some(CONT_COMMAND), error } => {
                self.decide(Input::ContAnswered(Err(error.to_string())));
            }
            Message::Error { id, error } => tracing::warn!(?id, %error, "QEMU refuses a command"),
            Message::Return { .. } => {}
            Message::Event(Event::Stop) => self.decide(Input::Stopped),
            Message::Event(Event::Resume) => self.decide(Input::Resumed),
            Message::Event(Event::Shutdown { by_guest, reason }) => {
                self.guest_shut_down |= by_guest;
                self.quit_by_monitor |= reason == "host-qmp-quit";
            }
            Message::Event(_) => {}
        }
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    tracing::warn!(%error, "cannot take a connection");
                }
                return;
            }
        };
        // Rather the oldest goes than a new daemon is kept out.
        if self.connections.len() >= MOST_CONNECTIONS {
            self.connections.pop_first();
        }
        let hello = FromGuard::Hello { protocol: PROTOCOL_VERSION, machine: self.launch.machine.clone() };
        let greeted = Connection::new(stream).and_then(|mut connection| {
            connection.send(&hello, Vec::new())?;
            Ok(connection)
        });
        match greeted {
            Ok(connection) => {
                self.last_connection += 1;
                self.connections.insert(self.last_connection, connection);
            }
            Err(error) => tracing::debug!(%error, "a connection ended at once"),
        }
    }

    fn serve(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let requests = match connection.flush().and_then(|()| connection.receive()) {
            Ok(requests) => requests,
            Err(error) => {
                tracing::debug!(%error, "a daemon's connection ends");
                self.connections.remove(&id);
                return;
            }
        };
        for request in requests {
            self.obey(id, request);
        }
    }

    fn obey(&mut self, connection: u64, Request { id, command }: Request) {
        let asker = Asker { connection, request: id };
        match command {
            Command::Renew { lease } => {
                self.decide(Input::Renew(asker, lease));
                let now = boottime();
                let lease = self.watch.lease();
                if let Some(gate) = &mut self.gate
                    && let Err(error) = gate.renew(lease, now)
                {
                    self.gate_failed(&error);
                }
            }
            Command::Pause => self.decide(Input::Pause(asker)),
            Command::Resume => self.decide(Input::Resume(asker)),
            Command::Kill => self.decide(Input::Kill(asker)),
            Command::PowerDown => {
                self.send_to_qemu(OTHER_COMMAND, "system_powerdown");
                self.answer(asker, Outcome::Fine, Vec::new());
            }
            Command::Status => {
                let status = GuardStatus {
                    run_state: self.watch.run_state(),
                    lease: self.watch.lease(),
                    pause_cause: self.watch.pause_cause(),
                    gate_works: self.gate.as_ref().map(Gate::works),
                };
                self.answer(asker, Outcome::Status(status), Vec::new());
            }
            Command::Keep { name } => self.keep(asker, name),
            Command::Kept => {
                let copies: io::Result<Vec<OwnedFd>> =
                    self.kept.iter().map(|(_, fd)| fd.try_clone()).collect();
                let names = self.kept.iter().map(|(name, _)| name.clone()).collect();
                match copies {
                    Ok(copies) => self.answer(asker, Outcome::Kept(names), copies),
                    Err(error) => self.refuse(asker, error.to_string()),
                }
            }
            Command::Unknown { problem } => self.refuse(asker, problem),
        }
    }

    fn keep(&mut self, asker: Asker, name: String) {
        let fd = self.connections.get_mut(&asker.connection).and_then(Connection::take_fd);
        let Some(fd) = fd else { return self.refuse(asker, "no descriptor came with it".into()) };
        self.kept.retain(|(kept, _)| *kept != name);
        if self.kept.len() >= MOST_KEPT {
            return self.refuse(asker, format!("{MOST_KEPT} descriptors are kept already"));
        }
        self.kept.push((name, fd));
        self.answer(asker, Outcome::Fine, Vec::new());
    }

    fn answer(&mut self, asker: Asker, outcome: Outcome, fds: Vec<OwnedFd>) {
        self.send(asker.connection, &FromGuard::Done { id: asker.request, outcome }, fds);
    }

    fn refuse(&mut self, asker: Asker, error: String) {
        self.send(asker.connection, &FromGuard::Failed { id: asker.request, error }, Vec::new());
    }

    fn send(&mut self, connection: u64, message: &FromGuard, fds: Vec<OwnedFd>) {
        if let Some(target) = self.connections.get_mut(&connection)
            && let Err(error) = target.send(message, fds)
        {
            tracing::debug!(%error, "a daemon's connection ends");
            self.connections.remove(&connection);
        }
    }

    fn tell(&mut self, event: GuardEvent) {
        let message = FromGuard::Event { event };
        self.connections.retain(|_, connection| connection.send(&message, Vec::new()).is_ok());
    }

    fn gate_failed(&mut self, error: &Error) {
        tracing::error!(machine = self.launch.machine, %error, "the network gate is not refreshed");
        self.tell(GuardEvent::GateFailed(error.to_string()));
    }

    fn read_signals(&mut self) {
        // Its first field is the signal's number.
        let mut information = [0; size_of::<libc::signalfd_siginfo>()];
        while matches!(rustix::io::read(&self.signals, &mut information), Ok(count) if count > 0) {
            let [a, b, c, d, ..] = information;
            match libc::c_int::from_ne_bytes([a, b, c, d]) {
                libc::SIGCHLD => self.read_child_state(),
                // The host goes down, or an operator wants this machine to. The guest is asked; whoever sent it
                // kills when its patience ends.
                libc::SIGTERM => {
                    tracing::info!(
                        machine = self.launch.machine,
                        "asked to end: pressing the guest's power button"
                    );
                    self.send_to_qemu(OTHER_COMMAND, "system_powerdown");
                }
                _ => {}
            }
        }
    }

    /// Whether QEMU's threads were stopped or continued by a signal. The kernel reports a stop when the last of them
    /// stands.
    fn read_child_state(&mut self) {
        let options = WaitIdOptions::STOPPED | WaitIdOptions::CONTINUED | WaitIdOptions::NOHANG;
        while let Ok(Some(status)) = rustix::process::waitid(WaitId::PidFd(self.qemu_pidfd.as_fd()), options)
        {
            if status.stopped() {
                self.decide(Input::Frozen);
            } else if status.continued() {
                self.decide(Input::Thawed);
            } else {
                return;
            }
        }
    }

    /// QEMU is gone: leaves the record of its end, and nothing else.
    fn finish(mut self) -> Result<()> {
        // What it said last is still in the socket.
        while self.read_monitor() {}
        let status = self.qemu.wait().map_err(|error| Error::io("reap QEMU", error))?;
        let started = self.watch.run_state() != crate::machine::RunState::Starting;
        let cause = match self.watch.killed() {
            Some(cause) => cause,
            None if !started => ExitCause::FailedToStart,
            None if self.guest_shut_down && status.success() => ExitCause::GuestShutdown,
            None if self.quit_by_monitor && status.success() => ExitCause::Request,
            None => ExitCause::Crashed,
        };
        let failed = matches!(cause, ExitCause::FailedToStart | ExitCause::Crashed);
        let detail = if failed { self.run_dir.log_tail("qemu.log") } else { String::new() };
        let record = ExitRecord { cause, code: status.code(), signal: status.signal(), detail };
        tracing::info!(machine = self.launch.machine, %record, "the machine is gone");
        self.run_dir.write_exit(&record)?;
        self.tell(GuardEvent::Exited(record.clone()));
        if let Some(gate) = self.gate.take()
            && let Err(error) = gate.tear_down()
        {
            tracing::warn!(%error, "the network gate's table stays behind");
        }
        if let Some(watchdog) = self.watchdog.take() {
            watchdog.release();
        }
        self.run_dir.remove("guard.sock")?;
        if started {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::FailedToStart, "start QEMU", record.to_string()))
        }
    }
}

fn start_error(program: &str, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::NotFound {
        let detail = format!("`{program}` is not installed");
        return Error::new(ErrorKind::MissingOnHost, "start QEMU", detail);
    }
    Error::io("start QEMU", error)
}

/// Signals of a terminal's end are nothing to a guard; SIGTERM and SIGCHLD become readable.
fn take_signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero set is initialised by sigemptyset; the other calls take pointers to it that live across
    // them, and the descriptor that signalfd returns is owned by nobody else.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signal(libc::SIGINT, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}
