//! How a client reaches its witness: a way to make a stream, whatever is under it.

use crate::Refusal;
use std::error::Error as StdError;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// A stream that carries HTTP.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for S {}

/// Why there is no stream.
#[derive(Debug)]
pub struct ConnectFailed {
    pub(super) refusal: Option<Refusal>,
    pub(super) source: Box<dyn StdError + Send + Sync>,
}

impl ConnectFailed {
    /// Nobody answered, or not in time.
    pub fn unreachable(source: impl Into<Box<dyn StdError + Send + Sync>>) -> ConnectFailed {
        ConnectFailed { refusal: None, source: source.into() }
    }

    /// Somebody answered, and it is no use to try again: a witness of another cluster, a revoked certificate.
    pub fn refused(refusal: Refusal, source: impl Into<Box<dyn StdError + Send + Sync>>) -> ConnectFailed {
        ConnectFailed { refusal: Some(refusal), source: source.into() }
    }
}

type Explain = dyn Fn(&std::io::Error) -> Option<Refusal> + Send + Sync;
type Connecting = Pin<Box<dyn Future<Output = Result<Box<dyn Stream>, ConnectFailed>> + Send>>;

/// Makes streams to one witness. Cheap to clone.
#[derive(Clone)]
pub struct Connector {
    connect: Arc<dyn Fn() -> Connecting + Send + Sync>,
    explain: Option<Arc<Explain>>,
    name: Arc<str>,
}

impl Connector {
    /// `name` is what messages call the witness. `connect` is called once for each new connection; the
    /// client's deadline covers it.
    pub fn new<C, F, S>(name: impl Into<String>, connect: C) -> Connector
    where
        C: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Result<S, ConnectFailed>> + Send + 'static,
        S: Stream,
    {
        let connect = move || -> Connecting {
            let connecting = connect();
            Box::pin(async move { connecting.await.map(|stream| Box::new(stream) as Box<dyn Stream>) })
        };
        Connector { connect: Arc::new(connect), explain: None, name: name.into().into() }
    }

    /// `explain` finds the refusal in an error that a stream gave, if it is one. In TLS 1.3 the client has sent
    /// its certificate and thinks itself connected when the server rejects it: only reading tells.
    #[must_use]
    pub fn explained_by(
        mut self,
        explain: impl Fn(&std::io::Error) -> Option<Refusal> + Send + Sync + 'static,
    ) -> Connector {
        self.explain = Some(Arc::new(explain));
        self
    }

    pub(super) fn explain(&self, error: &(dyn StdError + 'static)) -> Option<Refusal> {
        let explain = self.explain.as_ref()?;
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(refusal) = error.downcast_ref::<std::io::Error>().and_then(|error| explain(error)) {
                return Some(refusal);
            }
            next = error.source();
        }
        None
    }

    /// Without TLS: for tests, and inside one machine.
    pub fn tcp(address: SocketAddr) -> Connector {
        Connector::new(address.to_string(), move || async move {
            TcpStream::connect(address).await.map_err(ConnectFailed::unreachable)
        })
    }

    /// Without TLS: for tests, and inside one machine.
    pub fn unix(path: PathBuf) -> Connector {
        Connector::new(path.display().to_string(), move || {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map_err(ConnectFailed::unreachable) }
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) async fn connect(&self) -> Result<Box<dyn Stream>, ConnectFailed> {
        (self.connect)().await
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connector").field(&self.name).finish()
    }
}
