//! A machine of a node, whose engine tells what changed. It never runs: its disk is written over NBD, and nothing else is
//! measured than its backup.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::image::Image;
use super::measure::{self, Taken};
use super::tool::Tool;
use crate::bench::client::Client;
use crate::demo::rack::{Rack, Stage};
use crate::lab::{Host, Lab, Side};
use crate::workspace;

const VM: &str = "disk";
const EXPORT: &str = "disk0";
/// Writes under way at once.
const IN_FLIGHT: usize = 32;

#[derive(Debug)]
pub struct Machine {
    rack: Rack,
}

impl Machine {
    /// With a copy of the image as its disk.
    pub fn start(lab: Lab, program: &Path, image: &Image) -> Result<Machine> {
        let mut rack = Rack::new(lab, program, Stage::default())?;
        rack.form_cluster(&[])?;
        let disk = disk_of(&rack);
        let mut copy = std::process::Command::new("cp");
        workspace::output(copy.args(["--sparse=never"]).args([&image.path, &disk]))?;
        let path = disk.to_str().expect("the lab's paths are plain text");
        rack.user(Host::A, &["vm", "import", VM, "--disk", path, "--adopt"])?;
        Ok(Machine { rack })
    }

    pub fn write(&self, changes: &[(u64, Vec<u8>)]) -> Result<()> {
        let socket = self.rack.run_folder(Side::A).join("vms").join(VM).join("nbd.sock");
        let mut client = Client::connect(&socket, EXPORT)?;
        for (number, (at, bytes)) in changes.iter().enumerate() {
            client.send_write(number as u64, *at, bytes)?;
            if number >= IN_FLIGHT {
                client.receive()?;
            }
        }
        for _ in 0..changes.len().min(IN_FLIGHT) {
            client.receive()?;
        }
        client.send_flush(0)?;
        client.receive()?;
        Ok(())
    }

    /// All of its disk is read before, past the page cache, as the daemon reads it: the image that the others back up is in memory,
    /// and whether a virtual disk is in its host's is not what is measured.
    pub fn back_up(&self, repository: &Tool) -> Result<Taken> {
        let mut read = std::process::Command::new("dd");
        read.arg(format!("if={}", disk_of(&self.rack).display()));
        workspace::output(read.args(["of=/dev/null", "bs=4M", "iflag=direct"]))?;
        let mut command = self.rack.command(Host::A, &["backup", VM]);
        repository.environment(&mut command);
        measure::run(&mut command)
    }
}

fn disk_of(rack: &Rack) -> PathBuf {
    rack.lab.folder().join("machine.raw")
}
