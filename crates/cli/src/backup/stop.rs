//! Commands that go on until they are told to end.

use rempart_api::Error;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// SIGTERM and SIGINT, which do not end the program any more.
pub struct Stop {
    terminate: Signal,
    interrupt: Signal,
    // Dropped last.
    runtime: Runtime,
}

impl Stop {
    pub fn new() -> Result<Stop, Error> {
        let failed = |e: std::io::Error| Error::failed("cannot wait for signals").cause(e);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (terminate, interrupt) = {
            let _inside = runtime.enter();
            (
                signal(SignalKind::terminate()).map_err(failed)?,
                signal(SignalKind::interrupt()).map_err(failed)?,
            )
        };
        Ok(Stop { terminate, interrupt, runtime })
    }

    /// Waits for one of the signals.
    pub fn wait(&mut self) {
        self.runtime.block_on(async {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
            }
        });
    }

    /// Waits for one of the signals, or for what ends by itself: then it is true.
    pub fn wait_or(&mut self, ended: oneshot::Receiver<()>) -> bool {
        self.runtime.block_on(async {
            tokio::select! {
                _ = self.terminate.recv() => false,
                _ = self.interrupt.recv() => false,
                _ = ended => true,
            }
        })
    }
}
