use serde::{Deserialize, Serialize};
use std::fmt;

/// What kind of refusal it was; decides the HTTP status and the program's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request itself is wrong. HTTP 400, exit code 2.
    Invalid,
    /// What it names does not exist. HTTP 404, exit code 1.
    NotFound,
    /// It contradicts what is there, such as a name in use. HTTP 409, exit code 1.
    Conflict,
    /// Refused to protect data. HTTP 412, exit code 4.
    Refused,
    /// A peer, a witness or the daemon does not answer. HTTP 503, exit code 3.
    Unreachable,
    /// The sender may not do this. HTTP 403, exit code 1.
    Forbidden,
    /// It was tried and failed. HTTP 500, exit code 1.
    Failed,
}

impl ErrorKind {
    pub fn http_status(self) -> u16 {
        match self {
            ErrorKind::Invalid => 400,
            ErrorKind::Forbidden => 403,
            ErrorKind::NotFound => 404,
            ErrorKind::Conflict => 409,
            ErrorKind::Refused => 412,
            ErrorKind::Failed => 500,
            ErrorKind::Unreachable => 503,
        }
    }

    pub fn exit_code(self) -> u8 {
        match self {
            ErrorKind::Invalid => 2,
            ErrorKind::Unreachable => 3,
            ErrorKind::Refused => 4,
            ErrorKind::NotFound | ErrorKind::Conflict | ErrorKind::Forbidden | ErrorKind::Failed => 1,
        }
    }
}

/// What was refused, on what and why; the cause below it; and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    pub kind: ErrorKind,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into(), cause: None, hint: None }
    }

    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Invalid, message)
    }

    pub fn not_found(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::NotFound, message)
    }

    pub fn conflict(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Conflict, message)
    }

    pub fn refused(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Refused, message)
    }

    pub fn unreachable(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Unreachable, message)
    }

    pub fn failed(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Failed, message)
    }

    #[must_use]
    pub fn cause(mut self, cause: impl fmt::Display) -> Error {
        self.cause = Some(cause.to_string());
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(cause) = &self.cause {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
