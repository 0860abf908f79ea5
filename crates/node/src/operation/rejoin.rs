//! A copy whose group was led on by force elsewhere: what only it holds is saved aside, then it follows.

use super::replica::free_bytes;
use crate::jobs::Reporter;
use crate::node::Node;
use crate::vm::import::{self, Image};
use crate::vm::record::DiskFile;
use crate::vm::{First, Vm, unix_ms};
use rempart_api::{Error, RejoinRequest, Severity};
use rempart_engine::Command;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A reopened copy learns within this time what its register says.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn rejoin(
    node: Arc<Node>,
    mut vm: Arc<Vm>,
    request: RejoinRequest,
    reporter: Reporter,
) -> Result<serde_json::Value, Error> {
    let name = vm.name();
    let engine = vm.group.status.borrow().engine.clone();
    if !engine.superseded {
        return Err(Error::conflict(format!("this node's copy of `{name}` has not diverged"))
            .hint("only a copy whose group was led on by force elsewhere rejoins; see `rempart status`"));
    }
    if !request.confirm {
        return Err(Error::refused(format!("rejoining gives up what only this copy of `{name}` holds"))
            .cause(format!("this copy ends at log position {} of epoch {}", engine.end, engine.epoch))
            .hint(format!(
                "`rempart rejoin {name} --yes` saves its disks aside first, with --discard it does not"
            )));
    }
    let mut saved = None;
    if !request.discard {
        let target = node.paths.diverged(&name, unix_ms() / 1000);
        vm.close().await;
        let result = save(&node, &vm, &target, &reporter).await;
        vm = node.reopen_vm(&vm, First::Nothing).await?;
        result?;
        saved = Some(target);
    }
    reporter.phase("following the other side");
    let mut status = vm.group.status.clone();
    let known = status.wait_for(|status| status.engine.superseded);
    if tokio::time::timeout(PATIENCE, known).await.is_err() {
        return Err(Error::failed(format!("cannot rejoin `{name}`"))
            .cause("the witness does not say where the group lives on")
            .hint("try again when the witness answers; `rempart status` tells"));
    }
    vm.command("rejoin", Command::Rejoin).await?;
    let text = match &saved {
        Some(path) => format!("rejoins; what only this copy held is saved in `{}`", path.display()),
        None => "rejoins; what only this copy held is given up".to_owned(),
    };
    vm.events.note(&name, Severity::Warning, text);
    Ok(serde_json::json!({ "name": name, "saved": saved }))
}

/// Copies the disks of a closed replica: all of its log is in them.
async fn save(node: &Node, vm: &Vm, target: &Path, reporter: &Reporter) -> Result<(), Error> {
    let name = vm.name();
    let failed = |what: &Path, e: std::io::Error| {
        Error::failed(format!("cannot save the disks of `{name}` in `{}`", what.display())).cause(e)
    };
    if let Some(failure) = vm.failure() {
        return Err(Error::failed(format!("cannot save the disks of `{name}`")).cause(failure));
    }
    let disks = vm.with_record(|record| record.disks.clone());
    let mut wanted = 0;
    for disk in &disks {
        let used = std::fs::metadata(&disk.path).map_err(|e| failed(&disk.path, e))?;
        wanted += used.blocks() * 512;
    }
    let free = free_bytes(node)?;
    if free < wanted {
        return Err(Error::refused(format!("cannot save the disks of `{name}`"))
            .cause(format!("they use {wanted} bytes and {free} are free"))
            .hint("free some space, or give them up with --discard"));
    }
    copy_all(disks, target, reporter, failed).await
}

/// Into a directory of its own, which is there only if all disks are in it.
async fn copy_all(
    disks: Vec<DiskFile>,
    target: &Path,
    reporter: &Reporter,
    failed: impl Fn(&Path, std::io::Error) -> Error,
) -> Result<(), Error> {
    let parent = target.parent().expect("a directory of the data directory");
    let mut builder = std::fs::DirBuilder::new();
    builder.mode(0o700);
    builder.recursive(true).create(parent).map_err(|e| failed(parent, e))?;
    // One that is there already is another save's.
    builder.recursive(false).create(target).map_err(|e| failed(target, e))?;
    let copied = async {
        for disk in disks {
            let file: PathBuf = target.join(format!("disk{}.raw", disk.index.0));
            let phase = format!("saving disk {}", disk.index);
            import::copy(&Image::raw(disk.path, disk.size_bytes), &file, reporter, &phase).await?;
            std::fs::File::open(&file).and_then(|file| file.sync_all()).map_err(|e| failed(&file, e))?;
        }
        let synced = crate::durable::sync_dir(target).and_then(|()| crate::durable::sync_dir(parent));
        synced.map_err(|e| failed(target, e))
    };
    let result = copied.await;
    if result.is_err()
        && let Err(error) = std::fs::remove_dir_all(target)
    {
        tracing::warn!(directory = %target.display(), %error, "an unfinished save is left behind");
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::Jobs;
    use rempart_api::JobState;
    use rempart_types::DiskIndex;

    async fn saved(disks: Vec<DiskFile>, target: &Path) -> bool {
        let (jobs, target) = (Jobs::default(), target.to_owned());
        let job = jobs.start("save", |reporter| async move {
            let failed = |what: &Path, e: std::io::Error| Error::failed(what.display().to_string()).cause(e);
            copy_all(disks, &target, &reporter, failed).await?;
            Ok(serde_json::Value::Null)
        });
        let job = jobs.get(job.id, Duration::from_secs(60)).await.expect("it was started");
        matches!(job.state, JobState::Done { .. })
    }

    #[tokio::test]
    async fn a_save_that_fails_leaves_nothing_of_itself_behind() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |index: u16, name: &str| {
            let (index, path) = (DiskIndex(index), dir.path().join(name));
            DiskFile { index, path, size_bytes: 1 << 20, adopted: false }
        };
        std::fs::write(dir.path().join("a"), vec![7; 1 << 20]).unwrap();
        let at = |name: &str| dir.path().join("diverged").join(name);

        assert!(saved(vec![disk(0, "a")], &at("shop-1")).await);
        assert!(!saved(vec![disk(0, "a"), disk(1, "missing")], &at("shop-2")).await);
        assert!(!at("shop-2").exists(), "it would be taken for a whole copy");
        // Not even where an earlier one is.
        assert!(!saved(vec![disk(1, "missing")], &at("shop-1")).await);
        assert_eq!(std::fs::read(at("shop-1").join("disk0.raw")).unwrap(), vec![7; 1 << 20]);
    }
}
