//! The daemon as a library. It wires: every part that has a name of its own is a crate.
//!
//! | module | what is in it |
//! |---|---|
//! | [`config`] | the configuration files |
//! | `daemon` | `node init`, `node run` |
//! | `witness` | `witness init`, `witness run` |
//! | `node` | one node: identity, cluster, virtual machines |
//! | `group` | the data plane: one thread per virtual machine |
//! | `vm` | one virtual machine: its runner, its record, its events |
//! | `operation` | what an operator can order |
//! | `membership` | joining, renewing, removing |
//! | `http` | the operator's API, the API between nodes, enrolment |
//! | `remote_exports` | disks over TCP and TLS |
//! | `schedule` | backups by the clock |
//! | `links` | connections between replicas |

mod claims;
mod clock;
pub mod config;
mod daemon;
mod durable;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod group;
mod http;
mod identity;
mod jobs;
mod links;
mod members;
mod membership;
mod metrics;
mod node;
mod operation;
mod paths;
mod registers;
mod remote_exports;
mod schedule;
mod status;
mod vm;
mod witness;

pub use daemon::{init, run};
pub use witness::{init as witness_init, run as witness_run};

use rempart_api::Error;
use sd_notify::NotifyState;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

fn make_private_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// `key` of the configuration names no address that can be listened on.
fn cannot_listen(address: SocketAddr, key: &str, cause: &std::io::Error) -> Error {
    let hint = match cause.kind() {
        std::io::ErrorKind::PermissionDenied => "ports below 1024 are the superuser's; take a higher one",
        _ => "another program uses that port, or the address is not this machine's",
    };
    Error::failed(format!("cannot listen on `{address}` ({key})")).cause(cause).hint(hint)
}

/// An error with the errors below it, in one line.
fn whole_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(cause) = below {
        let said = cause.to_string();
        // Some repeat what is below them.
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        below = cause.source();
    }
    text
}

/// What a file or directory refused to whoever sets up a server.
fn cannot(what: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let message = format!("cannot {what} `{}`", path.display());
    move |cause| {
        let denied = cause.kind() == std::io::ErrorKind::PermissionDenied;
        let error = Error::failed(message).cause(cause);
        if denied { error.hint("run it as root") } else { error }
    }
}

/// Tells systemd that the service is up, if it runs under systemd.
fn notify_ready() {
    if let Err(error) = sd_notify::notify(false, &[NotifyState::Ready]) {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// Pets systemd's watchdog from the runtime that everything else runs on, if it asks for that.
fn watchdog() {
    let mut micros = 0;
    if !sd_notify::watchdog_enabled(false, &mut micros) {
        return;
    }
    let every = Duration::from_micros(micros / 3);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(every);
        loop {
            ticks.tick().await;
            let _ = sd_notify::notify(false, &[NotifyState::Watchdog]);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Layer {
        #[error("recover the store")]
        Silent(#[source] Box<Layer>),
        #[error("read it: {0}")]
        Repeats(#[source] std::io::Error),
    }

    #[test]
    fn every_cause_is_named_once() {
        let bottom = Layer::Repeats(std::io::Error::other("no such file"));
        let text = whole_chain(&Layer::Silent(Box::new(bottom)));
        assert_eq!(text, "recover the store: read it: no such file");
    }
}
