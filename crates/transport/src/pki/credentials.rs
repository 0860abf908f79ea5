//! What one member holds: its key, its certificate, the authority's certificate, the revocation list.

use super::authority::CaPin;
use super::files::{make_directory, read_text, write_private};
use crate::{ClusterId, Error, ErrorKind, Identity};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rempart_types::WallTime;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::fmt;
use std::path::Path;
use x509_parser::prelude::{CertificateRevocationList, FromDer, GeneralName, X509Certificate};

/// The name all members of a cluster answer to in TLS.
pub(crate) fn cluster_name(cluster: ClusterId) -> String {
    format!("member.{cluster}.rempart.internal")
}

fn invalid(doing: &str) -> Error {
    Error::new(ErrorKind::CertificateInvalid, doing)
}

/// A member's private key. Never shown by `Debug`; it leaves the process only into [`Credentials::save`].
pub struct PrivateKey(KeyPair);

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// A request to be sent to the authority, in PEM, with the key it is about.
#[derive(Debug)]
pub struct CertificateRequest {
    pub key: PrivateKey,
    pub request_pem: String,
}

impl PrivateKey {
    pub fn generate() -> Result<PrivateKey, Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256);
        key.map(PrivateKey).map_err(|error| invalid("generate a key").because(error))
    }

    pub fn from_pem(pem: &str) -> Result<PrivateKey, Error> {
        KeyPair::from_pem(pem).map(PrivateKey).map_err(|error| invalid("read a private key").because(error))
    }

    /// The key itself, for a file that only its owner can read.
    pub fn to_secret_pem(&self) -> String {
        self.0.serialize_pem()
    }

    pub(crate) fn into_key_pair(self) -> KeyPair {
        self.0
    }
}

impl CertificateRequest {
    /// A fresh key and the request for its certificate.
    pub fn generate() -> Result<CertificateRequest, Error> {
        let key = PrivateKey::generate()?;
        let request_pem = CertificateParams::default()
            .serialize_request(&key.0)
            .and_then(|request| request.pem())
            .map_err(|error| invalid("write a certificate request").because(error))?;
        Ok(CertificateRequest { key, request_pem })
    }
}

/// What a member's certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    pub identity: Identity,
    pub serial: Vec<u8>,
    pub not_before: WallTime,
    pub not_after: WallTime,
}

impl CertificateInfo {
    /// Reads a certificate. Verifies nothing: TLS did, or will.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<CertificateInfo, Error> {
        let parsed = parse(certificate)?;
        let identity = uris(&parsed)
            .find_map(|uri| uri.parse().ok())
            .ok_or_else(|| invalid("read the certificate's identity"))?;
        let millis = |seconds: i64| WallTime(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000));
        Ok(CertificateInfo {
            identity,
            serial: parsed.raw_serial().to_vec(),
            not_before: millis(parsed.validity().not_before.timestamp()),
            not_after: millis(parsed.validity().not_after.timestamp()),
        })
    }

    pub fn of_pem(pem: &str) -> Result<CertificateInfo, Error> {
        CertificateInfo::of(&first_certificate(pem)?)
    }

    /// Whether two thirds of the certificate's life are over.
    pub fn renewal_due(&self, now: WallTime) -> bool {
        let life = self.not_after.0.saturating_sub(self.not_before.0);
        now.0 >= self.not_after.0.saturating_sub(life / 3)
    }

    pub(crate) fn authority_cluster(certificate: &CertificateDer<'_>) -> Result<ClusterId, Error> {
        let parsed = parse(certificate)?;
        let mut clusters = uris(&parsed).filter_map(|uri| {
            uri.strip_prefix("rempart://")?.strip_suffix("/authority")?.parse::<ClusterId>().ok()
        });
        clusters.next().ok_or_else(|| invalid("read the authority's identity"))
    }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Error> {
    X509Certificate::from_der(certificate)
        .map(|(_, parsed)| parsed)
        .map_err(|error| invalid("read a certificate").because(error))
}

fn uris<'a>(certificate: &'a X509Certificate<'_>) -> impl Iterator<Item = &'a str> {
    let names = certificate.subject_alternative_name().ok().flatten().map(|names| &names.value.general_names);
    names.into_iter().flatten().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    })
}

pub(crate) fn first_certificate(pem: &str) -> Result<CertificateDer<'static>, Error> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| invalid("read a certificate").because(error))
}

/// A revocation list whose signature was checked.
pub(crate) struct Revocation {
    pub(crate) der: CertificateRevocationListDer<'static>,
    pub(crate) number: u64,
    pub(crate) serials: Vec<Vec<u8>>,
}

/// Everything a member needs to speak TLS in its cluster.
pub struct Credentials {
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    ca: CertificateDer<'static>,
    ca_pem: String,
    key: PrivateKey,
    list_pem: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("identity", &self.info().ok()).finish_non_exhaustive()
    }
}

const CERTIFICATE_FILE: &str = "certificate.pem";
const KEY_FILE: &str = "key.pem";
const CA_FILE: &str = "ca.pem";
const LIST_FILE: &str = "revoked.pem";

impl Credentials {
    /// Puts together what the authority sent back. Refuses a certificate that is not for this key.
    pub fn new(
        key: PrivateKey,
        certificate_pem: &str,
        ca_pem: &str,
        revocation_list_pem: Option<&str>,
    ) -> Result<Credentials, Error> {
        let credentials = Credentials {
            certificate: first_certificate(certificate_pem)?,
            certificate_pem: certificate_pem.to_owned(),
            ca: first_certificate(ca_pem)?,
            ca_pem: ca_pem.to_owned(),
            key,
            list_pem: revocation_list_pem.map(str::to_owned),
        };
        let info = credentials.info()?;
        if CertificateInfo::authority_cluster(&credentials.ca)? != info.identity.cluster {
            return Err(Error::new(ErrorKind::WrongCluster, "match the certificate and the authority"));
        }
        let (certificate, ca) = (parse(&credentials.certificate)?, parse(&credentials.ca)?);
        if certificate.public_key().subject_public_key.as_ref() != credentials.key.0.public_key_raw() {
            return Err(invalid("match the certificate and the key"));
        }
        if certificate.verify_signature(Some(ca.public_key())).is_err() {
            return Err(Error::new(ErrorKind::WrongCluster, "match the certificate and the authority"));
        }
        credentials.revocation()?;
        Ok(credentials)
    }

    pub fn load(directory: &Path) -> Result<Credentials, Error> {
        let list = directory.join(LIST_FILE);
        let list = if list.exists() { Some(read_text(&list)?) } else { None };
        Credentials::new(
            PrivateKey::from_pem(&read_text(&directory.join(KEY_FILE))?)?,
            &read_text(&directory.join(CERTIFICATE_FILE))?,
            &read_text(&directory.join(CA_FILE))?,
            list.as_deref(),
        )
    }

    /// Writes all files, each durably and readable by the owner only. A crash in between may leave a key
    /// without its certificate, which [`Credentials::load`] refuses: renew into a new directory and rename it.
    pub fn save(&self, directory: &Path) -> Result<(), Error> {
        make_directory(directory)?;
        write_private(&directory.join(CA_FILE), self.ca_pem.as_bytes())?;
        write_private(&directory.join(KEY_FILE), self.key.to_secret_pem().as_bytes())?;
        write_private(&directory.join(CERTIFICATE_FILE), self.certificate_pem.as_bytes())?;
        match &self.list_pem {
            Some(list) => write_private(&directory.join(LIST_FILE), list.as_bytes()),
            None => Ok(()),
        }
    }

    /// The same, with another revocation list.
    pub fn with_revocation_list(mut self, list_pem: &str) -> Result<Credentials, Error> {
        self.list_pem = Some(list_pem.to_owned());
        self.revocation()?;
        Ok(self)
    }

    pub fn info(&self) -> Result<CertificateInfo, Error> {
        CertificateInfo::of(&self.certificate)
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    pub fn revocation_list_pem(&self) -> Option<&str> {
        self.list_pem.as_deref()
    }

    pub fn pin(&self) -> CaPin {
        CaPin::of(&self.ca)
    }

    pub(crate) fn ca_der(&self) -> CertificateDer<'static> {
        self.ca.clone()
    }

    /// With the authority's certificate: a joining member has only its pin and takes it from here.
    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone(), self.ca.clone()]
    }

    pub(crate) fn key_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.0.serialize_der()))
    }

    pub(crate) fn revocation(&self) -> Result<Option<Revocation>, Error> {
        let Some(pem) = &self.list_pem else { return Ok(None) };
        let failed = || invalid("read the revocation list");
        let der = CertificateRevocationListDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| failed().because(error))?;
        let (_, list) = CertificateRevocationList::from_der(&der).map_err(|error| failed().because(error))?;
        let ca = parse(&self.ca)?;
        list.verify_signature(ca.public_key())
            .map_err(|_| Error::new(ErrorKind::WrongCluster, "check the revocation list's signature"))?;
        let number = list.crl_number().ok_or_else(failed)?.iter_u64_digits().collect::<Vec<_>>();
        let [number] = number[..] else { return Err(failed()) };
        let serials = list.iter_revoked_certificates().map(|revoked| revoked.raw_serial().to_vec()).collect();
        drop(ca);
        drop(list);
        Ok(Some(Revocation { der, number, serials }))
    }
}
