//! A [`Register`] on a witness: connections kept alive, one deadline a request, no retries.

use super::connector::Connector;
use super::wire::{
    CHANGES, ExcuseRequest, Health, INSTANCE, MAX_BODY, ReadAnswer, RefusedAnswer, ReportOutcome,
    ReportRequest, SwapAnswer, SwapRequest,
};
use crate::{Answer, ErrorKind, Refusal, Register, RegisterError, SwapOutcome};
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rempart_types::{Epoch, InstanceId, NodeId, NodeSet, RegisterId, RegisterValue};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Connections kept for the next request.
const MAX_IDLE_CONNECTIONS: usize = 4;
/// A connection that was idle longer is not used again: the witness closes it after two minutes, and a request
/// that meets the closing has an unknown outcome for no good reason.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// How a client behaves.
#[derive(Debug, Clone)]
pub struct WitnessClientConfig {
    /// For a whole request: connecting, TLS, sending, the answer.
    pub deadline: Duration,
    /// The instance this node has registers on, as it persisted it. `None`: the first one that answers.
    pub instance: Option<InstanceId>,
}

impl Default for WitnessClientConfig {
    fn default() -> WitnessClientConfig {
        WitnessClientConfig { deadline: Duration::from_secs(1), instance: None }
    }
}

/// A client of one witness. Each new connection begins with a look at the witness's health. Cheap to clone; clones share connections and knowledge.
#[derive(Debug, Clone)]
pub struct WitnessClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    connector: Connector,
    deadline: Duration,
    idle: Mutex<Vec<Idle>>,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Idle {
    sender: SendRequest<Full<Bytes>>,
    since: Instant,
}

#[derive(Debug, Default)]
struct Known {
    instance: Option<InstanceId>,
    /// Registers that were reported to another instance than the adopted one.
    reported: BTreeMap<RegisterId, InstanceId>,
    /// The highest change counter seen, and of which instance.
    changes: Option<(InstanceId, u64)>,
}

/// Whether an error after the request left means "unknown".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    None,
    Change,
}

impl WitnessClient {
    pub fn new(connector: Connector, config: WitnessClientConfig) -> WitnessClient {
        let known = Known { instance: config.instance, ..Known::default() };
        WitnessClient {
            inner: Arc::new(Inner {
                connector,
                deadline: config.deadline,
                idle: Mutex::default(),
                known: Mutex::new(known),
            }),
        }
    }

    /// The instance this client trusts. Persist it beside the register ids, and give it back at the next start.
    pub fn instance(&self) -> Option<InstanceId> {
        self.known().instance
    }

    /// Trusts `instance` from now on. Only after every register this node has on the witness was reported to it:
    /// a register that was not would seem never to have existed.
    pub fn adopt(&self, instance: InstanceId) {
        let mut known = self.known();
        known.instance = Some(instance);
        known.reported.clear();
    }

    /// The instance that `register` was reported to, if it is not the trusted one.
    pub fn reported(&self, register: RegisterId) -> Option<InstanceId> {
        self.known().reported.get(&register).copied()
    }

    pub async fn health(&self) -> Result<Health, RegisterError> {
        self.request(Method::GET, "/v1/health".to_owned(), &(), None, Effect::None).await
    }

    /// Tells a witness whose state is new the latest value of `register` that this node has *seen stored* (read,
    /// or won; not merely attempted), and who the replicas are. From then on the register is used on the
    /// instance that answered. It serves when the answer names nobody missing.
    pub async fn report(
        &self,
        node: NodeId,
        register: RegisterId,
        value: Option<RegisterValue>,
        replicas: NodeSet,
    ) -> Result<ReportOutcome, RegisterError> {
        let path = format!("/v1/registers/{register}/report");
        let request = ReportRequest { node, value, replicas };
        let (outcome, instance) = self.exchange(Method::POST, path, &request, None, Effect::Change).await?;
        if let Some(instance) = instance {
            let mut known = self.known();
            if known.instance == Some(instance) {
                known.reported.remove(&register);
            } else {
                known.reported.insert(register, instance);
            }
        }
        Ok(outcome)
    }

    /// On an operator's word that `node` is gone for good: recovery of `register` does not wait for it.
    pub async fn excuse(&self, node: NodeId, register: RegisterId) -> Result<ReportOutcome, RegisterError> {
        let path = format!("/v1/registers/{register}/excuse");
        self.request(Method::POST, path, &ExcuseRequest { node }, None, Effect::Change).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: String,
        body: &impl Serialize,
        register: Option<RegisterId>,
        effect: Effect,
    ) -> Result<T, RegisterError> {
        self.exchange(method, path, body, register, effect).await.map(|(answer, _)| answer)
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: String,
        body: &impl Serialize,
        register: Option<RegisterId>,
        effect: Effect,
    ) -> Result<(T, Option<InstanceId>), RegisterError> {
        let request = self.compose(method, path, body, register);
        // True from just before the first byte of the request may leave.
        let left = AtomicBool::new(false);
        let work = self.converse(request, &left);
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
            let unknown = left.load(Ordering::Acquire) && effect == Effect::Change;
            let kind = if unknown { ErrorKind::Unknown } else { ErrorKind::Unreachable };
            RegisterError::new(kind, self.doing()).because(source)
        };
        match tokio::time::timeout(self.inner.deadline, work).await {
            Err(_) => Err(failed("the deadline passed".into())),
            Ok(Err(Broken::Refused(refusal, source))) => {
                Err(RegisterError::refused(refusal, self.doing()).because(source))
            }
            Ok(Err(Broken::Failed(source))) => Err(failed(source)),
            Ok(Ok(reply)) => {
                self.learn(&reply);
                match reply.status {
                    StatusCode::OK => match serde_json::from_slice(&reply.body) {
                        Ok(answer) => Ok((answer, reply.instance)),
                        Err(error) => Err(failed(error.into())),
                    },
                    StatusCode::CONFLICT => match serde_json::from_slice(&reply.body) {
                        Ok(RefusedAnswer { refused }) => Err(RegisterError::refused(refused, self.doing())),
                        Err(error) => Err(failed(error.into())),
                    },
                    status => Err(failed(format!("the witness answered with status {status}").into())),
                }
            }
        }
    }

    fn compose(
        &self,
        method: Method,
        path: String,
        body: &impl Serialize,
        register: Option<RegisterId>,
    ) -> Request<Full<Bytes>> {
        let bytes = if method == Method::GET {
            Bytes::new()
        } else {
            serde_json::to_vec(body).expect("a request always serialises").into()
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "witness")
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(register) = register {
            let known = self.known();
            let instance = known.reported.get(&register).copied().or(known.instance);
            if let Some(instance) = instance {
                request = request.header(INSTANCE, instance.to_string());
                if let Some((of, changes)) = known.changes
                    && of == instance
                {
                    request = request.header(CHANGES, changes);
                }
            }
        }
        request.body(Full::new(bytes)).expect("the parts are valid")
    }

    async fn converse(&self, request: Request<Full<Bytes>>, left: &AtomicBool) -> Result<Reply, Broken> {
        let mut sender = self.connection().await?;
        let reply = self.send(&mut sender, request, left).await?;
        let mut idle = self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE_CONNECTIONS {
            idle.push(Idle { sender, since: Instant::now() });
        }
        Ok(reply)
    }

    async fn send(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        request: Request<Full<Bytes>>,
        left: &AtomicBool,
    ) -> Result<Reply, Broken> {
        sender.ready().await.map_err(|error| Broken::Failed(error.into()))?;
        left.store(true, Ordering::Release);
        let response = match sender.try_send_request(request).await {
            Ok(response) => response,
            Err(mut error) => {
                // Handed back whole: nothing of it was sent.
                if error.take_message().is_some() {
                    left.store(false, Ordering::Release);
                }
                return Err(Broken::Failed(error.into_error().into()));
            }
        };
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await.map_err(Broken::Failed)?.to_bytes();
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        Ok(Reply {
            status: head.status,
            instance: text(INSTANCE).and_then(|text| text.parse().ok()),
            changes: text(CHANGES).and_then(|text| text.parse().ok()),
            body,
        })
    }

    /// An idle connection that still stands, or a new one.
    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, Broken> {
        loop {
            let idle = self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            match idle {
                Some(idle) if !idle.sender.is_closed() && idle.since.elapsed() < MAX_IDLE => {
                    return Ok(idle.sender);
                }
                Some(_) => {}
                None => break,
            }
        }
        let stream = self.inner.connector.connect().await.map_err(|failed| match failed.refusal {
            Some(refusal) => Broken::Refused(refusal, failed.source),
            None => Broken::Failed(failed.source),
        })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| Broken::Failed(error.into()))?;
        // Ends when the sender is dropped, or the connection breaks; requests learn of it through the sender.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        // A harmless request first: a witness that rejects our certificate, or is none, says so now, and not
        // to a swap whose outcome would then be unknown.
        let greeting = self.compose(Method::GET, "/v1/health".to_owned(), &(), None);
        match self.send(&mut sender, greeting, &AtomicBool::new(false)).await {
            Ok(reply) if reply.status == StatusCode::OK && reply.instance.is_some() => Ok(sender),
            Ok(reply) => {
                Err(Broken::Failed(format!("the server answered with status {}", reply.status).into()))
            }
            Err(Broken::Failed(source)) => Err(match self.inner.connector.explain(&*source) {
                Some(refusal) => Broken::Refused(refusal, source),
                None => Broken::Failed(source),
            }),
            Err(refused) => Err(refused),
        }
    }

    fn learn(&self, reply: &Reply) {
        let mut known = self.known();
        let Some(instance) = reply.instance else { return };
        known.instance.get_or_insert(instance);
        if let Some(changes) = reply.changes {
            let seen = known.changes.filter(|(of, _)| *of == instance).map_or(0, |(_, changes)| changes);
            known.changes = Some((instance, seen.max(changes)));
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.inner.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn doing(&self) -> String {
        format!("ask the witness `{}`", self.inner.connector.name())
    }
}

struct Reply {
    status: StatusCode,
    instance: Option<InstanceId>,
    changes: Option<u64>,
    body: Bytes,
}

enum Broken {
    Refused(Refusal, Box<dyn std::error::Error + Send + Sync>),
    Failed(Box<dyn std::error::Error + Send + Sync>),
}

impl Register for WitnessClient {
    fn read(&self, register: RegisterId) -> Answer<'_, Option<RegisterValue>> {
        Box::pin(async move {
            let path = format!("/v1/registers/{register}");
            let answer: ReadAnswer =
                self.request(Method::GET, path, &(), Some(register), Effect::None).await?;
            Ok(answer.value)
        })
    }

    fn swap(
        &self,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    ) -> Answer<'_, SwapOutcome> {
        Box::pin(async move {
            let path = format!("/v1/registers/{register}/swap");
            let request = SwapRequest { expected, value };
            Ok(match self.request(Method::POST, path, &request, Some(register), Effect::Change).await? {
                SwapAnswer::Won => SwapOutcome::Won,
                SwapAnswer::Lost { current } => SwapOutcome::Lost(current),
            })
        })
    }
}
