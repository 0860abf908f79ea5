//! A guest's memory and devices, as QEMU sends them to whom it takes for another host.

use crate::error::{Error, ErrorKind, Result};
use crate::qmp::Client;
use std::fs::File;
use std::io::{ErrorKind as IoErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::oneshot;

/// The stream that QEMU's `-incoming` reads.
#[derive(Debug)]
pub struct SavedMemory {
    pub file: File,
    pub bytes: u64,
}

pub(super) const ACTION: &str = "keep the guest's memory";

/// For QEMU to connect.
const CONNECT: Duration = Duration::from_secs(10);

/// Capabilities with which the stream is still one that a QEMU reads without more ado, and whole.
const HARMLESS: [&str; 6] =
    ["events", "auto-converge", "late-block-activate", "xbzrle", "zero-blocks", "validate-uuid"];

pub(super) fn refused(detail: impl Into<String>) -> Error {
    Error::new(ErrorKind::Refused, ACTION, detail)
}

/// What the reader of a stream said when it ended.
pub(super) fn all_came(
    end: std::result::Result<std::io::Result<()>, oneshot::error::RecvError>,
) -> Result<()> {
    end.map_err(|_| refused("its reader died"))?.map_err(|error| Error::io(ACTION, error))
}

/// For a migration that QEMU says has failed, or was cancelled.
pub(super) fn not_sent(error_desc: Option<String>) -> Error {
    refused(format!(
        "QEMU cannot send this machine: {}",
        error_desc.as_deref().unwrap_or("it does not say why")
    ))
}

pub(super) async fn refuse_strange_capabilities(client: &Client) -> Result<()> {
    let capabilities = client.query_migrate_capabilities().await?;
    let strange =
        capabilities.iter().find(|found| found.state && !HARMLESS.contains(&found.capability.as_str()));
    match strange {
        None => Ok(()),
        Some(strange) => {
            let name = &strange.capability;
            Err(refused(format!("another program has set QEMU's migration capability `{name}`")))
        }
    }
}

/// Writes what comes from QEMU to a file, on a thread of its own: QEMU waits for whoever does not take it.
#[derive(Debug)]
pub(super) struct Receiver {
    stream: UnixStream,
    file: File,
    bytes: Arc<AtomicU64>,
}

impl Receiver {
    /// Has QEMU send the machine to who listens on `socket`; the other result tells when all of it came.
    pub(super) async fn of_migration(
        client: &Client,
        listener: UnixListener,
        socket: &Path,
        file: File,
        most: u64,
    ) -> Result<(Self, oneshot::Receiver<std::io::Result<()>>)> {
        let begun = client.migrate(socket).await;
        begun.map_err(|error| Error::new(error.kind(), ACTION, error.detail()))?;
        let accepted = tokio::time::timeout(CONNECT, listener.accept()).await;
        let (stream, _) = accepted
            .map_err(|_| Error::deadline("have QEMU send the guest's memory", CONNECT))?
            .map_err(|error| Error::io(ACTION, error))?;
        drop(listener);
        let _ = std::fs::remove_file(socket);
        Self::start(stream, file, most)
    }

    fn start(
        stream: tokio::net::UnixStream,
        file: File,
        most: u64,
    ) -> Result<(Self, oneshot::Receiver<std::io::Result<()>>)> {
        let failed = |error| Error::io(ACTION, error);
        let stream = stream.into_std().map_err(failed)?;
        stream.set_nonblocking(false).map_err(failed)?;
        let bytes = Arc::new(AtomicU64::new(0));
        let receiver = Self { stream, file, bytes: bytes.clone() };
        let (mut from, mut to) =
            (receiver.stream.try_clone().map_err(failed)?, receiver.file.try_clone().map_err(failed)?);
        let (tell, ended) = oneshot::channel();
        let work = move || {
            let mut buffer = vec![0; 1 << 20];
            let mut all = 0;
            let end = loop {
                let count = match from.read(&mut buffer) {
                    Ok(0) => break Ok(()),
                    Ok(count) => count,
                    Err(error) if error.kind() == IoErrorKind::Interrupted => continue,
                    Err(error) => break Err(error),
                };
                all += count as u64;
                if all > most {
                    break Err(std::io::Error::other(format!("it is more than {most} bytes")));
                }
                if let Err(error) = to.write_all(&buffer[..count]) {
                    break Err(error);
                }
                bytes.store(all, Ordering::Relaxed);
            };
            if end.is_err() {
                let _ = from.shutdown(Shutdown::Both);
            }
            let _ = tell.send(end);
        };
        std::thread::Builder::new().name("guest-memory".into()).spawn(work).map_err(failed)?;
        Ok((receiver, ended))
    }

    pub(super) fn stream(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// QEMU gives the migration up.
    pub(super) fn break_off(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    pub(super) fn finish(self) -> SavedMemory {
        let bytes = self.bytes();
        SavedMemory { file: self.file, bytes }
    }
}
