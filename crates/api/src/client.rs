//! A client of the daemon's local API. One request a connection: the socket is local, and nothing is retried.

use crate::{Error, Job, JobId, JobState, Progress};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// An answer longer than this is not the daemon's.
const MAX_ANSWER_BYTES: usize = 64 << 20;

#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    deadline: Duration,
}

impl Client {
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client { socket: socket.into(), deadline: Duration::from_secs(120) }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub async fn get<R: DeserializeOwned>(&self, path: &str) -> Result<R, Error> {
        self.call(Method::GET, path, None::<&()>).await
    }

    pub async fn post<B: Serialize, R: DeserializeOwned>(&self, path: &str, body: &B) -> Result<R, Error> {
        self.call(Method::POST, path, Some(body)).await
    }

    pub async fn delete<R: DeserializeOwned>(&self, path: &str) -> Result<R, Error> {
        self.call(Method::DELETE, path, None::<&()>).await
    }

    /// The body as it came, for answers that are not JSON.
    pub async fn get_text(&self, path: &str) -> Result<String, Error> {
        let body = self.exchange(Method::GET, path, Bytes::new()).await?;
        String::from_utf8(body.to_vec()).map_err(|_| Error::failed("the daemon's answer is not UTF-8"))
    }

    /// Waits for a job's end, telling its progress about four times a second.
    pub async fn wait(&self, id: JobId, mut tell: impl FnMut(&Progress)) -> Result<serde_json::Value, Error> {
        loop {
            let job: Job = self.get(&format!("/v1/jobs/{}?wait_ms=250", id.0)).await?;
            tell(&job.progress);
            match job.state {
                JobState::Running => {}
                JobState::Done { result } => return Ok(result),
                JobState::Failed { error } => return Err(error),
            }
        }
    }

    async fn call<B: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<R, Error> {
        let body = match body {
            Some(body) => {
                serde_json::to_vec(body).map_err(|e| Error::invalid("cannot write the request").cause(e))?
            }
            None => Vec::new(),
        };
        let answer = self.exchange(method, path, body.into()).await?;
        let text: &[u8] = if answer.is_empty() { b"null" } else { &answer };
        serde_json::from_slice(text).map_err(|e| {
            Error::failed(format!("cannot read the daemon's answer to `{path}`"))
                .cause(e)
                .hint("the program and the daemon may be of different versions; restart the daemon")
        })
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, Error> {
        let exchange = async {
            let (_connection, answer) = self.send(method, path, body).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES)
                .collect()
                .await
                .map_err(|e| Error::unreachable("the daemon's answer was cut off").cause(e))?
                .to_bytes();
            if status.is_success() {
                return Ok(body);
            }
            Err(refused(path, status, &body))
        };
        self.in_time(path, exchange).await
    }

    /// Posts, and leaves the answer's body to the caller.
    pub(crate) async fn open_stream(&self, path: &str, body: Bytes) -> Result<(Connection, Incoming), Error> {
        let open = async {
            let (connection, answer) = self.send(Method::POST, path, body).await?;
            let status = answer.status();
            if status.is_success() {
                return Ok((connection, answer.into_body()));
            }
            let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES)
                .collect()
                .await
                .map_err(|e| Error::unreachable("the daemon's answer was cut off").cause(e))?
                .to_bytes();
            Err(refused(path, status, &body))
        };
        self.in_time(path, open).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Connection, http::Response<Incoming>), Error> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.no_daemon(e))?;
        let broken = |e: hyper::Error| {
            Error::unreachable("the daemon closed the connection before it answered").cause(e)
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let driver = Connection(tokio::spawn(async {
            let _ = connection.await;
        }));
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "rempart")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| Error::invalid(format!("`{path}` is not a path")).cause(e))?;
        let answer = sender.send_request(request).await.map_err(broken)?;
        Ok((driver, answer))
    }

    async fn in_time<R>(&self, path: &str, work: impl Future<Output = Result<R, Error>>) -> Result<R, Error> {
        match tokio::time::timeout(self.deadline, work).await {
            Ok(result) => result,
            Err(_) => Err(Error::unreachable(format!(
                "the daemon did not answer `{path}` within {} s",
                self.deadline.as_secs()
            ))),
        }
    }

    fn no_daemon(&self, cause: std::io::Error) -> Error {
        let hint = match cause.kind() {
            std::io::ErrorKind::PermissionDenied => "run it as root, the owner of the socket",
            _ => "start the daemon: `systemctl start rempart` or `rempart node run`",
        };
        Error::unreachable(format!("cannot reach the daemon at `{}`", self.socket.display()))
            .cause(cause)
            .hint(hint)
    }
}

/// What carries an exchange: it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Connection(tokio::task::JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn refused(path: &str, status: http::StatusCode, body: &[u8]) -> Error {
    serde_json::from_slice(body).unwrap_or_else(|_| {
        Error::failed(format!("the daemon answered `{path}` with {status}"))
            .cause(String::from_utf8_lossy(body).trim())
    })
}
