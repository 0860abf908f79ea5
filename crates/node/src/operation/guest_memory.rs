//! A view of a machine's disks with the guest's memory of the same moment.
//!
//! The guest stands still from before its memory is written until the view is open: nobody writes to its disks between the two.
//! Its guard stops it and the runner has it go on, as for any other pause, so that a handover, a fence or the end of its
//! lease find it as they find any machine that stands still.

use super::replica::free_bytes;
use super::view::{KEEP_PART, ViewGuard, order_view};
use crate::node::Node;
use crate::vm::{Hold, Vm};
use rempart_api::{Error, ErrorKind, MemoryRequest, ViewMemory};
use rempart_engine::OpenedView;
use rempart_hypervisor::{KeptMemory, MemoryWanted};
use rempart_types::LogPosition;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Devices, and what of video memory and firmware is not in the memory's size.
const DEVICES: u64 = 256 << 20;
/// Each page has a header, at most this part of it.
const HEADERS_PART: u64 = 64;
/// A view is open within milliseconds, where everything was flushed before.
const LEAST_TIME_TO_OPEN: Duration = Duration::from_secs(1);

/// Removed when this is dropped.
#[derive(Debug)]
pub struct MemoryFile {
    path: PathBuf,
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a guest's memory is not removed");
        }
    }
}

/// What came of it.
#[derive(Debug)]
pub struct WithMemory {
    pub opened: OpenedView,
    pub guard: ViewGuard,
    pub memory: ViewMemory,
    /// How long the guest stood still.
    pub pause: Duration,
    /// Why it is not known that it goes on.
    pub still: Option<Error>,
}

/// Keeps the guest's memory and opens a view. However it ends, and also when this is dropped, the guest goes on.
pub async fn keep_and_open(
    node: &Node,
    vm: &Arc<Vm>,
    since: Option<LogPosition>,
    wanted: MemoryRequest,
) -> Result<WithMemory, Error> {
    let limit = Duration::from_millis(wanted.longest_pause_ms);
    let (file, most_bytes, memory_file) = make_file(node, vm)?;
    let begun = Instant::now();
    let hold = Hold::new(vm).await?;
    let work = async {
        let time_left = || limit.saturating_sub(begun.elapsed());
        let keeping = hold.machine.keep_memory(MemoryWanted { file, most_bytes, limit: time_left() });
        let kept = match tokio::time::timeout(time_left(), keeping).await {
            Ok(kept) => kept.map_err(|e| not_kept(&e)),
            Err(_) => Err(not_kept(&format!("it takes longer than {} s", limit.as_secs()))),
        }?;
        let deadline = time_left().max(LEAST_TIME_TO_OPEN);
        let (opened, guard) = order_view(node, vm, since, deadline).await?;
        match hold.machine.stands_as_kept().await {
            Ok(true) => Ok((opened, guard, kept)),
            Ok(false) => Err(not_kept(&"somebody had the guest go on meanwhile")),
            Err(error) => Err(not_kept(&error)),
        }
    };
    let (opened, mut guard, KeptMemory { bytes, description }) = tokio::select! {
        done = work => done?,
        why = hold.is_over() => return Err(not_kept(&why)),
    };
    let still = hold.end().await.err();
    let memory = ViewMemory { path: memory_file.path.clone(), size_bytes: bytes, qemu: description };
    guard.memory = Some(memory_file);
    Ok(WithMemory { opened, guard, memory, pause: begun.elapsed(), still })
}

fn not_kept(why: &dyn std::fmt::Display) -> Error {
    Error::new(ErrorKind::Refused, "the guest's memory cannot be kept").cause(why)
}

/// Beside the copy, with a bound for what may be written to it.
fn make_file(node: &Node, vm: &Vm) -> Result<(std::fs::File, u64, MemoryFile), Error> {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let memory_bytes = vm.with_record(|record| record.config.definition.memory_bytes);
    let most = memory_bytes + memory_bytes / HEADERS_PART + DEVICES;
    let room = free_bytes(node)? / KEEP_PART;
    if room < most {
        return Err(not_kept(&format!(
            "it may take {most} bytes beside the copy, and gets {room} at most, a part of what is free there"
        )));
    }
    let path = vm.paths.view_memory(NUMBER.fetch_add(1, Ordering::Relaxed));
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let file = file.map_err(|e| not_kept(&format!("make `{}`: {e}", path.display())))?;
    Ok((file, most, MemoryFile { path }))
}
