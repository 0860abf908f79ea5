//! The memory of a machine that its guard paused: nothing but `resume` has it go on, whatever becomes of the saving.

use crate::lab::{Lab, event, lease_of};
use rempart_hypervisor::{
    Adopted, ErrorKind, Hypervisor, KeptMemory, Lease, Machine, MachineEvent, MemoryWanted, PauseCause,
    Result, RunState, clock,
};
use std::fs::File;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

async fn keep(lab: &Lab, machine: &dyn Machine, most_bytes: u64, limit: Duration) -> Result<KeptMemory> {
    let file = File::create(lab.path("memory")).unwrap();
    machine.keep_memory(MemoryWanted { file, most_bytes, limit }).await
}

async fn state(machine: &dyn Machine) -> (RunState, Option<PauseCause>) {
    let status = machine.status().await.unwrap();
    (status.run_state, status.pause_cause)
}

const STILL: (RunState, Option<PauseCause>) = (RunState::Paused, Some(PauseCause::Request));
const RUNS: (RunState, Option<PauseCause>) = (RunState::Running, None);

#[tokio::test]
async fn a_machine_stands_still_after_its_memory_was_kept_or_was_not_until_it_is_resumed() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    // One that runs would be stopped by QEMU, which may have it go on.
    let refused = keep(&lab, &*machine, u64::MAX, LIMIT).await.unwrap_err();
    assert_eq!((refused.kind(), state(&*machine).await), (ErrorKind::Refused, RUNS));
    let mark = lab.run_dir().join("memory.saving");
    for _ in 0..2 {
        machine.pause().await.unwrap();
        assert!(!machine.stands_as_kept().await.unwrap());
        keep(&lab, &*machine, 1000, LIMIT).await.unwrap_err();
        assert_eq!(state(&*machine).await, STILL);
        assert!(!machine.stands_as_kept().await.unwrap());
        machine.resume().await.unwrap();
        assert_eq!((state(&*machine).await, mark.exists()), (RUNS, false));

        machine.pause().await.unwrap();
        let kept = keep(&lab, &*machine, u64::MAX, LIMIT).await.unwrap();
        assert_eq!(std::fs::metadata(lab.path("memory")).unwrap().len(), kept.bytes);
        assert!(kept.bytes > 100_000 && kept.description["command_line"].is_array(), "{kept:?}");
        assert_eq!(state(&*machine).await, STILL);
        assert!(machine.stands_as_kept().await.unwrap());
        machine.resume().await.unwrap();
        assert_eq!((state(&*machine).await, mark.exists()), (RUNS, false));
    }
    machine.kill().await.unwrap();
}

/// Whoever saves it is gone in the middle, and then its lease: nothing resumes it but a daemon that has the lease, which has
/// QEMU end first what it is at.
#[tokio::test]
async fn a_machine_whose_saver_is_gone_stands_still_past_its_lease_and_goes_on_by_the_next_daemon() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    machine.renew(lease_of(3000)).await.unwrap();
    machine.pause().await.unwrap();
    let mark = lab.run_dir().join("memory.saving");
    let marked = async {
        while !mark.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        kept = keep(&lab, &*machine, u64::MAX, LIMIT) => drop(kept.unwrap()),
        () = marked => {}
    }
    drop(machine);
    let Adopted::Running(machine) = lab.qemu.adopt(&lab.run_dir()).await.unwrap() else {
        panic!("it is lost")
    };
    while !machine.status().await.unwrap().lease.is_over(clock::boottime()) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(machine.resume().await.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(state(&*machine).await, STILL);
    let mut events = machine.events();
    machine.renew(lease_of(30_000)).await.unwrap();
    machine.resume().await.unwrap();
    event(&mut events, |event| matches!(event, MachineEvent::Resumed).then_some(())).await;
    assert_eq!((state(&*machine).await, mark.exists()), (RUNS, false));
    machine.kill().await.unwrap();
}
