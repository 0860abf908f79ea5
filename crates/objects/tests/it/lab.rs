//! Buckets of real servers, on this machine: moto speaks S3, azurite speaks Azure. Both look and then write, so that
//! they say nothing about races; of moto, which was seen to give one name to two writers, we have one request answered after
//! the other. `cargo xtask setup` installs them beside the build.

use object_store::azure::{AzureAccessKey, AzureAuthorizer, AzureCredential};
use object_store::client::{HttpConnector, HttpRequestBody, ReqwestConnector};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For a server to answer; it may be started on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Azurite's account, and its key, which everybody knows.
pub const ACCOUNT: &str = "devstoreaccount1";
pub const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// moto's program, with one request at a time in it.
const MOTO: &str = include_str!("moto.py");

/// A process that is killed with the test.
pub struct Server {
    child: Child,
    pub port: u16,
    _work: tempfile::TempDir,
}

impl Server {
    /// `STOP`: it takes connections and answers nothing, until `CONT`.
    #[allow(dead_code)] // Not all who have this module do so.
    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success(), "{signal}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lab() -> PathBuf {
    match std::env::var_os("REMPART_LAB_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("lab"),
    }
}

/// Starts a server of the lab; `None`, and a line that nobody captures, if it is not installed as a whole.
fn start(home: &str, program: &str, arguments: impl Fn(u16) -> Vec<String>) -> Option<Server> {
    let home = lab().join(home);
    if !home.join("whole").exists() {
        let _ = writeln!(
            std::io::stderr(),
            "NOT TESTED: no {} (`cargo xtask setup` installs it)",
            home.display()
        );
        return None;
    }
    let work = tempfile::tempdir().expect("a directory");
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
    let mut command = Command::new(home.join(program));
    command.args(arguments(port)).current_dir(work.path());
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut server = Server { child: child.expect("it starts"), port, _work: work };
    let started = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(server.child.try_wait().expect("it can be asked").is_none(), "the server died");
        assert!(started.elapsed() < PATIENCE, "the server does not answer");
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(server)
}

/// Speaks S3.
pub fn moto() -> Option<Server> {
    let arguments = |port: u16| {
        let fixed = ["-c", MOTO, "-H", "127.0.0.1", "-p"];
        fixed.map(str::to_owned).into_iter().chain([port.to_string()]).collect()
    };
    start("moto", "bin/python", arguments)
}

/// Speaks Azure.
pub fn azurite() -> Option<Server> {
    let arguments = |port: u16| {
        let fixed = [
            "--silent",
            "--skipApiVersionCheck",
            "--disableTelemetry",
            "--blobHost",
            "127.0.0.1",
            "--blobPort",
        ];
        fixed.map(str::to_owned).into_iter().chain([port.to_string()]).collect()
    };
    start("azurite", "node_modules/.bin/azurite-blob", arguments)
}

struct Request<'a> {
    method: &'a str,
    path: &'a str,
    headers: &'a [(&'a str, &'a str)],
    body: &'a str,
}

/// Asks a server of this machine; its status.
fn ask(port: u16, request: Request) -> u16 {
    let Request { method, path, headers, body } = request;
    let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += &format!("Content-Length: {}\r\n\r\n{body}", body.len());
    socket.write_all(text.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).expect("answered");
    let answer = String::from_utf8_lossy(&answer);
    answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or_else(|| panic!("no status: {answer}"))
}

/// A request to moto, which believes any signature.
pub fn moto_ask(server: &Server, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> u16 {
    let authorization =
        "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";
    let headers: Vec<_> = headers.iter().copied().chain([("Authorization", authorization)]).collect();
    ask(server.port, Request { method, path, headers: &headers, body })
}

pub fn make_container(endpoint: &str, container: &str) {
    let key = AzureAccessKey::try_new(KEY).expect("a key");
    let credential = AzureCredential::AccessKey(key);
    let mut request = http::Request::builder()
        .method("PUT")
        .uri(format!("{endpoint}/{container}?restype=container"))
        .header("content-length", "0")
        .body(HttpRequestBody::empty())
        .expect("a request");
    AzureAuthorizer::new(&credential, ACCOUNT).try_authorize(&mut request).expect("signed");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let options = object_store::ClientOptions::new().with_allow_http(true);
    let client = ReqwestConnector::default().connect(&options).expect("a client");
    let answer = runtime.block_on(client.execute(request)).expect("answered");
    assert_eq!(answer.status().as_u16(), 201);
}
