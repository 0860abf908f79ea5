//! Ctrl-C and termination end a run in order: waits notice, namespaces and processes are cleaned up on the way out.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Result, bail};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    ASKED.store(true, Relaxed);
}

/// From now on the two signals are noted instead of ending the process at once.
pub fn install() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which is safe in a signal handler.
        unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) };
    }
}

/// An error once the user asked to stop.
pub fn check() -> Result<()> {
    if ASKED.load(Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}
