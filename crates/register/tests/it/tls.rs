//! A witness behind the cluster's mutual TLS, wired as the daemon wires it.

use crate::support::PATIENT;
use rempart_register::conformance::{self, CALLER, fresh_register, value};
use rempart_register::witness::{
    Caller, ConnectFailed, Connector, Witness, WitnessClient, WitnessClientConfig, WitnessConfig,
};
use rempart_register::{Refusal, Register};
use rempart_transport::pki::{Authority, CertificateRequest, Credentials, Validity};
use rempart_transport::{
    Accepted, ClusterId, Deadlines, Error, ErrorKind, HttpStream, Identity, Role, TlsContext, accept,
    dial_http,
};
use rempart_types::{NodeId, WallTime};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::net::TcpListener;
use tokio::sync::watch;

const DEADLINES: Deadlines = Deadlines { handshake: PATIENT, silence: PATIENT, unacknowledged: PATIENT };

fn now() -> WallTime {
    WallTime(SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64)
}

fn member(authority: &mut Authority, role: Role, id: NodeId) -> TlsContext {
    let request = CertificateRequest::generate().unwrap();
    let identity = Identity { cluster: authority.cluster(), role, id };
    let pem = authority.issue(&request.request_pem, identity, Validity::usual(now())).unwrap();
    let list = authority.revocation_list(now()).unwrap();
    let ca = authority.certificate_pem();
    TlsContext::new(&Credentials::new(request.key, &pem, ca, Some(&list)).unwrap()).unwrap()
}

async fn serve(directory: &Path, tls: TlsContext) -> (SocketAddr, watch::Sender<bool>) {
    let witness = Witness::open(&WitnessConfig { directory: directory.to_owned() }).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        let admit = move |socket| {
            let tls = tls.clone();
            async move { admit(accept(socket, &tls, DEADLINES).await) }
        };
        witness.serve(listener, admit, stopped).await;
    });
    (address, stop)
}

fn admit(accepted: Result<Accepted, Error>) -> Result<(HttpStream, Caller), String> {
    match accepted {
        Ok(Accepted::Http(stream)) => {
            let caller = match stream.peer().expect("members only").identity {
                Identity { role: Role::Node, id, .. } => Caller::Node(id),
                _ => Caller::Other,
            };
            Ok((stream, caller))
        }
        Ok(_) => Err("a witness speaks HTTP to members".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn client(address: SocketAddr, tls: TlsContext) -> WitnessClient {
    let connector = Connector::new(address.to_string(), move || {
        let tls = tls.clone();
        async move { dial_http(address, &tls, None, DEADLINES).await.map_err(connect_failed) }
    });
    let connector = connector.explained_by(|error| match Error::tls_kind(error)? {
        (ErrorKind::WrongCluster, _) => Some(Refusal::WrongCluster),
        (kind, ours) => Some(Refusal::Certificate(format!("{kind:?}, ours: {ours}"))),
    });
    WitnessClient::new(connector, WitnessClientConfig { deadline: PATIENT, instance: None })
}

fn connect_failed(error: Error) -> ConnectFailed {
    match error.kind() {
        ErrorKind::WrongCluster => ConnectFailed::refused(Refusal::WrongCluster, error),
        ErrorKind::CertificateExpired | ErrorKind::CertificateRevoked => {
            ConnectFailed::refused(Refusal::Certificate(error.to_string()), error)
        }
        _ => ConnectFailed::unreachable(error),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_conforms_over_mutual_tls() {
    let directory = tempfile::tempdir().unwrap();
    let mut authority = Authority::create(ClusterId(1), now()).unwrap();
    let (address, _stop) = serve(directory.path(), member(&mut authority, Role::Witness, NodeId(1))).await;
    let node = member(&mut authority, Role::Node, CALLER);
    conformance::run(Arc::new(client(address, node))).await;
}

#[tokio::test]
async fn a_witness_of_another_cluster_is_named_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let mut theirs = Authority::create(ClusterId(1), now()).unwrap();
    let mut ours = Authority::create(ClusterId(2), now()).unwrap();
    let (address, _stop) = serve(directory.path(), member(&mut theirs, Role::Witness, NodeId(1))).await;
    let register = client(address, member(&mut ours, Role::Node, CALLER));
    let id = fresh_register();
    let error = register.swap(id, None, value(id, 1, 1)).await.unwrap_err();
    assert_eq!(error.refusal(), Some(&Refusal::WrongCluster));
    assert!(error.certainly_not_applied());
}

#[tokio::test]
async fn another_witness_may_look_but_not_touch_and_a_revoked_node_neither() {
    let directory = tempfile::tempdir().unwrap();
    let mut authority = Authority::create(ClusterId(1), now()).unwrap();
    let revoked = member(&mut authority, Role::Node, NodeId(66));
    authority.revoke(revoked.identity(), now());
    let (address, _stop) = serve(directory.path(), member(&mut authority, Role::Witness, NodeId(1))).await;
    let id = fresh_register();

    let other = client(address, member(&mut authority, Role::Witness, NodeId(2)));
    assert!(other.health().await.is_ok());
    assert_eq!(other.read(id).await.unwrap_err().refusal(), Some(&Refusal::NotAMember(None)));

    let error = client(address, revoked).swap(id, None, value(id, 1, 1)).await.unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Certificate(_))), "{error:?}");
    assert!(error.certainly_not_applied());
    let good = client(address, member(&mut authority, Role::Node, CALLER));
    assert_eq!(good.read(id).await.unwrap(), None);
}
