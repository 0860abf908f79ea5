//! TLS as this product uses it: 1.3 only, both sides show a certificate, no resumption (a resumed session
//! would skip the revocation list), credentials that can be replaced while connections are made.

use crate::pki::{CertificateInfo, Credentials, cluster_name};
use crate::{ClusterId, Error, ErrorKind, Identity};
use rempart_types::WallTime;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

/// What a connection becomes, as TLS negotiates it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Data,
    Http,
    Enrolment,
}

impl Protocol {
    pub(crate) fn alpn(self) -> &'static [u8] {
        match self {
            Protocol::Data => b"rempart-data/1",
            Protocol::Http => b"http/1.1",
            Protocol::Enrolment => b"rempart-join/1",
        }
    }
}

/// The other side of a connection, as its verified certificate names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub identity: Identity,
    pub address: SocketAddr,
    /// The certificate's serial number, to recognise a revocation that comes later.
    pub serial: Vec<u8>,
    pub expires: WallTime,
}

/// This machine's credentials, ready for use. Cheap to clone; all clones see a [`TlsContext::reload`].
#[derive(Clone)]
pub struct TlsContext {
    current: Arc<RwLock<Arc<Loaded>>>,
}

pub(crate) struct Loaded {
    pub(crate) identity: Identity,
    info: CertificateInfo,
    revoked: Vec<Vec<u8>>,
    list_number: Option<u64>,
    data_server: Arc<ServerConfig>,
    http_server: Arc<ServerConfig>,
    enrolment_server: Arc<ServerConfig>,
    data_client: Arc<ClientConfig>,
    http_client: Arc<ClientConfig>,
}

impl TlsContext {
    pub fn new(credentials: &Credentials) -> Result<TlsContext, Error> {
        Ok(TlsContext { current: Arc::new(RwLock::new(Arc::new(Loaded::new(credentials)?))) })
    }

    /// Uses other credentials for every connection from now on. Refuses those of another identity and a
    /// revocation list older than the present one. Connections that exist stay: ask [`TlsContext::is_revoked`].
    pub fn reload(&self, credentials: &Credentials) -> Result<(), Error> {
        let next = Loaded::new(credentials)?;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        let wrong =
            |why: &str| Error::new(ErrorKind::CertificateInvalid, "reload the credentials").because(why);
        if next.identity != current.identity {
            return Err(wrong("they name another identity"));
        }
        if next.list_number < current.list_number {
            return Err(wrong("their revocation list is older than the one in use"));
        }
        *current = Arc::new(next);
        Ok(())
    }

    pub fn identity(&self) -> Identity {
        self.loaded().identity
    }

    /// When our own certificate expires.
    pub fn expires(&self) -> WallTime {
        self.loaded().info.not_after
    }

    /// Whether the peer's certificate is on the revocation list in use now. Close its connections then.
    pub fn is_revoked(&self, peer: &Peer) -> bool {
        self.loaded().revoked.contains(&peer.serial)
    }

    pub(crate) fn loaded(&self) -> Arc<Loaded> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl std::fmt::Debug for TlsContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsContext").field("identity", &self.identity()).finish_non_exhaustive()
    }
}

impl Loaded {
    fn new(credentials: &Credentials) -> Result<Loaded, Error> {
        let info = credentials.info()?;
        let provider = provider();
        let roots = Arc::new(roots(credentials.ca_der())?);
        let revocation = credentials.revocation()?;
        let lists: Vec<_> = revocation.iter().map(|list| list.der.clone()).collect();
        let invalid = |error: rustls::Error| Error::tls("use the certificate", error);

        let members: Arc<dyn ClientCertVerifier> = {
            let mut builder = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
                .with_crls(lists.clone());
            if !lists.is_empty() {
                builder = builder.only_check_end_entity_revocation();
            }
            builder.build().map_err(|error| {
                Error::new(ErrorKind::CertificateInvalid, "trust the cluster's authority").because(error)
            })?
        };
        let server = |verifier: Option<&Arc<dyn ClientCertVerifier>>, protocol: Protocol| {
            let builder = ServerConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(invalid)?;
            let builder = match verifier {
                Some(verifier) => builder.with_client_cert_verifier(verifier.clone()),
                None => builder.with_no_client_auth(),
            };
            let mut config =
                builder.with_single_cert(credentials.chain(), credentials.key_der()).map_err(invalid)?;
            config.alpn_protocols = vec![protocol.alpn().to_vec()];
            config.ignore_client_order = true;
            config.send_tls13_tickets = 0;
            config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
            Ok::<_, Error>(Arc::new(config))
        };
        let client = |protocol: Protocol| {
            let mut builder =
                rustls::client::WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
                    .with_crls(lists.clone());
            if !lists.is_empty() {
                builder = builder.only_check_end_entity_revocation();
            }
            let verifier = builder.build().map_err(|error| {
                Error::new(ErrorKind::CertificateInvalid, "trust the cluster's authority").because(error)
            })?;
            let mut config = ClientConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(invalid)?
                .with_webpki_verifier(verifier)
                .with_client_auth_cert(credentials.chain(), credentials.key_der())
                .map_err(invalid)?;
            config.alpn_protocols = vec![protocol.alpn().to_vec()];
            config.resumption = rustls::client::Resumption::disabled();
            Ok::<_, Error>(Arc::new(config))
        };

        Ok(Loaded {
            identity: info.identity,
            data_server: server(Some(&members), Protocol::Data)?,
            http_server: server(Some(&members), Protocol::Http)?,
            enrolment_server: server(None, Protocol::Enrolment)?,
            data_client: client(Protocol::Data)?,
            http_client: client(Protocol::Http)?,
            revoked: revocation.as_ref().map(|list| list.serials.clone()).unwrap_or_default(),
            list_number: revocation.map(|list| list.number),
            info,
        })
    }

    pub(crate) fn server(&self, protocol: Protocol) -> Arc<ServerConfig> {
        match protocol {
            Protocol::Data => self.data_server.clone(),
            Protocol::Http => self.http_server.clone(),
            Protocol::Enrolment => self.enrolment_server.clone(),
        }
    }

    pub(crate) fn data_client(&self) -> Arc<ClientConfig> {
        self.data_client.clone()
    }

    pub(crate) fn http_client(&self) -> Arc<ClientConfig> {
        self.http_client.clone()
    }

    /// The peer named by the certificate that TLS has verified.
    pub(crate) fn peer(
        &self,
        certificates: Option<&[CertificateDer<'_>]>,
        address: SocketAddr,
    ) -> Result<Peer, Error> {
        let missing = || Error::new(ErrorKind::CertificateMissing, "identify the peer");
        let info = CertificateInfo::of(certificates.and_then(<[_]>::first).ok_or_else(missing)?)?;
        if info.identity.cluster != self.identity.cluster {
            return Err(Error::new(ErrorKind::WrongCluster, "identify the peer"));
        }
        Ok(Peer { identity: info.identity, address, serial: info.serial, expires: info.not_after })
    }
}

/// AES-128 first: every server has it in hardware, and it is the fastest of the three.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

pub(crate) fn roots(ca: CertificateDer<'static>) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca).map_err(|error| {
        Error::new(ErrorKind::CertificateInvalid, "read the authority's certificate").because(error)
    })?;
    Ok(roots)
}

/// Every member answers to its cluster's name; which member it is, its identity tells.
pub(crate) fn server_name(cluster: ClusterId) -> ServerName<'static> {
    ServerName::try_from(cluster_name(cluster)).expect("hexadecimal digits make a valid name")
}
