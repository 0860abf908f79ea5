//! The crate's one error: a kind to match on, what was being done, and the cause kept as a value.

use crate::hello::Refusal;
use std::error::Error as StdError;
use std::{fmt, io};

/// What went wrong, as far as a caller may want to react to it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A socket or a file failed.
    Io,
    /// The peer closed the connection, or it broke.
    Closed,
    /// Our own deadline passed first.
    Deadline,
    /// The certificate was signed by another authority: another cluster's, or a forgery.
    WrongCluster,
    /// The certificate's time is over.
    CertificateExpired,
    /// The certificate's time has not begun: one of the two clocks is wrong.
    CertificateNotYetValid,
    /// The authority took the certificate back.
    CertificateRevoked,
    /// A certificate was demanded and none was shown.
    CertificateMissing,
    /// The certificate, key or revocation list is damaged, or not of our making.
    CertificateInvalid,
    /// The certificate is good, but it is somebody else's.
    WrongPeer,
    /// The peer does not speak TLS 1.3, or not our protocol inside it.
    NotOurProtocol,
    /// The peer read our greeting and declined.
    Refused(Refusal),
    /// The peer sent bytes that are no frame, or a frame that is out of place.
    BadFrame,
    /// A frame larger than its named bound, in either direction.
    Oversize,
    /// The bytes waiting to be sent reached their bound: the frame was not queued.
    QueueFull,
    /// An enrolment token that is not one.
    BadToken,
    /// The token was never given out here, or was forgotten long after it expired.
    TokenUnknown,
    /// The token's time is over.
    TokenExpired,
    /// The token was used before.
    TokenUsed,
    /// The token was given out for the other role.
    TokenWrongRole,
}

/// Why a transport operation failed.
pub struct Error {
    kind: ErrorKind,
    doing: String,
    by_peer: bool,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, doing: impl Into<String>) -> Error {
        Error { kind, doing: doing.into(), by_peer: false, source: None }
    }

    pub(crate) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        self.source = Some(source.into());
        self
    }

    /// From an I/O error, which may carry one of ours or of TLS inside.
    pub(crate) fn io(doing: impl Into<String>, error: io::Error) -> Error {
        if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return Error::tls(doing, tls.clone());
        }
        let kind = match error.kind() {
            io::ErrorKind::TimedOut => ErrorKind::Deadline,
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => ErrorKind::Closed,
            _ => ErrorKind::Io,
        };
        Error::new(kind, doing).because(error)
    }

    /// From TLS, telling apart what an operator must do about it.
    pub(crate) fn tls(doing: impl Into<String>, error: rustls::Error) -> Error {
        let (kind, by_peer) = crate::refusal::classify(&error);
        Error { by_peer, ..Error::new(kind, doing).because(error) }
    }

    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// True if it is the peer who found the fault: `CertificateRevoked` then means *our* certificate.
    pub fn reported_by_peer(&self) -> bool {
        self.by_peer
    }

    /// The transport error inside an I/O error of a TLS stream, so that a caller who reads HTTP from it
    /// still learns that a certificate was revoked.
    pub fn from_stream(error: io::Error) -> Error {
        Error::io("use the connection", error)
    }

    /// What TLS objected to, if `error` came from TLS. Our own certificate is meant if the flag is set.
    pub fn tls_kind(error: &io::Error) -> Option<(ErrorKind, bool)> {
        let tls = error.get_ref()?.downcast_ref::<rustls::Error>()?;
        Some(crate::refusal::classify(tls))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: ", self.doing)?;
        let whose = if self.by_peer { "our certificate" } else { "its certificate" };
        match &self.kind {
            ErrorKind::Io => f.write_str("input or output failed"),
            ErrorKind::Closed => f.write_str("the peer closed the connection"),
            ErrorKind::Deadline => f.write_str("no answer within the deadline"),
            ErrorKind::WrongCluster => write!(f, "{whose} was not issued by the same cluster"),
            ErrorKind::CertificateExpired => write!(f, "{whose} has expired"),
            ErrorKind::CertificateNotYetValid => {
                write!(f, "{whose} is not valid yet (is a clock wrong?)")
            }
            ErrorKind::CertificateRevoked => write!(f, "{whose} was revoked"),
            ErrorKind::CertificateMissing => write!(f, "{whose} is missing"),
            ErrorKind::CertificateInvalid => write!(f, "{whose} is not valid"),
            ErrorKind::WrongPeer => f.write_str("another member of the cluster answered"),
            ErrorKind::NotOurProtocol => f.write_str("the peer does not speak this protocol"),
            ErrorKind::Refused(refusal) => write!(f, "the peer declined: {refusal}"),
            ErrorKind::BadFrame => f.write_str("the peer sent garbage"),
            ErrorKind::Oversize => f.write_str("a message exceeds its size limit"),
            ErrorKind::QueueFull => f.write_str("too many bytes wait to be sent"),
            ErrorKind::BadToken => f.write_str("this is not an enrolment token"),
            ErrorKind::TokenUnknown => f.write_str("the enrolment token is unknown"),
            ErrorKind::TokenExpired => f.write_str("the enrolment token has expired"),
            ErrorKind::TokenUsed => f.write_str("the enrolment token was used before"),
            ErrorKind::TokenWrongRole => f.write_str("the enrolment token is for another role"),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.kind)
            .field("doing", &self.doing)
            .field("by_peer", &self.by_peer)
            .field("source", &self.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}
