//! The witness as a server: connections in, decisions of the store out.

use super::http;
use super::metrics::Counters;
use super::store::Store;
use super::wire::Health;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rempart_types::{InstanceId, NodeId};
use std::error::Error as StdError;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// Connections served at one time.
const MAX_CONNECTIONS: usize = 1024;
/// A connection on which no request comes for that long is closed.
const IDLE: Duration = Duration::from_secs(120);
/// How long a shutdown waits for requests that are being answered.
const FAREWELL: Duration = Duration::from_secs(3);
/// Pause after a failed accept (out of descriptors, say): there is nothing to wait on.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where a witness keeps its state.
#[derive(Debug, Clone)]
pub struct WitnessConfig {
    /// Created if absent. Belongs to one witness; never restore it from a backup: start with an empty one.
    pub directory: PathBuf,
}

/// Who is at the other end of a connection, as its owner established.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// A node of the cluster, by its certificate.
    Node(NodeId),
    /// Someone on this machine (a private unix socket, a test) who may speak for any node.
    Trusted,
    /// A member that is no node: it may look at the health, and nothing else.
    Other,
}

/// Why a witness cannot run.
#[derive(Debug)]
pub struct WitnessError {
    doing: String,
    source: Box<dyn StdError + Send + Sync>,
}

impl WitnessError {
    pub(super) fn open(path: &Path, source: impl Into<Box<dyn StdError + Send + Sync>>) -> WitnessError {
        WitnessError {
            doing: format!("open the witness's state `{}`", path.display()),
            source: source.into(),
        }
    }
}

impl fmt::Display for WitnessError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}", self.doing)
    }
}

impl StdError for WitnessError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.source)
    }
}

/// A witness. Cheap to clone; the state closes with the last clone.
#[derive(Debug, Clone)]
pub struct Witness {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) store: Store,
    pub(super) counters: Counters,
}

impl Witness {
    /// Opens the state. Blocks for as long as the disk takes.
    pub fn open(config: &WitnessConfig) -> Result<Witness, WitnessError> {
        let path = config.directory.join("witness.redb");
        std::fs::create_dir_all(&config.directory).map_err(|error| WitnessError::open(&path, error))?;
        let store = Store::open(&path)?;
        Ok(Witness { inner: Arc::new(Inner { store, counters: Counters::default() }) })
    }

    pub fn instance(&self) -> InstanceId {
        self.inner.store.instance()
    }

    /// Blocks for as long as the disk takes. `None` if the storage failed.
    pub fn health(&self) -> Option<Health> {
        self.inner.store.health().ok()
    }

    pub fn counters(&self) -> &Counters {
        &self.inner.counters
    }

    /// Serves one connection until the peer closes it, it idles too long, or `stop` turns true.
    pub async fn serve_connection<S>(&self, stream: S, caller: Caller, mut stop: watch::Receiver<bool>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        Counters::add(&self.inner.counters.connections);
        let service = service_fn(|request| http::answer(self.inner.clone(), caller, request));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_buf_size(64 * 1024)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => Some(ended),
            _ = stop.wait_for(|&stop| stop) => None,
        };
        let ended = match ended {
            Some(ended) => ended,
            None => {
                connection.as_mut().graceful_shutdown();
                tokio::time::timeout(FAREWELL, connection).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            tracing::debug!(?caller, %error, "a connection ended badly");
        }
    }

    /// Accepts connections until `stop` turns true (or its sender is gone), then waits for the requests in
    /// work. `admit` makes a stream and a caller of each (the TLS handshake); it runs beside the others and
    /// must have a deadline of its own.
    pub async fn serve<A, F, S, E>(&self, listener: TcpListener, admit: A, mut stop: watch::Receiver<bool>)
    where
        A: Fn(TcpStream) -> F + Clone + Send + 'static,
        F: Future<Output = Result<(S, Caller), E>> + Send,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        E: fmt::Display + Send,
    {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                _ = stop.wait_for(|&stop| stop) => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
                accepted = listener.accept() => accepted,
            };
            let (socket, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = room.clone().try_acquire_owned() else {
                tracing::warn!(%address, "too many connections: one was closed");
                continue;
            };
            let (witness, admit, stop) = (self.clone(), admit.clone(), stop.clone());
            connections.spawn(async move {
                match admit(socket).await {
                    Ok((stream, caller)) => witness.serve_connection(stream, caller, stop).await,
                    Err(error) => {
                        Counters::add(&witness.inner.counters.connections_failed);
                        tracing::info!(%address, %error, "refused a connection");
                    }
                }
                drop(permit);
            });
        }
        drop(listener);
        let all = async { while connections.join_next().await.is_some() {} };
        // Handshakes that hang end with the set.
        let _ = tokio::time::timeout(FAREWELL + Duration::from_secs(1), all).await;
    }
}
