//! Asking a peer's API.

use crate::links;
use crate::node::Node;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rempart_api::Error;
use rempart_transport::{HttpStream, Identity, Role, dial_http};
use rempart_types::NodeId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;

const MAX_ANSWER_BYTES: usize = 16 << 20;

/// One peer, by its identity. A connection per request: these are rare.
#[derive(Debug)]
pub struct PeerClient {
    node: Arc<Node>,
    peer: NodeId,
    deadline: Duration,
}

impl PeerClient {
    pub fn new(node: &Arc<Node>, peer: NodeId) -> Result<PeerClient, Error> {
        node.cluster_or_refuse()?;
        Ok(PeerClient { node: node.clone(), peer, deadline: Duration::from_secs(30) })
    }

    /// For requests that are answered when a guest has shut down.
    #[must_use]
    pub fn patient(mut self, deadline: Duration) -> PeerClient {
        self.deadline = deadline;
        self
    }

    pub async fn post<B: Serialize, R: DeserializeOwned>(&self, path: &str, body: &B) -> Result<R, Error> {
        let body = serde_json::to_vec(body).map_err(|e| Error::failed("cannot write a request").cause(e))?;
        self.call(Method::POST, path, body.into()).await
    }

    pub async fn delete<R: DeserializeOwned>(&self, path: &str) -> Result<R, Error> {
        self.call(Method::DELETE, path, Bytes::new()).await
    }

    async fn call<R: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<R, Error> {
        let name = self.node.name_of(self.peer);
        let away = |cause: String| Error::unreachable(format!("node `{name}` does not answer")).cause(cause);
        let (_, tls) = self.node.cluster_or_refuse()?;
        let address = self.node.address_of(self.peer).await.map_err(away)?;
        let expected = Identity { cluster: tls.identity().cluster, role: Role::Node, id: self.peer };
        let deadlines = links::deadlines(&self.node);
        let stream =
            dial_http(address, &tls, Some(expected), deadlines).await.map_err(|e| away(e.to_string()))?;
        let answered = tokio::time::timeout(self.deadline, exchange(stream, method, path, body)).await;
        let answer = match answered {
            Ok(result) => result.map_err(|error| match error.kind {
                rempart_api::ErrorKind::Unreachable => away(error.to_string()),
                _ => error,
            })?,
            Err(_) => return Err(away(format!("not within {} s", self.deadline.as_secs()))),
        };
        self.node.heard_of(self.peer);
        serde_json::from_slice(&answer)
            .map_err(|e| Error::failed(format!("cannot read the answer of node `{name}`")).cause(e))
    }
}

/// One request and its answer on a fresh connection.
pub async fn exchange(stream: HttpStream, method: Method, path: &str, body: Bytes) -> Result<Bytes, Error> {
    let broken = |e: &dyn std::fmt::Display| Error::unreachable("the connection broke off").cause(e);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "rempart")
        .header("content-type", "application/json")
        .body(Full::new(body))
        .map_err(|e| Error::failed("cannot write a request").cause(e))?;
    let answer = sender.send_request(request).await.map_err(|e| broken(&e))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES)
        .collect()
        .await
        .map_err(|e| broken(&e))?
        .to_bytes();
    driver.abort();
    if status.is_success() {
        return Ok(body);
    }
    Err(serde_json::from_slice(&body).unwrap_or_else(|_| Error::failed(format!("the answer was {status}"))))
}
