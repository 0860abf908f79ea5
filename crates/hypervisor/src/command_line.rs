//! QEMU's arguments from a definition.
//!
//! The guest's hardware is a function of the definition alone: every device has a fixed place, so that a start on
//! the other node, or after a disk was added, shows the guest the same machine.
//!
//! | PCI slot | what |
//! |---|---|
//! | 1 | VGA (nobody looks at it by default; guests and screenshots need one) |
//! | 2, 3, 4 | virtio-serial with the guest agent's channel, virtio-rng, pvpanic |
//! | 8 – 15 | NICs |
//! | 16, 17 | a root port for each disk, and [`SPARE_PORTS`] more to plug disks into |
//! | 31 | q35's own: AHCI, LPC |
//!
//! Choices that matter for what a guest sees when things fail:
//!
//! - `reconnect-delay`: while no daemon answers, I/O waits in QEMU. The guest sees slowness, not an error.
//! - `werror=stop`, `rerror=stop`: an error the daemon does report stops the vCPUs and is tried again on resume. A
//!   guest that was told EIO would remount its file systems read-only, on the good copy too.
//! - `write-cache=on` without `cache.no-flush`: the guest's flushes are passed on; they are what makes data durable.
//! - `discard=unmap`: the guest's trims are passed on. No zero detection: it costs a look at every byte.
//! - `panic=none`: a guest that crashes does as it is configured (reboot, dump); the daemon is told.

use crate::accelerator::Accelerator;
use crate::definition::{BootDevice, CpuModel, Definition, Disk, DiskBus, Firmware, MAX_DISKS, NicModel};
use crate::machine::{DiskExport, FirstState};
use rempart_types::DiskIndex;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// Root ports beyond those of the definition's disks.
const SPARE_PORTS: usize = 4;

/// x86-64-v2 with AES: what QEMU's oldest 64-bit model lacks to be it.
const BASELINE_CPU: &str = "qemu64,svm=off,+aes,+cx16,+lahf-lm,+pclmulqdq,+popcnt,+sse4.1,+sse4.2,+ssse3";

/// Enough for a guest's hot code; QEMU would take a quarter of the guest's memory or more.
const TCG_CACHE_MIB: u32 = 128;

/// What the guest's hardware does not depend on.
#[derive(Debug, Clone)]
pub struct Runtime {
    pub qemu_program: PathBuf,
    pub accelerator: Accelerator,
    /// Sockets and logs are made in it.
    pub run_dir: PathBuf,
    pub disks: Vec<DiskExport>,
    pub reconnect_delay: Duration,
    /// How long QEMU tries to open a disk at start.
    pub open_timeout: Duration,
    /// For UEFI: the code image, and this machine's own copy of the variables.
    pub firmware: Option<FirmwareFiles>,
    pub first_state: FirstState,
    pub sandbox: bool,
}

#[derive(Debug, Clone)]
pub struct FirmwareFiles {
    pub code: PathBuf,
    pub variables: PathBuf,
}

/// What QEMU calls a NIC's backend; the guard passes the TAP under this name.
pub fn netdev_id(nic: usize) -> String {
    format!("nic-net-{nic}")
}

/// What QEMU calls a disk, and the block node behind it.
pub fn disk_id(disk: DiskIndex) -> String {
    format!("disk-{disk}")
}

pub fn disk_node(disk: DiskIndex) -> String {
    format!("disk-node-{disk}")
}

/// The disk that a device or node belongs to.
pub fn disk_of(id: &str) -> Option<DiskIndex> {
    let number = id.strip_prefix("disk-node-").or_else(|| id.strip_prefix("disk-"))?;
    number.parse().ok().map(DiskIndex)
}

/// The program and all its arguments, but for what only the guard can give: its own monitor and the TAPs.
/// The definition must be valid, and there is an export for each of its disks.
pub fn build(definition: &Definition, runtime: &Runtime) -> Vec<String> {
    build_with(definition, runtime, |disk| {
        let export = runtime.disks.iter().find(|export| export.disk == disk.index)?;
        Some(disk_node_options(export, runtime.reconnect_delay, runtime.open_timeout))
    })
}

/// The same on other block nodes than those of the daemon's exports; a disk's node has the name that [`disk_node`] gives.
pub fn build_with(
    definition: &Definition,
    runtime: &Runtime,
    node: impl Fn(&Disk) -> Option<Value>,
) -> Vec<String> {
    let mut line = Line { arguments: vec![runtime.qemu_program.display().to_string()] };
    line.option("-name", format!("guest={},debug-threads=on", definition.name));
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    line.option("-uuid", definition.uuid);
    line.board(definition, runtime);
    line.option("-m", format!("{}M", definition.memory_bytes >> 20));
    line.option("-smp", format!("{0},sockets=1,cores={0},threads=1", definition.cpus));
    line.option("-rtc", "base=utc,driftfix=slew");
    line.option("-boot", "menu=off,strict=on");
    line.option("-action", "panic=none");
    line.option("-display", "none");
    line.device(json!({ "driver": "VGA", "id": "screen", "bus": "pcie.0", "addr": "0x1", "vgamem_mb": 16 }));
    line.channels(runtime);
    line.disks(definition, node);
    line.nics(definition);
    if runtime.sandbox {
        line.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    }
    line.option("-pidfile", runtime.run_dir.join("qemu.pid").display());
    line.option("-msg", "timestamp=on");
    // The guard lets the vCPUs run, when it sees that the lease holds.
    line.flag("-S");
    if let FirstState::Incoming(address) = &runtime.first_state {
        line.option("-incoming", address);
    }
    line.arguments.extend(definition.extra_options.iter().cloned());
    line.arguments
}

/// The block node of a disk, for the command line and for `blockdev-add`.
pub fn disk_node_options(export: &DiskExport, reconnect_delay: Duration, open_timeout: Duration) -> Value {
    json!({
        "driver": "nbd",
        "node-name": disk_node(export.disk),
        "server": { "type": "unix", "path": export.socket },
        "export": export.export_name,
        "reconnect-delay": reconnect_delay.as_secs(),
        "open-timeout": open_timeout.as_secs(),
        "discard": "unmap",
    })
}

/// The device of a disk, for the command line and for `device_add`.
pub fn disk_device_options(disk: &Disk, boot_index: Option<usize>) -> Value {
    let mut device = json!({
        "id": disk_id(disk.index),
        "drive": disk_node(disk.index),
        "serial": disk.serial_number(),
        "write-cache": "on",
        "werror": "stop",
        "rerror": "stop",
    });
    match disk.bus {
        DiskBus::VirtioBlk => {
            device["driver"] = "virtio-blk-pci".into();
            device["bus"] = port_id(disk.index.0.into()).into();
            device["iothread"] = "disks".into();
        }
        DiskBus::Sata => {
            device["driver"] = "ide-hd".into();
            device["bus"] = format!("ide.{}", disk.index).into();
        }
    }
    if let Some(boot_index) = boot_index {
        device["bootindex"] = boot_index.into();
    }
    device
}

fn port_id(disk: usize) -> String {
    format!("disk-port-{disk}")
}

/// QEMU's `-cpu` argument. Under KVM a feature the host lacks is an error and not a silently different machine.
pub(crate) fn cpu_option(model: &CpuModel, accelerator: Accelerator) -> String {
    let model = match model {
        CpuModel::Baseline => BASELINE_CPU,
        CpuModel::Named(name) => name,
        CpuModel::Host => "host",
        CpuModel::Max => "max",
    };
    match accelerator {
        Accelerator::Kvm if !matches!(model, "host" | "max") => format!("{model},enforce"),
        _ => model.into(),
    }
}

pub(crate) fn accelerator_option(accelerator: Accelerator) -> String {
    match accelerator {
        Accelerator::Kvm => "kvm".into(),
        Accelerator::Tcg => format!("tcg,tb-size={TCG_CACHE_MIB}"),
    }
}

struct Line {
    arguments: Vec<String>,
}

impl Line {
    fn flag(&mut self, name: &str) {
        self.arguments.push(name.into());
    }

    fn option(&mut self, name: &str, value: impl ToString) {
        self.arguments.extend([name.into(), value.to_string()]);
    }

    fn device(&mut self, options: Value) {
        self.option("-device", options);
    }

    fn board(&mut self, definition: &Definition, runtime: &Runtime) {
        let mut machine = format!("{},usb=off,dump-guest-core=off", definition.machine_type);
        if definition.firmware == Firmware::Uefi
            && let Some(files) = &runtime.firmware
        {
            machine += ",pflash0=firmware-code,pflash1=firmware-variables";
            for (node, file, read_only) in
                [("firmware-code", &files.code, true), ("firmware-variables", &files.variables, false)]
            {
                self.option(
                    "-blockdev",
                    json!({ "driver": "file", "node-name": node, "filename": file, "read-only": read_only }),
                );
            }
        }
        self.option("-machine", machine);
        self.option("-accel", accelerator_option(runtime.accelerator));
        self.option("-cpu", cpu_option(&definition.cpu_model, runtime.accelerator));
    }

    /// The monitor for the daemon, the console, the guest agent, entropy and the panic notifier.
    fn channels(&mut self, runtime: &Runtime) {
        let path = |name: &str| runtime.run_dir.join(name).display().to_string();
        let socket =
            |name: &str, file: &str| format!("socket,id={name},path={},server=on,wait=off", path(file));
        self.option("-chardev", socket("daemon", "qmp.sock"));
        self.option("-mon", "chardev=daemon,mode=control");
        let log = path("console.log");
        self.option("-chardev", format!("{},logfile={log},logappend=on", socket("console", "console.sock")));
        self.option("-serial", "chardev:console");
        self.option("-chardev", socket("agent", "agent.sock"));
        self.device(
            json!({ "driver": "virtio-serial-pci", "id": "channels", "bus": "pcie.0", "addr": "0x2", "max_ports": 2 }),
        );
        self.device(json!({
            "driver": "virtserialport", "bus": "channels.0", "nr": 1, "chardev": "agent",
            "name": "org.qemu.guest_agent.0",
        }));
        self.option(
            "-object",
            json!({ "qom-type": "rng-random", "id": "entropy", "filename": "/dev/urandom" }),
        );
        self.device(json!({ "driver": "virtio-rng-pci", "rng": "entropy", "bus": "pcie.0", "addr": "0x3" }));
        self.device(json!({ "driver": "pvpanic-pci", "bus": "pcie.0", "addr": "0x4" }));
    }

    fn disks(&mut self, definition: &Definition, node: impl Fn(&Disk) -> Option<Value>) {
        let highest = definition.disks.iter().map(|disk| usize::from(disk.index.0) + 1).max().unwrap_or(0);
        for port in 0..(highest + SPARE_PORTS).min(MAX_DISKS) {
            self.device(json!({
                "driver": "pcie-root-port", "id": port_id(port), "bus": "pcie.0",
                "addr": format!("0x{:x}.0x{:x}", 0x10 + port / 8, port % 8), "multifunction": true,
                "chassis": port + 1, "port": port, "io-reserve": 0,
            }));
        }
        self.option("-object", json!({ "qom-type": "iothread", "id": "disks" }));
        for disk in &definition.disks {
            if let Some(node) = node(disk) {
                self.option("-blockdev", node);
            }
            let boot_index = boot_index(definition, BootDevice::Disk(disk.index));
            self.device(disk_device_options(disk, boot_index));
        }
    }

    fn nics(&mut self, definition: &Definition) {
        for (place, nic) in definition.nics.iter().enumerate() {
            let mut device = json!({
                "driver": match nic.model { NicModel::Virtio => "virtio-net-pci", NicModel::E1000e => "e1000e" },
                "id": format!("nic-{place}"), "netdev": netdev_id(place), "mac": nic.mac,
                "bus": "pcie.0", "addr": format!("0x{:x}", 8 + place),
            });
            let boot_index = boot_index(definition, BootDevice::Nic(place as u16));
            match boot_index {
                Some(boot_index) => device["bootindex"] = boot_index.into(),
                // The boot ROM costs a second of every boot under emulation.
                None => device["romfile"] = "".into(),
            }
            self.device(device);
        }
    }
}

/// From 1; None for a device that is not booted from.
fn boot_index(definition: &Definition, device: BootDevice) -> Option<usize> {
    let position = match device {
        BootDevice::Disk(index) if definition.boot_order.is_empty() => {
            Some(definition.disks.iter().filter(|other| other.index < index).count())
        }
        _ => definition.boot_order.iter().position(|candidate| *candidate == device),
    };
    position.map(|position| position + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::{Nic, VmUuid};

    fn sample() -> (Definition, Runtime) {
        let mut definition = Definition::new("db-01", VmUuid(0x1234), 2 << 30, 2);
        definition.disks = vec![Disk::new(DiskIndex(1), 1 << 30), Disk::new(DiskIndex(0), 1 << 30)];
        definition.nics = vec![Nic {
            bridge: "br0".into(),
            mac: "52:54:00:00:00:01".parse().unwrap(),
            model: NicModel::Virtio,
        }];
        let export = |index: u16| DiskExport {
            disk: DiskIndex(index),
            socket: "/run/r/nbd.sock".into(),
            export_name: format!("db-01/{index}"),
        };
        let runtime = Runtime {
            qemu_program: "qemu-system-x86_64".into(),
            accelerator: Accelerator::Tcg,
            run_dir: "/run/r".into(),
            disks: vec![export(0), export(1)],
            reconnect_delay: Duration::from_secs(86400),
            open_timeout: Duration::from_secs(30),
            firmware: None,
            first_state: FirstState::Running,
            sandbox: true,
        };
        (definition, runtime)
    }

    fn values<'a>(arguments: &'a [String], name: &str) -> Vec<&'a str> {
        arguments.windows(2).filter(|pair| pair[0] == name).map(|pair| pair[1].as_str()).collect()
    }

    fn device(arguments: &[String], id: &str) -> Value {
        values(arguments, "-device")
            .into_iter()
            .filter_map(|text| serde_json::from_str::<Value>(text).ok())
            .find(|device| device["id"] == id)
            .unwrap()
    }

    #[test]
    fn vcpus_never_run_before_the_guard_says_so() {
        let (definition, mut runtime) = sample();
        assert!(build(&definition, &runtime).contains(&"-S".to_owned()));
        runtime.first_state = FirstState::Incoming("unix:/run/r/in.sock".into());
        let arguments = build(&definition, &runtime);
        assert!(arguments.contains(&"-S".to_owned()));
        assert_eq!(values(&arguments, "-incoming"), ["unix:/run/r/in.sock"]);
    }

    #[test]
    fn disks_wait_for_the_daemon_and_never_tell_the_guest_of_an_error() {
        let (definition, runtime) = sample();
        let arguments = build(&definition, &runtime);
        let node: Value = serde_json::from_str(values(&arguments, "-blockdev")[0]).unwrap();
        assert_eq!(node["reconnect-delay"], 86400);
        assert_eq!(node["discard"], "unmap");
        let disk = device(&arguments, "disk-1");
        assert_eq!((&disk["werror"], &disk["rerror"]), (&json!("stop"), &json!("stop")));
        assert_eq!(disk["write-cache"], "on");
    }

    #[test]
    fn a_disk_keeps_its_place_when_another_is_added() {
        let (mut definition, runtime) = sample();
        let before = device(&build(&definition, &runtime), "disk-1");
        definition.disks.insert(0, Disk::new(DiskIndex(2), 1 << 30));
        assert_eq!(device(&build(&definition, &runtime), "disk-1"), before);
    }

    #[test]
    fn a_machine_boots_from_its_first_disk_unless_told_otherwise() {
        let (mut definition, runtime) = sample();
        let arguments = build(&definition, &runtime);
        assert_eq!(device(&arguments, "disk-0")["bootindex"], 1);
        assert_eq!(device(&arguments, "disk-1")["bootindex"], 2);
        assert_eq!(device(&arguments, "nic-0")["romfile"], "");
        definition.boot_order = vec![BootDevice::Nic(0), BootDevice::Disk(DiskIndex(1))];
        let arguments = build(&definition, &runtime);
        assert_eq!(device(&arguments, "nic-0")["bootindex"], 1);
        assert_eq!(device(&arguments, "nic-0")["romfile"], Value::Null);
        assert_eq!(device(&arguments, "disk-1")["bootindex"], 2);
        assert_eq!(device(&arguments, "disk-0")["bootindex"], Value::Null);
    }

    #[test]
    fn the_guest_sees_the_same_processor_under_either_accelerator() {
        let kvm = cpu_option(&CpuModel::Baseline, Accelerator::Kvm);
        assert_eq!(kvm, format!("{},enforce", cpu_option(&CpuModel::Baseline, Accelerator::Tcg)));
        assert_eq!(cpu_option(&CpuModel::Named("EPYC-v4".into()), Accelerator::Kvm), "EPYC-v4,enforce");
        assert_eq!(cpu_option(&CpuModel::Host, Accelerator::Kvm), "host");
    }

    #[test]
    fn what_an_error_names_is_found_again() {
        assert_eq!(disk_of(&disk_id(DiskIndex(3))), Some(DiskIndex(3)));
        assert_eq!(disk_of(&disk_node(DiskIndex(3))), Some(DiskIndex(3)));
        assert_eq!(disk_of("disk-x"), None);
        assert_eq!(disk_of("nic-0"), None);
    }
}
