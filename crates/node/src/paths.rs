//! Where a node keeps its files.

use std::path::{Path, PathBuf};

/// `data_dir` survives reboots; `run_dir` need not.
#[derive(Debug, Clone)]
pub struct Paths {
    data: PathBuf,
    run: PathBuf,
}

impl Paths {
    pub fn new(data: impl Into<PathBuf>, run: impl Into<PathBuf>) -> Paths {
        Paths { data: data.into(), run: run.into() }
    }

    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    pub fn run_dir(&self) -> &Path {
        &self.run
    }

    pub fn identity(&self) -> PathBuf {
        self.data.join("identity.json")
    }

    pub fn cluster(&self) -> PathBuf {
        self.data.join("cluster.json")
    }

    pub fn tokens(&self) -> PathBuf {
        self.data.join("tokens.json")
    }

    pub fn pki(&self) -> PathBuf {
        self.data.join("pki")
    }

    /// The cluster's certificate authority, on every full node.
    pub fn authority(&self) -> PathBuf {
        self.data.join("authority")
    }

    /// Which life of a witness's state this node trusts.
    pub fn witness_instance(&self, witness: rempart_types::NodeId) -> PathBuf {
        self.data.join(format!("witness-{witness}.json"))
    }

    /// Held by the running daemon.
    pub fn lock(&self) -> PathBuf {
        self.data.join("daemon.lock")
    }

    pub fn registers(&self) -> PathBuf {
        self.data.join("registers")
    }

    pub fn vms(&self) -> PathBuf {
        self.data.join("vms")
    }

    pub fn vm(&self, name: &str) -> VmPaths {
        VmPaths { data: self.vms().join(name), run: self.run.join("vms").join(name) }
    }

    /// Where the disks of a copy that diverged are saved before it rejoins.
    pub fn diverged(&self, name: &str, unix_s: u64) -> PathBuf {
        self.data.join("diverged").join(format!("{name}-{unix_s}"))
    }

    /// What came of a schedule's backups.
    pub fn schedule(&self, name: &str) -> PathBuf {
        self.data.join("schedules").join(name)
    }

    pub fn api_socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }
}

/// Where one virtual machine's files are.
#[derive(Debug, Clone)]
pub struct VmPaths {
    pub data: PathBuf,
    pub run: PathBuf,
}

impl VmPaths {
    pub fn record(&self) -> PathBuf {
        self.data.join("vm.json")
    }

    /// Exists until the machine is whole.
    pub fn unfinished(&self) -> PathBuf {
        self.data.join("unfinished")
    }

    /// Journal, change maps, superblock, snapshots.
    pub fn store(&self) -> PathBuf {
        self.data.join("store")
    }

    pub fn image(&self, index: u16) -> PathBuf {
        self.data.join(format!("disk{index}.raw"))
    }

    pub fn nbd_socket(&self) -> PathBuf {
        self.run.join("nbd.sock")
    }

    /// Exists while the guest's file systems are frozen for a view.
    pub fn frozen_mark(&self) -> PathBuf {
        self.run.join("frozen")
    }

    /// The exports of one view.
    pub fn view_socket(&self, view: u64) -> PathBuf {
        self.run.join(format!("view-{:x}.sock", view & 0xffff_ffff))
    }

    /// The guest's memory in one view, beside the disks: it may be larger than what `run_dir` takes.
    pub fn view_memory(&self, number: u64) -> PathBuf {
        self.data.join(format!("view-{number:x}.memory"))
    }
}
