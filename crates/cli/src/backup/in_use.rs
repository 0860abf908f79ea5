//! Restore points in use: nobody forgets them for as long as a command reads them.

use super::access::{chain, now};
use super::create::host_name;
use super::points::open_log;
use super::stop::Stop;
use crate::Output;
use rempart_api::Error;
use rempart_repository::log::Log;
use rempart_repository::{ErrorKind, Repository, SessionId};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often a use is told anew: far more often than a collection takes anybody for dead, which is after days.
const RENEW: Duration = Duration::from_secs(6 * 3600);
/// A command that is told to end waits so long, at most, for the log to say that it does.
const LAST_WORD: Duration = Duration::from_secs(10);
/// Points that are forgotten just as they are found, this many times in a row, are not bad luck.
const TRIES: u32 = 3;
/// What a shell makes of a command that was interrupted.
const INTERRUPTED: i32 = 130;

/// Has points in use, and tells so every now and then, until it is dropped.
#[derive(Debug)]
pub struct InUse {
    session: Option<SessionId>,
    ends: Option<(Sender<End>, JoinHandle<()>)>,
    /// Closed when nothing is told any more.
    over: Option<Receiver<()>>,
    at_drop: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The points may be forgotten.
    Over,
    /// The log goes on saying that they are in use: another command goes on with it.
    Later,
}

impl InUse {
    /// Of a command that ends with what it does. `find` looks for its points, and tells their numbers: once more if one of
    /// them was forgotten before it was in use. Where nothing can be written, the command goes on, and says what may happen.
    pub fn begin<T>(
        repository: &Arc<Repository>,
        command: &str,
        output: Output,
        mut find: impl FnMut(&Log) -> Result<(Vec<u64>, T), Error>,
    ) -> Result<(InUse, Log, T), Error> {
        let mut attempt = 1;
        loop {
            let log = open_log(repository)?;
            let (roots, found) = find(&log)?;
            match InUse::start(repository, None, &roots, command, output, End::Over) {
                Err(error) if error.kind == ErrorKind::Stale && attempt < TRIES => attempt += 1,
                begun => return Ok((begun.unwrap_or_else(|error| InUse::none(&error, output)), log, found)),
            }
        }
    }

    /// The same of a command that does not wait for SIGINT and SIGTERM itself: they end it, and the use before.
    pub fn until_stopped<T>(
        repository: &Arc<Repository>,
        command: &str,
        output: Output,
        find: impl FnMut(&Log) -> Result<(Vec<u64>, T), Error>,
    ) -> Result<(InUse, Log, T), Error> {
        let (mut in_use, log, found) = InUse::begin(repository, command, output, find)?;
        // Without it the points count as in use until `gc` takes the command for dead.
        if let (Some((ends, _)), Some(over), Ok(mut stop)) = (&in_use.ends, in_use.over.take(), Stop::new()) {
            let ends = ends.clone();
            let wait = move || {
                stop.wait();
                let _ = ends.send(End::Over);
                let _ = over.recv_timeout(LAST_WORD);
                std::process::exit(INTERRUPTED);
            };
            let _ = std::thread::Builder::new().name("stop".into()).spawn(wait);
        }
        Ok((in_use, log, found))
    }

    /// Of a command that may be killed and begun again, with the session that it had before. See [`InUse::end`].
    pub fn go_on(
        repository: &Arc<Repository>,
        session: Option<SessionId>,
        roots: &[u64],
        command: &str,
        output: Output,
    ) -> InUse {
        let begun = InUse::start(repository, session, roots, command, output, End::Later);
        begun.unwrap_or_else(|error| InUse::none(&error, output))
    }

    fn none(error: &rempart_repository::Error, output: Output) -> InUse {
        output.tell(&format!(
            "nothing keeps the restore points that are read here from being forgotten: {}",
            chain(error)
        ));
        InUse { session: None, ends: None, over: None, at_drop: End::Over }
    }

    fn start(
        repository: &Arc<Repository>,
        session: Option<SessionId>,
        roots: &[u64],
        command: &str,
        output: Output,
        at_drop: End,
    ) -> Result<InUse, rempart_repository::Error> {
        if roots.is_empty() {
            return Ok(InUse { session: None, ends: None, over: None, at_drop });
        }
        let who = format!("`rempart {command}` on {}, process {}", host_name(), std::process::id());
        let reading = match session {
            Some(session) => repository.read_points_on(session, roots, &who, now())?,
            None => repository.read_points(roots, &who, now())?,
        };
        let session = Some(reading.session());
        let (sender, ends) = channel();
        let (is_over, over) = channel::<()>();
        let renew = move || {
            let _is_over = is_over;
            let mut reading = reading;
            loop {
                match ends.recv_timeout(RENEW) {
                    Ok(End::Later) | Err(RecvTimeoutError::Disconnected) => return,
                    Ok(End::Over) => {
                        if let Err(error) = reading.end(now()) {
                            output.tell(&format!(
                                "the restore points that were read here count as in use until `rempart gc` takes this \
                                 command for dead: {}",
                                chain(&error)
                            ));
                        }
                        return;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                }
                match reading.renew(now()) {
                    Err(error) if error.kind == ErrorKind::Stale => {
                        output
                            .tell("the restore points that are read here were taken away from this command");
                        return;
                    }
                    // At the next time it may go better.
                    Ok(()) | Err(_) => {}
                }
            }
        };
        let thread = std::thread::Builder::new().name("in-use".into()).spawn(renew);
        // Without it nothing is renewed, and nothing ended; a collection does that later.
        Ok(InUse { session, ends: thread.ok().map(|thread| (sender, thread)), over: Some(over), at_drop })
    }

    /// By which another command goes on.
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// Nobody goes on: the points may be forgotten.
    pub fn end(mut self) {
        self.at_drop = End::Over;
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some((ends, thread)) = self.ends.take() {
            // A thread that is over has nothing left to do.
            let _ = ends.send(self.at_drop);
            let _ = thread.join();
        }
    }
}
