//! Starting, finding again and ending.

use crate::lab::{HELPER, Lab, PATIENCE, event, is_alive, lease_of, signal};
use rempart_hypervisor::qemu::RunAs;
use rempart_hypervisor::{
    Adopted, Definition, DiskExport, ErrorKind, ExitCause, FirstState, Hypervisor, Lease, MachineEvent,
    PauseCause, RunState, VmUuid,
};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};

#[tokio::test]
async fn a_machine_runs_until_it_is_killed_and_leaves_a_record() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    let mut events = machine.events();
    let status = machine.status().await.unwrap();
    assert_eq!((status.run_state, status.pause_cause, status.gate_works), (RunState::Running, None, None));
    assert!(is_alive(status.qemu_pid) && is_alive(status.guard_pid));
    let record = machine.kill().await.unwrap();
    assert_eq!((record.cause, record.signal), (ExitCause::Request, Some(libc::SIGKILL)));
    assert!(!is_alive(status.qemu_pid));
    assert_eq!(
        event(&mut events, |event| matches!(event, MachineEvent::Exited(_)).then(|| event.clone())).await,
        MachineEvent::Exited(record.clone())
    );
    // Asking again changes nothing, and a later daemon learns the same.
    assert_eq!(machine.kill().await.unwrap(), record);
    assert_eq!(machine.renew(Lease::Unlimited).await.unwrap_err().kind(), ErrorKind::NotRunning);
    let Adopted::Gone(Some(found)) = lab.qemu.adopt(&lab.run_dir()).await.unwrap() else {
        panic!("it is gone")
    };
    assert_eq!(found, record);
}

#[tokio::test]
async fn a_machine_is_not_started_twice_and_can_be_started_again() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    let twice = lab.qemu.start(lab.request(lab.definition(), Lease::Unlimited)).await.unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::AlreadyRunning);
    assert_eq!(twice.to_string(), "cannot start `probe`: another guard has it");
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Running);
    machine.kill().await.unwrap();
    let guard = machine.status().await;
    assert!(guard.is_err());
    // At once: the guard was on its way out once when the machine was told to be gone, and refused the next start.
    let again = lab.qemu.start(lab.request(lab.definition(), Lease::Unlimited)).await.unwrap();
    again.kill().await.unwrap();
}

#[tokio::test]
async fn the_daemons_sudden_death_leaves_the_machine_running_and_adoptable() {
    let lab = Lab::new();
    let mut daemon = tokio::process::Command::new(HELPER)
        .args(["daemon", lab.run_dir().to_str().unwrap(), "30000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(daemon.stdout.take().unwrap()).lines();
    assert_eq!(lines.next_line().await.unwrap().as_deref(), Some("started"));
    daemon.kill().await.unwrap();

    let Adopted::Running(machine) = lab.qemu.adopt(&lab.run_dir()).await.unwrap() else {
        panic!("it is lost")
    };
    assert_eq!(machine.name(), "adopted");
    let status = machine.status().await.unwrap();
    assert_eq!(status.run_state, RunState::Running);
    machine.renew(lease_of(40_000)).await.unwrap();
    // The socket that the dead daemon left is the one it listened on.
    let kept = machine.kept_listeners().await.unwrap();
    assert_eq!(kept.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["nbd"]);
    let listener = std::os::unix::net::UnixListener::from(kept.into_iter().next().unwrap().1);
    let _client = std::os::unix::net::UnixStream::connect(lab.run_dir().with_extension("kept")).unwrap();
    listener.accept().unwrap();
    // All of the machine works, not only its guard.
    assert!(machine.screenshot().await.unwrap().starts_with(b"\x89PNG"));
    machine.pause().await.unwrap();
    assert_eq!(machine.status().await.unwrap().pause_cause, Some(PauseCause::Request));
    machine.resume().await.unwrap();
    assert_eq!(machine.kill().await.unwrap().cause, ExitCause::Request);
    assert!(!is_alive(status.qemu_pid));
}

#[tokio::test]
async fn a_killed_qemu_is_told_at_once() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    signal(machine.status().await.unwrap().qemu_pid as i32, libc::SIGKILL);
    let record = tokio::time::timeout(PATIENCE, machine.exited()).await.unwrap();
    assert_eq!((record.cause, record.signal), (ExitCause::Crashed, Some(libc::SIGKILL)));
}

#[tokio::test]
async fn a_killed_guard_takes_its_qemu_along() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    let status = machine.status().await.unwrap();
    signal(status.guard_pid as i32, libc::SIGKILL);
    let record = tokio::time::timeout(PATIENCE, machine.exited()).await.unwrap();
    assert_eq!(record.cause, ExitCause::GuardDied);
    assert!(!is_alive(status.qemu_pid));
    let Adopted::Gone(None) = lab.qemu.adopt(&lab.run_dir()).await.unwrap() else {
        panic!("nothing is left")
    };
}

#[tokio::test]
async fn a_machine_whose_guard_is_frozen_can_still_be_killed() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    let status = machine.status().await.unwrap();
    signal(status.guard_pid as i32, libc::SIGSTOP);
    assert_eq!(machine.renew(Lease::Unlimited).await.unwrap_err().kind(), ErrorKind::Deadline);
    assert_eq!(machine.kill().await.unwrap().cause, ExitCause::Request);
    assert!(!is_alive(status.qemu_pid));
}

#[tokio::test]
async fn a_machine_found_with_a_frozen_guard_is_ended() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    let status = machine.status().await.unwrap();
    drop(machine);
    signal(status.guard_pid as i32, libc::SIGSTOP);
    let Adopted::Gone(None) = lab.qemu.adopt(&lab.run_dir()).await.unwrap() else {
        panic!("nobody watches it")
    };
    assert!(!is_alive(status.qemu_pid) && !is_alive(status.guard_pid));
}

#[tokio::test]
async fn a_guest_that_ignores_the_power_button_is_left_running() {
    let lab = Lab::new();
    let machine = lab.start(Lease::Unlimited).await;
    let error = machine.power_down(Duration::from_millis(200)).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot shut down `probe`: no answer within 200 ms");
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Running);
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn a_machine_started_paused_waits_for_resume() {
    let lab = Lab::new();
    let mut request = lab.request(lab.definition(), lease_of(30_000));
    request.first_state = FirstState::Paused;
    let machine = lab.qemu.start(request).await.unwrap();
    let status = machine.status().await.unwrap();
    assert_eq!((status.run_state, status.pause_cause), (RunState::Paused, Some(PauseCause::NotStarted)));
    machine.resume().await.unwrap();
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Running);
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn a_start_that_fails_says_why() {
    let lab = Lab::new();
    let mut definition = lab.definition();
    definition.extra_options = vec!["-no-such-option".into()];
    let error = lab.qemu.start(lab.request(definition, Lease::Unlimited)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedToStart);
    assert!(error.to_string().contains("-no-such-option: invalid option"), "{error}");

    let lab = Lab::with(|config| config.qemu_program = "no-such-qemu".into());
    let error = lab.qemu.start(lab.request(lab.definition(), Lease::Unlimited)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::MissingOnHost);
    assert!(error.to_string().contains("`no-such-qemu` is not installed"), "{error}");

    let lab = Lab::with(|config| config.guard_command = vec!["/no/rempart".into()]);
    let error = lab.qemu.start(lab.request(lab.definition(), Lease::Unlimited)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::MissingOnHost);
}

#[tokio::test]
async fn a_start_whose_disk_does_not_answer_ends_at_its_deadline_and_leaves_nothing() {
    let lab = Lab::with(|config| config.start_deadline = Duration::from_secs(2));
    // Accepts, and says nothing.
    let _silent = std::os::unix::net::UnixListener::bind(lab.path("nbd.sock")).unwrap();
    let mut definition = Definition::new("mute", VmUuid(1), 64 << 20, 1);
    definition.disks = vec![rempart_hypervisor::definition::Disk::new(rempart_types::DiskIndex(0), 1 << 20)];
    let mut request = lab.request(definition, Lease::Unlimited);
    request.disks = vec![DiskExport {
        disk: rempart_types::DiskIndex(0),
        socket: lab.path("nbd.sock"),
        export_name: "disk-0".into(),
    }];
    let error = lab.qemu.start(request).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline);
    let Adopted::Gone(_) = lab.qemu.adopt(&lab.run_dir()).await.unwrap() else { panic!("it was given up") };
}

#[tokio::test]
async fn a_qemu_without_privileges_still_dies_with_its_guard() {
    const NOBODY: u32 = 65534;
    let lab = Lab::with(|config| config.run_as = Some(RunAs { uid: NOBODY, gid: NOBODY }));
    let machine = lab.start(Lease::Unlimited).await;
    let status = machine.status().await.unwrap();
    let process = std::fs::read_to_string(format!("/proc/{}/status", status.qemu_pid)).unwrap();
    assert!(process.contains(&format!("Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}")), "{process}");
    assert!(machine.screenshot().await.unwrap().starts_with(b"\x89PNG"));
    signal(status.guard_pid as i32, libc::SIGKILL);
    assert_eq!(tokio::time::timeout(PATIENCE, machine.exited()).await.unwrap().cause, ExitCause::GuardDied);
    assert!(!is_alive(status.qemu_pid));
}

#[tokio::test]
async fn the_host_is_described() {
    let lab = Lab::new();
    let host = lab.qemu.host().await.unwrap();
    assert!(host.qemu_version.starts_with(|c: char| c.is_ascii_digit()), "{host:?}");
    assert!(
        host.machine_types
            .iter()
            .any(|machine| machine == rempart_hypervisor::definition::DEFAULT_MACHINE_TYPE)
    );
    assert_eq!(host.accelerator, "tcg");
}
