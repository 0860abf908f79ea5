//! One request, one answer.

use super::metrics::Counters;
use super::server::{Caller, Inner};
use super::store::{Expectation, Failure};
use super::wire::{
    CHANGES, ExcuseRequest, INSTANCE, MAX_BODY, ReadAnswer, RefusedAnswer, ReportRequest, SwapAnswer,
    SwapRequest,
};
use crate::{Refusal, SwapOutcome};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use rempart_types::{NodeId, RegisterId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

/// How long the rest of a request may take to come.
const BODY_DEADLINE: Duration = Duration::from_secs(5);

pub(super) async fn answer(
    inner: Arc<Inner>,
    caller: Caller,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let result = match tokio::time::timeout(BODY_DEADLINE, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => {
            let work = inner.clone();
            let body = body.to_bytes();
            // The store blocks on the disk. The request goes on even if its author is gone by then.
            tokio::task::spawn_blocking(move || {
                decide(&work, caller, &head.method, head.uri.path(), &head.headers, &body)
            })
            .await
            .unwrap_or_else(|_| Ok(Answer::status(StatusCode::INTERNAL_SERVER_ERROR)))
        }
        _ => Err(Refusal::BadRequest("the request is too long or incomplete".to_owned()).into()),
    };
    let answer = match result {
        Ok(answer) => answer,
        Err(Failure::Refused(refused)) => {
            Counters::add(&inner.counters.refused);
            tracing::debug!(?caller, %refused, "refused a request");
            Answer::json(StatusCode::CONFLICT, &RefusedAnswer { refused })
        }
        Err(Failure::Storage(error)) => {
            Counters::add(&inner.counters.storage_failures);
            tracing::error!(%error, "the witness's storage failed");
            Answer::status(StatusCode::INTERNAL_SERVER_ERROR)
        }
    };
    let response = Response::builder()
        .status(answer.status)
        .header(header::CONTENT_TYPE, answer.content_type)
        .header(INSTANCE, inner.store.instance().to_string())
        .header(CHANGES, inner.store.changes())
        .body(Full::new(answer.body));
    Ok(response.expect("the parts are valid"))
}

struct Answer {
    status: StatusCode,
    content_type: &'static str,
    body: Bytes,
}

impl Answer {
    fn status(status: StatusCode) -> Answer {
        Answer { status, content_type: "text/plain", body: Bytes::new() }
    }

    fn json(status: StatusCode, value: &impl Serialize) -> Answer {
        let body = serde_json::to_vec(value).expect("an answer always serialises").into();
        Answer { status, content_type: "application/json", body }
    }

    fn ok(value: &impl Serialize) -> Result<Answer, Failure> {
        Ok(Answer::json(StatusCode::OK, value))
    }
}

fn decide(
    inner: &Inner,
    caller: Caller,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Answer, Failure> {
    let path: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    if let (&Method::GET, ["v1", "health"]) = (method, &path[..]) {
        return Answer::ok(&inner.store.health()?);
    }
    let [_, "registers", register, action @ ..] = &path[..] else {
        return Ok(Answer::status(StatusCode::NOT_FOUND));
    };
    if path[0] != "v1" {
        return Err(Refusal::BadRequest("this release speaks v1".to_owned()).into());
    }
    if caller == Caller::Other {
        return Err(Refusal::NotAMember(None).into());
    }
    let register: RegisterId =
        register.parse().map_err(|_| Refusal::BadRequest("no register's id".to_owned()))?;
    let expectation = expectation(headers)?;
    let counters = &inner.counters;
    match (method, action) {
        (&Method::GET, []) => {
            inner.store.notice_regression(expectation)?;
            let value = inner.store.read(register, expectation)?;
            Counters::add(&counters.reads);
            Answer::ok(&ReadAnswer { value })
        }
        (&Method::POST, ["swap"]) => {
            let SwapRequest { expected, value } = parse(body)?;
            let node = match caller {
                Caller::Node(node) => Some(node),
                _ => None,
            };
            inner.store.notice_regression(expectation)?;
            Answer::ok(&match inner.store.swap(node, register, expected, value, expectation)? {
                SwapOutcome::Won => {
                    Counters::add(&counters.swaps_won);
                    SwapAnswer::Won
                }
                SwapOutcome::Lost(current) => {
                    Counters::add(&counters.swaps_lost);
                    SwapAnswer::Lost { current }
                }
            })
        }
        (&Method::POST, ["report"]) => {
            let ReportRequest { node, value, replicas } = parse(body)?;
            speaks_for(caller, node)?;
            Counters::add(&counters.reports);
            Answer::ok(&inner.store.report(node, register, value, &replicas)?)
        }
        (&Method::POST, ["excuse"]) => {
            let ExcuseRequest { node } = parse(body)?;
            Answer::ok(&inner.store.excuse(node, register)?)
        }
        _ => Ok(Answer::status(StatusCode::NOT_FOUND)),
    }
}

fn speaks_for(caller: Caller, node: NodeId) -> Result<(), Refusal> {
    match caller {
        Caller::Node(own) if own != node => {
            Err(Refusal::BadRequest("a node reports for itself only".to_owned()))
        }
        _ => Ok(()),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal::BadRequest(error.to_string()))
}

fn expectation(headers: &HeaderMap) -> Result<Expectation, Refusal> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let bad = |name: &str| Refusal::BadRequest(format!("header `{name}`"));
    Ok(Expectation {
        instance: text(INSTANCE).map(str::parse).transpose().map_err(|_| bad(INSTANCE))?,
        changes: text(CHANGES).map(str::parse).transpose().map_err(|_| bad(CHANGES))?,
    })
}
