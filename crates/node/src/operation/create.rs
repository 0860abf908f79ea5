//! Import and deletion of a virtual machine.

use super::arrival::Arrival;
use crate::config::check_name;
use crate::jobs::Reporter;
use crate::node::Node;
use crate::vm::import::{self, Image};
use crate::vm::record::{DiskFile, RegisterPlace, VmConfig, VmRecord};
use crate::vm::{First, Vm};
use rempart_api::{Error, ErrorKind, ImportRequest};
use rempart_hypervisor::HostReport;
use rempart_hypervisor::definition::{CpuModel, Disk, DiskUuid, Firmware, Nic, NicModel};
use rempart_hypervisor::{Definition, MacAddress, VmUuid};
use rempart_store::file::FileDisk;
use rempart_store::{DiskEntry, FormatParams, Store};
use rempart_types::{DiskIndex, GroupId, RegisterId};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Brings a machine in from its disk images.
pub async fn import(
    node: Arc<Node>,
    request: ImportRequest,
    reporter: Reporter,
) -> Result<serde_json::Value, Error> {
    let name = request.name.clone();
    check_name(&name).map_err(Error::invalid)?;
    node.refuse_taken(&name)?;
    reporter.phase("inspecting images");
    let mut images = Vec::new();
    for disk in &request.disks {
        images.push(import::inspect(disk.clone()).await?);
    }
    refuse_shared_images(&node, &images)?;
    let report = node.host_report().await?;
    let definition = definition(&node, report, &request, &images)?;
    let nvram = uefi_variables(report, &request)?;

    let mut arrival = Arrival::begin(&node, &name)?;
    let mut disks = Vec::new();
    let count = images.len();
    for (index, image) in images.into_iter().enumerate() {
        let disk = DiskIndex(u16::try_from(index).expect("the definition bounds the number of disks"));
        let adopted = image.source.adopt;
        let path = if adopted { image.source.path.clone() } else { arrival.paths.image(disk.0) };
        if !adopted {
            import::copy(&image, &path, &reporter, &format!("copying disk {} of {count}", index + 1)).await?;
        }
        disks.push(DiskFile { index: disk, path, size_bytes: image.size_bytes, adopted });
    }
    let mut config = VmConfig::new(definition, node.id());
    config.nvram = nvram;
    found(&node, &mut arrival, config, disks, &reporter).await?;
    Ok(serde_json::json!({ "name": name }))
}

/// Makes a machine of disks that are there.
pub(super) async fn found(
    node: &Arc<Node>,
    arrival: &mut Arrival,
    config: VmConfig,
    disks: Vec<DiskFile>,
    reporter: &Reporter,
) -> Result<(), Error> {
    reporter.phase("writing the journal");
    let place = match node.cluster().is_some_and(|cluster| cluster.witness().is_some()) {
        true => RegisterPlace::Witness,
        false => RegisterPlace::Local,
    };
    let random = || crate::identity::random_u128().map_err(|e| Error::failed("cannot draw an id").cause(e));
    let (group, register) = (GroupId(random()?), RegisterId(random()?));
    format(&arrival.paths.store(), group, &disks, DiskEntry::EXISTING).await?;
    let record = VmRecord::new(group, register, place, disks, config);
    record
        .save(&arrival.paths.record())
        .map_err(|e| Error::failed(format!("cannot save the record of `{}`", record.name())).cause(e))?;
    let vm = Vm::open(node.host.clone(), arrival.paths.clone(), record, First::Create).await?;
    let whole = match vm.put_config(|_| {}).await {
        Ok(()) => arrival.whole(),
        refused => refused,
    };
    if whole.is_err() {
        vm.close().await;
        return whole;
    }
    node.insert_vm(vm);
    Ok(())
}

/// Writes an empty store for `disks`, whose images exist already or will be made.
pub async fn format(
    directory: &Path,
    group: GroupId,
    disks: &[DiskFile],
    base: rempart_types::Lsn,
) -> Result<(), Error> {
    let entries = disks
        .iter()
        .map(|disk| {
            let location = disk.path.to_str().ok_or_else(|| {
                Error::invalid(format!(
                    "`{}` is not UTF-8, which paths of disks must be",
                    disk.path.display()
                ))
            })?;
            Ok(DiskEntry { index: disk.index, size: disk.size_bytes, location: location.to_owned(), base })
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let directory = directory.to_owned();
    let params = FormatParams::new(group, entries);
    let formatted = tokio::task::spawn_blocking(move || -> Result<(), String> {
        make_directory(&directory).map_err(|e| e.to_string())?;
        let mut disk = FileDisk::open(&directory).map_err(|e| e.to_string())?;
        Store::format(&mut disk, &params).map_err(|e| e.to_string())
    });
    let failed = |cause: String| Error::failed("cannot write the journal").cause(cause);
    formatted.await.map_err(|e| failed(e.to_string()))?.map_err(failed)
}

pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    std::fs::DirBuilder::new().mode(0o700).create(path)?;
    crate::durable::sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// The variables to bring along: of a size that this node's firmware takes, or QEMU would not start with them.
fn uefi_variables(report: &HostReport, request: &ImportRequest) -> Result<Option<Vec<u8>>, Error> {
    let Some(path) = &request.nvram else { return Ok(None) };
    let refuse = |why: String| {
        Error::invalid(format!("cannot import `{}` with `{}`: {why}", request.name, path.display()))
    };
    if request.firmware != rempart_api::Firmware::Uefi {
        return Err(refuse("a machine with BIOS firmware has no UEFI variables".into())
            .hint("add `--firmware uefi`, or leave out --nvram"));
    }
    let unreadable = |e: io::Error| refuse("it cannot be read".into()).cause(e);
    // Looked at before it is read: it may be anything.
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if let Some(wanted) = report.uefi_variables_bytes
        && size != wanted
    {
        return Err(refuse(format!("it has {size} bytes, and this node's UEFI firmware keeps {wanted}"))
            .hint("name the file of variables that OVMF used for this machine, of its 4 MiB build"));
    }
    std::fs::read(path).map(Some).map_err(unreadable)
}

/// Two machines on one image would destroy it.
fn refuse_shared_images(node: &Node, images: &[Image]) -> Result<(), Error> {
    let canonical = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut taken: Vec<_> = Vec::new();
    for record in node.records() {
        taken.extend(record.disks.iter().map(|disk| (canonical(&disk.path), record.name().to_owned())));
    }
    for image in images {
        let path = canonical(&image.source.path);
        if let Some((_, owner)) = taken.iter().find(|(other, _)| *other == path) {
            return Err(Error::conflict(format!("`{}` is a disk of `{owner}`", image.source.path.display())));
        }
        if image.source.adopt {
            taken.push((path, "this import".into()));
        }
    }
    Ok(())
}

/// A disk that is told from every other that ever had its place.
pub(super) fn new_disk(index: DiskIndex, size_bytes: u64) -> Result<Disk, Error> {
    let uuid = crate::identity::random_u128().map_err(|e| Error::failed("cannot draw an id").cause(e))?;
    Ok(Disk { uuid: Some(DiskUuid(uuid)), ..Disk::new(index, size_bytes) })
}

fn definition(
    node: &Node,
    report: &HostReport,
    request: &ImportRequest,
    images: &[Image],
) -> Result<Definition, Error> {
    let refuse = |why: String| Error::invalid(format!("cannot import `{}`: {why}", request.name));
    let uuid = crate::identity::random_u128().map_err(|e| Error::failed("cannot draw an id").cause(e))?;
    let mut definition = Definition::new(&request.name, VmUuid(uuid), request.memory_bytes, request.cpus);
    definition.firmware = match request.firmware {
        rempart_api::Firmware::Bios => Firmware::Bios,
        rempart_api::Firmware::Uefi => Firmware::Uefi,
    };
    if let Some(model) = &request.cpu_model {
        definition.cpu_model = match model.as_str() {
            "host" => CpuModel::Host,
            "max" => CpuModel::Max,
            other => CpuModel::Named(other.to_owned()),
        };
    }
    definition.autostart = request.autostart;
    for (index, image) in images.iter().enumerate() {
        let index = u16::try_from(index).map_err(|_| refuse("it has too many disks".into()))?;
        definition.disks.push(new_disk(DiskIndex(index), image.size_bytes)?);
    }
    for nic in &request.nics {
        let mac = match &nic.mac {
            Some(text) => text.parse::<MacAddress>().map_err(|e| refuse(e.to_string()))?,
            None => drawn_mac(definition.uuid, definition.nics.len()),
        };
        definition.nics.push(Nic { bridge: nic.bridge.clone(), mac, model: NicModel::Virtio });
    }
    refuse_other_mac(node, &definition)?;
    definition.validate().map_err(|e| refuse(e.to_string()))?;
    if definition.firmware == Firmware::Uefi && report.uefi_variables_bytes.is_none() {
        return Err(refuse("this node has no UEFI firmware".into()).hint("install the package ovmf"));
    }
    Ok(definition)
}

/// Of a machine's network card, by its place.
fn drawn_mac(machine: VmUuid, place: usize) -> MacAddress {
    let [a, b, c, ..] = (machine.0 >> 24).wrapping_add(place as u128).to_le_bytes();
    MacAddress::in_qemu_range([a, b, c])
}

/// Nobody on its network, and nothing in it, takes it for the machine that it was.
pub(super) fn draw_identity(definition: &mut Definition) -> Result<(), Error> {
    let uuid = crate::identity::random_u128().map_err(|e| Error::failed("cannot draw an id").cause(e))?;
    definition.uuid = VmUuid(uuid);
    for (place, nic) in definition.nics.iter_mut().enumerate() {
        nic.mac = drawn_mac(definition.uuid, place);
    }
    Ok(())
}

pub(super) fn refuse_other_mac(node: &Node, definition: &Definition) -> Result<(), Error> {
    let taken = definition.nics.iter().find_map(|nic| Some((nic.mac, owner_of_mac(node, nic.mac)?)));
    taken.map_or(Ok(()), |(mac, owner)| {
        let name = &definition.name;
        Err(Error::conflict(format!("cannot make `{name}`: `{owner}` has the address {mac}")))
    })
}

/// What this host lacks to run such a machine.
pub(super) fn host_problems(
    report: &HostReport,
    processor: Result<(), String>,
    definition: &Definition,
    nvram: Option<&[u8]>,
) -> Vec<String> {
    let mut problems = Vec::new();
    for nic in &definition.nics {
        if !Path::new("/sys/class/net").join(&nic.bridge).join("bridge").exists() {
            problems.push(format!("it has no bridge `{}`", nic.bridge));
        }
    }
    if !report.machine_types.is_empty() && !report.machine_types.contains(&definition.machine_type) {
        problems.push(format!(
            "its QEMU {} has no machine type `{}`",
            report.qemu_version, definition.machine_type
        ));
    }
    if let Err(why) = processor {
        problems.push(format!("it cannot give the machine its processor: {why}"));
    }
    if definition.firmware == Firmware::Uefi {
        match (report.uefi_variables_bytes, nvram.map(|nvram| nvram.len() as u64)) {
            (None, _) => problems.push("it has no UEFI firmware (package ovmf)".into()),
            (Some(bytes), Some(wanted)) if bytes != wanted => problems.push(format!(
                "its UEFI firmware keeps {bytes} bytes of variables, the machine has {wanted}"
            )),
            _ => {}
        }
    }
    problems
}

/// Which machine here has a network card of that address.
pub fn owner_of_mac(node: &Node, mac: MacAddress) -> Option<String> {
    let has = |record: &VmRecord| record.config.definition.nics.iter().any(|nic| nic.mac == mac);
    node.records().into_iter().find(has).map(|record| record.name().to_owned())
}

/// Deletes a stopped machine that has no peer.
pub async fn delete(node: &Arc<Node>, name: &str) -> Result<(), Error> {
    let vm = node.vm(name)?;
    let _claim = node.claims.claim(name)?;
    let refuse = |why: &str, hint: String| {
        Err(Error::new(ErrorKind::Refused, format!("cannot delete `{name}`: {why}")).hint(hint))
    };
    if !vm.peers().is_empty() {
        return refuse("it is mirrored", format!("run `rempart unprotect {name}` first"));
    }
    let shown = vm.shown();
    if shown.machine.is_some() || shown.starting {
        return refuse("it runs", format!("run `rempart vm stop {name}` first"));
    }
    node.remove_vm(name);
    discard(&vm).await
}

/// Ends a copy's thread and removes its files; adopted images stay.
pub async fn discard(vm: &Vm) -> Result<(), Error> {
    vm.close().await;
    let failed =
        |e: io::Error| Error::failed(format!("cannot remove `{}`", vm.paths.data.display())).cause(e);
    // Without its record it is no machine any more, whatever a crash leaves behind.
    std::fs::remove_file(vm.paths.record()).map_err(failed)?;
    crate::durable::sync_dir(&vm.paths.data).map_err(failed)?;
    std::fs::remove_dir_all(&vm.paths.data).map_err(failed)?;
    let _ = std::fs::remove_dir_all(&vm.paths.run);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_api::Firmware as Wanted;
    use rempart_hypervisor::Hypervisor;
    use rempart_hypervisor::fake::FakeHypervisor;

    #[tokio::test]
    async fn uefi_variables_are_of_the_size_that_the_firmware_takes() {
        let report = FakeHypervisor::new().host().await.unwrap();
        let size = report.uefi_variables_bytes.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vars.fd");
        let ask = |firmware, bytes: u64| {
            std::fs::write(&path, vec![0xff; bytes as usize]).unwrap();
            let request = ImportRequest {
                name: "shop".into(),
                disks: Vec::new(),
                memory_bytes: 1 << 30,
                cpus: 1,
                cpu_model: None,
                nics: Vec::new(),
                firmware,
                nvram: Some(path.clone()),
                autostart: false,
            };
            uefi_variables(&report, &request)
        };
        assert_eq!(ask(Wanted::Uefi, size).unwrap().unwrap().len() as u64, size);
        for (firmware, bytes, why) in [
            (Wanted::Bios, size, "BIOS"),
            (Wanted::Uefi, size - 1, "bytes"),
            (Wanted::Uefi, 0, "bytes"),
            (Wanted::Uefi, 128 << 10, "bytes"),
        ] {
            let error = ask(firmware, bytes).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Invalid);
            assert!(error.message.contains(why) && error.hint.is_some(), "{error:?}");
        }
    }
}
