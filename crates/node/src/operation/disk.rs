//! Adding, removing and growing disks, on every replica and in the running machine.
//!
//! Where a disk appears or grows, the peers go first: none is ever sent a record that it has no room for. Where one
//! goes, this node goes first: no record for it follows. Every copy must be there: one that misses a change could not
//! take the log up again.

use super::ReplicaOffer;
use super::create::new_disk;
use crate::http::PeerClient;
use crate::jobs::Reporter;
use crate::node::Node;
use crate::vm::Vm;
use crate::vm::import;
use crate::vm::record::DiskFile;
use rempart_api::{DiskAdd, Error};
use rempart_engine::Command;
use rempart_hypervisor::DiskExport;
use rempart_store::DiskEntry;
use rempart_types::{DiskIndex, NodeId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// How long a guest may take to give up a disk.
const DETACH_DEADLINE: Duration = Duration::from_secs(30);

/// What a primary asks of a peer's copy.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum DiskChange {
    Add { disk: DiskIndex, size_bytes: u64 },
    Remove { disk: DiskIndex },
    Resize { disk: DiskIndex, size_bytes: u64 },
}

pub async fn disk_add(
    node: Arc<Node>,
    vm: Arc<Vm>,
    request: DiskAdd,
    reporter: Reporter,
) -> Result<serde_json::Value, Error> {
    let name = vm.name();
    refuse_unless_complete(&vm, "add a disk to")?;
    let taken = vm.with_record(|record| record.disks.iter().map(|disk| disk.index.0).max());
    let disk = DiskIndex(taken.map_or(0, |last| last + 1));
    let path = vm.paths.image(disk.0);
    let (size_bytes, base) = match (&request.source, request.size_bytes) {
        (Some(source), None) => {
            if !vm.peers().is_empty() {
                return Err(Error::refused(format!(
                    "cannot add a disk with contents to `{name}`: it is mirrored"
                ))
                .hint("add an empty one with --size and fill it from the guest, or unprotect it meanwhile"));
            }
            let image = import::inspect(source.clone()).await?;
            import::copy(&image, &path, &reporter, "copying the disk").await?;
            (image.size_bytes, DiskEntry::EXISTING)
        }
        (None, Some(size)) if size > 0 && size.is_multiple_of(512) => (size, DiskEntry::EMPTY),
        _ => return Err(Error::invalid("a new disk needs an image, or a size that is a multiple of 512")),
    };
    let definition = new_disk(disk, size_bytes)?;
    on_peers(&node, &vm, DiskChange::Add { disk, size_bytes }, &reporter).await?;
    add_here(&vm, disk, size_bytes, base).await?;
    vm.put_config(|config| config.definition.disks.push(definition)).await?;
    if let Some(machine) = vm.shown().machine {
        reporter.phase("plugging it in");
        let definition = vm.with_record(|record| record.config.definition.disk(disk).cloned());
        let definition = definition.ok_or_else(|| Error::failed("the new disk is not in the definition"))?;
        let export_name = crate::group::export_name(disk);
        let export = DiskExport { disk, socket: vm.paths.nbd_socket(), export_name };
        machine.attach_disk(definition, export).await.map_err(|e| {
            Error::failed(format!("disk {disk} of `{name}` is there, but the running guest does not see it"))
                .cause(e)
                .hint("it will after the next start")
        })?;
    }
    Ok(serde_json::json!({ "name": name, "disk": disk.0, "size_bytes": size_bytes }))
}

pub async fn disk_remove(
    node: Arc<Node>,
    vm: Arc<Vm>,
    index: u16,
    reporter: Reporter,
) -> Result<serde_json::Value, Error> {
    let (name, disk) = (vm.name(), DiskIndex(index));
    refuse_unless_complete(&vm, "remove a disk from")?;
    let file = known_disk(&vm, disk)?;
    if vm.with_record(|record| record.disks.len()) == 1 {
        return Err(Error::refused(format!("disk {disk} is the only one of `{name}`")));
    }
    if let Some(machine) = vm.shown().machine {
        reporter.phase("waiting for the guest to give it up");
        machine.detach_disk(disk, DETACH_DEADLINE).await.map_err(|e| {
            Error::failed(format!("the guest of `{name}` does not give up disk {disk}"))
                .cause(e)
                .hint("unmount it in the guest, or stop the machine first")
        })?;
    }
    vm.put_config(|config| {
        config.definition.disks.retain(|other| other.index != disk);
        config
            .definition
            .boot_order
            .retain(|device| *device != rempart_hypervisor::definition::BootDevice::Disk(disk));
    })
    .await?;
    remove_here(&vm, &file).await?;
    on_peers(&node, &vm, DiskChange::Remove { disk }, &reporter).await?;
    Ok(serde_json::json!({ "name": name, "disk": disk.0 }))
}

pub async fn disk_resize(
    node: Arc<Node>,
    vm: Arc<Vm>,
    index: u16,
    size_bytes: u64,
    reporter: Reporter,
) -> Result<serde_json::Value, Error> {
    let (name, disk) = (vm.name(), DiskIndex(index));
    refuse_unless_complete(&vm, "resize a disk of")?;
    let file = known_disk(&vm, disk)?;
    if size_bytes < file.size_bytes || !size_bytes.is_multiple_of(512) {
        return Err(Error::invalid(format!(
            "cannot resize disk {disk} of `{name}` from {} to {size_bytes} bytes: a disk grows, by whole sectors of 512",
            file.size_bytes
        )));
    }
    on_peers(&node, &vm, DiskChange::Resize { disk, size_bytes }, &reporter).await?;
    resize_here(&vm, disk, size_bytes).await?;
    vm.put_config(|config| {
        for other in config.definition.disks.iter_mut().filter(|other| other.index == disk) {
            other.size_bytes = size_bytes;
        }
    })
    .await?;
    vm.events.note(&name, rempart_api::Severity::Info, format!("disk {disk} has {size_bytes} bytes now"));
    if let Some(machine) = vm.shown().machine {
        reporter.phase("telling the guest");
        // The export hung up on QEMU when the disk grew.
        machine.resize_disk(disk, size_bytes).await.map_err(|e| {
            Error::failed(format!("disk {disk} of `{name}` has grown, but its running guest was not told"))
                .cause(e)
                .hint("it sees the new size after the machine's next start")
        })?;
    }
    Ok(serde_json::json!({ "name": name, "disk": disk.0, "size_bytes": size_bytes }))
}

fn refuse_unless_complete(vm: &Vm, what: &str) -> Result<(), Error> {
    let name = vm.name();
    if !vm.group.status.borrow().serves() {
        return Err(Error::conflict(format!("cannot {what} `{name}`: this node does not lead it"))
            .hint("run it on the node that does"));
    }
    if vm.group.status.borrow().engine.in_sync.len() != vm.peers().len() + 1 {
        return Err(Error::refused(format!("cannot {what} `{name}`: not every copy is in sync"))
            .hint("wait until `rempart status` says mirrored"));
    }
    Ok(())
}

fn known_disk(vm: &Vm, disk: DiskIndex) -> Result<DiskFile, Error> {
    let found = vm.with_record(|record| record.disks.iter().find(|file| file.index == disk).cloned());
    found.ok_or_else(|| {
        let hint = format!("`rempart vm show {}` lists its disks", vm.name());
        Error::not_found(format!("`{}` has no disk {disk}", vm.name())).hint(hint)
    })
}

async fn on_peers(node: &Arc<Node>, vm: &Vm, change: DiskChange, reporter: &Reporter) -> Result<(), Error> {
    for peer in vm.peers() {
        reporter.phase(format!("changing the copy on `{}`", node.name_of(peer)));
        let path = format!("/peer/v1/replicas/{}/disks", vm.group_id());
        PeerClient::new(node, peer)?.post::<_, ()>(&path, &change).await?;
    }
    Ok(())
}

/// A primary has its copy here changed. The same change a second time is no error: its answer may have been lost.
pub async fn change_replica(node: &Node, from: NodeId, vm: &Vm, change: DiskChange) -> Result<(), Error> {
    if !vm.peers().contains(&from) || vm.is_primary() {
        return Err(Error::refused(format!("`{}` does not lead `{}`", node.name_of(from), vm.name())));
    }
    let known = |disk| vm.with_record(|r| r.disks.iter().find(|file| file.index == disk).cloned());
    match change {
        DiskChange::Add { disk, size_bytes } => match known(disk) {
            Some(file) if file.size_bytes == size_bytes => Ok(()),
            Some(_) => Err(Error::conflict(format!("disk {disk} is there in another size"))),
            None => {
                ReplicaOffer::check_space(node, size_bytes)?;
                add_here(vm, disk, size_bytes, DiskEntry::EMPTY).await
            }
        },
        DiskChange::Remove { disk } => match known(disk) {
            Some(file) => remove_here(vm, &file).await,
            None => Ok(()),
        },
        DiskChange::Resize { disk, size_bytes } => {
            let file = known_disk(vm, disk)?;
            ReplicaOffer::check_space(node, size_bytes.saturating_sub(file.size_bytes))?;
            if file.size_bytes == size_bytes { Ok(()) } else { resize_here(vm, disk, size_bytes).await }
        }
    }
}

async fn add_here(vm: &Vm, disk: DiskIndex, size_bytes: u64, base: rempart_types::Lsn) -> Result<(), Error> {
    let path = vm.paths.image(disk.0);
    let location = path.to_str().ok_or_else(|| Error::invalid("paths of disks must be UTF-8"))?.to_owned();
    let entry = DiskEntry { index: disk, size: size_bytes, location, base };
    vm.command("add a disk to", Command::AddDisk { entry }).await?;
    vm.change_record(|record| {
        record.disks.push(DiskFile { index: disk, path: path.clone(), size_bytes, adopted: false });
    })
}

async fn remove_here(vm: &Vm, file: &DiskFile) -> Result<(), Error> {
    vm.command("remove a disk from", Command::RemoveDisk { disk: file.index }).await?;
    vm.change_record(|record| record.disks.retain(|other| other.index != file.index))?;
    if file.adopted {
        return Ok(());
    }
    std::fs::remove_file(&file.path).map_err(|e| {
        Error::failed(format!("`{}` is not needed any more, but remains", file.path.display())).cause(e)
    })
}

async fn resize_here(vm: &Vm, disk: DiskIndex, size_bytes: u64) -> Result<(), Error> {
    vm.command("resize a disk of", Command::ResizeDisk { disk, size: size_bytes }).await?;
    vm.change_record(|record| {
        for file in record.disks.iter_mut().filter(|file| file.index == disk) {
            file.size_bytes = size_bytes;
        }
    })
}
