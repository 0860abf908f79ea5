use crate::support::{Served, caller};
use rempart_register::conformance::{self, fresh_register, value};
use rempart_register::faulty::{Fault, FaultyRegister};
use rempart_register::{ErrorKind, FileRegister, MemoryRegister, Refusal, Register, SwapOutcome};
use rempart_types::Epoch;
use std::sync::Arc;
use std::time::Duration;

const PATIENT: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_conforms() {
    conformance::run(Arc::new(MemoryRegister::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_faultless_faulty_register_conforms() {
    conformance::run(Arc::new(FaultyRegister::new(Arc::new(MemoryRegister::new())))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_conform() {
    let directory = tempfile::tempdir().unwrap();
    let register = FileRegister::open(directory.path().join("new/registers")).unwrap();
    conformance::run(Arc::new(register.with_deadline(PATIENT))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_conforms() {
    let directory = tempfile::tempdir().unwrap();
    for caller in [rempart_register::witness::Caller::Trusted, caller()] {
        let served = Served::start_as(directory.path(), caller).await;
        conformance::run(Arc::new(served.client())).await;
        served.stop().await;
    }
}

#[tokio::test]
async fn two_processes_share_a_directory_without_losing_a_swap() {
    // Two adapters do not know each other, as two processes would not.
    let directory = tempfile::tempdir().unwrap();
    let open = || FileRegister::open(directory.path()).unwrap().with_deadline(PATIENT);
    let (one, two) = (open(), open());
    let id = fresh_register();
    one.swap(id, None, value(id, 1, 0)).await.unwrap();
    let mut wins = 0;
    for epoch in 1..40 {
        let expected = Some(Epoch(epoch));
        let (first, second) = tokio::join!(
            one.swap(id, expected, value(id, epoch + 1, 1)),
            two.swap(id, expected, value(id, epoch + 1, 2))
        );
        wins += [first.unwrap(), second.unwrap()].iter().filter(|&won| *won == SwapOutcome::Won).count();
        assert_eq!(wins as u64, epoch);
    }
}

#[tokio::test]
async fn a_damaged_file_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let register = FileRegister::open(directory.path()).unwrap().with_deadline(PATIENT);
    let id = fresh_register();
    register.swap(id, None, value(id, 1, 0)).await.unwrap();
    let path = directory.path().join(format!("{id}.json"));
    let good = std::fs::read(&path).unwrap();
    for damaged in [&good[..good.len() / 2], b""] {
        std::fs::write(&path, damaged).unwrap();
        let read = register.read(id).await.unwrap_err();
        assert!(matches!(read.refusal(), Some(Refusal::NotServing(_))), "{read}");
        let swap = register.swap(id, None, value(id, 2, 1)).await.unwrap_err();
        assert!(swap.certainly_not_applied());
        assert_eq!(std::fs::read(&path).unwrap(), damaged);
    }
    // What a crash between write and rename leaves behind disturbs nobody.
    std::fs::write(&path, &good).unwrap();
    std::fs::write(path.with_extension("new"), b"{\"half").unwrap();
    let outcome = register.swap(id, Some(Epoch(1)), value(id, 2, 1)).await.unwrap();
    assert_eq!(outcome, SwapOutcome::Won);
}

#[tokio::test]
async fn faults_do_what_they_say() {
    let truth = Arc::new(MemoryRegister::new());
    let faulty = FaultyRegister::new(truth.clone());
    let id = fresh_register();
    let swap = |expected: u64, epoch, nonce| {
        faulty.swap(id, (expected > 0).then_some(Epoch(expected)), value(id, epoch, nonce))
    };
    let kind =
        |result: Result<SwapOutcome, rempart_register::RegisterError>| result.unwrap_err().kind().clone();
    let stands = || truth.read_now(id).map(|value| (value.epoch.0, value.nonce.0));

    faulty.plan([Fault::Unreachable, Fault::RequestLost, Fault::ReplyLost]);
    assert_eq!(kind(swap(0, 1, 1).await), ErrorKind::Unreachable);
    assert_eq!(kind(swap(0, 1, 2).await), ErrorKind::Unknown);
    assert_eq!(stands(), None);
    assert_eq!(kind(swap(0, 1, 3).await), ErrorKind::Unknown);
    assert_eq!(stands(), Some((1, 3)));

    // A late swap wins if nothing superseded it, and loses if something did.
    faulty.plan([Fault::AppliedLate, Fault::AppliedLate]);
    assert_eq!(kind(swap(1, 2, 4).await), ErrorKind::Unknown);
    assert_eq!(kind(swap(2, 3, 5).await), ErrorKind::Unknown);
    assert_eq!(stands(), Some((1, 3)));
    assert_eq!(faulty.apply_late().await.unwrap().unwrap(), SwapOutcome::Won);
    assert_eq!(stands(), Some((2, 4)));
    assert_eq!(swap(2, 7, 6).await.unwrap(), SwapOutcome::Won);
    assert!(matches!(faulty.apply_late().await.unwrap().unwrap(), SwapOutcome::Lost(Some(_))));
    assert!(faulty.apply_late().await.is_none());

    faulty.plan([Fault::Delayed(Duration::from_millis(1)), Fault::Unreachable]);
    assert_eq!(faulty.read(id).await.unwrap().unwrap().epoch, Epoch(7));
    assert!(faulty.read(id).await.is_err());
}
