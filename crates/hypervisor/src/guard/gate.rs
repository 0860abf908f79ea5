//! The kernel-timed gate: drops the machine's frames when nobody renews its lease, even if every process here stands
//! still.
//!
//! A table of nftables' `netdev` family with one chain at each TAP's ingress, where the guest's frames enter the
//! host. They pass while the TAP's name is in a set, and its entry there has a timeout that every renewal moves. So a
//! host whose guard, daemon and QEMU are all stopped, and go on after the peer took over, lets nothing out. (A name
//! and not the guest's MAC address: guests use more than one.)
//!
//! Renewals are lines to one long-lived `nft -i`: a fork for each would cost more than everything else the guard
//! does. Each line is one transaction, so there is no moment without the entry.

use crate::command::run;
use crate::error::{Error, ErrorKind, Result};
use crate::machine::Lease;
use rempart_types::MonotonicTime;
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Gate {
    table: String,
    interfaces: Vec<String>,
    nft: Child,
    input: ChildStdin,
    errors: ChildStderr,
    /// Until when the kernel lets frames pass, as last written. None: for ever.
    open_until: Option<MonotonicTime>,
    /// Beyond the end of the lease: the vCPUs may run that long.
    guard_stop: Duration,
    /// Since when this nft is known not to work.
    failed_at: Option<MonotonicTime>,
}

/// Between two tries to start nft again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

impl Gate {
    /// Closes the interfaces until the first [`Gate::renew`].
    pub(crate) fn set_up(name: &str, interfaces: Vec<String>, guard_stop: Duration) -> Result<Self> {
        let table = table_name(name);
        let mut script =
            format!("add table netdev {table}\ndelete table netdev {table}\nadd table netdev {table}\n");
        let _ = writeln!(script, "add set netdev {table} live {{ type ifname; flags timeout; }}");
        for interface in &interfaces {
            // Writing to a string cannot fail.
            let _ = writeln!(
                script,
                "add chain netdev {table} {interface} {{ type filter hook ingress device \"{interface}\" priority -500; \
                 policy drop; }}\nadd rule netdev {table} {interface} iifname @live accept"
            );
        }
        run("nft", &["-f", "-"], Some(script.as_bytes()))?;
        let (nft, input, errors) = start_nft()?;
        let open_until = Some(MonotonicTime::ZERO);
        Ok(Self { table, interfaces, nft, input, errors, open_until, guard_stop, failed_at: None })
    }

    pub(crate) fn works(&self) -> bool {
        self.failed_at.is_none()
    }

    /// Moves the kernel's timer to the end of the lease, and the time to stop after it.
    pub(crate) fn renew(&mut self, lease: Lease, now: MonotonicTime) -> Result<()> {
        if let Some(failed_at) = self.failed_at {
            if now.since(failed_at) < RETRY_INTERVAL {
                return Ok(());
            }
            self.failed_at = Some(now);
            // Reap the one that failed, whatever state it is in.
            let _ = self.nft.kill();
            let _ = self.nft.wait();
            (self.nft, self.input, self.errors) = start_nft()?;
            self.failed_at = None;
        }
        let open_until = match lease {
            Lease::Unlimited => None,
            Lease::UntilBoottimeNs(until) => {
                let until = MonotonicTime(until);
                // As last written it still covers the lease, with room: spare the work.
                if self.open_until.is_some_and(|open| open >= until + self.guard_stop / 2) {
                    return Ok(());
                }
                Some(until + self.guard_stop)
            }
        };
        if self.open_until == open_until {
            return Ok(());
        }
        let timeout = match open_until {
            None => String::new(),
            Some(until) if until <= now => return Ok(()),
            Some(until) => format!(" timeout {}ms", until.since(now).as_millis().max(1)),
        };
        let table = &self.table;
        let entries: Vec<String> =
            self.interfaces.iter().map(|name| format!("\"{name}\"{timeout}")).collect();
        let line = format!(
            "flush set netdev {table} live; add element netdev {table} live {{ {} }}\n",
            entries.join(", ")
        );
        // Far below a pipe's buffer: a partial write means nft does not read any more.
        match self.input.write(line.as_bytes()) {
            Ok(written) if written == line.len() => {
                self.open_until = open_until;
                Ok(())
            }
            Ok(_) => self.fail("it does not read".into(), now),
            Err(error) => self.fail(error.to_string(), now),
        }
    }

    fn fail(&mut self, detail: String, now: MonotonicTime) -> Result<()> {
        self.failed_at = Some(now);
        // Whatever it did or did not do: write it again.
        self.open_until = Some(MonotonicTime::ZERO);
        Err(Error::new(ErrorKind::Refused, "refresh the network gate", detail))
    }

    /// Readable when nft complains or has ended; None while that is known.
    pub(crate) fn errors(&self) -> Option<BorrowedFd<'_>> {
        self.works().then(|| self.errors.as_fd())
    }

    /// An error if nft complains.
    pub(crate) fn check(&mut self, now: MonotonicTime) -> Result<()> {
        let mut bytes = [0; 1024];
        let complaint = match self.errors.read(&mut bytes) {
            Ok(0) => "nft ended".into(),
            Ok(count) => {
                String::from_utf8_lossy(&bytes[..count]).lines().next().unwrap_or_default().to_owned()
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => error.to_string(),
        };
        self.fail(complaint, now)
    }

    /// Takes the table away.
    pub(crate) fn tear_down(mut self) -> Result<()> {
        // Nothing of it is needed any more; it may not even live.
        let _ = self.nft.kill();
        let _ = self.nft.wait();
        run("nft", &["delete", "table", "netdev", &self.table], None).map(drop)
    }
}

fn table_name(machine: &str) -> String {
    format!("rempart-{machine}")
}

/// Takes a machine's table away without knowing whether there is one.
pub(crate) fn remove(machine: &str) {
    let table = table_name(machine);
    let script = format!("add table netdev {table}\ndelete table netdev {table}\n");
    if let Err(error) = run("nft", &["-f", "-"], Some(script.as_bytes())) {
        // Without nft there was no gate.
        tracing::debug!(%error, machine, "no network gate is removed");
    }
}

/// Whether this kernel and this nft know what a gate needs. Checked only, nothing is changed.
pub(crate) fn is_possible() -> bool {
    let script = "add table netdev rempart-probe\nadd set netdev rempart-probe live { type ifname; flags timeout; }\n\
        add chain netdev rempart-probe lo { type filter hook ingress device \"lo\" priority -500; }\n\
        add rule netdev rempart-probe lo iifname @live accept\n";
    run("nft", &["--check", "-f", "-"], Some(script.as_bytes())).is_ok()
}

fn start_nft() -> Result<(Child, ChildStdin, ChildStderr)> {
    let action = "start nft";
    let mut command = Command::new("nft");
    command.arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Interactive nft writes a history into the home directory.
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", "/nonexistent");
    // SAFETY: it only calls prctl and getppid, which are async-signal-safe.
    unsafe { command.pre_exec(super::spawn::die_with_parent()) };
    let mut nft = command.spawn().map_err(|error| Error::io(action, error))?;
    let (Some(input), Some(errors)) = (nft.stdin.take(), nft.stderr.take()) else {
        unreachable!("both were asked for")
    };
    for pipe in [input.as_fd(), errors.as_fd()] {
        rustix::io::ioctl_fionbio(pipe, true).map_err(|error| Error::io(action, error))?;
    }
    Ok((nft, input, errors))
}
