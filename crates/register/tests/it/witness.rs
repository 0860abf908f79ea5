use crate::support::{OTHER, PATIENT, Served, caller, client};
use rempart_register::conformance::{CALLER, fresh_register, value};
use rempart_register::witness::{Caller, ConnectFailed, Connector, WitnessClient, WitnessClientConfig};
use rempart_register::{ErrorKind, Refusal, Register, SwapOutcome};
use rempart_types::{Epoch, Intent, NodeId, NodeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::test]
async fn only_a_member_of_the_in_sync_set_changes_a_register() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start_as(directory.path(), caller()).await;
    let register = served.client();
    let id = fresh_register();
    let mut solo = value(id, 1, 1);
    solo.primary = OTHER;
    solo.in_sync = NodeSet::only(OTHER);
    // Anyone completes a creation: a move's last step may fall to any node.
    assert_eq!(register.swap(id, None, solo).await.unwrap(), SwapOutcome::Won);
    let refused = register.swap(id, Some(Epoch(1)), value(id, 2, 2)).await.unwrap_err();
    assert_eq!(refused.refusal(), Some(&Refusal::NotAMember(Some(CALLER))));
    assert!(refused.certainly_not_applied());
    // An operator's forced takeover closes a register that would not have let this node lead: in its own name only.
    let successor = fresh_register();
    let mut tombstone = value(id, 2, 2);
    tombstone.intent = Intent::Tombstone { successor };
    (tombstone.primary, tombstone.in_sync) = (OTHER, NodeSet::only(OTHER));
    let refused = register.swap(id, Some(Epoch(1)), tombstone.clone()).await.unwrap_err();
    assert_eq!(refused.refusal(), Some(&Refusal::NotAMember(Some(CALLER))));
    (tombstone.primary, tombstone.in_sync) = (CALLER, NodeSet::only(CALLER));
    let closed = register.swap(id, Some(Epoch(1)), tombstone.clone()).await.unwrap();
    assert_eq!(closed, SwapOutcome::Won);
    // Whoever is behind learns that first, member or not.
    let lost = register.swap(id, None, value(id, 2, 2)).await.unwrap();
    assert_eq!(lost, SwapOutcome::Lost(Some(tombstone)));
    served.stop().await;
}

#[tokio::test]
async fn a_member_that_is_no_node_sees_the_health_only() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start_as(directory.path(), Caller::Other).await;
    let register = served.client();
    assert!(register.health().await.unwrap().serving);
    let refused = register.read(fresh_register()).await.unwrap_err();
    assert_eq!(refused.refusal(), Some(&Refusal::NotAMember(None)));
    served.stop().await;
}

#[tokio::test]
async fn a_restart_keeps_instance_and_values_and_idle_clients_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start(directory.path()).await;
    let register = served.client();
    let id = fresh_register();
    register.swap(id, None, value(id, 1, 1)).await.unwrap();
    let instance = register.instance().unwrap();
    let address = served.address;
    served.stop().await;
    let gone = register.read(id).await.unwrap_err();
    assert_eq!(*gone.kind(), ErrorKind::Unreachable);
    let gone = register.swap(id, Some(Epoch(1)), value(id, 2, 2)).await.unwrap_err();
    assert_eq!(*gone.kind(), ErrorKind::Unreachable, "nothing was sent, so nothing is unknown");

    let served = Served::start(directory.path()).await;
    assert_ne!(served.address, address);
    let register = client(served.address, Some(instance));
    assert_eq!(served.witness.instance(), instance);
    assert_eq!(register.read(id).await.unwrap(), Some(value(id, 1, 1)));
    served.stop().await;
}

#[tokio::test]
async fn requests_share_connections() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start(directory.path()).await;
    let made = Arc::new(AtomicUsize::new(0));
    let (count, address) = (made.clone(), served.address);
    let connector = Connector::new("counted", move || {
        count.fetch_add(1, Ordering::Relaxed);
        async move { TcpStream::connect(address).await.map_err(ConnectFailed::unreachable) }
    });
    let config = WitnessClientConfig { deadline: PATIENT, instance: None };
    let register = WitnessClient::new(connector, config);
    for _ in 0..20 {
        register.read(fresh_register()).await.unwrap();
    }
    assert_eq!(made.load(Ordering::Relaxed), 1);
    served.stop().await;
}

/// A server that greets like a witness, takes a request, and answers `reply` (or never).
async fn stub(reply: Option<&'static [u8]>) -> WitnessClient {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut request = vec![0; 64 * 1024];
                let _ = socket.read(&mut request).await;
                let greeting = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\
                    rempart-instance: 00000000000000000000000000000001\r\n\r\n";
                let _ = socket.write_all(greeting).await;
                let _ = socket.read(&mut request).await;
                match reply {
                    Some(reply) => {
                        let _ = socket.write_all(reply).await;
                    }
                    None => std::future::pending().await,
                }
            });
        }
    });
    let config = WitnessClientConfig { deadline: Duration::from_millis(100), instance: None };
    WitnessClient::new(Connector::tcp(address), config)
}

#[tokio::test]
async fn no_answer_is_unknown_for_a_swap_and_plainly_a_failure_for_a_read() {
    let id = fresh_register();
    let replies: [Option<&'static [u8]>; 6] = [
        None,
        Some(b""),
        Some(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n{}"),
        Some(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\ngarbage"),
        Some(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n"),
        Some(b"\x16\x03\x01 this is no HTTP at all"),
    ];
    for reply in replies {
        let register = stub(reply).await;
        let swap = register.swap(id, None, value(id, 1, 1)).await.unwrap_err();
        assert_eq!(*swap.kind(), ErrorKind::Unknown, "{reply:?}");
        assert!(!swap.certainly_not_applied());
        let read = register.read(id).await.unwrap_err();
        assert_eq!(*read.kind(), ErrorKind::Unreachable, "{reply:?}");
    }
}

#[tokio::test]
async fn a_server_that_is_no_witness_is_found_out_before_a_swap_is_sent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            let _ = socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        }
    });
    let register = client(address, None);
    let id = fresh_register();
    let error = register.swap(id, None, value(id, 1, 1)).await.unwrap_err();
    assert!(error.certainly_not_applied(), "{error:?}");
}

#[tokio::test]
async fn a_connection_that_never_comes_is_unreachable_within_the_deadline() {
    let connector = Connector::new("nowhere", std::future::pending::<Result<TcpStream, ConnectFailed>>);
    let config = WitnessClientConfig { deadline: Duration::from_millis(50), instance: None };
    let register = WitnessClient::new(connector, config);
    let id = fresh_register();
    let error = register.swap(id, None, value(id, 1, 1)).await.unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Unreachable);
    assert!(error.to_string().contains("nowhere"), "{error}");
}

#[tokio::test]
async fn garbage_is_answered_or_cut_and_never_hurts_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start(directory.path()).await;
    let id = fresh_register();
    let path = format!("/v1/registers/{id}/swap");
    let post = |body: &str| {
        let length = body.len();
        format!(
            "POST {path} HTTP/1.1\r\nhost: w\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )
    };
    let huge = "x".repeat(600_000);
    let cases = [
        post("{}"),
        post("not json"),
        post(r#"{"expected":null,"value":{"register":"zz"}}"#),
        post(&huge),
        "GET /v1/registers/xyz HTTP/1.1\r\nhost: w\r\nconnection: close\r\n\r\n".to_owned(),
        "GET /v9/registers/00 HTTP/1.1\r\nhost: w\r\nconnection: close\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nhost: w\r\nconnection: close\r\n\r\n".to_owned(),
        "DELETE /v1/health HTTP/1.1\r\nhost: w\r\nconnection: close\r\n\r\n".to_owned(),
        "\x16\x03\x01\x02\x00\x01 TLS?".to_owned(),
        "\0".repeat(100),
    ];
    for case in cases {
        let mut socket = TcpStream::connect(served.address).await.unwrap();
        // The server may hang up in the middle of a huge one.
        let _ = socket.write_all(case.as_bytes()).await;
        let _ = socket.shutdown().await;
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        let status = String::from_utf8_lossy(&answer[..answer.len().min(12)]).into_owned();
        assert!(!status.starts_with("HTTP/1.1 200"), "{}", &case[..case.len().min(60)]);
    }
    let register = served.client();
    assert_eq!(register.read(id).await.unwrap(), None);
    served.stop().await;
}

#[tokio::test]
async fn counters_tell_what_happened() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start(directory.path()).await;
    let register = served.client();
    let id = fresh_register();
    register.swap(id, None, value(id, 1, 1)).await.unwrap();
    register.swap(id, None, value(id, 1, 2)).await.unwrap();
    register.read(id).await.unwrap();
    register.swap(id, Some(Epoch(1)), value(id, 1, 2)).await.unwrap_err();
    let counters: std::collections::BTreeMap<_, _> = served.witness.counters().each().collect();
    let of = |name| counters[name];
    assert_eq!((of("swaps_won"), of("swaps_lost"), of("reads"), of("refused")), (1, 1, 1, 1));
    let health = register.health().await.unwrap();
    assert_eq!((health.registers, health.recovering, health.serving), (1, 0, true));
    assert_eq!(served.witness.health().unwrap().instance, health.instance);
    served.stop().await;
}

#[tokio::test]
async fn a_second_witness_on_the_same_state_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start(directory.path()).await;
    let config = rempart_register::witness::WitnessConfig { directory: directory.path().to_owned() };
    let error = rempart_register::witness::Witness::open(&config).unwrap_err();
    assert!(error.to_string().contains("witness.redb"), "{error}");
    served.stop().await;
}

#[tokio::test]
async fn shutdown_does_not_wait_for_idle_clients() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start(directory.path()).await;
    let register = served.client();
    register.read(fresh_register()).await.unwrap();
    let before = std::time::Instant::now();
    served.stop().await;
    assert!(before.elapsed() < Duration::from_secs(3), "idle connections held the shutdown up");
    drop(register);
}

#[tokio::test]
async fn nodes_speak_for_themselves_only() {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start_as(directory.path(), caller()).await;
    let register = served.client();
    let id = fresh_register();
    let replicas = NodeSet::only(CALLER).with(OTHER);
    let error = register.report(OTHER, id, None, replicas.clone()).await.unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::BadRequest(_))), "{error}");
    assert!(register.report(CALLER, id, None, NodeSet::only(NodeId(1))).await.is_err());
    assert!(register.report(CALLER, id, None, replicas).await.unwrap().serving);
    served.stop().await;
}
