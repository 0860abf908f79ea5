//! Commands about block nodes, dirty bitmaps, jobs and exports.

use super::client::Client;
use super::commands::{QUICK, THOROUGH};
use crate::error::{Error, ErrorKind, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// A block node records in it which parts were written.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DirtyBitmap {
    /// Bitmaps without a name belong to a running job.
    #[serde(default)]
    pub name: String,
    /// It does record.
    #[serde(default)]
    pub recording: bool,
    /// A job or an export uses it.
    #[serde(default)]
    pub busy: bool,
    /// Kept in the image.
    #[serde(default)]
    pub persistent: bool,
    /// It missed writes: QEMU did not end in order. Good for nothing but to be removed.
    #[serde(default)]
    pub inconsistent: bool,
    #[serde(default)]
    pub granularity: u32,
}

/// A device's block nodes, from the one next to the guest down to the file: each is the primary child of the one before.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NodeChain {
    #[serde(default)]
    pub qdev: Option<String>,
    #[serde(default, rename = "node-name")]
    pub node_name: Option<String>,
    #[serde(default)]
    pub parent: Option<Box<NodeChain>>,
}

impl NodeChain {
    /// Names from top to bottom.
    pub fn names(&self) -> Vec<&str> {
        let below = std::iter::successors(Some(self), |node| node.parent.as_deref());
        below.filter_map(|node| node.node_name.as_deref()).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Job {
    pub id: String,
    /// `running`, `concluded` …
    pub status: String,
    #[serde(default)]
    pub error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockExport {
    pub id: String,
    #[serde(default, rename = "node-name")]
    pub node_name: String,
}

/// Between two looks at something that takes milliseconds.
const POLL: Duration = Duration::from_millis(5);

impl Client {
    /// Each device's block nodes. An empty drive has a chain without a name.
    pub async fn query_node_chains(&self) -> Result<Vec<NodeChain>> {
        self.ask("query-blockstats", Value::Null, QUICK).await
    }

    /// All actions, or none, at one instant.
    pub async fn transaction(&self, actions: Vec<Value>) -> Result<()> {
        self.tell("transaction", json!({ "actions": actions }), THOROUGH).await
    }

    /// Changes nodes that exist, all at one instant: no request is in flight while it is done.
    pub async fn blockdev_reopen(&self, nodes: Vec<Value>) -> Result<()> {
        self.tell("blockdev-reopen", json!({ "options": nodes }), THOROUGH).await
    }

    /// Writes a new, empty image into a block node and waits until that is done.
    pub async fn blockdev_create(&self, job: &str, options: Value) -> Result<()> {
        self.tell("blockdev-create", json!({ "job-id": job, "options": options }), THOROUGH).await?;
        let action = || "make an image in QEMU".to_owned();
        let end = tokio::time::Instant::now() + THOROUGH;
        loop {
            let jobs = self.query_jobs().await?;
            let Some(found) = jobs.into_iter().find(|found| found.id == job) else {
                return Err(Error::new(ErrorKind::Protocol, action(), "its job is gone"));
            };
            if found.status == "concluded" {
                self.job_dismiss(job).await?;
                return match found.error {
                    Some(error) => Err(Error::new(ErrorKind::Refused, action(), error)),
                    None => Ok(()),
                };
            }
            if tokio::time::Instant::now() > end {
                return Err(Error::deadline(action(), THOROUGH));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    pub async fn query_jobs(&self) -> Result<Vec<Job>> {
        self.ask("query-jobs", Value::Null, QUICK).await
    }

    pub async fn job_dismiss(&self, id: &str) -> Result<()> {
        self.tell("job-dismiss", json!({ "id": id }), QUICK).await
    }

    /// Takes a named bitmap off a node, from its image too.
    pub async fn remove_bitmap(&self, node: &str, name: &str) -> Result<()> {
        self.tell("block-dirty-bitmap-remove", json!({ "node": node, "name": name }), THOROUGH).await
    }

    /// QEMU has one NBD server for everybody who uses it.
    pub async fn nbd_server_start(&self, socket: &Path) -> Result<()> {
        let address = json!({ "type": "unix", "data": { "path": socket } });
        self.tell("nbd-server-start", json!({ "addr": address, "max-connections": 0 }), QUICK).await
    }

    pub async fn nbd_server_stop(&self) -> Result<()> {
        self.tell("nbd-server-stop", Value::Null, THOROUGH).await
    }

    pub async fn query_block_exports(&self) -> Result<Vec<BlockExport>> {
        self.ask("query-block-exports", Value::Null, QUICK).await
    }

    pub async fn block_export_add(&self, options: Value) -> Result<()> {
        self.tell("block-export-add", options, THOROUGH).await
    }

    /// Ends an export and its connections, and waits until QEMU let go of its node.
    pub async fn block_export_remove(&self, id: &str) -> Result<()> {
        self.tell("block-export-del", json!({ "id": id, "mode": "hard" }), THOROUGH).await?;
        let end = tokio::time::Instant::now() + THOROUGH;
        while self.query_block_exports().await?.iter().any(|export| export.id == id) {
            if tokio::time::Instant::now() > end {
                return Err(Error::deadline("end an export of QEMU", THOROUGH));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    pub async fn qom_set(&self, path: &str, property: &str, value: Value) -> Result<()> {
        let arguments = json!({ "path": path, "property": property, "value": value });
        self.tell("qom-set", arguments, THOROUGH).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_read_from_top_to_bottom() {
        let chain: NodeChain = serde_json::from_value(json!({
            "device": "", "qdev": "/machine/peripheral/a/virtio-backend", "node-name": "top",
            "stats": {}, "backing": { "node-name": "base", "stats": {} },
            "parent": { "node-name": "format", "stats": {}, "parent": { "node-name": "file", "stats": {} } },
        }))
        .unwrap();
        assert_eq!(chain.names(), ["top", "format", "file"]);
        let empty: NodeChain = serde_json::from_value(json!({ "device": "cd", "stats": {} })).unwrap();
        assert_eq!(empty.names(), [""; 0]);
    }
}
