//! A view lives as long as the connection that asked for it.

use super::answer::Refused;
use crate::node::Node;
use crate::operation::{ViewGuard, open_view};
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::body::Frame;
use rempart_api::{Error, ViewMessage, ViewRequest};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;

/// A client that is gone is noticed when something is sent to it.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// Lines as they are said.
struct Lines {
    receiver: mpsc::Receiver<Bytes>,
}

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.receiver.poll_recv(context).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

fn line(message: &ViewMessage) -> Bytes {
    let mut text = serde_json::to_vec(message).expect("a message always encodes");
    text.push(b'\n');
    text.into()
}

pub async fn open(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    super::answer::Body(request): super::answer::Body<Option<ViewRequest>>,
) -> Result<Response, Refused> {
    let vm = node.vm(&name)?;
    let opened = open_view(&node, vm, request.unwrap_or_default()).await?;
    let (sender, receiver) = mpsc::channel(1);
    let first = line(&ViewMessage::Opened { view: Box::new(opened.view) });
    tokio::spawn(hold(name, sender, first, opened.guard, opened.lost));
    let body = Body::new(Lines { receiver });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// Says what there is to say until the client leaves or the view is lost. The view is closed with `guard`.
async fn hold(
    name: String,
    sender: mpsc::Sender<Bytes>,
    first: Bytes,
    guard: ViewGuard,
    mut lost: tokio::sync::oneshot::Receiver<String>,
) {
    let mut next = first;
    loop {
        if sender.send(next).await.is_err() {
            break;
        }
        tokio::select! {
            () = sender.closed() => break,
            why = &mut lost => {
                let why = why.unwrap_or_else(|_| "its copy was closed".into());
                tracing::warn!(vm = name, why, "a view is lost");
                let error = Error::failed(format!("the view of `{name}` is lost")).cause(why);
                let _ = sender.send(line(&ViewMessage::Lost { error })).await;
                // Until the client has heard, its reads are answered with the reason.
                sender.closed().await;
                break;
            }
            () = tokio::time::sleep(ALIVE_EVERY) => next = line(&ViewMessage::Alive),
        }
    }
    drop(guard);
}
