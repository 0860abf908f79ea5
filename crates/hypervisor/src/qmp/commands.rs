//! The commands that are used here, typed. Each has a deadline; QEMU's main loop may be stuck behind a dead disk.

use super::block::DirtyBitmap;
use super::client::Client;
use crate::error::{Error, ErrorKind, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// For commands that only look or set something.
pub(super) const QUICK: Duration = Duration::from_secs(5);
/// For commands that may wait for I/O in flight.
pub(super) const THOROUGH: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// Whether the vCPUs run.
    pub running: bool,
    /// `running`, `paused`, `io-error`, `inmigrate`, `prelaunch` …
    pub status: String,
}

/// A disk as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Block {
    /// Name of an old-style drive (`-drive`), or empty.
    #[serde(default)]
    pub device: String,
    /// The device's id, or its path in QEMU's object tree if it has none; nothing for a drive without a device.
    #[serde(default)]
    pub qdev: Option<String>,
    /// What is behind it, if anything.
    #[serde(default)]
    pub inserted: Option<Inserted>,
    /// `ok`, `failed` or `nospace`
    #[serde(default, rename = "io-status")]
    pub io_status: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Inserted {
    #[serde(default, rename = "node-name")]
    pub node_name: Option<String>,
    /// The guest cannot write to it.
    #[serde(default, rename = "ro")]
    pub read_only: bool,
    pub image: Image,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Image {
    #[serde(rename = "virtual-size")]
    pub virtual_size: u64,
    #[serde(default)]
    pub format: String,
    /// A path, or `json:{…}` for what has none.
    #[serde(default)]
    pub filename: String,
    #[serde(default, rename = "format-specific")]
    pub format_specific: Value,
    /// Those in the image itself.
    #[serde(default)]
    pub snapshots: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct Chardev {
    label: String,
    #[serde(rename = "frontend-open")]
    open_in_guest: bool,
}

/// A block node of QEMU's own graph.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NamedNode {
    #[serde(rename = "node-name")]
    pub node_name: String,
    /// The driver.
    pub drv: String,
    pub image: Image,
    #[serde(default, rename = "dirty-bitmaps")]
    pub bitmaps: Vec<DirtyBitmap>,
}

impl Client {
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        name: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<T> {
        let value = self.execute(name, arguments, deadline).await?;
        serde_json::from_value(value).map_err(|error| {
            Error::new(
                ErrorKind::Protocol,
                format!("understand QEMU's answer to `{name}`"),
                error.to_string(),
            )
        })
    }

    pub(super) async fn tell(&self, name: &str, arguments: Value, deadline: Duration) -> Result<()> {
        self.execute(name, arguments, deadline).await.map(drop)
    }

    pub async fn query_status(&self) -> Result<Status> {
        self.ask("query-status", Value::Null, QUICK).await
    }

    /// Stops the vCPUs. They stand still long before the answer if a disk does not answer: see [`super::Event::Stop`].
    pub async fn stop(&self) -> Result<()> {
        self.tell("stop", Value::Null, THOROUGH).await
    }

    pub async fn cont(&self) -> Result<()> {
        self.tell("cont", Value::Null, THOROUGH).await
    }

    /// Presses the power button.
    pub async fn system_powerdown(&self) -> Result<()> {
        self.tell("system_powerdown", Value::Null, QUICK).await
    }

    pub async fn quit(&self) -> Result<()> {
        self.tell("quit", Value::Null, QUICK).await
    }

    pub async fn query_block(&self) -> Result<Vec<Block>> {
        self.ask("query-block", Value::Null, QUICK).await
    }

    pub async fn query_named_block_nodes(&self) -> Result<Vec<NamedNode>> {
        self.ask("query-named-block-nodes", json!({ "flat": true }), QUICK).await
    }

    /// Has QEMU write the screen to `file` as a PNG.
    pub async fn screendump(&self, file: &Path) -> Result<()> {
        self.tell("screendump", json!({ "filename": file, "format": "png" }), THOROUGH).await
    }

    pub async fn qom_get(&self, path: &str, property: &str) -> Result<Value> {
        self.execute("qom-get", json!({ "path": path, "property": property }), QUICK).await
    }

    /// Cuts a block node's network connection. It does not connect again: only for a node to be given up.
    /// Out of band in QEMU: works even while other commands hang.
    pub async fn yank_block_node(&self, node_name: &str) -> Result<()> {
        let instance = json!({ "type": "block-node", "node-name": node_name });
        self.tell("yank", json!({ "instances": [instance] }), QUICK).await
    }

    /// Reads the first sector: a node whose server hung up connects again only when it has something to ask.
    pub async fn touch(&self, node_name: &str) -> Result<()> {
        let line = format!("qemu-io {node_name} \"read 0 512\"");
        self.tell("human-monitor-command", json!({ "command-line": line }), THOROUGH).await
    }

    pub async fn block_resize(&self, node_name: &str, size_bytes: u64) -> Result<()> {
        self.tell("block_resize", json!({ "node-name": node_name, "size": size_bytes }), THOROUGH).await
    }

    /// Whether a program in the guest has opened its end of a channel.
    pub async fn is_open_in_guest(&self, chardev: &str) -> Result<bool> {
        let chardevs: Vec<Chardev> = self.ask("query-chardev", Value::Null, QUICK).await?;
        Ok(chardevs.iter().any(|found| found.label == chardev && found.open_in_guest))
    }

    pub async fn blockdev_add(&self, options: Value) -> Result<()> {
        self.tell("blockdev-add", options, THOROUGH).await
    }

    pub async fn blockdev_del(&self, node_name: &str) -> Result<()> {
        self.tell("blockdev-del", json!({ "node-name": node_name }), THOROUGH).await
    }

    pub async fn device_add(&self, options: Value) -> Result<()> {
        self.tell("device_add", options, THOROUGH).await
    }

    /// Asks the guest to let go of a device; [`super::Event::DeviceDeleted`] says when it did.
    pub async fn device_del(&self, id: &str) -> Result<()> {
        self.tell("device_del", json!({ "id": id }), QUICK).await
    }

    /// Sends gratuitous ARP and the like from every NIC, five times within half a second.
    pub async fn announce_self(&self) -> Result<()> {
        let schedule = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        self.tell("announce-self", schedule, QUICK).await
    }
}
