//! The authority of a cluster: issues certificates and takes them back.

use super::credentials::{CertificateInfo, PrivateKey, cluster_name, first_certificate};
use super::files::{make_directory, read_text, write_private};
use crate::{ClusterId, Error, ErrorKind, Identity};
use data_encoding::HEXLOWER;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rempart_types::WallTime;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt;
use std::path::Path;
use std::time::Duration;
use time::OffsetDateTime;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The authority outlives the hardware.
const AUTHORITY_LIFE: Duration = DAY.saturating_mul(365 * 20);
/// A member's certificate; it renews itself after two thirds of that.
const MEMBER_LIFE: Duration = DAY.saturating_mul(365);
/// Certificates count from this much earlier, because two clocks never agree.
const CLOCK_ALLOWANCE: Duration = DAY;

/// SHA-256 of the authority's certificate: what a token carries so that a stranger can trust the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CaPin(pub [u8; 32]);

impl CaPin {
    pub fn of(certificate: &CertificateDer<'_>) -> CaPin {
        CaPin(Sha256::digest(certificate).into())
    }
}

impl fmt::Display for CaPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for CaPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CaPin({self})")
    }
}

/// From when until when a certificate is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub from: WallTime,
    pub until: WallTime,
}

impl Validity {
    /// A member's usual certificate, issued now.
    pub fn usual(now: WallTime) -> Validity {
        Validity { from: minus(now, CLOCK_ALLOWANCE), until: plus(now, MEMBER_LIFE) }
    }
}

/// What the authority must remember. Secrets are not in it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Book {
    /// Number of the newest revocation list.
    list_number: u64,
    issued: Vec<Issued>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Issued {
    identity: Identity,
    /// Hexadecimal.
    serial: String,
    expires_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revoked_ms: Option<u64>,
}

/// A cluster's certificate authority, with its key. Whoever has its directory can admit anyone.
pub struct Authority {
    cluster: ClusterId,
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    key: KeyPair,
    book: Book,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

const CERTIFICATE_FILE: &str = "authority.pem";
const KEY_FILE: &str = "authority-key.pem";
const BOOK_FILE: &str = "authority.json";

impl Authority {
    /// A new authority for a new cluster.
    pub fn create(cluster: ClusterId, now: WallTime) -> Result<Authority, Error> {
        let key = PrivateKey::generate()?.into_key_pair();
        let mut params = CertificateParams::default();
        params.not_before = date(minus(now, CLOCK_ALLOWANCE))?;
        params.not_after = date(plus(now, AUTHORITY_LIFE))?;
        params.serial_number = Some(random_serial());
        params.distinguished_name = common_name(format!("rempart authority {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri(format!("rempart://{cluster}/authority"))?];
        let certificate =
            params.self_signed(&key).map_err(|error| unusable("create the authority", error))?;
        Ok(Authority {
            cluster,
            certificate_pem: certificate.pem(),
            certificate: certificate.der().clone(),
            key,
            book: Book::default(),
        })
    }

    pub fn load(directory: &Path) -> Result<Authority, Error> {
        let certificate_pem = read_text(&directory.join(CERTIFICATE_FILE))?;
        let certificate = first_certificate(&certificate_pem)?;
        let cluster = CertificateInfo::authority_cluster(&certificate)?;
        let key = PrivateKey::from_pem(&read_text(&directory.join(KEY_FILE))?)?.into_key_pair();
        let book = serde_json::from_str(&read_text(&directory.join(BOOK_FILE))?).map_err(|error| {
            Error::new(ErrorKind::CertificateInvalid, "read the authority's book").because(error)
        })?;
        Ok(Authority { cluster, certificate_pem, certificate, key, book })
    }

    /// Writes the certificate, the key and the book, each durably and readable by the owner only.
    /// Call it after each change and before its result leaves the machine.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        make_directory(directory)?;
        write_private(&directory.join(KEY_FILE), self.key.serialize_pem().as_bytes())?;
        write_private(&directory.join(CERTIFICATE_FILE), self.certificate_pem.as_bytes())?;
        let book = serde_json::to_vec_pretty(&self.book).expect("a book always serialises");
        write_private(&directory.join(BOOK_FILE), &book)
    }

    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    pub fn pin(&self) -> CaPin {
        CaPin::of(&self.certificate)
    }

    /// Signs a certificate for `identity` and the key of `request_pem`; whatever else the request asks for is
    /// ignored. The caller has made sure that the requester may be that identity.
    pub fn issue(
        &mut self,
        request_pem: &str,
        identity: Identity,
        validity: Validity,
    ) -> Result<String, Error> {
        if identity.cluster != self.cluster {
            return Err(Error::new(ErrorKind::WrongCluster, format!("issue a certificate to {identity}")));
        }
        let request = CertificateSigningRequestParams::from_pem(request_pem)
            .map_err(|error| unusable("read the certificate request", error))?;
        let serial = random_serial();
        let mut params = CertificateParams::default();
        params.not_before = date(validity.from)?;
        params.not_after = date(validity.until)?;
        params.serial_number = Some(serial.clone());
        params.distinguished_name = common_name(format!("rempart {} {}", identity.role, identity.id));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let name =
            cluster_name(self.cluster).try_into().map_err(|error| unusable("name the cluster", error))?;
        params.subject_alt_names = vec![SanType::DnsName(name), uri(identity.to_string())?];
        let certificate = params
            .signed_by(&request.public_key, &self.issuer()?)
            .map_err(|error| unusable("sign the certificate", error))?;
        self.book.issued.push(Issued {
            identity,
            serial: HEXLOWER.encode(&serial.to_bytes()),
            expires_ms: validity.until.0,
            revoked_ms: None,
        });
        Ok(certificate.pem())
    }

    /// Takes back every certificate of `identity` that has not expired. Returns how many. It takes effect
    /// where the next [`Authority::revocation_list`] arrives.
    pub fn revoke(&mut self, identity: Identity, now: WallTime) -> usize {
        let mut revoked = 0;
        for issued in &mut self.book.issued {
            if issued.identity == identity && issued.revoked_ms.is_none() && issued.expires_ms > now.0 {
                issued.revoked_ms = Some(now.0);
                revoked += 1;
            }
        }
        revoked
    }

    /// A new revocation list, in PEM, numbered above all before it. Certificates that expired leave it.
    pub fn revocation_list(&mut self, now: WallTime) -> Result<String, Error> {
        self.book.issued.retain(|issued| issued.expires_ms > minus(now, CLOCK_ALLOWANCE).0);
        // Time as a lower bound keeps the numbers rising when an authority is restored from a backup.
        self.book.list_number = (self.book.list_number + 1).max(now.0);
        let mut revoked_certs = Vec::new();
        for issued in &self.book.issued {
            let Some(revoked) = issued.revoked_ms else { continue };
            let serial = HEXLOWER.decode(issued.serial.as_bytes()).map_err(|error| {
                Error::new(ErrorKind::CertificateInvalid, "read the authority's book").because(error)
            })?;
            revoked_certs.push(RevokedCertParams {
                serial_number: SerialNumber::from_slice(&serial),
                revocation_time: date(WallTime(revoked))?,
                reason_code: None,
                invalidity_date: None,
            });
        }
        let list = CertificateRevocationListParams {
            this_update: date(now)?,
            // Nobody stops working because a list is old; it is replaced by hand-over, not by time.
            next_update: date(plus(now, AUTHORITY_LIFE))?,
            crl_number: SerialNumber::from_slice(&self.book.list_number.to_be_bytes()),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer()?)
        .map_err(|error| unusable("sign the revocation list", error))?;
        list.pem().map_err(|error| unusable("write the revocation list", error))
    }

    fn issuer(&self) -> Result<Issuer<'static, &KeyPair>, Error> {
        Issuer::from_ca_cert_der(&self.certificate, &self.key)
            .map_err(|error| unusable("read the authority's certificate", error))
    }
}

fn unusable(doing: &str, error: rcgen::Error) -> Error {
    Error::new(ErrorKind::CertificateInvalid, doing).because(error)
}

fn common_name(name: String) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

fn uri(text: String) -> Result<SanType, Error> {
    text.try_into().map(SanType::URI).map_err(|error| unusable("write an identity", error))
}

/// Positive and not zero, as X.509 wants it.
fn random_serial() -> SerialNumber {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes[0] = bytes[0] & 0x3f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn plus(time: WallTime, span: Duration) -> WallTime {
    WallTime(time.0.saturating_add(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)))
}

fn minus(time: WallTime, span: Duration) -> WallTime {
    WallTime(time.0.saturating_sub(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)))
}

fn date(time: WallTime) -> Result<OffsetDateTime, Error> {
    let seconds = i64::try_from(time.0 / 1000).unwrap_or(i64::MAX);
    OffsetDateTime::from_unix_timestamp(seconds)
        .map_err(|error| Error::new(ErrorKind::CertificateInvalid, "write a date").because(error))
}
