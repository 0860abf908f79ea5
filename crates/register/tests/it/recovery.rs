//! State that was copied, restored or lost is never taken for the truth.

use crate::support::{OTHER, Served, client};
use rempart_register::conformance::{CALLER, fresh_register, value};
use rempart_register::{Refusal, Register, SwapOutcome};
use rempart_types::{Epoch, NodeSet, RegisterId, RegisterValue};
use std::path::Path;

fn replicas() -> NodeSet {
    NodeSet::only(CALLER).with(OTHER)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    std::fs::copy(from.join("witness.redb"), to.join("witness.redb")).unwrap();
}

/// A witness with one register at epoch 1, stopped, and its directory.
async fn with_history() -> (tempfile::TempDir, RegisterId, rempart_types::InstanceId) {
    let directory = tempfile::tempdir().unwrap();
    let served = Served::start(directory.path()).await;
    let register = served.client();
    let id = fresh_register();
    register.swap(id, None, value(id, 1, 1)).await.unwrap();
    let instance = register.instance().unwrap();
    served.stop().await;
    (directory, id, instance)
}

fn newer(id: RegisterId) -> RegisterValue {
    value(id, 2, 2)
}

#[tokio::test]
async fn copied_state_serves_nothing_until_every_replica_reported() {
    let (directory, id, instance) = with_history().await;
    let elsewhere = directory.path().join("copy");
    copy(directory.path(), &elsewhere);
    let served = Served::start(&elsewhere).await;
    assert_ne!(served.witness.instance(), instance, "a copy is another instance");

    // A client that knew the original is told; it does not get an old value for a new one.
    let register = client(served.address, Some(instance));
    let refused = register.read(id).await.unwrap_err();
    assert_eq!(refused.refusal(), Some(&Refusal::OtherInstance(served.witness.instance())));
    assert!(register.swap(id, Some(Epoch(1)), newer(id)).await.unwrap_err().certainly_not_applied());

    // A client without memory gets no further.
    let naive = served.client();
    let recovering = Refusal::Recovering { missing: replicas() };
    assert_eq!(naive.read(id).await.unwrap_err().refusal(), Some(&recovering));
    assert_eq!(naive.swap(id, Some(Epoch(1)), newer(id)).await.unwrap_err().refusal(), Some(&recovering));
    assert_eq!(naive.health().await.unwrap().recovering, 1);

    // The first report names a later value than the copy has; the second replica must still be heard.
    let outcome = register.report(CALLER, id, Some(newer(id)), replicas()).await.unwrap();
    assert_eq!(outcome.missing, NodeSet::only(OTHER));
    assert!(register.read(id).await.is_err());
    let newest = value(id, 3, 3);
    let outcome = register.report(OTHER, id, Some(newest.clone()), replicas()).await.unwrap();
    assert!(outcome.serving);
    assert_eq!(register.read(id).await.unwrap(), Some(newest));
    assert_eq!(register.swap(id, Some(Epoch(3)), value(id, 4, 4)).await.unwrap(), SwapOutcome::Won);
    served.stop().await;
}

#[tokio::test]
async fn recovery_survives_a_restart_of_the_witness() {
    let (directory, id, _) = with_history().await;
    let elsewhere = directory.path().join("copy");
    copy(directory.path(), &elsewhere);
    let served = Served::start(&elsewhere).await;
    let instance = served.witness.instance();
    let register = served.client();
    register.report(CALLER, id, Some(newer(id)), replicas()).await.unwrap();
    served.stop().await;

    let served = Served::start(&elsewhere).await;
    assert_eq!(served.witness.instance(), instance);
    let register = served.client();
    assert!(matches!(register.read(id).await.unwrap_err().refusal(), Some(Refusal::Recovering { .. })));
    assert!(register.report(OTHER, id, None, replicas()).await.unwrap().serving);
    assert_eq!(register.read(id).await.unwrap(), Some(newer(id)));
    served.stop().await;
}

#[tokio::test]
async fn lost_state_is_rebuilt_from_the_replicas() {
    let (_directory, id, instance) = with_history().await;
    let empty = tempfile::tempdir().unwrap();
    let served = Served::start(empty.path()).await;
    let register = client(served.address, Some(instance));
    // Without the pin this would look like a register that never was, and could be created anew.
    let created = register.swap(id, None, value(id, 1, 9)).await.unwrap_err();
    assert!(matches!(created.refusal(), Some(Refusal::OtherInstance(_))), "{created}");
    let outcome = register.report(CALLER, id, Some(value(id, 1, 1)), replicas()).await.unwrap();
    assert_eq!(outcome.missing, NodeSet::only(OTHER));
    assert!(register.report(OTHER, id, Some(newer(id)), replicas()).await.unwrap().serving);
    assert_eq!(register.read(id).await.unwrap(), Some(newer(id)));
    // Other registers of this client wait for their own report, until the instance is adopted as a whole.
    let other = fresh_register();
    assert!(register.read(other).await.is_err());
    register.adopt(served.witness.instance());
    assert_eq!(register.read(other).await.unwrap(), None);
    served.stop().await;
}

#[tokio::test]
async fn state_that_went_back_in_place_is_noticed() {
    // What a restored disk image does: the same machine, the same file, an earlier content.
    let (directory, id, instance) = with_history().await;
    let file = directory.path().join("witness.redb");
    let earlier = std::fs::read(&file).unwrap();
    let served = Served::start(directory.path()).await;
    let register = client(served.address, Some(instance));
    assert_eq!(register.swap(id, Some(Epoch(1)), newer(id)).await.unwrap(), SwapOutcome::Won);
    served.stop().await;
    // Written into the existing file, so that its inode and birth stay.
    use std::io::{Seek, Write};
    let mut target = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    target.set_len(earlier.len() as u64).unwrap();
    target.seek(std::io::SeekFrom::Start(0)).unwrap();
    target.write_all(&earlier).unwrap();
    drop(target);

    let served = Served::start(directory.path()).await;
    assert_eq!(served.witness.instance(), instance, "the place alone cannot tell");
    // A replica that reports what it knows makes the register recover.
    let late = served.client();
    let outcome = late.report(CALLER, id, Some(newer(id)), replicas()).await.unwrap();
    assert_eq!(outcome.missing, NodeSet::only(OTHER));
    assert!(matches!(late.read(id).await.unwrap_err().refusal(), Some(Refusal::Recovering { .. })));
    served.stop().await;
}

#[tokio::test]
async fn a_client_that_saw_more_changes_than_the_state_has_unmasks_it() {
    let (directory, id, instance) = with_history().await;
    let served = Served::start(directory.path()).await;
    let address = served.address;
    // The same counter header a client sends by itself.
    let raw = |changes: u64| async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!(
            "GET /v1/registers/{id} HTTP/1.1\r\nhost: w\r\nconnection: close\r\n\
             rempart-instance: {instance}\r\nrempart-changes: {changes}\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let now = served.witness.health().unwrap().changes;
    assert!(raw(now).await.starts_with("HTTP/1.1 200"));
    assert_eq!(served.witness.instance(), instance);
    let answer = raw(now + 1).await;
    assert!(answer.starts_with("HTTP/1.1 409") && answer.contains("other-instance"), "{answer}");
    assert_ne!(served.witness.instance(), instance);
    assert_eq!(served.witness.health().unwrap().recovering, 1);
    served.stop().await;
}

#[tokio::test]
async fn contradicting_reports_are_refused() {
    let (directory, id, _) = with_history().await;
    let elsewhere = directory.path().join("copy");
    copy(directory.path(), &elsewhere);
    let served = Served::start(&elsewhere).await;
    let register = served.client();
    register.report(CALLER, id, Some(value(id, 2, 2)), replicas()).await.unwrap();
    let error = register.report(OTHER, id, Some(value(id, 2, 99)), replicas()).await.unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::Invalid(_))), "{error}");
    assert!(register.read(id).await.is_err());
    served.stop().await;
}

#[tokio::test]
async fn an_operator_may_excuse_a_replica_but_not_all() {
    let (directory, id, _) = with_history().await;
    let elsewhere = directory.path().join("copy");
    copy(directory.path(), &elsewhere);
    let served = Served::start(&elsewhere).await;
    let register = served.client();
    for node in [OTHER, CALLER] {
        assert!(!register.excuse(node, id).await.unwrap().serving);
        assert!(register.read(id).await.is_err(), "an excuse alone proves nothing");
    }
    assert!(register.report(CALLER, id, Some(newer(id)), replicas()).await.unwrap().serving);
    assert_eq!(register.read(id).await.unwrap(), Some(newer(id)));
    served.stop().await;
}
