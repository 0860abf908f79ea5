//! What kind of machine runs on a restore point's disks: QEMU's arguments for it, and its monitor once it is there.

use rempart_api::Error;
use rempart_hypervisor::FirstState;
use rempart_hypervisor::accelerator::{self, Accelerator};
use rempart_hypervisor::command_line::{self, FirmwareFiles, Runtime, disk_node, netdev_id};
use rempart_hypervisor::definition::{CpuModel, Definition, Firmware};
use rempart_hypervisor::qemu::FirmwarePaths;
use rempart_hypervisor::qmp;
use rempart_repository::Point;
use rempart_types::DiskIndex;
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

pub const CONNECT: Duration = Duration::from_secs(2);
const START: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub enum Hardware {
    Defined {
        definition: Box<Definition>,
        accelerator: Accelerator,
    },
    /// QEMU's own arguments, with `{DISK}` for the block node of a disk.
    Arguments(Vec<String>),
}

/// A disk that the machine gets.
#[derive(Debug)]
pub struct Drive {
    pub disk: String,
    /// What QEMU calls its block node, and that node's options.
    pub node: String,
    pub options: Value,
}

/// What does not belong to the machine itself.
#[derive(Debug)]
pub struct Layout<'a> {
    pub qemu: &'a str,
    /// Sockets and logs are made in it.
    pub run_dir: &'a Path,
    pub drives: &'a [Drive],
    pub firmware: Option<FirmwareFiles>,
}

impl Layout<'_> {
    fn monitor(&self) -> PathBuf {
        self.run_dir.join("qmp.sock")
    }
}

impl Hardware {
    /// By QEMU's arguments where they are given, or else by the definition in the point.
    pub async fn of(point: &Point, arguments: &[String], qemu: &str, what: &str) -> Result<Hardware, Error> {
        match &point.definition {
            _ if !arguments.is_empty() => Ok(Hardware::Arguments(arguments.to_vec())),
            Some(definition) if definition.kind == "rempart" => {
                Hardware::defined(&definition.content, qemu, what).await
            }
            _ => Err(Error::invalid(what)
                .cause("the restore point has no definition of a machine that could be run here")
                .hint("give QEMU's arguments after `--`, with `{disk0}` for the block node of `disk0`")),
        }
    }

    async fn defined(content: &[u8], qemu: &str, what: &str) -> Result<Hardware, Error> {
        let mut definition = parse_definition(content, what)?;
        // They may name anything of another host.
        definition.extra_options.clear();
        let accelerator = accelerator::probe(Path::new(qemu), &CpuModel::Baseline).await.accelerator;
        Ok(Hardware::Defined { definition: Box::new(definition), accelerator })
    }

    /// What QEMU calls the block node of a disk.
    pub fn node(&self, disk: &str, place: usize) -> String {
        let index = disk.strip_prefix("disk").and_then(|number| number.parse().ok()).map(DiskIndex);
        match self {
            Hardware::Defined { .. } => disk_node(index.unwrap_or(DiskIndex(place as u16))),
            Hardware::Arguments(_) => disk_node(DiskIndex(place as u16)),
        }
    }

    /// How many network cards its definition has: each wants a backend.
    pub fn nics(&self) -> usize {
        match self {
            Hardware::Defined { definition, .. } => definition.nics.len(),
            Hardware::Arguments(_) => 0,
        }
    }

    pub fn accelerator(&self) -> Option<Accelerator> {
        match self {
            Hardware::Defined { accelerator, .. } => Some(*accelerator),
            Hardware::Arguments(_) => None,
        }
    }

    /// Where it would have more, it gets so much memory, in whole MiB.
    pub fn limit_memory(&mut self, bytes: u64) {
        if let Hardware::Defined { definition, .. } = self {
            definition.memory_bytes = definition.memory_bytes.min(bytes >> 20 << 20);
        }
    }

    pub fn is_uefi(&self) -> bool {
        matches!(self, Hardware::Defined { definition, .. } if definition.firmware == Firmware::Uefi)
    }

    /// The program and its arguments, but for the backends of network cards.
    pub fn arguments(&self, layout: &Layout<'_>) -> Vec<String> {
        match self {
            Hardware::Defined { definition, accelerator } => {
                let runtime = Runtime {
                    qemu_program: layout.qemu.into(),
                    accelerator: *accelerator,
                    run_dir: layout.run_dir.into(),
                    disks: Vec::new(),
                    reconnect_delay: Duration::ZERO,
                    open_timeout: Duration::ZERO,
                    firmware: layout.firmware.clone(),
                    first_state: FirstState::Running,
                    sandbox: true,
                };
                command_line::build_with(definition, &runtime, |disk| {
                    let wanted = disk_node(disk.index);
                    let found = layout.drives.iter().find(|drive| drive.node == wanted);
                    found.map(|drive| drive.options.clone())
                })
            }
            Hardware::Arguments(given) => {
                let mut arguments = vec![layout.qemu.to_owned()];
                for drive in layout.drives {
                    arguments.extend(["-blockdev".to_owned(), drive.options.to_string()]);
                }
                arguments.extend(["-qmp".to_owned(), monitor(&layout.monitor())]);
                let named = |argument: &String| {
                    layout.drives.iter().fold(argument.clone(), |argument, drive| {
                        argument.replace(&format!("{{{}}}", drive.disk), &drive.node)
                    })
                };
                arguments.extend(given.iter().map(named));
                arguments
            }
        }
    }
}

/// A machine's definition, as a point of Rempart's own has it.
pub fn parse_definition(content: &[u8], what: &str) -> Result<Definition, Error> {
    let parsed = serde_json::from_slice::<Definition>(content).map_err(|e| e.to_string());
    let parsed = parsed.and_then(|definition| {
        definition.validate().map_err(|e| e.to_string())?;
        Ok(definition)
    });
    parsed.map_err(|e| Error::failed(what).cause(format!("its definition makes no sense: {e}")))
}

/// A network card's wire that leads nowhere.
pub fn unconnected(nic: usize) -> [String; 2] {
    ["-netdev".to_owned(), format!("hubport,id={},hubid={nic}", netdev_id(nic))]
}

/// A monitor's socket, as an argument of `-qmp`.
pub fn monitor(path: &Path) -> String {
    format!("unix:{},server=on,wait=off", path.display())
}

/// The firmware's variables: those that are in `file` already, those of the point, or new ones.
pub fn firmware(file: PathBuf, nvram: Option<&[u8]>, what: &str) -> Result<FirmwareFiles, Error> {
    let paths = FirmwarePaths::default();
    let failed = |e: std::io::Error| {
        Error::failed(what).cause(format!("its UEFI firmware: {e}")).hint("install the package ovmf")
    };
    if !file.exists() {
        let content = match nvram {
            Some(content) => content.to_vec(),
            None => std::fs::read(&paths.variables).map_err(failed)?,
        };
        let draft = file.with_extension("fd.new");
        std::fs::write(&draft, content).map_err(failed)?;
        File::open(&draft).and_then(|file| file.sync_all()).map_err(failed)?;
        std::fs::rename(&draft, &file).map_err(failed)?;
    }
    Ok(FirmwareFiles { code: paths.code, variables: file })
}

/// Waits for the monitor of a QEMU that was just started.
pub async fn connect(socket: &Path, child: &mut Child) -> Result<qmp::Client, String> {
    let start = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(format!("QEMU ended with {status}"));
        }
        match qmp::Client::connect(socket, CONNECT).await {
            Ok(client) => return Ok(client),
            Err(error) if start.elapsed() > START => return Err(error.to_string()),
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use rempart_hypervisor::VmUuid;
    use rempart_hypervisor::definition::{Disk, Nic, NicModel};
    use serde_json::json;

    pub fn drive() -> Drive {
        let node = "disk-node-0".to_owned();
        Drive { disk: "disk0".to_owned(), options: json!({ "node-name": node }), node }
    }

    fn arguments(hardware: &Hardware) -> Vec<String> {
        let (drives, run_dir) = ([drive()], Path::new("/f"));
        hardware.arguments(&Layout { qemu: "qemu", run_dir, drives: &drives, firmware: None })
    }

    pub async fn defined() -> Hardware {
        let mut definition = Definition::new("shop", VmUuid(1), 64 << 20, 1);
        definition.disks = vec![Disk::new(DiskIndex(0), 512)];
        let mac = "52:54:00:00:00:01".parse().expect("an address");
        definition.nics = vec![Nic { bridge: "br0".to_owned(), mac, model: NicModel::Virtio }];
        definition.extra_options = vec!["-trace".to_owned()];
        let content = serde_json::to_vec(&definition).expect("plain data");
        Hardware::defined(&content, "/no/such/qemu", "").await.expect("makes sense")
    }

    #[tokio::test]
    async fn options_of_another_host_are_left_out() {
        let hardware = defined().await;
        let arguments = arguments(&hardware);
        assert_eq!((hardware.node("disk0", 3), hardware.nics()), ("disk-node-0".to_owned(), 1));
        assert!(arguments.contains(&r#"{"node-name":"disk-node-0"}"#.to_owned()), "{arguments:?}");
        assert!(!arguments.contains(&"-trace".to_owned()), "{arguments:?}");
        Hardware::defined(b"{}", "qemu", "cannot").await.expect_err("no definition");
    }

    #[test]
    fn a_disks_name_in_braces_is_its_block_node() {
        let given = Hardware::Arguments(vec!["-device".to_owned(), "x,drive={disk0},y={disk1}".to_owned()]);
        let arguments = arguments(&given);
        assert_eq!(arguments[..3], ["qemu", "-blockdev", r#"{"node-name":"disk-node-0"}"#]);
        assert!(arguments.contains(&"x,drive=disk-node-0,y={disk1}".to_owned()), "{arguments:?}");
    }
}
