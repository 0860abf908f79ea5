//! The machine's network, and the gate that closes it. Everything happens in a network namespace of the test's own.

use crate::guest::{Guest, run};
use crate::lab::{Lab, PATIENCE, lease_of, signal};
use rempart_hypervisor::definition::{BootDevice, Definition, Disk, DiskBus, Nic, NicModel};
use rempart_hypervisor::{ErrorKind, ExitCause, Hypervisor, Lease, MacAddress, Machine, VmUuid};
use rempart_types::DiskIndex;
use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs a test on a thread, and so a guard and a QEMU, that are alone on their network.
fn in_own_network<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: it changes this thread's network namespace and nothing else.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
        shell(
            "ip link set lo up && ip link add br0 type bridge && ip addr add 10.99.0.1/24 dev br0 && ip link set br0 up",
        );
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn talker(bridge: &str) -> Definition {
    let mut definition = Definition::new("talker", VmUuid(77), 192 << 20, 1);
    let mac = MacAddress::in_qemu_range([0, 0, 7]);
    definition.nics = vec![Nic { bridge: bridge.into(), mac, model: NicModel::Virtio }];
    definition.extra_options = Guest::options(run::TALKER);
    definition
}

/// Waits for the guest's next datagram; false if none came in time.
fn hears(socket: &UdpSocket, patience: Duration) -> bool {
    socket.set_read_timeout(Some(patience)).unwrap();
    loop {
        match socket.recv(&mut [0; 64]) {
            // The kernel told of a stopped or ended child.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            heard => return heard.is_ok(),
        }
    }
}

async fn keep_renewing(machine: Arc<dyn Machine>, lease_ms: u64) {
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    loop {
        ticks.tick().await;
        machine.renew(lease_of(lease_ms)).await.unwrap();
    }
}

#[test]
fn the_gate_closes_by_itself_when_everything_stands_still() {
    in_own_network(|| async {
        let lab = Lab::with(|config| config.network_gate = true);
        let heard = UdpSocket::bind("10.99.0.1:7000").unwrap();
        let machine = lab.start_defined(talker("br0"), Lease::Unlimited).await;
        assert_eq!(machine.status().await.unwrap().gate_works, Some(true));
        // Longer than one lease, so that only renewals can have kept the gate open.
        let renewing = tokio::spawn(keep_renewing(machine.clone(), 3000));
        let heard = tokio::task::spawn_blocking(move || {
            assert!(hears(&heard, PATIENCE), "the guest is not heard");
            let end = Instant::now() + Duration::from_secs(5);
            while Instant::now() < end {
                assert!(hears(&heard, Duration::from_secs(3)), "the gate closed under renewals");
            }
            heard
        });
        let heard = heard.await.unwrap();
        renewing.abort();
        assert_eq!(machine.status().await.unwrap().gate_works, Some(true));

        // The daemon is this process, and renews no more. QEMU goes on running.
        let status = machine.status().await.unwrap();
        signal(status.guard_pid as i32, libc::SIGSTOP);
        let stopped = Instant::now();
        while hears(&heard, Duration::from_secs(3)) {
            // The last lease, the time to stop, and room for a busy machine.
            assert!(stopped.elapsed() < Duration::from_secs(10), "the gate does not close");
        }
        assert!(crate::lab::is_alive(status.qemu_pid));

        // All goes on: the guard kills at once, and nothing more is heard.
        signal(status.guard_pid as i32, libc::SIGCONT);
        let record = tokio::time::timeout(PATIENCE, machine.exited()).await.unwrap();
        assert_eq!(record.cause, ExitCause::Lease);
        assert!(!hears(&heard, Duration::from_millis(500)));
    });
}

#[test]
fn a_machine_leaves_no_device_and_no_table_behind() {
    in_own_network(|| async {
        let lab = Lab::with(|config| config.network_gate = true);
        let machine = lab.start_defined(talker("br0"), Lease::Unlimited).await;
        let guard = machine.status().await.unwrap().guard_pid;
        assert!(shell("ip -o link show master br0").contains("rp"));
        assert!(shell("nft list tables").contains("rempart-talker"));
        machine.announce().await.unwrap();
        machine.kill().await.unwrap();
        while crate::lab::is_alive(guard) {
            tokio::task::yield_now().await;
        }
        assert_eq!(shell("ip -o link show master br0"), "");
        assert_eq!(shell("nft list tables"), "");
    });
}

#[test]
fn a_missing_bridge_is_named() {
    in_own_network(|| async {
        let lab = Lab::new();
        let error = lab.qemu.start(lab.request(talker("br7"), Lease::Unlimited)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::MissingOnHost);
        assert!(error.to_string().contains("use the bridge `br7`: there is no such device"), "{error}");
    });
}

#[test]
fn every_kind_of_device_is_taken_by_qemu() {
    in_own_network(|| async {
        let lab = Lab::new();
        let image = lab.path("image");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let mut definition = Definition::new("everything", VmUuid(78), 64 << 20, 2);
        let nic =
            |tail, model| Nic { bridge: "br0".into(), mac: MacAddress::in_qemu_range([0, 0, tail]), model };
        definition.nics = vec![nic(1, NicModel::Virtio), nic(2, NicModel::E1000e)];
        definition.disks = vec![Disk { bus: DiskBus::Sata, ..Disk::new(DiskIndex(5), 1 << 20) }];
        definition.boot_order = vec![BootDevice::Nic(1), BootDevice::Disk(DiskIndex(5))];
        let _server = crate::lab::NbdServer::start(&lab, &image, "disk-5");
        let machine = lab.start_defined(definition.clone(), Lease::Unlimited).await;
        assert_eq!(shell("ip -o link show master br0").lines().count(), 2);
        machine.kill().await.unwrap();

        // As many as there may be.
        let lab = Lab::new();
        definition.disks = (0..16).map(|index| Disk::new(DiskIndex(index), 1 << 20)).collect();
        definition.nics.extend((3..9).map(|tail| nic(tail, NicModel::Virtio)));
        definition.uuid = VmUuid(79);
        let mut request = lab.request(definition, Lease::Unlimited);
        request.disks.iter_mut().for_each(|export| export.export_name = "all".into());
        let socket = lab.path("nbd.sock");
        let _server = Command::new("qemu-nbd")
            .args(["-t", "-e", "16", "-f", "raw", "-x", "all", "-k", socket.to_str().unwrap()])
            .arg(&image)
            .spawn()
            .map(KillOnDrop)
            .unwrap();
        lab.qemu.start(request).await.unwrap().kill().await.unwrap();
    });
}

struct KillOnDrop(std::process::Child);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
