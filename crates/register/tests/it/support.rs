//! A witness on the loopback interface, without TLS: the caller is trusted to be who the port says.

use rempart_register::conformance::CALLER;
use rempart_register::witness::{
    Caller, Connector, Witness, WitnessClient, WitnessClientConfig, WitnessConfig,
};
use rempart_types::{InstanceId, NodeId};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Long: a busy machine must not fail a test that is not about deadlines.
pub const PATIENT: Duration = Duration::from_secs(20);

pub struct Served {
    pub witness: Witness,
    pub address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Served {
    pub async fn start(directory: &Path) -> Served {
        Served::start_as(directory, Caller::Trusted).await
    }

    pub async fn start_as(directory: &Path, caller: Caller) -> Served {
        let witness = Witness::open(&WitnessConfig { directory: directory.to_owned() }).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let server = witness.clone();
        let task = tokio::spawn(async move {
            let admit = move |socket: TcpStream| async move { Ok::<_, Infallible>((socket, caller)) };
            server.serve(listener, admit, stopped).await;
        });
        Served { witness, address, stop, task }
    }

    /// Stops cleanly; the state is closed when this returns.
    pub async fn stop(self) {
        self.stop.send(true).unwrap();
        self.task.await.unwrap();
    }

    pub fn client(&self) -> WitnessClient {
        client(self.address, None)
    }
}

pub fn client(address: SocketAddr, instance: Option<InstanceId>) -> WitnessClient {
    let config = WitnessClientConfig { deadline: PATIENT, instance };
    WitnessClient::new(Connector::tcp(address), config)
}

pub fn caller() -> Caller {
    Caller::Node(CALLER)
}

pub const OTHER: NodeId = NodeId(u128::MAX);
