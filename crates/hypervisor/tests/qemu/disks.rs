//! A guest's disks while their server comes and goes.

use crate::guest::{Guest, run};
use crate::lab::{Lab, NbdServer, PATIENCE, event, lease_of};
use rempart_hypervisor::definition::Disk;
use rempart_hypervisor::{
    Definition, DiskExport, ExitCause, Lease, Machine, MachineEvent, PauseCause, RunState, VmUuid,
};
use rempart_types::DiskIndex;
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::UnixStream;

const SIZE: u64 = 64 << 20;

fn image(lab: &Lab) -> PathBuf {
    let path = lab.path("image");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

fn linux(run: &str) -> Definition {
    let mut definition =
        Definition::new("linux", VmUuid(u128::from(std::process::id()) + (1 << 64)), 192 << 20, 1);
    definition.disks = vec![Disk::new(DiskIndex(0), SIZE)];
    definition.extra_options = Guest::options(run);
    definition
}

type Console = Lines<BufReader<UnixStream>>;

async fn console(machine: &dyn Machine) -> Console {
    BufReader::new(machine.console().await.unwrap()).lines()
}

/// The number of the next write that the guest reports; a failed one fails the test.
async fn next_write(console: &mut Console) -> u64 {
    let wait = async {
        loop {
            let line = console.next_line().await.unwrap().expect("the console was closed");
            let line = line.trim();
            assert!(
                !line.starts_with("failed") && !line.contains("I/O error"),
                "the guest saw an error: {line}"
            );
            // A serial line under emulation drops a character now and then.
            if let Some(Ok(number)) = line.strip_prefix("wrote ").map(str::parse) {
                return number;
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the guest does not write")
}

/// What the guest was told is on the disk.
fn assert_written(image: &PathBuf, last: u64) {
    let bytes = std::fs::read(image).unwrap();
    for number in 1..=last {
        let expected = format!("{number}\n");
        let at = number as usize * 512;
        assert_eq!(&bytes[at..at + expected.len()], expected.as_bytes(), "write {number} is lost");
    }
}

#[tokio::test]
async fn a_server_that_dies_and_comes_back_is_a_pause_of_the_guests_io_and_no_error() {
    let lab = Lab::new();
    let image = image(&lab);
    let server = NbdServer::start(&lab, &image, "disk-0");
    let machine = lab.start_defined(linux(run::WRITER), Lease::Unlimited).await;
    let mut console = console(&*machine).await;
    for _ in 0..20 {
        next_write(&mut console).await;
    }
    server.kill();
    // Whatever was under way is not answered, and the vCPUs run on.
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Running);
    let _server = NbdServer::start(&lab, &image, "disk-0");
    let mut last = 0;
    for _ in 0..20 {
        last = next_write(&mut console).await;
    }
    assert_written(&image, last);
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn a_lease_that_runs_out_while_the_disk_is_gone_pauses_and_does_not_kill() {
    // The very case of a dead daemon: its lease ends and its NBD server is gone. QEMU cannot finish `stop` then, but
    // its vCPUs stand still.
    let lab = Lab::new();
    let image = image(&lab);
    let server = NbdServer::start(&lab, &image, "disk-0");
    let machine = lab.start_defined(linux(run::WRITER), Lease::Unlimited).await;
    let mut console = console(&*machine).await;
    for _ in 0..5 {
        next_write(&mut console).await;
    }
    let mut events = machine.events();
    server.kill();
    machine.renew(lease_of(1000)).await.unwrap();
    let cause = event(&mut events, |event| match event {
        MachineEvent::Paused(cause) => Some(Ok(*cause)),
        MachineEvent::Exited(record) => Some(Err(record.to_string())),
        _ => None,
    });
    assert_eq!(cause.await, Ok(PauseCause::Lease));
    // Well after the time to stop it is still there.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(machine.status().await.unwrap().run_state, RunState::Paused);
    // The daemon's next life: adopts while nothing is served yet, then serves, renews and resumes.
    drop(machine);
    let adopted = rempart_hypervisor::Hypervisor::adopt(&lab.qemu, &lab.run_dir()).await.unwrap();
    let rempart_hypervisor::Adopted::Running(machine) = adopted else { panic!("it is lost") };
    let _server = NbdServer::start(&lab, &image, "disk-0");
    machine.renew(lease_of(50_000)).await.unwrap();
    machine.resume().await.unwrap();
    let mut last = 0;
    for _ in 0..5 {
        last = next_write(&mut console).await;
    }
    assert_written(&image, last);
    assert_eq!(machine.kill().await.unwrap().cause, ExitCause::Request);
}

#[tokio::test]
async fn with_a_kept_socket_io_goes_on_as_soon_as_a_server_is_back_and_a_grown_disk_is_seen() {
    let lab = Lab::new();
    let image = image(&lab);
    let listener = std::os::unix::net::UnixListener::bind(lab.path("nbd.sock")).unwrap();
    let server = NbdServer::on_listener(&listener, &image, "disk-0", SIZE);
    let machine = lab.start_defined(linux(run::MEASURING_WRITER), Lease::Unlimited).await;
    let mut console = console(&*machine).await;
    for _ in 0..5 {
        next_write(&mut console).await;
    }
    server.kill();
    // Long enough for QEMU to try again every few seconds only, if it had nobody to connect to.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let _server = NbdServer::on_listener(&listener, &image, "disk-0", 2 * SIZE);
    let back = std::time::Instant::now();
    next_write(&mut console).await;
    let took = back.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");

    machine.resize_disk(DiskIndex(0), 2 * SIZE).await.unwrap();
    wait_for(&mut console, &format!("sees vda {}", 2 * SIZE / 512)).await;
    machine.kill().await.unwrap();
}

/// A guest that asks its disk nothing gives QEMU no reason to connect again.
#[tokio::test]
async fn a_guest_that_is_idle_sees_a_grown_disk_and_not_one_that_did_not_grow() {
    let lab = Lab::new();
    let image = image(&lab);
    let listener = std::os::unix::net::UnixListener::bind(lab.path("nbd.sock")).unwrap();
    let server = NbdServer::on_listener(&listener, &image, "disk-0", SIZE);
    let run = "while%:;do%echo%sees%vda%$(cat%/sys/block/vda/size);usleep%200000;done";
    let machine = lab.start_defined(linux(run), Lease::Unlimited).await;
    let mut console = console(&*machine).await;
    wait_for(&mut console, &format!("sees vda {}", SIZE / 512)).await;
    let refused = machine.resize_disk(DiskIndex(0), 2 * SIZE).await.unwrap_err();
    assert!(refused.to_string().contains("grow"), "{refused}");

    server.kill();
    let _server = NbdServer::on_listener(&listener, &image, "disk-0", 2 * SIZE);
    machine.resize_disk(DiskIndex(0), 2 * SIZE).await.unwrap();
    wait_for(&mut console, &format!("sees vda {}", 2 * SIZE / 512)).await;
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_shuts_down_wants_to_stay_off() {
    let lab = Lab::new();
    let image = image(&lab);
    let _server = NbdServer::start(&lab, &image, "disk-0");
    let machine = lab.start_defined(linux(run::POWEROFF), Lease::Unlimited).await;
    let record = tokio::time::timeout(PATIENCE, machine.exited()).await.unwrap();
    assert_eq!((record.cause, record.code), (ExitCause::GuestShutdown, Some(0)));
}

#[tokio::test]
async fn disks_are_plugged_in_and_out_of_a_running_machine() {
    let lab = Lab::new();
    let image = image(&lab);
    let _server = NbdServer::start(&lab, &image, "disk-0");
    let run = "while%:;do%for%d%in%/sys/block/vd*;do%echo%sees%$(basename%$d)%$(cat%$d/size);done;usleep%200000;done";
    let mut definition = linux(run);
    definition.disks.clear();
    let machine = lab.start_defined(definition, Lease::Unlimited).await;
    let mut console = console(&*machine).await;
    let disk = Disk::new(DiskIndex(0), SIZE);
    let export =
        DiskExport { disk: DiskIndex(0), socket: lab.path("nbd.sock"), export_name: "disk-0".into() };
    // The guest must be up to take part.
    wait_for(&mut console, "guest is up").await;
    machine.attach_disk(disk, export.clone()).await.unwrap();
    wait_for(&mut console, &format!("sees vda {}", SIZE / 512)).await;
    machine.detach_disk(DiskIndex(0), PATIENCE).await.unwrap();
    // Everything of it is gone: it can come again.
    machine.attach_disk(Disk::new(DiskIndex(0), SIZE), export).await.unwrap();
    machine.kill().await.unwrap();
}

async fn wait_for(console: &mut Console, text: &str) {
    let wait = async {
        while let Some(line) = console.next_line().await.unwrap() {
            if line.contains(text) {
                return;
            }
        }
        panic!("the console was closed");
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("the guest does not say `{text}`"));
}
