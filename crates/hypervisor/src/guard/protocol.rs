//! What the daemon and a guard say to each other: one JSON object a line, on the guard's unix socket.
//!
//! The guard says hello first, then answers each request by its number; events come in between, to every
//! connection. File descriptors travel beside the line that names them (SCM_RIGHTS).
//!
//! A guard lives as long as its machine, so it may be older than the daemon: requests are only ever added, a guard
//! answers one it does not know with an error, and the version in its hello changes only when that is not enough.

use crate::machine::{ExitRecord, Lease, PauseCause, RunState};
use serde::{Deserialize, Serialize};

pub(crate) const PROTOCOL_VERSION: u32 = 1;

/// Neither side sends longer ones.
pub(crate) const LONGEST_LINE: usize = 64 * 1024;

/// Sockets a guard keeps for the daemon.
pub(crate) const MOST_KEPT: usize = 32;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Request {
    pub id: u64,
    #[serde(flatten)]
    pub command: Command,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Command {
    Renew {
        lease: Lease,
    },
    /// Answered when the vCPUs stand still.
    Pause,
    /// Answered when they run.
    Resume,
    /// Presses the power button.
    PowerDown,
    /// Answered when the signal is sent; [`GuardEvent::Exited`] says when it is gone.
    Kill,
    Status,
    /// One descriptor comes with it. A kept one of the same name is dropped.
    Keep {
        name: String,
    },
    Kept,
    /// Made by the receiver from what it does not understand; never sent.
    #[serde(skip)]
    Unknown {
        problem: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum FromGuard {
    Hello { protocol: u32, machine: String },
    Done { id: u64, outcome: Outcome },
    Failed { id: u64, error: String },
    Event { event: GuardEvent },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Fine,
    Status(GuardStatus),
    /// Their descriptors come with the line, in this order.
    Kept(Vec<String>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GuardStatus {
    pub run_state: RunState,
    pub lease: Lease,
    pub pause_cause: Option<PauseCause>,
    pub gate_works: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum GuardEvent {
    Paused(PauseCause),
    Resumed,
    LeaseExpired,
    GateFailed(String),
    Exited(ExitRecord),
}

/// The one line a starting guard prints on its standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum StartReport {
    Ready,
    AlreadyRunning,
    MissingOnHost { detail: String },
    Failed { detail: String },
}

pub(crate) fn line(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).expect("these have only strings for keys");
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_version_1() {
        // A guard of an older release speaks exactly these: change them only with the protocol's version.
        let requests = [
            (
                Command::Renew { lease: Lease::UntilBoottimeNs(17) },
                r#"{"id":1,"do":"renew","lease":{"until_boottime_ns":17}}"#,
            ),
            (Command::Renew { lease: Lease::Unlimited }, r#"{"id":1,"do":"renew","lease":"unlimited"}"#),
            (Command::Pause, r#"{"id":1,"do":"pause"}"#),
            (Command::Keep { name: "nbd".into() }, r#"{"id":1,"do":"keep","name":"nbd"}"#),
        ];
        for (command, expected) in requests {
            let request = Request { id: 1, command };
            assert_eq!(serde_json::to_string(&request).unwrap(), expected);
            assert_eq!(serde_json::from_str::<Request>(expected).unwrap(), request);
        }
        let answers = [
            (FromGuard::Done { id: 1, outcome: Outcome::Fine }, r#"{"type":"done","id":1,"outcome":"fine"}"#),
            (
                FromGuard::Event { event: GuardEvent::Paused(PauseCause::Lease) },
                r#"{"type":"event","event":{"paused":"lease"}}"#,
            ),
        ];
        for (answer, expected) in answers {
            assert_eq!(serde_json::to_string(&answer).unwrap(), expected);
            assert_eq!(serde_json::from_str::<FromGuard>(expected).unwrap(), answer);
        }
    }
}
