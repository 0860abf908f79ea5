//! Whoever must not get in does not, and both sides learn why.

use crate::support::{Cluster, DAY_MS, PATIENT, data, hello, listen, listen_within, now};
use rempart_transport::pki::{CaPin, Validity};
use rempart_transport::{
    Accepted, Deadlines, Error, ErrorKind, Hello, Identity, ProtocolVersion, Refusal, RefusalReason,
    TlsContext, dial_data, dial_enrolment, dial_http,
};
use rempart_types::{NodeId, WallTime};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What each side says when `client` dials `server`.
async fn meet(client: &TlsContext, server: &TlsContext, expected: Identity) -> (Error, Error) {
    let (address, task) = listen(server).await;
    let dialled = dial_data(address, client, expected, hello(client), PATIENT).await.unwrap_err();
    (dialled, task.await.unwrap().unwrap_err())
}

#[tokio::test]
async fn a_member_of_another_cluster_is_named_as_such() {
    let (mut ours, mut theirs) = (Cluster::new(1), Cluster::new(2));
    let (a, b) = (ours.tls(1), theirs.tls(1));
    let (client, server) = meet(&a, &b, b.identity()).await;
    assert_eq!(*client.kind(), ErrorKind::WrongCluster, "{client:?}");
    assert!(!client.reported_by_peer());
    assert_eq!(*server.kind(), ErrorKind::WrongCluster, "{server:?}");
    assert!(server.reported_by_peer());
}

#[tokio::test]
async fn the_same_cluster_id_under_another_authority_does_not_pass() {
    let (mut ours, mut forged) = (Cluster::new(1), Cluster::new(1));
    let (a, b) = (ours.tls(1), forged.tls(2));
    let (client, _) = meet(&a, &b, b.identity()).await;
    assert_ne!(*client.kind(), ErrorKind::Io, "{client:?}");
    assert!(matches!(client.kind(), ErrorKind::WrongCluster | ErrorKind::CertificateInvalid), "{client:?}");
}

#[tokio::test]
async fn a_revoked_client_is_told_so() {
    let mut cluster = Cluster::new(1);
    let a = cluster.tls(1);
    cluster.authority.revoke(a.identity(), now());
    let b = cluster.tls(2);
    let (client, server) = meet(&a, &b, b.identity()).await;
    assert_eq!(*server.kind(), ErrorKind::CertificateRevoked, "{server:?}");
    assert_eq!(*client.kind(), ErrorKind::CertificateRevoked, "{client:?}");
    assert!(client.reported_by_peer());
    assert!(client.to_string().contains("our certificate was revoked"), "{client}");
}

#[tokio::test]
async fn a_revoked_server_is_refused_once_the_list_arrives() {
    let mut cluster = Cluster::new(1);
    let (a, b) = (cluster.tls(1), cluster.tls(2));
    let (address, task) = listen(&b).await;
    let stream = dial_http(address, &a, None, PATIENT).await.unwrap();
    let peer = stream.peer().unwrap().clone();
    task.await.unwrap().unwrap();
    assert!(!a.is_revoked(&peer));

    cluster.authority.revoke(b.identity(), now());
    let own = a.identity();
    a.reload(&cluster.credentials(own)).unwrap();
    assert!(a.is_revoked(&peer), "open connections can be found and closed");
    let (client, server) = meet(&a, &b, b.identity()).await;
    assert_eq!(*client.kind(), ErrorKind::CertificateRevoked);
    assert_eq!(*server.kind(), ErrorKind::CertificateRevoked);
}

#[tokio::test]
async fn expired_and_premature_certificates_are_told_apart() {
    let mut cluster = Cluster::new(1);
    let b = cluster.tls(2);
    let (day, present) = (DAY_MS, now().0);
    let cases = [
        (present - 3 * day, present - day, ErrorKind::CertificateExpired),
        (present + day, present + 3 * day, ErrorKind::CertificateNotYetValid),
    ];
    for (from, until, expected) in cases {
        let identity = cluster.node(1);
        let validity = Validity { from: WallTime(from), until: WallTime(until) };
        let a = TlsContext::new(&cluster.credentials_valid(identity, validity)).unwrap();
        let (client, server) = meet(&b, &a, a.identity()).await;
        assert_eq!(*client.kind(), expected, "{client:?}");
        assert!(server.reported_by_peer(), "{server:?}");
        let (client, server) = meet(&a, &b, b.identity()).await;
        assert_eq!(*server.kind(), expected, "{server:?}");
        assert!(client.reported_by_peer(), "{client:?}");
    }
}

#[tokio::test]
async fn another_member_at_the_address_is_noticed() {
    let mut cluster = Cluster::new(1);
    let (a, b) = (cluster.tls(1), cluster.tls(2));
    let (address, _task) = listen(&b).await;
    let error = dial_data(address, &a, cluster.node(3), hello(&a), PATIENT).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::WrongPeer);
    let (address, _task) = listen(&b).await;
    let error = dial_http(address, &a, Some(cluster.node(3)), PATIENT).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::WrongPeer);
}

#[tokio::test]
async fn a_greeting_under_another_name_is_refused() {
    let mut cluster = Cluster::new(1);
    let (a, b) = (cluster.tls(1), cluster.tls(2));
    let (address, task) = listen(&b).await;
    let lie = Hello { node: NodeId(5), ..hello(&a) };
    let client = dial_data(address, &a, b.identity(), lie, PATIENT).await.unwrap_err();
    assert!(
        matches!(client.kind(), ErrorKind::Refused(r) if r.reason == RefusalReason::WrongNode),
        "{client:?}"
    );
    assert!(task.await.unwrap().is_err());
    // A witness has a good certificate, but no business on the data plane.
    let identity = Identity::witness(cluster.id, NodeId(8));
    let witness = TlsContext::new(&cluster.credentials(identity)).unwrap();
    let (client, _) = meet(&witness, &b, b.identity()).await;
    assert!(
        matches!(client.kind(), ErrorKind::Refused(r) if r.reason == RefusalReason::WrongNode),
        "{client:?}"
    );
}

#[tokio::test]
async fn another_major_is_refused_with_both_versions_named() {
    let mut cluster = Cluster::new(1);
    let (a, b) = (cluster.tls(1), cluster.tls(2));
    let (address, task) = listen(&b).await;
    let future = Hello { protocol: ProtocolVersion { major: 9, minor: 4 }, ..hello(&a) };
    let client = dial_data(address, &a, b.identity(), future, PATIENT).await.unwrap_err();
    let text = client.to_string();
    assert!(matches!(client.kind(), ErrorKind::Refused(r) if r.reason == RefusalReason::Version), "{text}");
    assert!(text.contains("9.4") && text.contains(&ProtocolVersion::CURRENT.to_string()), "{text}");
    assert!(task.await.unwrap().is_err());
}

#[tokio::test]
async fn the_owner_can_decline_with_words() {
    let mut cluster = Cluster::new(1);
    let (a, b) = (cluster.tls(1), cluster.tls(2));
    let (address, task) = listen(&b).await;
    let decline = tokio::spawn(async move {
        let incoming = data(task.await.unwrap().unwrap());
        incoming.refuse(Refusal::new(RefusalReason::UnknownGroup, "no `db-01` here")).await.unwrap();
    });
    let client = dial_data(address, &a, b.identity(), hello(&a), PATIENT).await.unwrap_err();
    assert!(client.to_string().contains("no `db-01` here"), "{client}");
    decline.await.unwrap();
}

#[tokio::test]
async fn a_client_without_a_certificate_reaches_the_enrolment_only() {
    let mut cluster = Cluster::new(1);
    let b = cluster.tls(2);
    let (address, task) = listen(&b).await;
    let mut stream = dial_enrolment(address, cluster.id, cluster.authority.pin(), PATIENT).await.unwrap();
    assert!(stream.peer().is_none());
    stream.write_all(b"join").await.unwrap();
    stream.flush().await.unwrap();
    let Accepted::Enrolment(mut served) = task.await.unwrap().unwrap() else { panic!("not enrolment") };
    let mut got = [0; 4];
    served.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"join");

    // Another authority, or another cluster's name: the secret would go to a stranger.
    for (id, pin) in [(cluster.id, CaPin([1; 32])), (Cluster::new(9).id, cluster.authority.pin())] {
        let (address, task) = listen(&b).await;
        let error = dial_enrolment(address, id, pin, PATIENT).await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::WrongCluster, "{error:?}");
        assert!(task.await.unwrap().is_err());
    }
}

#[tokio::test]
async fn no_certificate_is_named_when_one_is_demanded() {
    // A peer that trusts the cluster but has nothing to show, speaking plain TLS of its own.
    let mut cluster = Cluster::new(1);
    let b = cluster.tls(2);
    let (address, task) = listen(&b).await;
    let mut roots = tokio_rustls::rustls::RootCertStore::empty();
    let pem = cluster.authority.certificate_pem().as_bytes().to_vec();
    let der = rustls_pki_types::pem::PemObject::from_pem_slice(&pem).unwrap();
    roots.add(der).unwrap();
    let provider = std::sync::Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let mut config = tokio_rustls::rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let name = format!("member.{}.rempart.internal", cluster.id).try_into().unwrap();
    let socket = TcpStream::connect(address).await.unwrap();
    let result = async { connector.connect(name, socket).await?.read_u8().await }.await;
    assert_eq!(*task.await.unwrap().unwrap_err().kind(), ErrorKind::CertificateMissing);
    let client = Error::from_stream(result.unwrap_err());
    assert_eq!(*client.kind(), ErrorKind::CertificateMissing);
    assert!(client.reported_by_peer());
}

#[tokio::test]
async fn garbage_silence_and_hang_up_on_the_port_end_soon() {
    let mut cluster = Cluster::new(1);
    let b = cluster.tls(2);
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 100], &[0x16, 3, 1, 0xff, 0xff, 1, 2, 3], b"NBDMAGIC"]
    {
        let (address, task) = listen(&b).await;
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(garbage).await.unwrap();
        socket.shutdown().await.unwrap();
        let error = task.await.unwrap().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NotOurProtocol | ErrorKind::Closed), "{error:?}");
    }
    let hasty = Deadlines { handshake: Duration::from_millis(50), ..PATIENT };
    let (address, task) = listen_within(&b, hasty).await;
    let silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(*task.await.unwrap().unwrap_err().kind(), ErrorKind::Deadline);
    drop(silent);
}

#[tokio::test]
async fn a_server_that_never_answers_meets_our_deadline() {
    let mut cluster = Cluster::new(1);
    let a = cluster.tls(1);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let hasty = Deadlines { handshake: Duration::from_millis(50), ..PATIENT };
    let error = dial_data(address, &a, cluster.node(2), hello(&a), hasty).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Deadline);
    let error = dial_http(address, &a, None, hasty).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Deadline);
    drop(listener);
    let error = dial_http(address, &a, None, PATIENT).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Io, "{error:?}");
}
