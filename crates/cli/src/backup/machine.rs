//! A machine of this node, as the daemon shows it at one moment while it runs.

use super::consistency::{ConsistencyArgs, Enough, Wanted};
use super::create::{Taken, TakenDisk};
use rempart_api::{
    Changes as Told, Client, ConsistencyLevel as Level, Error, Freeze, MemoryRequest, ReplicaRole, Status,
    View, ViewPosition, ViewRequest,
};
use rempart_backup::{BackupError, Changes, FileSource, NbdEndpoint, NbdSource, Source};
use rempart_repository::{Consistency, ConsistencyLevel, Definition, Point};
use rempart_types::WallTime;
use std::sync::{Arc, Mutex};

/// By this NBD context the daemon tells what changed since the position that it was given.
const CHANGED_SINCE: &str = "rempart:changed-since";
const CHANGED: u64 = 1;

/// The daemon, asked from threads that block.
pub struct Machine {
    client: Client,
    freeze: Freeze,
    memory: Option<MemoryRequest>,
    runtime: tokio::runtime::Runtime,
}

/// All disks at one moment, for as long as this is there.
pub struct MachineView {
    view: View,
    sources: Vec<NbdSource>,
    memory: Option<FileSource>,
    lost: Arc<Mutex<Option<Error>>>,
    watch: tokio::task::JoinHandle<()>,
}

impl Drop for MachineView {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// Where the backup before was.
pub fn position_of(point: &Point) -> Option<ViewPosition> {
    let positions = point.disks.iter().filter_map(|disk| disk.position.as_deref());
    positions.filter_map(|position| serde_json::from_str(position).ok()).next()
}

impl Machine {
    pub fn new(client: Client, consistency: &ConsistencyArgs) -> Result<Machine, Error> {
        let keep = |or_refuse| {
            let longest_pause_ms = consistency.longest_pause().as_millis() as u64;
            Some(MemoryRequest { longest_pause_ms, or_refuse })
        };
        let (freeze, memory) = match (consistency.wanted(true), consistency.otherwise()) {
            (Wanted::Crash, _) => (Freeze::No, None),
            (Wanted::Application, Enough::Crash) => (Freeze::IfPossible, None),
            (Wanted::Application, Enough::Nothing) => (Freeze::OrRefuse, None),
            (Wanted::Application, Enough::SavedState) => (Freeze::IfPossible, keep(true)),
            (Wanted::SavedState, enough) => (Freeze::No, keep(enough != Enough::Crash)),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| Error::failed("cannot start the runtime").cause(e))?;
        Ok(Machine { client, freeze, memory, runtime })
    }

    /// The names of all machines that this node leads, but for some.
    pub fn led_here(&self, but: &[String]) -> Result<Vec<String>, Error> {
        let status: Status = self.runtime.block_on(self.client.get("/v1/status"))?;
        let unopened = status.unopened.iter().map(|vm| &vm.name);
        let known = status.vms.iter().map(|vm| &vm.name).chain(unopened.clone());
        if let Some(wrong) = but.iter().find(|name| !known.clone().any(|known| known == *name)) {
            return Err(Error::not_found(format!("there is no machine `{wrong}` to leave out")));
        }
        // One that nobody knows the leader of is tried, and told.
        let led = status.vms.iter().filter(|vm| vm.role != ReplicaRole::Secondary).map(|vm| &vm.name);
        Ok(led.chain(unopened).filter(|name| !but.contains(name)).cloned().collect())
    }

    pub fn view(&self, vm: &str, since: Option<ViewPosition>) -> Result<MachineView, Error> {
        let request = ViewRequest { since, freeze: self.freeze, memory: self.memory };
        let mut open = self.runtime.block_on(self.client.open_view(vm, &request))?;
        let view = open.view.clone();
        let lost = Arc::new(Mutex::new(None));
        let watch = self.runtime.spawn({
            let lost = lost.clone();
            async move {
                let why = open.lost().await;
                *lost.lock().expect("no holder panics") = Some(why);
            }
        });
        let mut opened = MachineView { view, sources: Vec::new(), memory: None, lost, watch };
        let unreadable =
            |e: &dyn std::error::Error| Error::failed("cannot read the view").cause(super::access::chain(e));
        if let Some(memory) = &opened.view.memory {
            opened.memory = Some(FileSource::open(&memory.path).map_err(|e| unreadable(&e))?);
        }
        for disk in &opened.view.disks {
            let endpoint = NbdEndpoint { socket: disk.socket.clone(), export: disk.export.clone() };
            opened.sources.push(NbdSource::open(endpoint).map_err(|e| unreadable(&e))?);
        }
        Ok(opened)
    }
}

impl MachineView {
    pub fn take<'a>(&'a self, before: Option<&'a Point>, chunk_len: u64) -> Result<Taken<'a>, BackupError> {
        let position = serde_json::to_string(&self.view.position).expect("a position is plain data");
        let mut disks = Vec::new();
        for (disk, source) in self.view.disks.iter().zip(&self.sources) {
            let name = format!("disk{}", disk.index);
            let earlier = before.and_then(|point| point.disk(&name));
            let changes = match (&disk.changes, earlier) {
                (Told::Known, Some(earlier)) => {
                    let changed = source.chunks_by(CHANGED_SINCE, chunk_len, |flags| flags == CHANGED)?;
                    Changes::Known { before: earlier, changed }
                }
                (Told::Unknown { why }, Some(_)) => Changes::Unknown(why.clone()),
                (_, None) => Changes::Unknown("it is the first backup of this disk".to_owned()),
            };
            disks.push(TakenDisk {
                name,
                source: source as &dyn Source,
                position: Some(position.clone()),
                changes,
            });
        }
        let nvram = self
            .view
            .nvram_hex
            .as_deref()
            .and_then(|hex| data_encoding::HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).ok());
        let mut definition = self.view.definition.clone();
        let mut notes = self.view.consistency.notes.clone();
        if let Some(memory) = &self.view.memory {
            // Who starts the machine by its definition passes over it.
            definition["qemu"] = memory.qemu.clone();
            notes.extend(super::qemu::hidden(&memory.qemu));
        }
        let content = serde_json::to_vec(&definition).expect("it was JSON");
        let told = &self.view.consistency;
        let consistency = Consistency {
            level: match told.level {
                Level::Crash => ConsistencyLevel::Crash,
                Level::SavedState => ConsistencyLevel::SavedState,
                Level::FileSystem => ConsistencyLevel::FileSystem,
                Level::Application => ConsistencyLevel::Application,
                Level::Stopped => ConsistencyLevel::Stopped,
            },
            why: Some(told.why.clone()),
            pause_ms: told.frozen_ms,
        };
        Ok(Taken {
            at: WallTime(self.view.opened_unix_ms),
            disks,
            definition: Some(Definition { kind: "rempart".to_owned(), content }),
            nvram,
            memory: self.memory.as_ref().map(|memory| memory as &dyn Source),
            consistency,
            notes,
            lost: Box::new(|| self.lost.lock().expect("no holder panics").clone()),
        })
    }
}
