//! QEMU on a restore point: its arguments, and starting it so that it outlives who started it.

use super::folder::{Folder, Record};
use rempart_api::Error;
use rempart_hypervisor::accelerator::{self, Accelerator};
use rempart_hypervisor::command_line::{self, FirmwareFiles, Runtime, disk_node, netdev_id};
use rempart_hypervisor::definition::{CpuModel, Definition, Firmware};
use rempart_hypervisor::qemu::FirmwarePaths;
use rempart_hypervisor::qmp;
use rempart_hypervisor::{FirstState, tap};
use rempart_types::DiskIndex;
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CONNECT: Duration = Duration::from_secs(2);
const START: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// What kind of machine it will be.
#[derive(Debug)]
pub enum Hardware {
    Defined {
        definition: Box<Definition>,
        accelerator: Accelerator,
        network: bool,
    },
    /// QEMU's own arguments, with `{DISK}` for the block node of a disk.
    Arguments(Vec<String>),
}

impl Hardware {
    /// By the definition that is in a point.
    pub async fn defined(content: &[u8], qemu: &str, network: bool, what: &str) -> Result<Hardware, Error> {
        let parsed = serde_json::from_slice::<Definition>(content).map_err(|e| e.to_string());
        let parsed = parsed.and_then(|definition| {
            definition.validate().map_err(|e| e.to_string())?;
            Ok(definition)
        });
        let mut definition =
            parsed.map_err(|e| Error::failed(what).cause(format!("its definition makes no sense: {e}")))?;
        // They may name anything of another host.
        definition.extra_options.clear();
        let accelerator = accelerator::probe(Path::new(qemu), &CpuModel::Baseline).await.accelerator;
        Ok(Hardware::Defined { definition: Box::new(definition), accelerator, network })
    }

    /// What QEMU calls the block node of a disk.
    pub fn node(&self, disk: &str, place: usize) -> String {
        let index = disk.strip_prefix("disk").and_then(|number| number.parse().ok()).map(DiskIndex);
        match self {
            Hardware::Defined { .. } => disk_node(index.unwrap_or(DiskIndex(place as u16))),
            Hardware::Arguments(_) => disk_node(DiskIndex(place as u16)),
        }
    }

    fn arguments(
        &self,
        folder: &Folder,
        nodes: &[(String, Value)],
        qemu: &str,
        firmware: Option<FirmwareFiles>,
        record: &Record,
    ) -> Vec<String> {
        let mut arguments = match self {
            Hardware::Defined { definition, accelerator, network } => {
                let runtime = Runtime {
                    qemu_program: qemu.into(),
                    accelerator: *accelerator,
                    run_dir: folder.path().into(),
                    disks: Vec::new(),
                    reconnect_delay: Duration::ZERO,
                    open_timeout: Duration::ZERO,
                    firmware,
                    first_state: FirstState::Running,
                    sandbox: true,
                };
                let node_of = |index: DiskIndex| {
                    let wanted = disk_node(index);
                    nodes.iter().find(|(node, _)| *node == wanted).map(|(_, options)| options.clone())
                };
                let mut arguments =
                    command_line::build_with(definition, &runtime, |disk| node_of(disk.index));
                if !network {
                    for nic in 0..definition.nics.len() {
                        // A wire that leads nowhere.
                        let netdev = format!("hubport,id={},hubid={nic}", netdev_id(nic));
                        arguments.extend(["-netdev".to_owned(), netdev]);
                    }
                }
                arguments
            }
            Hardware::Arguments(given) => {
                let mut arguments = vec![qemu.to_owned()];
                for (_, options) in nodes {
                    arguments.extend(["-blockdev".to_owned(), options.to_string()]);
                }
                arguments.extend(["-qmp".to_owned(), monitor(&folder.monitor())]);
                let named = |argument: &String| {
                    record.disks.iter().zip(nodes).fold(argument.clone(), |argument, (disk, (node, _))| {
                        argument.replace(&format!("{{{}}}", disk.name), node)
                    })
                };
                arguments.extend(given.iter().map(named));
                arguments
            }
        };
        arguments.extend(["-qmp".to_owned(), monitor(&folder.second_monitor())]);
        arguments
    }

    /// Starts it, and waits for its monitor.
    pub async fn start(
        &self,
        folder: &Folder,
        record: &Record,
        qemu: &str,
        nvram: Option<&[u8]>,
    ) -> Result<qmp::Client, Error> {
        let failed = |e: &dyn std::fmt::Display| Error::failed(folder.what()).cause(e);
        let (mut points, mut nodes) = (Vec::new(), Vec::new());
        for (place, disk) in record.disks.iter().enumerate() {
            let node = self.node(&disk.name, place);
            let (point, overlay) = folder.nodes(disk, &node, place)?;
            points.extend(point);
            nodes.push((node, overlay));
        }
        let firmware = match self {
            Hardware::Defined { definition, .. } if definition.firmware == Firmware::Uefi => {
                Some(firmware(folder, nvram)?)
            }
            _ => None,
        };
        let arguments = self.arguments(folder, &nodes, qemu, firmware, record);
        let mut command = Command::new(&arguments[0]);
        // Before the overlays, which name them.
        for point in &points {
            command.arg("-blockdev").arg(point.to_string());
        }
        command.args(&arguments[1..]);
        let taps = self.taps().map_err(|e| failed(&e))?;
        for (nic, tap) in taps.iter().enumerate() {
            let netdev = format!("tap,id={},fd={}", netdev_id(nic), tap.as_raw_fd());
            command.args(["-netdev".to_owned(), netdev]);
            fcntl_setfd(tap, FdFlags::empty()).map_err(|e| failed(&e))?;
        }
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(folder.file("qemu.log"));
        let log = log.map_err(|e| failed(&e))?;
        let said_before = log.metadata().map_err(|e| failed(&e))?.len();
        let output = log.try_clone().map_err(|e| failed(&e))?;
        command.stdin(Stdio::null()).stdout(output).stderr(log);
        // SAFETY: only an async-signal-safe call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // A signal to who started it is not one to the machine.
                rustix::process::setsid()?;
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(|e| failed(&format!("start {}: {e}", arguments[0])))?;
        match wait_for_monitor(folder, &mut child).await {
            Ok(client) => Ok(client),
            Err(why) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = std::fs::read(folder.file("qemu.log")).unwrap_or_default();
                let said = said.get(said_before as usize..).unwrap_or_default();
                let said = String::from_utf8_lossy(said);
                Err(failed(&format!("{why}: {}", said.trim())))
            }
        }
    }

    fn taps(&self) -> rempart_hypervisor::Result<Vec<OwnedFd>> {
        let Hardware::Defined { definition, network: true, .. } = self else { return Ok(Vec::new()) };
        let open = |(place, nic): (usize, &rempart_hypervisor::definition::Nic)| {
            let bridge = tap::find_bridge(&nic.bridge)?;
            tap::open(&tap::interface_name(definition.uuid, place), &bridge)
        };
        definition.nics.iter().enumerate().map(open).collect()
    }
}

fn monitor(path: &Path) -> String {
    format!("unix:{},server=on,wait=off", path.display())
}

/// The machine's own variables, which it may have changed since.
fn firmware(folder: &Folder, nvram: Option<&[u8]>) -> Result<FirmwareFiles, Error> {
    let paths = FirmwarePaths::default();
    let failed = |e: std::io::Error| {
        Error::failed(folder.what()).cause(format!("its UEFI firmware: {e}")).hint("install the package ovmf")
    };
    let variables = folder.file("nvram.fd");
    if !variables.exists() {
        let content = match nvram {
            Some(content) => content.to_vec(),
            None => std::fs::read(&paths.variables).map_err(failed)?,
        };
        let draft = folder.file("nvram.fd.new");
        std::fs::write(&draft, content).map_err(failed)?;
        File::open(&draft).and_then(|file| file.sync_all()).map_err(failed)?;
        std::fs::rename(&draft, &variables).map_err(failed)?;
    }
    Ok(FirmwareFiles { code: paths.code, variables })
}

async fn wait_for_monitor(folder: &Folder, child: &mut Child) -> Result<qmp::Client, String> {
    let start = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(format!("QEMU ended with {status}"));
        }
        match qmp::Client::connect(&folder.monitor(), CONNECT).await {
            Ok(client) => return Ok(client),
            Err(error) if start.elapsed() > START => return Err(error.to_string()),
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

/// The machine that runs there already.
pub async fn running(socket: &Path) -> Option<qmp::Client> {
    qmp::Client::connect(socket, CONNECT).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_hypervisor::VmUuid;
    use rempart_hypervisor::definition::{Disk, Nic, NicModel};
    use serde_json::json;

    fn record() -> Record {
        serde_json::from_value(json!({
            "version": 1, "repository": "", "vm": "shop", "point": 1, "has_run": false,
            "disks": [{ "name": "disk0", "size_bytes": 512, "overlay": "disk0.qcow2" }],
        }))
        .expect("a record")
    }

    async fn defined(network: bool) -> Vec<String> {
        let mut definition = Definition::new("shop", VmUuid(1), 64 << 20, 1);
        definition.disks = vec![Disk::new(DiskIndex(0), 512)];
        let mac = "52:54:00:00:00:01".parse().expect("an address");
        definition.nics = vec![Nic { bridge: "br0".to_owned(), mac, model: NicModel::Virtio }];
        definition.extra_options = vec!["-trace".to_owned()];
        let content = serde_json::to_vec(&definition).expect("plain data");
        let hardware = Hardware::defined(&content, "/no/such/qemu", network, "").await.expect("makes sense");
        let folder = Folder::open(Path::new("/f")).expect("a short path");
        let nodes = [(hardware.node("disk0", 0), json!({ "node-name": "disk-node-0" }))];
        hardware.arguments(&folder, &nodes, "qemu", None, &record())
    }

    #[tokio::test]
    async fn network_cards_lead_nowhere_unless_wanted_and_options_of_another_host_are_left_out() {
        let apart = defined(false).await;
        assert!(apart.contains(&"hubport,id=nic-net-0,hubid=0".to_owned()), "{apart:?}");
        assert!(apart.contains(&r#"{"node-name":"disk-node-0"}"#.to_owned()), "{apart:?}");
        assert!(!apart.contains(&"-trace".to_owned()), "{apart:?}");
        let connected = defined(true).await;
        assert!(!connected.iter().any(|argument| argument.contains("hubport")), "{connected:?}");
        Hardware::defined(b"{}", "qemu", false, "cannot").await.expect_err("no definition");
    }

    #[test]
    fn a_disks_name_in_braces_is_its_block_node() {
        let hardware =
            Hardware::Arguments(vec!["-device".to_owned(), "x,drive={disk0},y={disk1}".to_owned()]);
        let folder = Folder::open(Path::new("/f")).expect("a short path");
        let nodes = [(hardware.node("disk0", 0), json!({ "node-name": "disk-node-0" }))];
        let arguments = hardware.arguments(&folder, &nodes, "qemu", None, &record());
        assert_eq!(arguments[..3], ["qemu", "-blockdev", r#"{"node-name":"disk-node-0"}"#]);
        assert!(arguments.contains(&"x,drive=disk-node-0,y={disk1}".to_owned()), "{arguments:?}");
    }
}
