//! A machine of this node, as the daemon shows it at one moment while it runs.

use super::create::{Taken, TakenDisk};
use rempart_api::{Changes as Told, Client, Error, View, ViewPosition, ViewRequest};
use rempart_backup::{BackupError, Changes, NbdEndpoint, NbdSource, Source};
use rempart_repository::{Consistency, ConsistencyLevel, Definition, Point};
use rempart_types::WallTime;
use std::sync::{Arc, Mutex};

/// By this NBD context the daemon tells what changed since the position that it was given.
const CHANGED_SINCE: &str = "rempart:changed-since";
const CHANGED: u64 = 1;

/// The daemon, asked from threads that block.
pub struct Machine {
    client: Client,
    runtime: tokio::runtime::Runtime,
}

/// All disks at one moment, for as long as this is there.
pub struct MachineView {
    view: View,
    sources: Vec<NbdSource>,
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
    pub fn new(client: Client) -> Result<Machine, Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| Error::failed("cannot start the runtime").cause(e))?;
        Ok(Machine { client, runtime })
    }

    pub fn view(&self, vm: &str, since: Option<ViewPosition>) -> Result<MachineView, Error> {
        let mut open = self.runtime.block_on(self.client.open_view(vm, &ViewRequest { since }))?;
        let view = open.view.clone();
        let lost = Arc::new(Mutex::new(None));
        let watch = self.runtime.spawn({
            let lost = lost.clone();
            async move {
                let why = open.lost().await;
                *lost.lock().expect("no holder panics") = Some(why);
            }
        });
        let mut opened = MachineView { view, sources: Vec::new(), lost, watch };
        for disk in &opened.view.disks {
            let endpoint = NbdEndpoint { socket: disk.socket.clone(), export: disk.export.clone() };
            let source = NbdSource::open(endpoint);
            opened.sources.push(
                source.map_err(|e| Error::failed("cannot read the view").cause(super::access::chain(&e)))?,
            );
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
        let content = serde_json::to_vec(&self.view.definition).expect("it was JSON");
        let consistency = Consistency {
            level: ConsistencyLevel::Crash,
            why: Some("the guest was not asked to take part".to_owned()),
            pause_ms: None,
        };
        Ok(Taken {
            at: WallTime(self.view.opened_unix_ms),
            disks,
            definition: Some(Definition { kind: "rempart".to_owned(), content }),
            nvram,
            consistency,
            notes: Vec::new(),
            lost: Box::new(|| self.lost.lock().expect("no holder panics").clone()),
        })
    }
}
