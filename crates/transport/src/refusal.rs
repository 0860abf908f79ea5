//! What a TLS failure means to an operator.

use crate::ErrorKind;
use rustls::{AlertDescription, CertificateError, Error};

/// The kind, and whether the peer (by an alert) found the fault.
pub(crate) fn classify(error: &Error) -> (ErrorKind, bool) {
    match error {
        Error::InvalidCertificate(why) => (certificate(why), false),
        Error::InvalidCertRevocationList(_) => (ErrorKind::CertificateInvalid, false),
        Error::NoCertificatesPresented => (ErrorKind::CertificateMissing, false),
        Error::AlertReceived(alert) => (alert_kind(*alert), true),
        _ => (ErrorKind::NotOurProtocol, false),
    }
}

fn certificate(why: &CertificateError) -> ErrorKind {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => ErrorKind::CertificateExpired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            ErrorKind::CertificateNotYetValid
        }
        CertificateError::Revoked => ErrorKind::CertificateRevoked,
        // Each cluster has its own authority and its own name, so these two mean "another cluster".
        CertificateError::UnknownIssuer
        | CertificateError::NotValidForName
        | CertificateError::NotValidForNameContext { .. } => ErrorKind::WrongCluster,
        _ => ErrorKind::CertificateInvalid,
    }
}

fn alert_kind(alert: AlertDescription) -> ErrorKind {
    match alert {
        AlertDescription::CertificateExpired => ErrorKind::CertificateExpired,
        AlertDescription::CertificateRevoked => ErrorKind::CertificateRevoked,
        AlertDescription::UnknownCA => ErrorKind::WrongCluster,
        AlertDescription::CertificateRequired => ErrorKind::CertificateMissing,
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::DecryptError => ErrorKind::CertificateInvalid,
        AlertDescription::CloseNotify => ErrorKind::Closed,
        _ => ErrorKind::NotOurProtocol,
    }
}
