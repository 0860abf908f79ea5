//! Commands about migration: the stream that holds a machine's memory and devices.

use super::client::Client;
use super::commands::{QUICK, THOROUGH};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// How the last migration goes, or went.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Migration {
    /// `setup`, `active`, `device`, `completed`, `failed`, `cancelled` …; empty where there was none.
    pub status: String,
    pub error_desc: Option<String>,
    pub ram: MigratedMemory,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigratedMemory {
    /// How often QEMU went over all of it.
    pub dirty_sync_count: u64,
    /// Bytes of it, and those that are not sent yet.
    pub total: u64,
    pub remaining: u64,
}

/// Those that matter here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationParameters {
    /// Bytes a second, while the guest runs.
    pub max_bandwidth: u64,
    /// Milliseconds.
    pub downtime_limit: u64,
    #[serde(skip_serializing)]
    pub tls_creds: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MigrationCapability {
    pub capability: String,
    pub state: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct MemorySize {
    base_memory: u64,
    plugged_memory: u64,
}

#[derive(Debug, Deserialize)]
struct CommandName {
    name: String,
}

impl Client {
    pub async fn query_migrate(&self) -> Result<Migration> {
        self.ask("query-migrate", Value::Null, QUICK).await
    }

    pub async fn query_migrate_parameters(&self) -> Result<MigrationParameters> {
        self.ask("query-migrate-parameters", Value::Null, QUICK).await
    }

    pub async fn migrate_set_parameters(&self, parameters: &MigrationParameters) -> Result<()> {
        self.tell("migrate-set-parameters", json!(parameters), QUICK).await
    }

    pub async fn query_migrate_capabilities(&self) -> Result<Vec<MigrationCapability>> {
        self.ask("query-migrate-capabilities", Value::Null, QUICK).await
    }

    /// Begins to send the machine to who listens on `socket`.
    pub async fn migrate(&self, socket: &Path) -> Result<()> {
        self.tell("migrate", json!({ "uri": format!("unix:{}", socket.display()) }), THOROUGH).await
    }

    /// The guest goes on by itself then if it was QEMU that stopped it, and stands still if it was somebody else.
    pub async fn migrate_cancel(&self) -> Result<()> {
        self.tell("migrate_cancel", Value::Null, QUICK).await
    }

    /// Bytes of the guest's memory.
    pub async fn query_memory_size(&self) -> Result<u64> {
        let size: MemorySize = self.ask("query-memory-size-summary", Value::Null, QUICK).await?;
        Ok(size.base_memory + size.plugged_memory)
    }

    pub async fn knows_command(&self, name: &str) -> Result<bool> {
        let commands: Vec<CommandName> = self.ask("query-commands", Value::Null, QUICK).await?;
        Ok(commands.iter().any(|command| command.name == name))
    }

    /// Takes all images back that were given up at the end of a migration. From 10.0 on.
    pub async fn blockdev_set_active(&self) -> Result<()> {
        self.tell("blockdev-set-active", json!({ "active": true }), THOROUGH).await
    }
}
