//! `rempart restore` onto this node: as a new virtual machine, or over the disks of one.

use super::access::describe;
use super::create::{back_up_before, shown};
use super::hardware::parse_definition;
use super::restore::Opened;
use super::serve::Memory;
use crate::command::vm::FirmwareArg;
use crate::{Output, output::bytes};
use clap::Args;
use rempart_api::{
    Client, Error, Firmware, Job, OpenRestore, RestoreDisk, RestoreOnto, RestoreReady, RestoreRequest,
    RestoreTarget, UnfinishedRestore, VmDetail,
};
use rempart_backup::{
    BackupError, ChunkCache, Content, FileTarget, LiveDisk, NbdEndpoint, Pace, Progress, data_bytes,
};
use rempart_hypervisor::definition::{self, BootDevice, Definition, Disk, MacAddress, Nic, NicModel};
use rempart_hypervisor::{VmUuid, definition::DEFAULT_MACHINE_TYPE};
use rempart_repository::PointDisk;
use rempart_types::DiskIndex;
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tokio::runtime::Runtime;

/// Threads that write to one machine's disks: its server takes so many connections and a few more.
const THREADS: usize = 8;

/// What the new machine is, where it is not what the point says.
#[derive(Debug, Args)]
pub struct NewMachineArgs {
    /// The new machine's processors.
    #[arg(long)]
    cpus: Option<u32>,
    /// The new machine's firmware.
    #[arg(long, value_enum)]
    firmware: Option<FirmwareArg>,
    /// This node's bridge that all its network cards are plugged into, instead of those that they were; it gets one if it
    /// had none.
    #[arg(long, conflicts_with = "no_network")]
    bridge: Option<String>,
    /// Leave its network cards out.
    #[arg(long)]
    no_network: bool,
    /// It keeps its UUID and its network cards' addresses: the machine that it was must not run any more.
    #[arg(long)]
    same_identity: bool,
}

impl NewMachineArgs {
    /// They say nothing where no new machine is made.
    pub fn refuse_without(&self, vm: Option<&str>, memory: Option<u64>) -> Result<(), Error> {
        let NewMachineArgs { cpus, firmware, bridge, no_network, same_identity } = self;
        let is_given = memory.is_some() || cpus.is_some() || firmware.is_some() || bridge.is_some();
        if vm.is_some() || !(is_given || *no_network || *same_identity) {
            return Ok(());
        }
        Err(Error::invalid("memory, processors, firmware, network and identity are of a new machine")
            .hint("name that with `--vm`"))
    }

    pub fn onto(&self, definition: &Definition, needed_bytes: u64) -> RestoreOnto {
        let definition = serde_json::to_value(definition).expect("a definition has only strings for keys");
        RestoreOnto::NewMachine { definition, same_identity: self.same_identity, needed_bytes }
    }
}

/// A restore that the daemon knows of, until this is dropped.
pub struct Restore {
    runtime: Runtime,
    client: Client,
    pub ready: RestoreReady,
    lost: Arc<Mutex<Option<Error>>>,
    /// One a disk. They are stopped when the daemon knows nothing of it any more.
    progress: Vec<Arc<Progress>>,
    watch: tokio::task::JoinHandle<()>,
}

impl Drop for Restore {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl Restore {
    pub fn open(client: Client, request: &RestoreRequest) -> Result<Restore, Error> {
        let runtime = runtime()?;
        let mut open: OpenRestore = runtime.block_on(client.open_restore(request))?;
        let ready = open.ready.clone();
        let lost = Arc::new(Mutex::new(None));
        let progress: Vec<Arc<Progress>> = ready.disks.iter().map(|_| Arc::default()).collect();
        let watch = runtime.spawn({
            let (lost, progress) = (lost.clone(), progress.clone());
            async move {
                let why = open.lost().await;
                *lost.lock().expect("no holder panics") = Some(why);
                progress.iter().for_each(|progress| progress.stop());
            }
        });
        Ok(Restore { runtime, client, ready, lost, progress, watch })
    }

    /// Has one disk written, and shows how far it is.
    fn write(
        &self,
        place: usize,
        disk: &PointDisk,
        opened: &Opened,
        output: Output,
        work: impl FnOnce(&Progress) -> Result<(), BackupError>,
    ) -> Result<(), Error> {
        let progress = &self.progress[place];
        let written =
            shown(output, &format!("restore {}", disk.name), disk.size, progress, || work(progress));
        // Why it was stopped is more than that it was.
        written.map_err(|error| {
            self.lost.lock().expect("no holder panics").clone().unwrap_or_else(|| opened.failed(&error))
        })
    }

    pub fn finish(&self, output: Output) -> Result<(), Error> {
        self.runtime.block_on(async {
            let job: Job = self.client.post(&format!("/v1/restores/{}/finish", self.ready.id), &()).await?;
            let mut show = output.progress();
            let ended = self.client.wait(job.id, |progress| show.show(progress)).await;
            show.finish();
            ended.map(drop)
        })
    }
}

fn runtime() -> Result<Runtime, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.map_err(|e| Error::failed("cannot start the runtime").cause(e))
}

/// The numbers that a point's disks have in a machine: those of their names, or else their places.
pub fn numbers<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<u16> {
    let numbered = names.clone().map(|name| name.strip_prefix("disk").and_then(|number| number.parse().ok()));
    numbered
        .collect::<Option<Vec<u16>>>()
        .unwrap_or_else(|| (0..).zip(names).map(|(place, _)| place).collect())
}

fn wanted(opened: &Opened, disks: &[&PointDisk]) -> Result<Vec<RestoreDisk>, Error> {
    if disks.is_empty() {
        return Err(Error::refused(&opened.what)
            .cause("it has files, and no disks")
            .hint("`rempart restore --to` brings files back into a folder"));
    }
    let names = opened.point.disks.iter().map(|disk| disk.name.as_str());
    let numbers: BTreeMap<&str, u16> = names.clone().zip(numbers(names)).collect();
    let wanted = disks.iter().map(|disk| {
        if !disk.size.is_multiple_of(512) {
            return Err(Error::refused(&opened.what)
                .cause(format!("{} has {} bytes, no multiple of 512", disk.name, disk.size))
                .hint("restore it as an image with --to, and make that larger"));
        }
        Ok(RestoreDisk { index: numbers[disk.name.as_str()], size_bytes: disk.size })
    });
    wanted.collect()
}

fn nvram_hex(opened: &Opened) -> Result<Option<String>, Error> {
    let Some((chunks, len)) = &opened.point.nvram else { return Ok(None) };
    let failed = |e: &rempart_repository::Error| describe(&opened.what, e);
    let cache = ChunkCache::new(opened.repository.clone(), Memory::DEFAULT).map_err(|e| failed(&e))?;
    let content = cache.content(chunks, *len).map_err(|e| failed(&e))?;
    Ok(Some(data_encoding::HEXLOWER.encode(&content)))
}

/// By what the point says, and what is asked for.
pub fn definition(
    of_point: Option<&[u8]>,
    name: &str,
    disks: &[RestoreDisk],
    (wanted, memory): (&NewMachineArgs, Option<u64>),
    what: &str,
    output: Output,
) -> Result<Definition, Error> {
    let mut definition = match (of_point, memory) {
        (Some(found), _) => parse_definition(found, what)?,
        (None, _) if wanted.same_identity => {
            return Err(Error::invalid(what).cause("the point does not say who its machine was"));
        }
        (None, Some(memory)) => {
            let mut new = Definition::new(name, VmUuid(0), memory, 1);
            new.disks = disks.iter().map(|disk| Disk::new(DiskIndex(disk.index), disk.size_bytes)).collect();
            output.tell(&format!(
                "the point does not say what machine it is of: it becomes a `{DEFAULT_MACHINE_TYPE}` with virtio disks"
            ));
            new
        }
        (None, None) => {
            return Err(Error::invalid(what)
                .cause("the point does not say what machine it is of in a way that is understood here")
                .hint("give it memory, such as `--memory 4G` (`--vm-memory` of `recover`), and --cpus, `--firmware uefi` and --bridge as it needs them"));
        }
    };
    if !definition.extra_options.is_empty() {
        output
            .tell("options for QEMU in its definition are left out: they may name anything of another host");
    }
    definition.memory_bytes = memory.unwrap_or(definition.memory_bytes);
    definition.cpus = wanted.cpus.unwrap_or(definition.cpus);
    definition.firmware = match wanted.firmware {
        None => definition.firmware,
        Some(FirmwareArg::Bios) => definition::Firmware::Bios,
        Some(FirmwareArg::Uefi) => definition::Firmware::Uefi,
    };
    if wanted.no_network {
        definition.nics.clear();
        definition.boot_order.retain(|device| !matches!(device, BootDevice::Nic(_)));
    }
    if let Some(bridge) = &wanted.bridge {
        if definition.nics.is_empty() {
            // The node draws another with the UUID.
            let [a, b, c, ..] = definition.uuid.0.to_le_bytes();
            let mac = MacAddress::in_qemu_range([a, b, c]);
            definition.nics.push(Nic { bridge: bridge.clone(), mac, model: NicModel::Virtio });
        }
        definition.nics.iter_mut().for_each(|nic| nic.bridge.clone_from(bridge));
    }
    Ok(definition)
}

/// A new machine, which is there when it is whole.
pub fn new_machine(
    opened: &Opened,
    name: &str,
    (args, memory): (&NewMachineArgs, Option<u64>),
    client: Client,
    output: Output,
) -> Result<serde_json::Value, Error> {
    let disks: Vec<&PointDisk> = opened.point.disks.iter().collect();
    let wanted = wanted(opened, &disks)?;
    let of_point = opened.point.definition.as_ref().filter(|definition| definition.kind == "rempart");
    let of_point = of_point.map(|definition| definition.content.as_slice());
    let definition = definition(of_point, name, &wanted, (args, memory), &opened.what, output)?;
    let nvram_hex = match definition.firmware {
        definition::Firmware::Uefi => nvram_hex(opened)?,
        definition::Firmware::Bios => None,
    };
    let mut needed_bytes = 0;
    for disk in &disks {
        let content = Content::of(disk, opened.repository.chunk_size());
        needed_bytes += data_bytes(&opened.reader, content).map_err(|e| opened.failed(&e))?;
    }
    let onto = args.onto(&definition, needed_bytes);
    let request = RestoreRequest { name: name.to_owned(), disks: wanted.clone(), nvram_hex, onto };
    let restore = Restore::open(client, &request)?;
    for (place, (disk, target)) in disks.iter().zip(&restore.ready.disks).enumerate() {
        let RestoreTarget::File { path } = target else { return Err(other_version()) };
        restore.write(place, disk, opened, output, |progress| {
            opened.write_to(disk, &FileTarget::create(path, disk.size)?, Pace::default().threads, progress)
        })?;
    }
    restore.finish(output)?;
    output.tell(&format!(
        "`{name}` is `{}@{}`; start it with `rempart vm start {name}`",
        opened.point.vm, opened.root
    ));
    let told = disks
        .iter()
        .zip(&wanted)
        .map(|(disk, wanted)| json!({ "disk": disk.name, "index": wanted.index, "size_bytes": disk.size }));
    Ok(json!({
        "vm": opened.point.vm, "point": opened.root, "machine": name, "disks": told.collect::<Vec<_>>(),
    }))
}

pub fn other_version() -> Error {
    Error::failed("the daemon wants the disks elsewhere than they were asked for")
        .hint("the program and the daemon may be of different versions; restart the daemon")
}

/// What is to be overwritten, and whether that was agreed to.
#[derive(Debug)]
pub struct Over<'a> {
    pub name: &'a str,
    /// Only this one.
    pub disk: Option<&'a str>,
    pub is_agreed: bool,
    /// What the machine holds is backed up before.
    pub with_backup: bool,
}

/// The disks of a stopped machine become those of the point; only what differs is written.
pub fn over(
    opened: &Opened,
    over: &Over<'_>,
    client: Client,
    output: Output,
) -> Result<serde_json::Value, Error> {
    let name = over.name;
    let disks = opened.disks(over.disk)?;
    let wanted = wanted(opened, &disks)?;
    let detail: VmDetail = runtime()?.block_on(client.get(&format!("/v1/vms/{name}")))?;
    if over.disk.is_none() {
        refuse_other_firmware(opened, &detail)?;
    }
    let point = format!("{}@{}", opened.point.vm, opened.root);
    let names: Vec<String> = wanted.iter().map(|disk| format!("disk {}", disk.index)).collect();
    let names = names.join(", ");
    if !over.is_agreed {
        let held = if over.with_backup { "; that is backed up first" } else { "" };
        return Err(Error::refused(format!("restoring `{point}` would overwrite what `{name}` holds"))
            .cause(format!("{names}{held}"))
            .hint("add `--yes`"));
    }
    let nvram_hex = if over.disk.is_none() { nvram_hex(opened)? } else { None };
    let request = RestoreRequest {
        name: name.to_owned(),
        disks: wanted.clone(),
        nvram_hex,
        onto: RestoreOnto::Machine,
    };
    let restore = Restore::open(client.clone(), &request)?;
    let before = match &restore.ready.unfinished {
        Some(begun) => {
            output.tell(&format!("`{name}` is half restored to `{}`: this goes on from there", begun.point));
            begun.before.clone()
        }
        None if over.with_backup => {
            let note = format!("before `{point}` was restored over it");
            let root = back_up_before(&opened.repository, client.clone(), name, note, output);
            let root = root.map_err(|error| {
                let hint = "with `--no-backup`, what the machine holds now is given up";
                Error::new(error.kind, &opened.what).cause(error).hint(hint)
            })?;
            Some(format!("{name}@{root}"))
        }
        None => None,
    };
    let begun = UnfinishedRestore {
        point: point.clone(),
        disk: over.disk.map(str::to_owned),
        indexes: Vec::new(),
        before: before.clone(),
    };
    let path = format!("/v1/restores/{}/begin", restore.ready.id);
    restore.runtime.block_on(client.post::<_, ()>(&path, &begun))?;
    let domain = opened.domain()?;
    let mut told = Vec::new();
    for (place, (disk, target)) in disks.iter().zip(&restore.ready.disks).enumerate() {
        let RestoreTarget::Nbd { socket, export } = target else { return Err(other_version()) };
        let endpoint = NbdEndpoint { socket: socket.clone(), export: export.clone() };
        let live = LiveDisk::open(endpoint, disk.size, opened.repository.chunk_size(), domain.clone());
        let live = live.map_err(|e| opened.failed(&e))?;
        restore.write(place, disk, opened, output, |progress| {
            opened.write_to(disk, &live, Pace::default().threads.min(THREADS), progress)
        })?;
        output.tell(&format!("{}: {} of {} differed", disk.name, bytes(live.written()), bytes(disk.size)));
        told.push(json!({
            "disk": disk.name, "index": wanted[place].index, "size_bytes": disk.size,
            "written_bytes": live.written(),
        }));
    }
    restore.finish(output)?;
    let back = before.as_ref().map_or(String::new(), |before| format!("; before, it was `{before}`"));
    output.tell(&format!("{names} of `{name}`: `{point}`{back}"));
    Ok(json!({
        "vm": opened.point.vm, "point": opened.root, "machine": name, "disks": told, "before": before,
    }))
}

fn refuse_other_firmware(opened: &Opened, detail: &VmDetail) -> Result<(), Error> {
    let Some(found) = opened.point.definition.as_ref().filter(|found| found.kind == "rempart") else {
        return Ok(());
    };
    let then = match parse_definition(&found.content, &opened.what)?.firmware {
        definition::Firmware::Bios => Firmware::Bios,
        definition::Firmware::Uefi => Firmware::Uefi,
    };
    if then == detail.firmware {
        return Ok(());
    }
    Err(Error::refused(&opened.what)
        .cause(format!("the point is of a machine with another firmware than `{}`", detail.status.name))
        .hint("restore it as a new machine with `--vm`, or its disks one by one with `--disk`"))
}
