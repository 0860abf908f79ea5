//! What happens when nobody renews.

use crate::lab::{Lab, PATIENCE, event, is_alive, lease_of, signal};
use rempart_hypervisor::qmp;
use rempart_hypervisor::{
    Adopted, ErrorKind, ExitCause, Hypervisor, Lease, Machine, MachineEvent, MachineEvents, PauseCause,
    RunState, clock,
};
use std::sync::Arc;
use std::time::Duration;

/// A machine whose lease is counted from when it runs, however long it took to come up.
async fn started(lab: &Lab, lease_ms: u64) -> (Arc<dyn Machine>, MachineEvents, u64) {
    let machine = lab.start(Lease::Unlimited).await;
    let events = machine.events();
    let lease = lease_of(lease_ms);
    machine.renew(lease).await.unwrap();
    let Lease::UntilBoottimeNs(until) = lease else { unreachable!() };
    (machine, events, until)
}

fn paused(event: &MachineEvent) -> Option<PauseCause> {
    if let MachineEvent::Paused(cause) = event { Some(*cause) } else { None }
}

#[tokio::test]
async fn a_lease_that_runs_out_pauses_and_a_renewal_with_resume_goes_on() {
    let lab = Lab::new();
    let (machine, mut events, until) = started(&lab, 3000).await;
    assert_eq!(event(&mut events, paused).await, PauseCause::Lease);
    let late = Duration::from_nanos(clock::boottime().0 - until);
    assert!(late < Duration::from_secs(1), "paused {late:?} after the end of the lease");
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Paused);
    assert_eq!(machine.resume().await.unwrap_err().kind(), ErrorKind::Refused);
    machine.renew(lease_of(30_000)).await.unwrap();
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Paused);
    machine.resume().await.unwrap();
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Running);
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn renewals_keep_a_machine_running() {
    let lab = Lab::new();
    let (machine, mut events, _) = started(&lab, 3000).await;
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    for _ in 0..20 {
        ticks.tick().await;
        machine.renew(lease_of(3000)).await.unwrap();
    }
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Running);
    // And it was the renewals that did.
    assert_eq!(event(&mut events, paused).await, PauseCause::Lease);
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn a_frozen_qemu_is_killed_within_the_time_to_stop() {
    let lab = Lab::new();
    let (machine, _, until) = started(&lab, 3000).await;
    let pid = machine.status().await.unwrap().qemu_pid;
    signal(pid as i32, libc::SIGSTOP);
    let record = tokio::time::timeout(PATIENCE, machine.exited()).await.unwrap();
    let late = Duration::from_nanos(clock::boottime().0 - until);
    assert_eq!((record.cause, record.signal), (ExitCause::Lease, Some(libc::SIGKILL)));
    assert!((Duration::from_secs(1)..Duration::from_secs(3)).contains(&late), "killed {late:?} after");
    assert!(!is_alive(pid));
}

#[tokio::test]
async fn a_guard_that_was_frozen_past_the_lease_kills_as_soon_as_it_goes_on() {
    let lab = Lab::new();
    let (machine, _, until) = started(&lab, 3000).await;
    let status = machine.status().await.unwrap();
    signal(status.guard_pid as i32, libc::SIGSTOP);
    let left = Duration::from_nanos(until.saturating_sub(clock::boottime().0));
    // No event tells that time has passed while everything stands still.
    tokio::time::sleep(left + Duration::from_millis(1200)).await;
    assert!(is_alive(status.qemu_pid));
    let woken = clock::boottime();
    signal(status.guard_pid as i32, libc::SIGCONT);
    let record = tokio::time::timeout(PATIENCE, machine.exited()).await.unwrap();
    assert_eq!(record.cause, ExitCause::Lease);
    let took = clock::boottime().since(woken);
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn a_machine_found_after_its_lease_ran_out_is_paused_and_can_go_on() {
    let lab = Lab::new();
    let (machine, mut events, _) = started(&lab, 1000).await;
    event(&mut events, paused).await;
    drop(machine);
    let Adopted::Running(machine) = lab.qemu.adopt(&lab.run_dir()).await.unwrap() else {
        panic!("it is lost")
    };
    let status = machine.status().await.unwrap();
    assert_eq!((status.run_state, status.pause_cause), (RunState::Paused, Some(PauseCause::Lease)));
    machine.renew(lease_of(30_000)).await.unwrap();
    machine.resume().await.unwrap();
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn a_machine_resumed_behind_the_guards_back_is_killed() {
    let lab = Lab::new();
    let (machine, mut events, _) = started(&lab, 1000).await;
    event(&mut events, paused).await;
    // Past the time to stop as well.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let run_dir = lab.run_dir();
    drop(machine);
    let monitor = loop {
        // The dropped handle's connection has the monitor for a moment still.
        if let Ok(monitor) = qmp::Client::connect(&run_dir.join("qmp.sock"), Duration::from_secs(1)).await {
            break monitor;
        }
    };
    let _ = monitor.cont().await;
    let found = loop {
        if let Adopted::Gone(record) = lab.qemu.adopt(&run_dir).await.unwrap() {
            break record;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(found.unwrap().cause, ExitCause::Lease);
}

#[tokio::test]
async fn the_guards_socket_survives_garbage() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    let mut flood = b"{\"id\":1,\"do\":\"renew\"".to_vec();
    flood.resize(100_000, b' ');
    for garbage in
        [b"GET / HTTP/1.1\r\n\r\n".as_slice(), b"\0\xff\xfe\n", &flood, b"{\"id\":7,\"do\":\"fly\"}\n"]
    {
        let mut stream = tokio::net::UnixStream::connect(lab.run_dir().join("guard.sock")).await.unwrap();
        // It may hang up in the middle.
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let mut answer = String::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap();
        if garbage.starts_with(b"{\"id\":7") {
            assert!(answer.contains("\"type\":\"failed\",\"id\":7"), "{answer}");
        }
    }
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Running);
    machine.kill().await.unwrap();
}
