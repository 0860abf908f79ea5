//! Starts QEMU on a restore point so that it outlives who started it.

use super::super::hardware::{CONNECT, Drive, Hardware, Layout, connect, firmware, monitor, unconnected};
use super::folder::{Folder, Record};
use rempart_api::Error;
use rempart_hypervisor::command_line::netdev_id;
use rempart_hypervisor::{qmp, tap};
use rustix::io::{FdFlags, fcntl_setfd};
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// How it is run.
#[derive(Debug)]
pub struct Start<'a> {
    pub qemu: &'a str,
    /// It joins the bridges of its definition.
    pub network: bool,
    pub nvram: Option<&'a [u8]>,
}

impl Start<'_> {
    /// Starts it, and waits for its monitor.
    pub async fn machine(
        &self,
        hardware: &Hardware,
        folder: &Folder,
        record: &Record,
    ) -> Result<qmp::Client, Error> {
        let failed = |e: &dyn std::fmt::Display| Error::failed(folder.what()).cause(e);
        let (mut points, mut drives) = (Vec::new(), Vec::new());
        for (place, disk) in record.disks.iter().enumerate() {
            let node = hardware.node(&disk.name, place);
            let (point, options) = folder.nodes(disk, &node, place)?;
            points.extend(point);
            drives.push(Drive { disk: disk.name.clone(), node, options });
        }
        let variables = || firmware(folder.file("nvram.fd"), self.nvram, folder.what());
        let firmware = hardware.is_uefi().then(variables).transpose()?;
        let layout = Layout { qemu: self.qemu, run_dir: folder.path(), drives: &drives, firmware };
        let arguments = hardware.arguments(&layout);
        let mut command = Command::new(&arguments[0]);
        // Before the overlays, which name them.
        for point in &points {
            command.arg("-blockdev").arg(point.to_string());
        }
        command.args(&arguments[1..]).args(["-qmp".to_owned(), monitor(&folder.second_monitor())]);
        let taps = self.taps(hardware).map_err(|e| failed(&e))?;
        for (nic, tap) in taps.iter().enumerate() {
            let netdev = format!("tap,id={},fd={}", netdev_id(nic), tap.as_raw_fd());
            command.args(["-netdev".to_owned(), netdev]);
            fcntl_setfd(tap, FdFlags::empty()).map_err(|e| failed(&e))?;
        }
        command.args((taps.len()..hardware.nics()).flat_map(unconnected));
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
        match connect(&folder.monitor(), &mut child).await {
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

    fn taps(&self, hardware: &Hardware) -> rempart_hypervisor::Result<Vec<OwnedFd>> {
        let Hardware::Defined { definition, .. } = hardware else { return Ok(Vec::new()) };
        let open = |(place, nic): (usize, &rempart_hypervisor::definition::Nic)| {
            let bridge = tap::find_bridge(&nic.bridge)?;
            tap::open(&tap::interface_name(definition.uuid, place), &bridge)
        };
        let wanted = if self.network { definition.nics.as_slice() } else { &[] };
        wanted.iter().enumerate().map(open).collect()
    }
}

/// The machine that runs there already.
pub async fn running(socket: &Path) -> Option<qmp::Client> {
    qmp::Client::connect(socket, CONNECT).await.ok()
}
