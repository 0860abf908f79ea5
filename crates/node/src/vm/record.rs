//! What a node remembers of a virtual machine: the part that travels in the group's log, and its own.

use crate::config::TimingSection;
use crate::durable;
use rempart_api::{Error, UnfinishedRestore};
use rempart_hypervisor::Definition;
use rempart_types::{DiskIndex, GroupId, NodeId, RegisterId};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

/// The newest form that this build writes and reads.
const FORMAT: u32 = 1;

/// Where the group's register is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegisterPlace {
    /// A file on this node: a machine that has one copy only.
    Local,
    Witness,
}

/// The part that every replica knows, as a config record of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    pub format: u32,
    pub definition: Definition,
    /// Whoever leads runs it.
    pub should_run: bool,
    /// Nodes that keep a copy.
    pub replicas: Vec<NodeId>,
    /// The times that its copies agreed upon when it was protected. Each uses these, whatever its node's
    /// configuration says by now: the lease holds only if all wait by the same. None: its node's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timing: Option<TimingSection>,
    /// UEFI variables.
    #[serde(default, with = "hex_bytes", skip_serializing_if = "Option::is_none")]
    pub nvram: Option<Vec<u8>>,
    /// Its disks are being overwritten: it does not start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restoring: Option<UnfinishedRestore>,
}

impl VmConfig {
    pub fn new(definition: Definition, me: NodeId) -> VmConfig {
        let should_run = definition.autostart;
        VmConfig {
            format: FORMAT,
            definition,
            should_run,
            replicas: vec![me],
            timing: None,
            nvram: None,
            restoring: None,
        }
    }

    /// Refuses what its disks are not fit for while they are being overwritten.
    pub fn refuse_unfinished(&self, verb: &str) -> Result<(), Error> {
        let Some(UnfinishedRestore { point, disk, before, .. }) = &self.restoring else { return Ok(()) };
        let name = &self.definition.name;
        let only = disk.as_ref().map_or(String::new(), |disk| format!(" --disk {disk}"));
        let back = before
            .as_ref()
            .map_or(String::new(), |before| format!("; with `{before}` instead, it is as it was before"));
        Err(Error::refused(format!("cannot {verb} `{name}`"))
            .cause(format!("a restore of `{point}` onto it has not ended"))
            .hint(format!("run `rempart restore {point} --over {name}{only} --yes` again{back}")))
    }

    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a definition always encodes")
    }

    pub fn decode(bytes: &[u8]) -> Result<VmConfig, String> {
        let config: VmConfig = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if config.format > FORMAT {
            return Err(format!("it has format {}, this build reads up to {FORMAT}", config.format));
        }
        config.definition.validate().map_err(|e| e.to_string())?;
        config.check_timing()?;
        Ok(config)
    }

    fn check_timing(&self) -> Result<(), String> {
        self.timing
            .map_or(Ok(()), |timing| timing.to_cluster().validate())
            .map_err(|e| format!("its times do not fit together: {e}"))
    }
}

/// A disk's image on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFile {
    pub index: DiskIndex,
    pub path: PathBuf,
    pub size_bytes: u64,
    /// It was there before us and stays when the machine is deleted.
    #[serde(default)]
    pub adopted: bool,
}

/// `vm.json`: this node's own view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    pub format: u32,
    pub group: GroupId,
    pub register: RegisterId,
    pub place: RegisterPlace,
    /// The register on the witness that the group is moving to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving_to: Option<RegisterId>,
    pub disks: Vec<DiskFile>,
    /// The latest config record this node saw.
    pub config: VmConfig,
}

impl VmRecord {
    pub fn new(
        group: GroupId,
        register: RegisterId,
        place: RegisterPlace,
        disks: Vec<DiskFile>,
        config: VmConfig,
    ) -> VmRecord {
        VmRecord { format: FORMAT, group, register, place, moving_to: None, disks, config }
    }

    pub fn name(&self) -> &str {
        &self.config.definition.name
    }

    /// Where `register` is kept.
    pub fn place_of(&self, register: RegisterId) -> RegisterPlace {
        if self.moving_to == Some(register) { RegisterPlace::Witness } else { self.place }
    }

    pub fn load(path: &Path) -> io::Result<Option<VmRecord>> {
        let Some(record) = durable::read_json::<VmRecord>(path)? else { return Ok(None) };
        let wrong = |what: String| {
            io::Error::new(io::ErrorKind::InvalidData, format!("`{}`: {what}", path.display()))
        };
        if record.format > FORMAT {
            return Err(wrong(format!("it has format {}, this build reads up to {FORMAT}", record.format)));
        }
        record.config.check_timing().map_err(wrong)?;
        Ok(Some(record))
    }

    pub fn save(&self, path: &Path) -> io::Result<()> {
        durable::write_json(path, self)
    }
}

/// Bytes as hexadecimal text in JSON.
pub(crate) mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::fmt::Write;

    pub fn serialize<S: Serializer>(bytes: &Option<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
        match bytes {
            None => serializer.serialize_none(),
            Some(bytes) => serializer.serialize_some(&to_text(bytes)),
        }
    }

    pub fn to_text(bytes: &[u8]) -> String {
        let mut text = String::with_capacity(bytes.len() * 2);
        for byte in bytes {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u8>>, D::Error> {
        let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        from_text(&text).map(Some).ok_or_else(|| serde::de::Error::custom("not hexadecimal bytes"))
    }

    pub fn from_text(text: &str) -> Option<Vec<u8>> {
        if !text.len().is_multiple_of(2) || !text.is_ascii() {
            return None;
        }
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rempart_hypervisor::definition::VmUuid;

    #[test]
    fn times_that_do_not_fit_together_are_not_taken_from_the_log() {
        let definition = Definition::new("shop", VmUuid(1), 64 << 20, 1);
        let mut config = VmConfig::new(definition, NodeId(1));
        assert_eq!(VmConfig::decode(&config.encode()), Ok(config.clone()));
        config.timing = Some(TimingSection::default());
        assert_eq!(VmConfig::decode(&config.encode()), Ok(config.clone()));
        config.timing = Some(TimingSection { lease_ms: 10, ..TimingSection::default() });
        let refused = VmConfig::decode(&config.encode()).unwrap_err();
        assert!(refused.contains("its times do not fit together"), "{refused}");
    }
}
