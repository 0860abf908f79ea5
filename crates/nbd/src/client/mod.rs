//! The client's end of one connection.
//!
//! - [`Handshake`] and [`Codec`]: no socket, no clock; bytes in, bytes out.
//! - [`Client`]: the two of them on a non-blocking stream (unix socket, TCP, TLS), with a deadline on every
//!   wait. Requests may be pipelined: [`Client::submit`] as many as wanted, then [`Client::wait`].
//!
//! A server is not trusted: replies that answer nothing, lie about their length, overlap or leave gaps end
//! the connection with [`ClientError::Violation`].

mod blocking;
mod codec;
mod handshake;
mod reading;

pub use blocking::{Client, Stream, Timed, list_exports, start_tls};
pub use codec::{Answer, Codec, Command, CommandError, Completion, ContextExtents, Cookie};
pub use handshake::{ConnectOptions, ExportInfo, Handshake, Outcome};

use crate::ErrorCode;
use std::io;

/// Why a client cannot go on. After any but `Command` and `NotOffered` the connection is of no more use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    #[error("{doing}")]
    Io { doing: &'static str, source: io::Error },
    #[error("{doing}: no answer in time")]
    TimedOut { doing: &'static str },
    #[error("{doing}: the server closed the connection")]
    Closed { doing: &'static str },
    #[error("the server broke the protocol: {0}")]
    Violation(&'static str),
    #[error("no export `{name}` on this server{}", shown(.message))]
    NoSuchExport { name: String, message: String },
    #[error("the server wants an encrypted connection{}", shown(.message))]
    EncryptionRequired { message: String },
    #[error("the server refused option {option} with {reply:#x}{}", shown(.message))]
    Refused { option: u32, reply: u32, message: String },
    #[error("the server does not offer {0}")]
    NotOffered(&'static str),
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl ClientError {
    /// The code with which the server failed a request, if that is what happened.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            ClientError::Command(error) => Some(error.code),
            _ => None,
        }
    }
}

/// What a server said about an error, behind a colon, if it said anything.
fn shown(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}
