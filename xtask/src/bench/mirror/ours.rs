//! Our side: two nodes and a witness with mutual TLS, a mirrored machine and one with a single copy.
//!
//! The machines never run. A node serves a stopped machine's disks like a running one's, and then no guest can be
//! what is measured.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::disk;
use super::server::{Image, Server, private_bytes, processor_seconds};
use crate::demo::rack::{Rack, Stage};
use crate::interrupt;
use crate::lab::{Host, Lab, Link, Side};

pub const TWO_COPIES: &str = "rempart, two copies";
pub const ONE_COPY: &str = "rempart, one copy";
const EXPORT: &str = "disk0";
const MIRRORED: &str = "mirrored";
const SINGLE: &str = "single";
const COPY_DEADLINE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(50);
/// For the checkpoints after a load: then the groups have nothing left to do.
const SETTLE: Duration = Duration::from_secs(8);
const IDLE: Duration = Duration::from_secs(10);

/// A backup that is under way; killed at the end.
#[derive(Debug)]
pub struct Backup {
    child: Child,
}

impl Backup {
    /// Fails if it is over: then nothing was measured of it.
    pub fn must_be_under_way(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the backup ended ({status}) before it was measured"),
        }
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_viewed(folder: &Path) -> Result<bool> {
    for entry in folder.read_dir()? {
        if entry?.file_name().to_string_lossy().starts_with("view-") {
            return Ok(true);
        }
    }
    Ok(false)
}

#[derive(Debug)]
pub struct Ours {
    rack: Rack,
    nodes: [i32; 2],
    /// Of each node before it had a group.
    memory_at_first: [u64; 2],
}

/// What the nodes need while nobody asks anything of them.
#[derive(Debug)]
pub struct Idle {
    /// The most a node has for each of its groups.
    pub memory_per_group: u64,
    /// Of both nodes together, in seconds per second.
    pub processor_share: f64,
}

/// A whole disk sent over a line.
#[derive(Debug)]
pub struct Resync {
    pub bytes_per_second: f64,
    pub line_bytes_per_second: f64,
}

impl Ours {
    pub fn start(lab: Lab, program: &Path) -> Result<Ours> {
        let mut rack = Rack::new(lab, program, Stage::default())?;
        rack.form_cluster(&[])?;
        let id = |host| rack.daemon_id(host).context("the daemon runs");
        let nodes = [id(Host::A)?, id(Host::B)?];
        let memory_at_first = [private_bytes(nodes[0])?, private_bytes(nodes[1])?];
        for name in [MIRRORED, SINGLE] {
            let file = disk_file(&rack.lab, name);
            disk::preallocate(&file, disk::BYTES)?;
            let path = file.to_str().expect("the lab's paths are plain text");
            rack.user(Host::A, &["vm", "import", name, "--disk", path, "--adopt"])?;
        }
        let ours = Ours { rack, nodes, memory_at_first };
        ours.protect()?;
        Ok(ours)
    }

    pub fn lab(&self) -> &Lab {
        &self.rack.lab
    }

    pub fn two_copies(&self) -> Server {
        let copy = self.rack.data_folder(Side::B).join("vms").join(MIRRORED).join("disk0.raw");
        let images = vec![
            self.image(Side::A, MIRRORED, disk_file(self.lab(), MIRRORED)),
            self.image(Side::B, MIRRORED, copy),
        ];
        self.server(TWO_COPIES, MIRRORED, self.nodes.to_vec(), images)
    }

    pub fn one_copy(&self) -> Server {
        let images = vec![self.image(Side::A, SINGLE, disk_file(self.lab(), SINGLE))];
        self.server(ONE_COPY, SINGLE, vec![self.nodes[0]], images)
    }

    fn server(&self, name: &'static str, vm: &str, processes: Vec<i32>, images: Vec<Image>) -> Server {
        let socket = self.rack.run_folder(Side::A).join("vms").join(vm).join("nbd.sock");
        Server { name, socket, export: EXPORT, processes, images }
    }

    fn image(&self, side: Side, vm: &'static str, file: PathBuf) -> Image {
        Image { file, api: self.rack.run_folder(side).join("api.sock"), vm }
    }

    fn protect(&self) -> Result<()> {
        self.rack.user(Host::A, &["protect", MIRRORED, "--peer", Host::B.name(), "--wait"]).map(drop)
    }

    /// A command of the first node that works on a repository in a bucket.
    pub fn on_repository(&self, arguments: &[&str]) -> Command {
        let mut command = self.rack.command(Host::A, arguments);
        command.env("REMPART_CACHE_DIR", self.lab().folder().join("cache"));
        command.env("AWS_ACCESS_KEY_ID", "id").env("AWS_SECRET_ACCESS_KEY", "secret");
        command
    }

    /// Starts a backup of the mirrored machine, and returns when its view is open.
    pub fn start_backup(&self, repository: &str, key: &Path) -> Result<Backup> {
        let mut command = self.on_repository(&["backup", MIRRORED, "--repo", repository]);
        command.arg("--key-file").arg(key).stdout(Stdio::null()).stderr(Stdio::null());
        let backup = Backup { child: command.spawn()? };
        let folder = self.rack.run_folder(Side::A).join("vms").join(MIRRORED);
        let end = Instant::now() + COPY_DEADLINE;
        while !is_viewed(&folder)? {
            interrupt::check()?;
            if Instant::now() > end {
                bail!("there is no view");
            }
            thread::sleep(POLL);
        }
        Ok(backup)
    }

    /// Fails if a write would be acknowledged by one copy only: a figure taken then is of something else.
    pub fn must_be_mirrored(&self) -> Result<()> {
        let status = self.status()?;
        if status["mirrored"] != true {
            bail!("the mirror broke during the run: {status}");
        }
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        let printed = self.rack.user(Host::A, &["status", "--json"])?;
        let status: Value = serde_json::from_str(&printed).context("parse `status --json`")?;
        let mut vms = status["vms"].as_array().into_iter().flatten();
        vms.find(|vm| vm["name"] == MIRRORED).cloned().context("the node does not know the machine")
    }

    /// After the loads: what they left behind counts.
    pub fn idle(&self) -> Result<Idle> {
        thread::sleep(SETTLE);
        let used = || self.nodes.iter().map(|&node| processor_seconds(node)).sum::<Result<f64>>();
        let (before, started) = (used()?, Instant::now());
        thread::sleep(IDLE);
        let processor_share = (used()? - before) / started.elapsed().as_secs_f64();
        let mut memory_per_group = 0;
        for (node, groups) in [(0, 2), (1, 1)] {
            let grown = private_bytes(self.nodes[node])?.saturating_sub(self.memory_at_first[node]);
            memory_per_group = memory_per_group.max(grown / groups);
        }
        Ok(Idle { memory_per_group, processor_share })
    }

    /// Gives the second copy up and makes it anew over a line of so many megabits per second.
    pub fn resync(&self, megabits_per_second: u64) -> Result<Resync> {
        self.rack.user(Host::A, &["unprotect", MIRRORED])?;
        self.lab().shape(Link::Peer, megabits_per_second)?;
        // It returns when the copy is ready; meanwhile its progress is looked at.
        let seen = thread::scope(|scope| {
            let protecting = scope.spawn(|| self.protect());
            let seen = self.watch_resync(|| protecting.is_finished());
            protecting.join().expect("it does not panic")?;
            seen
        })?;
        self.lab().unshape(Link::Peer)?;
        let Some([first, last]) = seen.filter(|[first, last]| last.1 - first.1 >= disk::BYTES / 2) else {
            bail!("the copy was ready before its speed could be seen");
        };
        Ok(Resync {
            bytes_per_second: (last.1 - first.1) as f64 / (last.0 - first.0).as_secs_f64(),
            line_bytes_per_second: megabits_per_second as f64 * 1e6 / 8.0,
        })
    }

    /// When how much was seen to be sent, the first time and the last time that it was more than before.
    fn watch_resync(&self, is_over: impl Fn() -> bool) -> Result<Option<[(Instant, u64); 2]>> {
        let end = Instant::now() + COPY_DEADLINE;
        let mut seen: Option<[(Instant, u64); 2]> = None;
        while !is_over() {
            interrupt::check()?;
            let (status, now) = (self.status()?, Instant::now());
            let resync = &status["resync"];
            // Those of the resync before are kept.
            let bytes = resync["bytes_sent"].as_u64().filter(|_| resync["running"] == true).unwrap_or(0);
            match &mut seen {
                None if bytes > 0 => seen = Some([(now, bytes); 2]),
                Some([_, last]) if bytes > last.1 => *last = (now, bytes),
                _ => {}
            }
            if now > end {
                bail!("the copy does not get ready: {status}");
            }
            thread::sleep(POLL);
        }
        Ok(seen)
    }
}

fn disk_file(lab: &Lab, name: &str) -> PathBuf {
    lab.folder().join(format!("{name}.raw"))
}
