//! What a virtual machine is, apart from the contents of its disks.
//!
//! The definition travels in the group's log, so that the peer can start the same machine. Nothing in it depends
//! on the node it runs on: paths, sockets and TAP names are runtime matters (see [`crate::command_line`]).

use rempart_types::{DiskIndex, SECTOR_SIZE};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// Version of the encoded form. A reader refuses a newer one, and ignores fields it does not know.
pub const DEFINITION_FORMAT: u32 = 1;

/// The machine type of a new definition. Versioned, so that an upgrade of QEMU does not change the guest's hardware.
pub const DEFAULT_MACHINE_TYPE: &str = "pc-q35-10.0";

pub(crate) const MAX_DISKS: usize = 16;
const MAX_NICS: usize = 8;
/// Of the AHCI controller in q35's chipset.
const SATA_PORTS: u16 = 6;
const MAX_CPUS: u32 = 255;
const MIN_MEMORY_BYTES: u64 = 16 << 20;
const MAX_MEMORY_BYTES: u64 = 16 << 40;
/// QEMU cuts a virtio-blk serial here, without saying so.
const MAX_SERIAL_BYTES: usize = 20;
/// A bridge is a network device: the kernel's IFNAMSIZ without its terminator.
const MAX_BRIDGE_NAME_BYTES: usize = 15;
const MAX_NAME_BYTES: usize = 63;

/// A virtual machine: everything needed to start it, but the bytes of its disks and NVRAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Letters, digits, `-`, `_` and `.`, at most 63; starts with a letter or digit.
    pub name: String,
    pub uuid: VmUuid,
    /// A whole number of MiB.
    pub memory_bytes: u64,
    pub cpus: u32,
    #[serde(default)]
    pub cpu_model: CpuModel,
    /// A versioned QEMU machine type.
    #[serde(default = "default_machine_type")]
    pub machine_type: String,
    #[serde(default)]
    pub firmware: Firmware,
    #[serde(default)]
    pub nics: Vec<Nic>,
    pub disks: Vec<Disk>,
    /// Tried in this order. Empty: the disks in theirs.
    #[serde(default)]
    pub boot_order: Vec<BootDevice>,
    /// Start it when its node comes up.
    #[serde(default)]
    pub autostart: bool,
    /// Given to QEMU as they are, after all else. For experts; nothing here is checked.
    #[serde(default)]
    pub extra_options: Vec<String>,
}

/// The processor the guest sees. It must be the same on both nodes, or a live switchover is impossible and a guest
/// that was installed on the better one may not boot on the other.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuModel {
    /// x86-64-v2 with AES: every server processor since 2011, any vendor, KVM or emulated. Migratable.
    #[default]
    Baseline,
    /// One of QEMU's models, by its versioned name, with features after commas (`Skylake-Server-v5,-hle`).
    Named(String),
    /// The host's own processor: fastest, and only between nodes with equal processors. KVM only.
    Host,
    /// All that the accelerator can offer.
    Max,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firmware {
    #[default]
    Bios,
    Uefi,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// A bridge that exists on both nodes.
    pub bridge: String,
    pub mac: MacAddress,
    #[serde(default)]
    pub model: NicModel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicModel {
    #[default]
    Virtio,
    /// For guests without virtio drivers.
    E1000e,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub index: DiskIndex,
    /// A whole number of sectors.
    pub size_bytes: u64,
    #[serde(default)]
    pub bus: DiskBus,
    /// What the guest sees as the serial number. None: `disk-N`.
    #[serde(default)]
    pub serial: Option<String>,
    /// None: it was there before disks had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<DiskUuid>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    #[default]
    VirtioBlk,
    /// AHCI, for guests without virtio drivers. Cannot be attached to a running machine.
    Sata,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootDevice {
    Disk(DiskIndex),
    /// The NIC at this place among `nics`, from 0.
    Nic(u16),
}

/// A definition that cannot describe a machine, and the first reason found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}`: {problem}")]
pub struct InvalidDefinition {
    pub field: String,
    pub problem: String,
}

fn default_machine_type() -> String {
    DEFAULT_MACHINE_TYPE.into()
}

fn invalid(field: impl Into<String>, problem: impl Into<String>) -> InvalidDefinition {
    InvalidDefinition { field: field.into(), problem: problem.into() }
}

fn require(condition: bool, field: &str, problem: impl FnOnce() -> String) -> Result<(), InvalidDefinition> {
    if condition { Ok(()) } else { Err(invalid(field, problem())) }
}

#[derive(Serialize, Deserialize)]
struct Encoded {
    format: u32,
    definition: Definition,
}

#[derive(Deserialize)]
struct EncodedFormat {
    format: u32,
}

impl Definition {
    /// A machine with defaults and no disks or NICs yet.
    pub fn new(name: impl Into<String>, uuid: VmUuid, memory_bytes: u64, cpus: u32) -> Self {
        Self {
            name: name.into(),
            uuid,
            memory_bytes,
            cpus,
            cpu_model: CpuModel::default(),
            machine_type: default_machine_type(),
            firmware: Firmware::default(),
            nics: Vec::new(),
            disks: Vec::new(),
            boot_order: Vec::new(),
            autostart: false,
            extra_options: Vec::new(),
        }
    }

    /// Checks what can be checked without a host.
    pub fn validate(&self) -> Result<(), InvalidDefinition> {
        validate_name(&self.name)?;
        require((MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&self.memory_bytes), "memory_bytes", || {
            format!("{} is not between 16 MiB and 16 TiB", self.memory_bytes)
        })?;
        require(self.memory_bytes.is_multiple_of(1 << 20), "memory_bytes", || {
            format!("{} is not a whole number of MiB", self.memory_bytes)
        })?;
        require((1..=MAX_CPUS).contains(&self.cpus), "cpus", || {
            format!("{} is not between 1 and {MAX_CPUS}", self.cpus)
        })?;
        // The places of devices are those of a q35, and an unversioned type would change with QEMU.
        let q35 = self.machine_type.starts_with("pc-q35-") && is_option_word(&self.machine_type);
        require(q35, "machine_type", || format!("`{}` is not a versioned `pc-q35-…`", self.machine_type))?;
        if let CpuModel::Named(model) = &self.cpu_model {
            let fine = model.split(',').all(|part| {
                let feature = part.strip_prefix(['+', '-']).unwrap_or(part);
                is_option_word(&feature.replacen('=', "", 1))
            });
            require(fine, "cpu_model", || format!("`{model}` is not a model with features"))?;
        }
        self.validate_disks()?;
        self.validate_nics()?;
        self.validate_boot_order()
    }

    fn validate_disks(&self) -> Result<(), InvalidDefinition> {
        require(self.disks.len() <= MAX_DISKS, "disks", || {
            format!("{} disks, at most {MAX_DISKS}", self.disks.len())
        })?;
        let mut indexes = BTreeSet::new();
        let mut serials = BTreeSet::new();
        for disk in &self.disks {
            let field = format!("disks[{}]", disk.index);
            require(indexes.insert(disk.index), &field, || "given twice".into())?;
            require(usize::from(disk.index.0) < MAX_DISKS, &field, || {
                format!("the last possible disk is {}", MAX_DISKS - 1)
            })?;
            require(disk.bus != DiskBus::Sata || disk.index.0 < SATA_PORTS, &field, || {
                format!("the last possible SATA disk is {}", SATA_PORTS - 1)
            })?;
            require(disk.size_bytes > 0 && disk.size_bytes.is_multiple_of(SECTOR_SIZE), &field, || {
                format!("size {} is not a positive multiple of {SECTOR_SIZE}", disk.size_bytes)
            })?;
            let serial = disk.serial_number();
            require(
                !serial.is_empty() && serial.len() <= MAX_SERIAL_BYTES && is_option_word(&serial),
                &field,
                || {
                    format!(
                        "serial `{serial}` is not 1 to {MAX_SERIAL_BYTES} letters, digits, `-`, `_` or `.`"
                    )
                },
            )?;
            require(serials.insert(serial.clone()), &field, || {
                format!("serial `{serial}` is another disk's")
            })?;
        }
        Ok(())
    }

    fn validate_nics(&self) -> Result<(), InvalidDefinition> {
        require(self.nics.len() <= MAX_NICS, "nics", || {
            format!("{} NICs, at most {MAX_NICS}", self.nics.len())
        })?;
        let mut macs = BTreeSet::new();
        for (place, nic) in self.nics.iter().enumerate() {
            let field = format!("nics[{place}]");
            require(is_interface_name(&nic.bridge), &field, || {
                format!("`{}` is not a bridge's name", nic.bridge)
            })?;
            require(nic.mac.is_unicast(), &field, || format!("{} is not a unicast address", nic.mac))?;
            require(macs.insert(nic.mac), &field, || format!("{} is another NIC's", nic.mac))?;
        }
        Ok(())
    }

    fn validate_boot_order(&self) -> Result<(), InvalidDefinition> {
        for (place, device) in self.boot_order.iter().enumerate() {
            let field = format!("boot_order[{place}]");
            require(!self.boot_order[..place].contains(device), &field, || "given twice".into())?;
            match device {
                BootDevice::Disk(index) => {
                    require(self.disk(*index).is_some(), &field, || format!("there is no disk {index}"))?;
                }
                BootDevice::Nic(place) => {
                    require(usize::from(*place) < self.nics.len(), &field, || {
                        format!("there is no NIC {place}")
                    })?;
                }
            }
        }
        Ok(())
    }

    pub fn disk(&self, index: DiskIndex) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.index == index)
    }

    /// The form that travels in the log: JSON with its format's number.
    pub fn encode(&self) -> Vec<u8> {
        let encoded = Encoded { format: DEFINITION_FORMAT, definition: self.clone() };
        serde_json::to_vec(&encoded).expect("a definition has only strings for keys")
    }

    /// Reads what [`Definition::encode`] wrote, here or on the peer, and validates it.
    pub fn decode(bytes: &[u8]) -> Result<Self, InvalidDefinition> {
        let unreadable = |error: serde_json::Error| invalid("definition", error.to_string());
        // The number first: a newer format may not even parse as this one.
        let EncodedFormat { format } = serde_json::from_slice(bytes).map_err(unreadable)?;
        require(format <= DEFINITION_FORMAT, "format", || {
            format!("{format} is newer than {DEFINITION_FORMAT}, the newest this version reads")
        })?;
        let Encoded { definition, .. } = serde_json::from_slice(bytes).map_err(unreadable)?;
        definition.validate()?;
        Ok(definition)
    }
}

impl Disk {
    pub fn new(index: DiskIndex, size_bytes: u64) -> Self {
        Self { index, size_bytes, bus: DiskBus::default(), serial: None, uuid: None }
    }

    /// What the guest sees, default included.
    pub fn serial_number(&self) -> String {
        self.serial.clone().unwrap_or_else(|| format!("disk-{}", self.index))
    }
}

/// A machine's name is part of paths, logs and QEMU's own options.
fn validate_name(name: &str) -> Result<(), InvalidDefinition> {
    require(!name.is_empty() && name.len() <= MAX_NAME_BYTES, "name", || {
        format!("`{name}` is not 1 to {MAX_NAME_BYTES} characters")
    })?;
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    require(starts_well && is_option_word(name), "name", || {
        format!("`{name}` is not letters, digits, `-`, `_` or `.`, starting with a letter or digit")
    })
}

/// Safe inside QEMU's comma-separated options.
fn is_option_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

fn is_interface_name(text: &str) -> bool {
    is_option_word(text) && text.len() <= MAX_BRIDGE_NAME_BYTES && text != "." && text != ".."
}

/// A machine's UUID as its firmware tables show it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmUuid(pub u128);

/// Tells a disk from every other that ever had its place in a machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskUuid(pub u128);

macro_rules! uuid_as_text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let hex = format!("{:032x}", self.0);
                write!(f, "{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidDefinition;

            fn from_str(text: &str) -> Result<Self, InvalidDefinition> {
                let problem = || invalid("uuid", format!("`{text}` is not a UUID"));
                let lengths: Vec<usize> = text.split('-').map(str::len).collect();
                if lengths != [8, 4, 4, 4, 12] || !text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit()) {
                    return Err(problem());
                }
                u128::from_str_radix(&text.replace('-', ""), 16).map(Self).map_err(|_| problem())
            }
        }
    };
}

uuid_as_text!(VmUuid);
uuid_as_text!(DiskUuid);

/// A NIC's hardware address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// An address in QEMU's range (52:54:00) with three bytes chosen by the caller.
    pub fn in_qemu_range(tail: [u8; 3]) -> Self {
        Self([0x52, 0x54, 0x00, tail[0], tail[1], tail[2]])
    }

    fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddress {
    type Err = InvalidDefinition;

    fn from_str(text: &str) -> Result<Self, InvalidDefinition> {
        let problem = || invalid("mac", format!("`{text}` is not six hexadecimal bytes with `:` between"));
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(problem)?;
            if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(problem());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| problem())?;
        }
        if parts.next().is_some() { Err(problem()) } else { Ok(Self(bytes)) }
    }
}

macro_rules! serde_as_text {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

serde_as_text!(VmUuid);
serde_as_text!(DiskUuid);
serde_as_text!(MacAddress);

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Definition {
        let mut definition = Definition::new("db-01", VmUuid(7), 1 << 30, 2);
        definition.disks = vec![Disk::new(DiskIndex(0), 1 << 30), Disk::new(DiskIndex(1), 1 << 30)];
        definition.nics = vec![Nic {
            bridge: "br0".into(),
            mac: "52:54:00:12:34:56".parse().unwrap(),
            model: NicModel::Virtio,
        }];
        definition
    }

    fn problem_with(change: impl FnOnce(&mut Definition)) -> String {
        let mut definition = sample();
        change(&mut definition);
        definition.validate().unwrap_err().to_string()
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let definition = sample();
        assert_eq!(Definition::decode(&definition.encode()), Ok(definition));
    }

    #[test]
    fn a_newer_format_is_refused_by_name() {
        let error = Definition::decode(br#"{"format":2,"definition":{"shape":"unknown"}}"#).unwrap_err();
        assert_eq!(error.to_string(), "`format`: 2 is newer than 1, the newest this version reads");
    }

    #[test]
    fn an_unknown_field_of_the_same_format_is_ignored() {
        let mut value: serde_json::Value = serde_json::from_slice(&sample().encode()).unwrap();
        value["definition"]["colour"] = "green".into();
        assert_eq!(Definition::decode(value.to_string().as_bytes()), Ok(sample()));
    }

    #[test]
    fn each_mistake_is_named() {
        assert_eq!(
            problem_with(|d| d.name = "a,b=c".into()),
            "`name`: `a,b=c` is not letters, digits, `-`, `_` or `.`, starting with a letter or digit"
        );
        assert_eq!(
            problem_with(|d| d.memory_bytes = (1 << 30) + 5),
            "`memory_bytes`: 1073741829 is not a whole number of MiB"
        );
        assert_eq!(problem_with(|d| d.cpus = 0), "`cpus`: 0 is not between 1 and 255");
        assert_eq!(problem_with(|d| d.disks[1].index = DiskIndex(0)), "`disks[0]`: given twice");
        assert_eq!(
            problem_with(|d| d.disks[1].size_bytes = 100),
            "`disks[1]`: size 100 is not a positive multiple of 512"
        );
        assert_eq!(
            problem_with(|d| d.disks[1].serial = Some("disk-0".into())),
            "`disks[1]`: serial `disk-0` is another disk's"
        );
        assert_eq!(
            problem_with(|d| d.nics[0].mac = MacAddress([1, 0, 0, 0, 0, 1])),
            "`nics[0]`: 01:00:00:00:00:01 is not a unicast address"
        );
        assert_eq!(
            problem_with(|d| d.nics[0].bridge = "a-name-that-is-too-long".into()),
            "`nics[0]`: `a-name-that-is-too-long` is not a bridge's name"
        );
        assert_eq!(
            problem_with(|d| d.boot_order = vec![BootDevice::Disk(DiskIndex(3))]),
            "`boot_order[0]`: there is no disk 3"
        );
        assert_eq!(
            problem_with(|d| d.cpu_model = CpuModel::Named("max,foo bar".into())),
            "`cpu_model`: `max,foo bar` is not a model with features"
        );
    }

    #[test]
    fn named_models_with_features_are_accepted() {
        let mut definition = sample();
        definition.cpu_model = CpuModel::Named("Skylake-Server-v5,-hle,+aes,pmu=off".into());
        assert_eq!(definition.validate(), Ok(()));
    }

    #[test]
    fn addresses_are_read_strictly() {
        assert_eq!("52:54:00:aB:00:01".parse::<MacAddress>().unwrap().to_string(), "52:54:00:ab:00:01");
        for text in ["52:54:00:ab:00", "52:54:00:ab:00:01:02", "52:54:00:+b:00:01", "525400ab0001"] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
        let uuid: VmUuid = "12345678-9abc-def0-1234-56789abcdef0".parse().unwrap();
        assert_eq!(uuid.to_string(), "12345678-9abc-def0-1234-56789abcdef0");
        assert!("123456789abcdef0123456789abcdef0".parse::<VmUuid>().is_err());
    }
}
