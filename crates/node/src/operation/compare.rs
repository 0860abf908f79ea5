use crate::jobs::Reporter;
use crate::vm::Vm;
use rempart_api::{Comparison, Error};
use rempart_engine::{Command, CommandOutput};
use rempart_types::EXTENT_SIZE;
use std::sync::Arc;

/// Differences named one by one.
const NAMED: usize = 100;

/// Checks the peer's copy against this one, while the machine runs.
pub async fn compare(vm: Arc<Vm>, reporter: Reporter) -> Result<serde_json::Value, Error> {
    let name = vm.name();
    let peer = vm.group.in_sync_peer().ok_or_else(|| {
        Error::refused(format!("cannot compare `{name}`: no peer holds everything"))
            .hint("run it on the node that leads, when `rempart status` says mirrored")
    })?;
    reporter.phase("comparing both copies");
    match vm.command("compare", Command::Compare { peer }).await? {
        CommandOutput::Compared { at, extents, differing } => {
            let comparison = Comparison {
                lsn: at.0,
                compared_bytes: extents * EXTENT_SIZE,
                different_extents: differing.len() as u64,
                first_differences: differing
                    .iter()
                    .take(NAMED)
                    .map(|(disk, extent)| (disk.0, extent.0 * EXTENT_SIZE))
                    .collect(),
            };
            serde_json::to_value(comparison).map_err(|e| Error::failed("cannot write the result").cause(e))
        }
        other => Err(Error::failed(format!("`{name}` was not compared")).cause(format!("{other:?}"))),
    }
}
