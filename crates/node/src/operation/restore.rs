//! Restores: somebody who can read a repository writes a machine's disks, and this node makes a machine of them.
//!
//! A new machine's images are written where they stay. The disks of a machine that is there are written through its log,
//! so that its peers get the same; a mark in its definition, in the same log, keeps it from being started meanwhile.

use super::arrival::Arrival;
use super::create::{draw_identity, found, host_problems, refuse_other_mac};
use super::replica::free_bytes;
use crate::claims::NameClaim;
use crate::config::check_name;
use crate::jobs::Reporter;
use crate::node::Node;
use crate::vm::Vm;
use crate::vm::record::{DiskFile, VmConfig, hex_bytes};
use rempart_api::{
    Error, RestoreDisk, RestoreOnto, RestoreReady, RestoreRequest, RestoreTarget, UnfinishedRestore,
};
use rempart_hypervisor::Definition;
use rempart_hypervisor::definition::{CpuModel, Disk, Firmware};
use rempart_types::DiskIndex;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard};

/// Those that are open.
#[derive(Debug, Default)]
pub struct Restores {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    open: BTreeMap<u64, Restore>,
}

/// What a restore ends with.
#[derive(Debug)]
pub struct Restore {
    name: String,
    onto: Onto,
}

#[derive(Debug)]
enum Onto {
    New { arrival: Arrival, config: Box<VmConfig>, disks: Vec<DiskFile> },
    Machine { vm: Arc<Vm>, indexes: Vec<u16>, nvram: Option<Vec<u8>>, _claim: NameClaim },
}

/// Gives the restore up when it is dropped, unless it was taken to be finished.
#[derive(Debug)]
pub struct RestoreGuard {
    node: Arc<Node>,
    id: u64,
}

impl Drop for RestoreGuard {
    fn drop(&mut self) {
        if let Ok(restore) = self.node.restores.take(self.id) {
            tracing::info!(vm = restore.name, "a restore was given up");
        }
    }
}

impl Restore {
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Restores {
    fn hold(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("held for a moment only")
    }

    fn insert(&self, restore: Restore) -> u64 {
        let mut inner = self.hold();
        inner.next += 1;
        let id = inner.next;
        inner.open.insert(id, restore);
        id
    }

    /// From here on it is the caller's.
    pub fn take(&self, id: u64) -> Result<Restore, Error> {
        self.hold().open.remove(&id).ok_or_else(|| not_open(id))
    }
}

fn not_open(id: u64) -> Error {
    Error::not_found(format!("there is no restore {id}")).hint("it goes with the connection that opened it")
}

pub async fn open_restore(
    node: &Arc<Node>,
    request: RestoreRequest,
) -> Result<(RestoreReady, RestoreGuard), Error> {
    let name = request.name.clone();
    let nvram = match &request.nvram_hex {
        None => None,
        Some(text) => Some(hex_bytes::from_text(text).ok_or_else(|| {
            Error::invalid(format!("cannot restore `{name}`: its UEFI variables are no hexadecimal text"))
        })?),
    };
    let (restore, disks, unfinished) = match request.onto {
        RestoreOnto::NewMachine { definition, same_identity, needed_bytes } => {
            let definition = serde_json::from_value::<Definition>(definition).map_err(|e| {
                Error::invalid(format!("cannot restore `{name}`: its definition makes no sense")).cause(e)
            })?;
            let restore =
                new_machine(node, &name, definition, nvram, &request.disks, same_identity, needed_bytes);
            restore.await?
        }
        RestoreOnto::Machine => onto_machine(node, &name, nvram, &request.disks).await?,
    };
    let id = node.restores.insert(restore);
    Ok((RestoreReady { id, disks, unfinished }, RestoreGuard { node: node.clone(), id }))
}

type Opened = (Restore, Vec<RestoreTarget>, Option<UnfinishedRestore>);

async fn new_machine(
    node: &Arc<Node>,
    name: &str,
    mut definition: Definition,
    nvram: Option<Vec<u8>>,
    wanted: &[RestoreDisk],
    same_identity: bool,
    needed_bytes: u64,
) -> Result<Opened, Error> {
    check_name(name).map_err(Error::invalid)?;
    node.refuse_taken(name)
        .map_err(|taken| taken.hint("choose another name; `--over` restores over the disks of that one"))?;
    let refuse =
        |why: String| Error::refused(format!("cannot make `{name}` on node `{}`", node.name())).cause(why);
    name.clone_into(&mut definition.name);
    // They may name anything of another host.
    definition.extra_options.clear();
    definition.autostart = false;
    definition.disks.retain(|disk| wanted.iter().any(|wanted| wanted.index == disk.index.0));
    for disk in wanted {
        let index = DiskIndex(disk.index);
        if definition.disk(index).is_none() {
            definition.disks.push(Disk::new(index, disk.size_bytes));
        }
    }
    for disk in &mut definition.disks {
        // Another one than that it is restored from.
        let size_bytes =
            wanted.iter().find(|wanted| wanted.index == disk.index.0).map(|disk| disk.size_bytes);
        let new = super::create::new_disk(disk.index, size_bytes.unwrap_or(disk.size_bytes))?;
        (disk.size_bytes, disk.uuid) = (new.size_bytes, new.uuid);
    }
    if !same_identity {
        draw_identity(&mut definition)?;
    }
    definition
        .validate()
        .map_err(|e| Error::invalid(format!("cannot make `{name}`: its definition is not valid")).cause(e))?;
    if definition.disks.is_empty() || definition.disks.len() != wanted.len() {
        return Err(Error::invalid(format!("cannot make `{name}`: it has no disk, or two of one number")));
    }
    refuse_other_mac(node, &definition)?;
    let processor = match definition.cpu_model {
        CpuModel::Baseline => Ok(()),
        ref model => node.host.hypervisor.try_processor(model).await,
    };
    let problems = host_problems(node.host_report().await?, processor, &definition, nvram.as_deref());
    if !problems.is_empty() {
        return Err(refuse(problems.join("; ")));
    }
    let free = free_bytes(node)?;
    if free < needed_bytes {
        return Err(refuse(format!("its disks need {needed_bytes} bytes, and {free} are free")));
    }
    let arrival = Arrival::begin(node, name)?;
    let path = |disk: &Disk| arrival.paths.image(disk.index.0);
    let disks: Vec<DiskFile> = definition
        .disks
        .iter()
        .map(|disk| DiskFile {
            index: disk.index,
            path: path(disk),
            size_bytes: disk.size_bytes,
            adopted: false,
        })
        .collect();
    let targets = wanted.iter().map(|disk| RestoreTarget::File { path: arrival.paths.image(disk.index) });
    let targets = targets.collect();
    let mut config = VmConfig::new(definition, node.id());
    config.nvram = nvram;
    let onto = Onto::New { arrival, config: Box::new(config), disks };
    Ok((Restore { name: name.to_owned(), onto }, targets, None))
}

async fn onto_machine(
    node: &Arc<Node>,
    name: &str,
    nvram: Option<Vec<u8>>,
    wanted: &[RestoreDisk],
) -> Result<Opened, Error> {
    let vm = node.vm(name)?;
    let claim = node.claims.claim(name)?;
    if !vm.group.status.borrow().serves() {
        return Err(Error::conflict(format!("cannot restore onto `{name}`: this node does not lead it"))
            .hint("run it on the node that does; `rempart status` names it"));
    }
    refuse_running(&vm)?;
    let refuse = |why: String, hint: &str| {
        Error::refused(format!("cannot restore onto `{name}`")).cause(why).hint(hint)
    };
    let (definition, unfinished) =
        vm.with_record(|record| (record.config.definition.clone(), record.config.restoring.clone()));
    for disk in wanted {
        let index = disk.index;
        match definition.disk(DiskIndex(index)) {
            None => {
                return Err(refuse(
                    format!("it has no disk {index}"),
                    "`rempart vm disk add --size` gives it one; or restore a new machine with `--vm`",
                ));
            }
            Some(there) if there.size_bytes < disk.size_bytes => {
                let (has, needs) = (there.size_bytes, disk.size_bytes);
                return Err(refuse(
                    format!("its disk {index} has {has} bytes, and {needs} are to be restored"),
                    "`rempart vm disk resize` makes it larger; or restore a new machine with `--vm`",
                ));
            }
            Some(_) => {}
        }
    }
    let half = unfinished.iter().flat_map(|unfinished| &unfinished.indexes);
    let left: Vec<String> = half
        .filter(|index| !wanted.iter().any(|disk| disk.index == **index))
        .map(|index| format!("disk {index}"))
        .collect();
    if !left.is_empty() {
        let why =
            format!("an earlier restore has not ended, and {} would stay half restored", left.join(", "));
        return Err(refuse(why, "restore all its disks first"));
    }
    if let Some(nvram) = &nvram {
        let known = node.host_report().await?.uefi_variables_bytes;
        if definition.firmware != Firmware::Uefi {
            return Err(refuse(
                "its firmware is BIOS, the point's UEFI".into(),
                "restore a new machine with `--vm`",
            ));
        }
        if known.is_some_and(|known| known != nvram.len() as u64) {
            return Err(refuse(
                format!("the point has {} bytes of UEFI variables, this node's firmware other", nvram.len()),
                "restore its disks, one by one, with `--disk`",
            ));
        }
    }
    let socket = vm.paths.nbd_socket();
    let target = |disk: &RestoreDisk| RestoreTarget::Nbd {
        socket: socket.clone(),
        export: crate::group::export_name(DiskIndex(disk.index)),
    };
    let targets = wanted.iter().map(target).collect();
    let indexes = wanted.iter().map(|disk| disk.index).collect();
    let onto = Onto::Machine { vm, indexes, nvram, _claim: claim };
    Ok((Restore { name: name.to_owned(), onto }, targets, unfinished))
}

fn refuse_running(vm: &Vm) -> Result<(), Error> {
    let (name, shown) = (vm.name(), vm.shown());
    if shown.machine.is_none() && !shown.starting && !vm.with_record(|record| record.config.should_run) {
        return Ok(());
    }
    Err(Error::refused(format!("cannot restore onto `{name}`: it runs"))
        .hint(format!("run `rempart vm stop {name}` first")))
}

/// The machine does not start from here on, on whatever node, until a restore of it ended.
pub async fn begin_restore(node: &Arc<Node>, id: u64, unfinished: UnfinishedRestore) -> Result<(), Error> {
    let (vm, indexes) = match node.restores.hold().open.get(&id).map(|restore| &restore.onto) {
        Some(Onto::Machine { vm, indexes, .. }) => (vm.clone(), indexes.clone()),
        Some(Onto::New { .. }) => return Err(Error::invalid(format!("restore {id} makes a new machine"))),
        None => return Err(not_open(id)),
    };
    refuse_running(&vm)?;
    let name = vm.name();
    vm.change_config(|config| {
        if config.should_run {
            return Err(Error::refused(format!("cannot restore onto `{name}`: it was started meanwhile")));
        }
        config.restoring = Some(UnfinishedRestore { indexes, ..unfinished });
        Ok(())
    })
    .await
}

pub async fn finish_restore(
    node: Arc<Node>,
    restore: Restore,
    reporter: Reporter,
) -> Result<serde_json::Value, Error> {
    let name = restore.name;
    match restore.onto {
        Onto::New { mut arrival, config, disks } => {
            for disk in &disks {
                let wrong = |why: String| {
                    Error::invalid(format!("`{}` is no restored disk", disk.path.display())).cause(why)
                };
                let meta = std::fs::symlink_metadata(&disk.path).map_err(|e| wrong(e.to_string()))?;
                if !meta.is_file() || meta.size() != disk.size_bytes {
                    return Err(wrong(format!("it is no file of {} bytes", disk.size_bytes)));
                }
            }
            found(&node, &mut arrival, *config, disks, &reporter).await?;
        }
        Onto::Machine { vm, nvram, _claim: claim, .. } => {
            reporter.phase("ending the restore");
            vm.change_config(|config| {
                if config.restoring.take().is_none() {
                    return Err(Error::conflict(format!("no restore onto `{name}` was begun")));
                }
                if nvram.is_some() {
                    config.nvram = nvram;
                }
                Ok(())
            })
            .await?;
            drop(claim);
        }
    }
    Ok(serde_json::json!({ "name": name }))
}
