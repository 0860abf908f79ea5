//! A certificate authority for one test, and the files in which other programs look for its certificates.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fs;
use std::path::Path;
use std::sync::Arc;

pub struct Certificates {
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
    ca_pem: String,
    client_pem: (String, String),
}

impl Certificates {
    pub fn new() -> Certificates {
        let mut ca_params = CertificateParams::default();
        ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca_params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        ca_params.distinguished_name.push(DnType::CommonName, "a test's authority");
        let ca_key = KeyPair::generate().unwrap();
        let ca = ca_params.self_signed(&ca_key).unwrap();
        let issuer = Issuer::new(ca_params, ca_key);

        let issue = |purpose: ExtendedKeyUsagePurpose| {
            let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
            // QEMU also looks for key encipherment, though nothing here uses it.
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
            params.extended_key_usages = vec![purpose];
            params.distinguished_name.push(DnType::CommonName, "localhost");
            let key = KeyPair::generate().unwrap();
            (params.signed_by(&key, &issuer).unwrap(), key)
        };
        let (server, server_key) = issue(ExtendedKeyUsagePurpose::ServerAuth);
        let (client, client_key) = issue(ExtendedKeyUsagePurpose::ClientAuth);

        let mut roots = RootCertStore::empty();
        roots.add(ca.der().clone()).unwrap();
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let chain = |certificate: &rcgen::Certificate| -> Vec<CertificateDer<'static>> {
            vec![certificate.der().clone()]
        };
        let key = |key: &KeyPair| PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build().unwrap();
        let server_config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain(&server), key(&server_key))
            .unwrap();
        let client_config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain(&client), key(&client_key))
            .unwrap();
        Certificates {
            server: Arc::new(server_config),
            client: Arc::new(client_config),
            ca_pem: ca.pem(),
            client_pem: (client.pem(), client_key.serialize_pem()),
        }
    }

    /// Writes a client's files under the names libnbd and QEMU expect.
    pub fn write_client_files(&self, directory: &Path) {
        fs::create_dir_all(directory).unwrap();
        fs::write(directory.join("ca-cert.pem"), &self.ca_pem).unwrap();
        fs::write(directory.join("client-cert.pem"), &self.client_pem.0).unwrap();
        fs::write(directory.join("client-key.pem"), &self.client_pem.1).unwrap();
    }
}
