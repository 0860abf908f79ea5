//! What a stranger, or nobody, answers with.

use crate::receiver::secret;
use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use tempfile::TempDir;

/// A port at which nobody listens.
pub fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port()
}

/// A certificate for `localhost`, which is its own authority, and its key.
pub struct SelfSigned {
    pub certificate: PathBuf,
    pub key: PathBuf,
    home: TempDir,
}

impl SelfSigned {
    pub fn new() -> SelfSigned {
        let home = TempDir::new().expect("a directory");
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("made");
        let (certificate, key) = (home.path().join("certificate.pem"), home.path().join("key.pem"));
        fs::write(&certificate, made.cert.pem()).expect("written");
        fs::write(&key, made.signing_key.serialize_pem()).expect("written");
        SelfSigned { certificate, key, home }
    }

    /// A file beside it.
    pub fn beside(&self, name: &str, content: &str) -> PathBuf {
        let path = self.home.path().join(name);
        secret(&path, content);
        path
    }
}
