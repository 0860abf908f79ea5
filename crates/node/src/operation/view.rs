//! A view of a machine's disks, for whoever backs them up: opened, told, and closed when nobody holds it any more.

use super::guest_memory::{MemoryFile, WithMemory, keep_and_open};
use super::quiesce::{self, Quiesced};
use super::replica::free_bytes;
use crate::group::{ServedView, Since, ToGroup, ViewServer, ViewedDisk, export_name, view_channel};
use crate::node::Node;
use crate::paths::VmPaths;
use crate::vm::Vm;
use crate::vm::record::{VmConfig, hex_bytes};
use crate::vm::unix_ms;
use rempart_api::{
    Changes, ConsistencyLevel, DiskThen, Error, Freeze, View, ViewDisk, ViewPosition, ViewRequest,
};
use rempart_engine::{ChangesSince, Command, CommandOutput, OpenedView, Role, ViewId};
use rempart_hypervisor::definition::Disk;
use rempart_types::{Epoch, GroupId, LogPosition, Lsn, Term};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Everything written so far must reach the disks first, of both copies.
const OPEN_DEADLINE: Duration = Duration::from_secs(60);
/// A primary that has just come back leads before it serves: what the others know of its log comes first.
const SERVE_DEADLINE: Duration = Duration::from_secs(10);
/// Of what is free beside the copy, this part may be taken by what is overwritten while views are open.
pub(super) const KEEP_PART: u64 = 2;

/// Closes the view when it is dropped.
#[derive(Debug)]
pub struct ViewGuard {
    vm: Arc<Vm>,
    view: ViewId,
    pub(super) memory: Option<MemoryFile>,
}

impl Drop for ViewGuard {
    fn drop(&mut self) {
        self.vm.group.send(ToGroup::CloseView { view: self.view });
    }
}

/// An open view.
#[derive(Debug)]
pub struct Opened {
    pub view: View,
    pub guard: ViewGuard,
    /// Told why, when the view is lost.
    pub lost: oneshot::Receiver<String>,
}

pub async fn open_view(node: &Node, vm: Arc<Vm>, request: ViewRequest) -> Result<Opened, Error> {
    let name = vm.name();
    let group = vm.group_id();
    let of_this_log = request.since.as_ref().filter(|since| since.group == group.to_string());
    let since = of_this_log
        .map(|since| LogPosition { term: Term::new(since.epoch, since.incarnation), lsn: Lsn(since.lsn) });
    if vm.group.is_primary() {
        let mut status = vm.group.status.clone();
        let settled = status.wait_for(|status| status.serves() || status.engine.role != Role::Primary);
        let _ = tokio::time::timeout(SERVE_DEADLINE, settled).await;
    }
    vm.with_record(|record| record.config.refuse_unfinished("open a view of"))?;
    let quiesced = Quiesced::start(&vm, request.freeze).await?;
    let with_memory = match (&quiesced, request.memory) {
        (Quiesced::No(_), Some(wanted)) => match keep_and_open(node, &vm, since, wanted).await {
            Err(error) if wanted.or_refuse => return Err(error),
            kept => Some(kept),
        },
        _ => None,
    };
    let (opened, guard, memory, consistency) = match (with_memory, quiesced) {
        (Some(Ok(WithMemory { opened, guard, memory, pause, still })), quiesced) => {
            let mut consistency = quiesced.end(&vm).await;
            consistency.level = ConsistencyLevel::SavedState;
            consistency.frozen_ms = Some(pause.as_millis() as u64);
            consistency.notes.extend(still.map(|error| error.to_string()));
            (opened, guard, Some(memory), consistency)
        }
        (without, quiesced) => {
            let opening = order_view(node, &vm, since, OPEN_DEADLINE).await;
            // Before anything else, also if there is no view.
            let mut consistency = quiesced.end(&vm).await;
            let (opened, guard) = opening?;
            if let Some(Err(error)) = without {
                consistency.why = format!("{}; {error}", consistency.why);
            }
            (opened, guard, None, consistency)
        }
    };
    let least = match (request.freeze, request.memory) {
        (Freeze::OrRefuse, _) => ConsistencyLevel::FileSystem,
        (_, Some(wanted)) if wanted.or_refuse => ConsistencyLevel::SavedState,
        _ => ConsistencyLevel::Crash,
    };
    if consistency.level < least {
        return Err(quiesce::not_frozen(&name, consistency.why));
    }
    let config = match &opened.config {
        Some(bytes) => VmConfig::decode(bytes)
            .map_err(|e| Error::failed(format!("cannot read the definition of `{name}`")).cause(e))?,
        None => vm.with_record(|record| record.config.clone()),
    };
    let listening = |e| Error::failed(format!("cannot serve a view of `{name}`")).cause(e);
    let socket = listen(&vm, opened.view).map_err(listening)?;
    let disks = told_disks(group, &config, &opened, &request, &socket.0);

    let (server, inbox) = view_channel().map_err(listening)?;
    let (lost, told) = oneshot::channel();
    let since = disks.iter().filter_map(|(disk, _, since)| Some((disk.index, (*since)?))).collect();
    let served = ServedView { at: opened.at.lsn, since, server, lost: Some(lost) };
    vm.group.send(ToGroup::ServeView { view: opened.view, served });
    let viewed = disks.iter().map(|(disk, _, since)| ViewedDisk {
        index: disk.index,
        size: disk.size_bytes,
        changes_known: since.is_some(),
    });
    ViewServer::start(opened.view, viewed.collect(), socket, vm.group.clone(), inbox).map_err(listening)?;

    let definition = serde_json::to_value(&config.definition)
        .map_err(|e| Error::failed(format!("cannot write the definition of `{name}`")).cause(e))?;
    let nvram = nvram(&vm, &config).await;
    let view = View {
        position: position(group, opened.at, &disks),
        opened_unix_ms: unix_ms(),
        definition,
        nvram_hex: nvram.map(|bytes| hex_bytes::to_text(&bytes)),
        consistency,
        disks: disks.into_iter().map(|(_, told, _)| told).collect(),
        memory,
        vm: name,
    };
    Ok(Opened { view, guard, lost: told })
}

/// A view of what was acknowledged until now, once it is open.
pub(super) async fn order_view(
    node: &Node,
    vm: &Arc<Vm>,
    since: Option<LogPosition>,
    deadline: Duration,
) -> Result<(OpenedView, ViewGuard), Error> {
    let order = Command::OpenView { since, keep_bytes: free_bytes(node)? / KEEP_PART };
    let name = vm.name();
    match tokio::time::timeout(deadline, vm.command("open a view of", order)).await {
        Ok(Ok(CommandOutput::ViewOpened(opened))) => {
            let guard = ViewGuard { vm: vm.clone(), view: opened.view, memory: None };
            Ok((opened, guard))
        }
        Ok(Ok(other)) => {
            Err(Error::failed(format!("no view of `{name}` was opened")).cause(format!("{other:?}")))
        }
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::failed(format!("cannot open a view of `{name}`")).cause(format!(
            "what it wrote did not reach the disks of all copies in {} s",
            deadline.as_secs()
        ))),
    }
}

fn listen(vm: &Vm, view: ViewId) -> std::io::Result<(PathBuf, UnixListener)> {
    let path = vm.paths.view_socket(view.0);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok((path, listener))
}

type ToldDisk = (Disk, ViewDisk, Option<Since>);

/// Each disk with what is told of it, and the earlier position that its changes are known since.
fn told_disks(
    group: GroupId,
    config: &VmConfig,
    opened: &OpenedView,
    request: &ViewRequest,
    socket: &std::path::Path,
) -> Vec<ToldDisk> {
    let then: BTreeMap<&str, u64> = request
        .since
        .iter()
        .flat_map(|since| since.disks.iter().map(|disk| (disk.uuid.as_str(), disk.size_bytes)))
        .collect();
    let told = |disk: &Disk| {
        let uuid = uuid_of(group, disk);
        let since = known_since(request, opened, then.get(uuid.as_str()).copied(), disk.size_bytes);
        let changes = match &since {
            Ok(_) => Changes::Known,
            Err(why) => Changes::Unknown { why: (*why).to_owned() },
        };
        let told = ViewDisk {
            index: disk.index.0,
            uuid,
            size_bytes: disk.size_bytes,
            socket: socket.to_owned(),
            export: export_name(disk.index),
            changes,
        };
        (disk.clone(), told, since.ok())
    };
    config.definition.disks.iter().map(told).collect()
}

/// The position that the request named bounds what changed on a disk, which had this size then and has that one now.
fn known_since(
    request: &ViewRequest,
    opened: &OpenedView,
    size_then: Option<u64>,
    size_now: u64,
) -> Result<Since, &'static str> {
    let since = request.since.as_ref().ok_or("no earlier position was named")?;
    match opened.since {
        None => return Err("the earlier position is of another machine"),
        Some(ChangesSince::Unknown(why)) => return Err(why),
        Some(ChangesSince::Known) => {}
    }
    let size = size_then.ok_or("the disk is another one than then, or was not there")?;
    if size > size_now {
        return Err("the disk was larger then");
    }
    Ok(Since { lsn: Lsn(since.lsn), size })
}

/// What tells a disk from every other. One that is older than such ids is the only one that ever had its place since.
fn uuid_of(group: GroupId, disk: &Disk) -> String {
    disk.uuid.map_or_else(|| format!("{group}-disk{}", disk.index), |uuid| uuid.to_string())
}

fn position(group: GroupId, at: LogPosition, disks: &[ToldDisk]) -> ViewPosition {
    let LogPosition { term: Term { epoch: Epoch(epoch), incarnation }, lsn } = at;
    let then = |(_, told, _): &ToldDisk| DiskThen { uuid: told.uuid.clone(), size_bytes: told.size_bytes };
    ViewPosition {
        group: group.to_string(),
        epoch,
        incarnation,
        lsn: lsn.0,
        disks: disks.iter().map(then).collect(),
    }
}

/// The running machine's, or those that it left.
async fn nvram(vm: &Vm, config: &VmConfig) -> Option<Vec<u8>> {
    let running = match vm.shown().machine {
        Some(machine) => machine.nvram().await.ok().flatten(),
        None => None,
    };
    running.or_else(|| config.nvram.clone())
}

/// Sockets of views that the last daemon served, and guests' memory in them.
pub fn remove_left_views(paths: &VmPaths) {
    for (folder, end) in [(&paths.run, ".sock"), (&paths.data, ".memory")] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with("view-") && name.ends_with(end)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_types::DiskIndex;

    fn opened(since: Option<ChangesSince>) -> OpenedView {
        OpenedView { view: ViewId(1), at: LogPosition::default(), config: None, since }
    }

    fn request(named: bool) -> ViewRequest {
        let since = ViewPosition { group: "g".into(), epoch: 1, incarnation: 0, lsn: 7, disks: Vec::new() };
        ViewRequest { since: named.then_some(since), freeze: Freeze::No, memory: None }
    }

    #[test]
    fn changes_are_known_of_the_same_disk_in_the_same_log_only() {
        let known = |request: &ViewRequest, since, then, now| {
            known_since(request, &opened(since), then, now).map(|since| (since.lsn.0, since.size))
        };
        let named = request(true);
        assert_eq!(known(&named, Some(ChangesSince::Known), Some(4096), 8192), Ok((7, 4096)));
        let refused = [
            known(&request(false), None, None, 8192),
            known(&named, None, Some(4096), 8192),
            known(&named, Some(ChangesSince::Unknown("another branch")), Some(4096), 8192),
            known(&named, Some(ChangesSince::Known), None, 8192),
            known(&named, Some(ChangesSince::Known), Some(8192), 4096),
        ];
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
    }

    #[test]
    fn a_disk_in_anothers_place_is_another_disk() {
        let old = Disk::new(DiskIndex(1), 4096);
        let new = crate::operation::create::new_disk(DiskIndex(1), 4096).unwrap();
        let next = crate::operation::create::new_disk(DiskIndex(1), 4096).unwrap();
        let group = GroupId(5);
        assert_eq!(uuid_of(group, &old), uuid_of(group, &old));
        assert_ne!(uuid_of(group, &old), uuid_of(group, &new));
        assert_ne!(uuid_of(group, &new), uuid_of(group, &next));
        assert_ne!(uuid_of(group, &old), uuid_of(GroupId(6), &old));
    }
}
