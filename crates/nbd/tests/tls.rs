//! Encrypted connections over TCP, with certificates on both sides.

mod common;

use common::certificates::Certificates;
use common::pattern;
use common::server::{Server, Setup};
use common::tools::{nbdcopy, nbdinfo, qemu_img, run, run_any, text};
use rempart_nbd::HeaderStyle;
use rempart_nbd::client::{Client, ClientError, ConnectOptions, Stream, start_tls};
use rempart_nbd::server::TlsPolicy;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use std::fs;
use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

fn serve(policy: TlsPolicy, sizes: &[u64]) -> (Server, Certificates) {
    let certificates = Certificates::new();
    let mut setup = Setup::several(sizes);
    setup.tls = Some((policy, certificates.server.clone()));
    let server = setup.serve();
    certificates.write_client_files(&server.file("pki"));
    (server, certificates)
}

fn encrypted_uri(server: &Server, index: usize) -> String {
    let directory = server.file("pki");
    format!("nbds://localhost:{}/disk{index}?tls-certificates={}", server.port, directory.display())
}

struct Tls(StreamOwned<ClientConnection, TcpStream>);

impl Read for Tls {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Tls {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write(buffer)
    }
    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(slices)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Stream for Tls {
    fn socket(&self) -> BorrowedFd<'_> {
        self.0.sock.as_fd()
    }
}

fn connect(server: &Server, certificates: &Certificates) -> Client<Tls> {
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    stream.set_nonblocking(true).unwrap();
    start_tls(&mut stream, Duration::from_secs(10)).unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(certificates.client.clone(), name).unwrap();
    Client::over_tls(Tls(StreamOwned::new(connection, stream)), &ConnectOptions::new("disk0")).unwrap()
}

#[test]
fn our_client_reads_and_writes_over_tls() {
    let (server, certificates) = serve(TlsPolicy::Required, &[8 << 20]);
    let mut client = connect(&server, &certificates);
    assert_eq!(client.header_style(), HeaderStyle::Extended);
    let data = pattern(0, 8 << 20, 3);
    client.write(0, &data, false).unwrap();
    client.flush().unwrap();
    let mut back = vec![0; 8 << 20];
    client.read(0, &mut back).unwrap();
    assert!(back == data && server.disks[0].bytes() == data);
    client.disconnect().unwrap();
    assert_eq!(server.seen.encrypted.load(Ordering::SeqCst), 1);
    server.assert_no_problems();
}

#[test]
fn nbdcopy_copies_over_tls() {
    let (server, _certificates) = serve(TlsPolicy::Required, &[8 << 20, 8 << 20]);
    server.disks[0].write(1 << 20, &pattern(0, 5 << 20, 1));
    run(nbdcopy().args([encrypted_uri(&server, 0), encrypted_uri(&server, 1)]));
    assert!(server.disks[0].bytes() == server.disks[1].bytes());
    let told = run(nbdinfo().args(["--json", &encrypted_uri(&server, 0)]));
    assert!(told.contains(r#""TLS": true"#), "{told}");
    assert_eq!(server.seen.encrypted.load(Ordering::SeqCst), server.seen.attached.load(Ordering::SeqCst));
}

#[test]
fn qemu_img_converts_over_tls() {
    let (server, _certificates) = serve(TlsPolicy::Required, &[8 << 20]);
    let file = server.file("image.raw");
    fs::write(&file, pattern(0, 8 << 20, 2)).unwrap();
    let credentials = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", text(&server.file("pki")));
    let image = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.port={},export=disk0,tls-creds=tls0",
        server.port
    );
    run(qemu_img()
        .args(["convert", "--object", &credentials, "-n", "--target-image-opts", "-f", "raw"])
        .args([&text(&file), &image]));
    assert!(server.disks[0].bytes() == fs::read(&file).unwrap());
    assert!(server.seen.encrypted.load(Ordering::SeqCst) > 0);
    server.assert_no_problems();
}

#[test]
fn a_server_that_requires_tls_tells_nothing_in_the_clear() {
    let (server, _certificates) = serve(TlsPolicy::Required, &[8 << 20]);
    let address = SocketAddr::from(([127, 0, 0, 1], server.port));
    let error = Client::connect_tcp(address, &ConnectOptions::new("disk0")).unwrap_err();
    assert!(matches!(error, ClientError::EncryptionRequired { .. }), "{error}");
    let output = run_any(nbdinfo().args(["--list", &format!("nbd://localhost:{}", server.port)]));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("server replied with error"), "{said}");
    assert_eq!(server.seen.attached.load(Ordering::SeqCst), 0);
}

#[test]
fn a_client_without_a_certificate_is_not_served() {
    let (server, _certificates) = serve(TlsPolicy::Required, &[8 << 20]);
    let stranger = Certificates::new();
    stranger.write_client_files(&server.file("pki"));
    let output = run_any(nbdinfo().arg(encrypted_uri(&server, 0)));
    assert!(!output.status.success());
    assert_eq!(server.seen.attached.load(Ordering::SeqCst), 0);
}

#[test]
fn where_tls_is_optional_both_ways_work() {
    let (server, certificates) = serve(TlsPolicy::Optional, &[1 << 20]);
    connect(&server, &certificates).write(0, &[1; 512], false).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], server.port));
    let mut client = Client::connect_tcp(address, &ConnectOptions::new("disk0")).unwrap();
    let mut data = [0; 512];
    client.read(0, &mut data).unwrap();
    assert_eq!(data, [1; 512]);
    assert_eq!(server.seen.encrypted.load(Ordering::SeqCst), 1);
}
