//! Answers that do not end by themselves: lines of JSON, for as long as the connection lives.

use crate::client::Connection;
use crate::{Client, Error};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// A daemon that says nothing for so long is not there any more.
const SILENCE: Duration = Duration::from_secs(30);
/// What is told with a machine's UEFI variables. Longer lines are not the daemon's.
const MAX_LINE_BYTES: usize = 64 << 20;

#[derive(Debug)]
pub(crate) struct Lines {
    /// What is told of: "a view".
    what: &'static str,
    body: Incoming,
    received: Vec<u8>,
    /// The connection lives no longer than this.
    _connection: Connection,
}

impl Client {
    pub(crate) async fn lines(
        &self,
        path: &str,
        request: &impl Serialize,
        what: &'static str,
    ) -> Result<Lines, Error> {
        let text =
            serde_json::to_vec(request).map_err(|e| Error::invalid("cannot write the request").cause(e))?;
        let (connection, body) = self.open_stream(path, Bytes::from(text)).await?;
        Ok(Lines { what, body, received: Vec::new(), _connection: connection })
    }
}

impl Lines {
    pub(crate) async fn next<M: DeserializeOwned>(&mut self) -> Result<M, Error> {
        let what = self.what;
        let cut_off = || Error::unreachable(format!("the daemon ended {what}"));
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|e| {
                    Error::failed(format!("cannot read what the daemon said of {what}")).cause(e)
                });
            }
            if self.received.len() > MAX_LINE_BYTES {
                return Err(Error::failed(format!("the daemon said too much of {what}")));
            }
            match tokio::time::timeout(SILENCE, self.body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.received.extend_from_slice(&data);
                    }
                }
                Ok(Some(Err(e))) => return Err(cut_off().cause(e)),
                Ok(None) => return Err(cut_off()),
                Err(_) => {
                    return Err(cut_off().cause(format!("it said nothing for {} s", SILENCE.as_secs())));
                }
            }
        }
    }
}
