//! A machine that is being made: whatever ends that, nothing of it is left that looks like a machine.

use super::create::make_directory;
use crate::claims::NameClaim;
use crate::durable;
use crate::node::Node;
use crate::paths::{Paths, VmPaths};
use rempart_api::Error;
use std::io;
use std::sync::Arc;

/// The directory of a machine that is not whole yet. It goes with this value, or with the daemon's next start.
#[derive(Debug)]
pub struct Arrival {
    pub paths: VmPaths,
    is_whole: bool,
    _claim: NameClaim,
}

impl Arrival {
    pub fn begin(node: &Arc<Node>, name: &str) -> Result<Arrival, Error> {
        let claim = node.claims.claim(name)?;
        node.refuse_taken(name)?;
        let paths = node.paths.vm(name);
        let failed = |e: io::Error| Error::failed(format!("cannot make `{}`", paths.data.display())).cause(e);
        make_directory(&paths.data).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => {
                Error::conflict(format!("`{}` exists already, and is no machine", paths.data.display()))
                    .hint("remove the directory if nothing in it is needed")
            }
            _ => failed(e),
        })?;
        let arrival = Arrival { paths, is_whole: false, _claim: claim };
        durable::write(&arrival.paths.unfinished(), b"")
            .map_err(|e| Error::failed(format!("cannot make `{}`", arrival.paths.data.display())).cause(e))?;
        Ok(arrival)
    }

    /// From here on it is a machine.
    pub fn whole(&mut self) -> Result<(), Error> {
        std::fs::remove_file(self.paths.unfinished())
            .and_then(|()| durable::sync_dir(&self.paths.data))
            .map_err(|e| Error::failed(format!("cannot finish `{}`", self.paths.data.display())).cause(e))?;
        self.is_whole = true;
        Ok(())
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if !self.is_whole
            && let Err(error) = remove(&self.paths)
        {
            tracing::warn!(%error, "what was made of a machine is left until the daemon's next start");
        }
    }
}

/// The mark goes last: until then the directory is known for what it is.
fn remove(paths: &VmPaths) -> io::Result<()> {
    for entry in std::fs::read_dir(&paths.data)? {
        let path = entry?.path();
        if path.is_dir() {
            std::fs::remove_dir_all(&path)?;
        } else if path != paths.unfinished() {
            std::fs::remove_file(&path)?;
        }
    }
    std::fs::remove_dir_all(&paths.data)?;
    match std::fs::remove_dir_all(&paths.run) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Removes what an earlier daemon left of machines that it had not finished. Before anything else looks at them.
pub fn remove_unfinished(paths: &Paths) {
    let Ok(entries) = std::fs::read_dir(paths.vms()) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let machine = paths.vm(&name);
        if !machine.unfinished().exists() {
            // Nothing is in it, if its maker died before it could mark it.
            let _ = std::fs::remove_dir(&machine.data);
            continue;
        }
        match remove(&machine) {
            Ok(()) => tracing::info!(vm = name, "removed: it was not finished when the daemon ended"),
            Err(error) => {
                tracing::error!(vm = name, %error, "what is left of a machine that was not finished stays")
            }
        }
    }
}
