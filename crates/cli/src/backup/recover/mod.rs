//! `rempart recover --instant`.

mod attend;
mod folder;
mod into_node;
mod machine;

use super::access::{Access, chain, describe};
use super::hardware::Hardware;
use super::in_use::InUse;
use super::onto_node::NewMachineArgs;
use super::points::{find, open_log};
use super::restore::WITHOUT_MEMORY;
use super::serve::{Memory, SocketFile, disk_reader, tell_unreadable};
use crate::{Output, parse};
use attend::{Ended, attend, job};
use clap::Args;
use folder::{Folder, Record};
use machine::{Start, running};
use rempart_api::{Client, Error, ErrorKind};
use rempart_backup::{ChunkCache, DiskReader, DiskServer, Listener};
use rempart_repository::{Point, Repository};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Between two looks at somebody else's work.
const LOOK: Duration = Duration::from_millis(500);

/// Runs a virtual machine from a restore point within seconds, while its disks are moved to a folder.
///
/// All that the machine writes goes into that folder. When the disks are there, the command ends and the machine runs on.
/// Whatever ends it before, the same command goes on where it was.
#[derive(Debug, Args)]
pub struct Recover {
    #[command(flatten)]
    access: Access,
    /// Run it at once.
    #[arg(long, required_unless_present_any = ["status", "finish"], requires = "point")]
    instant: bool,
    /// `VM` for its newest point, or `VM@POINT`.
    point: Option<String>,
    /// The folder that the disks are moved to, empty at first.
    #[arg(long)]
    to: PathBuf,
    /// Tell how far it is.
    #[arg(long, conflicts_with_all = ["instant", "finish"])]
    status: bool,
    /// Wait until the disks are moved; of a machine that is switched off, move them.
    #[arg(long, conflicts_with = "instant")]
    finish: bool,
    /// Make a new virtual machine of this node of it, of this name. It must be switched off.
    #[arg(long, value_name = "NAME", requires = "finish")]
    vm: Option<String>,
    /// The new machine's memory, such as `4G`; what it was without this. Needed where the point does not say it.
    #[arg(long, value_parser = parse::byte_count)]
    vm_memory: Option<u64>,
    #[command(flatten)]
    new_machine: NewMachineArgs,
    /// Connect it to the bridges that its definition names. Without this its network cards lead nowhere: the machine that
    /// it was may still be there.
    #[arg(long)]
    network: bool,
    /// Bytes a second at which each disk is moved; as fast as it goes without this.
    #[arg(long, value_parser = parse::byte_count)]
    limit: Option<u64>,
    /// The program that runs it.
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: String,
    #[command(flatten)]
    memory: Memory,
    /// QEMU's arguments, where the point has no definition: `{disk0}` in them is the block node of the disk of that name.
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// The point, served in the folder for as long as this is there.
struct Served {
    _server: DiskServer,
    _socket: SocketFile,
    // A lock that goes with its descriptor.
    _lock: std::fs::File,
}

impl Served {
    fn start(
        folder: &Folder,
        cache: &Arc<ChunkCache>,
        point: &Point,
        lock: std::fs::File,
        output: Output,
    ) -> Result<Served, Error> {
        let (socket, listener) = SocketFile::listen(&folder.nbd())?;
        let disks: Vec<DiskReader> = point.disks.iter().map(|disk| disk_reader(cache, disk)).collect();
        let server = DiskServer::start(disks, Listener::Unix(listener), Box::new(tell_unreadable(output)));
        let server = server.map_err(|e| Error::failed(folder.what()).cause(chain(&e)))?;
        Ok(Served { _server: server, _socket: socket, _lock: lock })
    }
}

pub fn run(
    command: &Recover,
    client: impl FnOnce() -> Result<Client, Error>,
    output: Output,
) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Error::failed("cannot start the runtime").cause(e))?;
    command.new_machine.refuse_without(command.vm.as_deref(), command.vm_memory)?;
    match (command.status, command.finish) {
        (true, _) => status(command, &runtime, output),
        (_, true) => match &command.vm {
            Some(name) => into_node(command, name, &runtime, client()?, output),
            None => finish(command, &runtime, output),
        },
        _ => instant(command, &runtime, output),
    }
}

fn instant(command: &Recover, runtime: &Runtime, output: Output) -> Result<(), Error> {
    let began = Instant::now();
    let repository = command.access.open()?;
    let log = open_log(&repository)?;
    let wanted = command.point.as_deref().expect("it is asked for with --instant");
    let folder = Folder::create(&command.to)?;
    // Whoever goes on means the point that he began with, and not one that is newer now.
    let begun = folder.record()?.filter(|record| record.vm == wanted).map(|record| record.point);
    let wanted = begun.map_or_else(|| wanted.to_owned(), |point| format!("{wanted}@{point}"));
    let (root, point) = find(&repository, &log, &wanted)?;
    drop(log);
    let lock = folder.lock_soon()?.ok_or_else(|| busy(&folder))?;
    let mut record = folder.begin(Record::new(&repository, root, &point))?;
    if let Some(name) = &record.became {
        return Err(Error::refused(folder.what())
            .cause(format!("what was recovered there is the virtual machine `{name}` of a node since"))
            .hint("`rempart vm start` starts that; to begin anew, name another folder"));
    }
    if let Some(definition) = point.definition.as_ref().filter(|definition| definition.kind == "rempart") {
        folder.keep_definition(&definition.content)?;
    }
    let in_use = keep_in_use(&repository, &folder, &mut record, output)?;
    let hardware =
        runtime.block_on(Hardware::of(&point, &command.arguments, &command.qemu, folder.what()))?;
    let cache = command.memory.cache(&repository)?;
    let served = Served::start(&folder, &cache, &point, lock, output)?;
    folder.make_overlays(&record)?;
    let nvram = point.nvram.as_ref().map(|(chunks, len)| cache.content(chunks, *len)).transpose();
    let nvram = nvram.map_err(|e| describe(folder.what(), &e))?;
    let ended = runtime.block_on(async {
        let client = match running(&folder.monitor()).await {
            Some(client) => {
                output.tell(&format!("`{}` runs already; it is attended to again", record.vm));
                client
            }
            None => {
                if point.memory.is_some() {
                    output.tell(WITHOUT_MEMORY);
                }
                // Before the machine can write anything.
                record.has_run = true;
                folder.write_record(&record)?;
                let (qemu, network) = (&command.qemu, command.network);
                Start { qemu, network, nvram: nvram.as_deref() }.machine(&hardware, &folder, &record).await?
            }
        };
        let after = began.elapsed().as_secs_f64();
        output.tell(&format!("`{}` runs, after {after:.1} s; its disks are moved meanwhile", record.vm));
        attend(&client, &folder, &record, &hardware, command.limit, output).await
    })?;
    drop(served);
    if ended == Ended::Moved {
        in_use.end();
    }
    let text = match ended {
        Ended::Moved => "its disks are moved; it runs on, and needs the repository no more",
        Ended::Off => "it is off; what it wrote is kept, and the same command goes on",
        Ended::Stopped => "it is stopped; what it wrote is kept, and the same command goes on",
    };
    output.tell(&format!("`{}`: {text}", record.vm));
    if output.json {
        return output.print_json(&json!({
            "vm": record.vm, "point": record.point, "folder": folder.path(),
            "is_moved": is_moved(&folder, &record)?, "runs": ended == Ended::Moved,
        }));
    }
    Ok(())
}

/// The point stays until the disks are moved, whatever ends before.
fn keep_in_use(
    repository: &Arc<Repository>,
    folder: &Folder,
    record: &mut Record,
    output: Output,
) -> Result<InUse, Error> {
    let before = record.reader.as_deref().and_then(|reader| reader.parse().ok());
    let command = format!("recover --to {}", folder.path().display());
    let in_use = InUse::go_on(repository, before, &[record.point], &command, output);
    if in_use.session().is_some() && in_use.session() != before {
        record.reader = in_use.session().map(|session| session.to_string());
        folder.write_record(record)?;
    }
    Ok(in_use)
}

fn busy(folder: &Folder) -> Error {
    Error::new(ErrorKind::Conflict, folder.what())
        .cause("another command recovers there just now")
        .hint("`rempart recover --status` tells how far it is")
}

fn begun(folder: &Folder) -> Result<Record, Error> {
    folder.record()?.ok_or_else(|| Error::not_found(folder.what()).cause("nothing is recovered there"))
}

fn is_moved(folder: &Folder, record: &Record) -> Result<bool, Error> {
    for disk in &record.disks {
        if folder.needs_point(disk)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn status(command: &Recover, runtime: &Runtime, output: Output) -> Result<(), Error> {
    let folder = Folder::open(&command.to)?;
    let record = begun(&folder)?;
    let is_attended = folder.lock()?.is_none();
    let (state, jobs) = runtime.block_on(async {
        let Some(client) = running(&folder.second_monitor()).await else {
            return ("off".to_owned(), Value::Null);
        };
        let state = client.query_status().await.map_or_else(|e| e.to_string(), |status| status.status);
        let jobs = client.execute("query-block-jobs", Value::Null, Duration::from_secs(10)).await;
        (state, jobs.unwrap_or_default())
    });
    let mut disks = Vec::new();
    for (place, disk) in record.disks.iter().enumerate() {
        let under_way =
            jobs.as_array().and_then(|jobs| jobs.iter().find(|found| found["device"] == job(place).as_str()));
        disks.push(json!({
            "disk": disk.name, "file": folder.file(&disk.overlay), "is_moved": !folder.needs_point(disk)?,
            "done_bytes": under_way.map(|job| &job["offset"]), "total_bytes": under_way.map(|job| &job["len"]),
        }));
    }
    if output.json {
        return output.print_json(&json!({
            "vm": record.vm, "point": record.point, "state": state, "is_attended": is_attended, "disks": disks,
        }));
    }
    output.print(&format!(
        "`{}@{}`: {state}{}",
        record.vm,
        record.point,
        if is_attended { "" } else { ", nobody moves its disks" }
    ))?;
    let rows = disks.iter().map(|disk| {
        let percent = match (disk["done_bytes"].as_u64(), disk["total_bytes"].as_u64()) {
            _ if disk["is_moved"] == true => "moved".to_owned(),
            (Some(done), Some(total)) if total > 0 => format!("{} %", done.saturating_mul(100) / total),
            _ => "not moved".to_owned(),
        };
        vec![disk["disk"].as_str().unwrap_or_default().to_owned(), percent]
    });
    output.table(&["disk", "moved"], rows.collect())
}

/// Serves the point of a recovery that nobody attends to.
fn serve_again(
    command: &Recover,
    folder: &Folder,
    record: &mut Record,
    lock: std::fs::File,
    output: Output,
) -> Result<(Served, InUse), Error> {
    let repository = command.access.open()?;
    let log = open_log(&repository)?;
    let (_, point) = find(&repository, &log, &format!("{}@{}", record.vm, record.point))?;
    drop(log);
    let in_use = keep_in_use(&repository, folder, record, output)?;
    let cache = command.memory.cache(&repository)?;
    Ok((Served::start(folder, &cache, &point, lock, output)?, in_use))
}

/// What was moved is copied once more, to where the node keeps it; what was not comes from the repository at once.
fn into_node(
    command: &Recover,
    name: &str,
    runtime: &Runtime,
    client: Client,
    output: Output,
) -> Result<(), Error> {
    let folder = Folder::open(&command.to)?;
    let mut record = begun(&folder)?;
    let lock = folder.lock_soon()?.ok_or_else(|| busy(&folder))?;
    if runtime.block_on(running(&folder.second_monitor())).is_some() {
        return Err(Error::refused(folder.what())
            .cause("the machine runs")
            .hint("shut it down in its guest, then do this again"));
    }
    let args = (&command.new_machine, command.vm_memory);
    let copy = |record: &Record| into_node::into_node(&folder, record, name, args, client, output);
    if is_moved(&folder, &record)? {
        copy(&record)?;
        drop(lock);
    } else {
        let (_served, in_use) = serve_again(command, &folder, &mut record, lock, output)?;
        copy(&record)?;
        in_use.end();
    }
    record.became = Some(name.to_owned());
    folder.write_record(&record)?;
    let path = folder.path().display();
    output.tell(&format!("`{name}` is what `{path}` holds, which is not needed any more; start it with `rempart vm start {name}`"));
    if output.json {
        return output.print_json(&json!({ "vm": record.vm, "point": record.point, "machine": name }));
    }
    Ok(())
}

fn finish(command: &Recover, runtime: &Runtime, output: Output) -> Result<(), Error> {
    let folder = Folder::open(&command.to)?;
    let mut record = begun(&folder)?;
    while !is_moved(&folder, &record)? {
        let Some(lock) = folder.lock()? else {
            std::thread::sleep(LOOK);
            continue;
        };
        if runtime.block_on(running(&folder.second_monitor())).is_some() {
            return Err(Error::refused(folder.what())
                .cause("the machine runs, and nobody serves it the repository")
                .hint("begin `rempart recover --instant` again: it goes on with that machine"));
        }
        let (_served, in_use) = serve_again(command, &folder, &mut record, lock, output)?;
        for disk in &record.disks {
            if folder.needs_point(disk)? {
                output.tell(&format!("move {}", disk.name));
                folder.complete(disk)?;
            }
        }
        in_use.end();
    }
    output.tell(&format!("`{}@{}`: its disks are in `{}`", record.vm, record.point, folder.path().display()));
    if output.json {
        let disks =
            record.disks.iter().map(|disk| json!({ "disk": disk.name, "file": folder.file(&disk.overlay) }));
        return output.print_json(&json!({
            "vm": record.vm, "point": record.point, "is_moved": true, "disks": disks.collect::<Vec<_>>(),
        }));
    }
    Ok(())
}
