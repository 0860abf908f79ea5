//! Answers that do not end by themselves: what they are of lives as long as the connection that asked for it.

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::body::Frame;
use serde::Serialize;
use std::convert::Infallible;
use std::pin::Pin;
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

fn line(message: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec(message).expect("a message always encodes");
    text.push(b'\n');
    text.into()
}

/// Says `first`, then `alive` every now and then until the client leaves, or `last` comes true and is said. `guard` goes
/// when the client has gone.
pub fn stream<M: Serialize + Send + Sync + 'static>(
    first: &M,
    alive: M,
    last: impl Future<Output = M> + Send + 'static,
    guard: impl Send + 'static,
) -> Response {
    let (sender, receiver) = mpsc::channel(1);
    let mut next = line(first);
    tokio::spawn(async move {
        tokio::pin!(last);
        while sender.send(next).await.is_ok() {
            tokio::select! {
                () = sender.closed() => break,
                message = &mut last => {
                    let _ = sender.send(line(&message)).await;
                    sender.closed().await;
                    break;
                }
                () = tokio::time::sleep(ALIVE_EVERY) => next = line(&alive),
            }
        }
        drop(guard);
    });
    let body = Body::new(Lines { receiver });
    ([(CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}
