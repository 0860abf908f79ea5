//! A small cluster: an authority and its members.

use rempart_transport::pki::{Authority, CertificateRequest, Credentials, Validity};
use rempart_transport::{
    Accepted, ClusterId, Connection, Deadlines, Error, Hello, Identity, Incoming, Purpose, TlsContext,
    accept, dial_data,
};
use rempart_types::{GroupId, NodeId, WallTime};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub const DAY_MS: u64 = 24 * 60 * 60 * 1000;
pub const GROUP: GroupId = GroupId(77);
/// Long: only the tests about deadlines shorten it, and a busy machine must not fail the others.
pub const PATIENT: Deadlines = Deadlines {
    handshake: Duration::from_secs(20),
    silence: Duration::from_secs(20),
    unacknowledged: Duration::from_secs(20),
};

pub fn now() -> WallTime {
    WallTime(SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as u64)
}

pub struct Cluster {
    pub id: ClusterId,
    pub authority: Authority,
}

impl Cluster {
    pub fn new(id: u128) -> Cluster {
        let id = ClusterId(id);
        Cluster { id, authority: Authority::create(id, now()).unwrap() }
    }

    pub fn node(&self, id: u128) -> Identity {
        Identity::node(self.id, NodeId(id))
    }

    pub fn credentials(&mut self, identity: Identity) -> Credentials {
        self.credentials_valid(identity, Validity::usual(now()))
    }

    pub fn credentials_valid(&mut self, identity: Identity, validity: Validity) -> Credentials {
        let request = CertificateRequest::generate().unwrap();
        let certificate = self.authority.issue(&request.request_pem, identity, validity).unwrap();
        let list = self.authority.revocation_list(now()).unwrap();
        Credentials::new(request.key, &certificate, self.authority.certificate_pem(), Some(&list)).unwrap()
    }

    pub fn tls(&mut self, id: u128) -> TlsContext {
        let identity = self.node(id);
        TlsContext::new(&self.credentials(identity)).unwrap()
    }
}

pub fn hello(tls: &TlsContext) -> Hello {
    let identity = tls.identity();
    Hello::new(identity.cluster, identity.id, GROUP, Purpose::Replication)
}

/// Accepts one connection in a task.
pub async fn listen(tls: &TlsContext) -> (SocketAddr, JoinHandle<Result<Accepted, Error>>) {
    listen_within(tls, PATIENT).await
}

pub async fn listen_within(
    tls: &TlsContext,
    deadlines: Deadlines,
) -> (SocketAddr, JoinHandle<Result<Accepted, Error>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = tls.clone();
    let task = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        accept(socket, &tls, deadlines).await
    });
    (address, task)
}

pub fn data(accepted: Accepted) -> Incoming {
    match accepted {
        Accepted::Data(incoming) => incoming,
        other => panic!("expected a data connection, found {other:?}"),
    }
}

/// Two greeted ends.
pub async fn pair() -> (Connection, Connection) {
    let mut cluster = Cluster::new(1);
    let (a, b) = (cluster.tls(0xa), cluster.tls(0xb));
    let (address, server) = listen(&b).await;
    let ours = hello(&b);
    let answer =
        tokio::spawn(async move { data(server.await.unwrap().unwrap()).accept(ours).await.unwrap() });
    let dialled = dial_data(address, &a, b.identity(), hello(&a), PATIENT).await.unwrap();
    (dialled, answer.await.unwrap())
}
