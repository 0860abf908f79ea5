//! QEMU's devices and block nodes, as far as a view needs to know them.

use super::names::{self, Role, ViewId};
use crate::error::{Error, ErrorKind, Result};
use crate::qmp::Client;
use crate::qmp::block::{DirtyBitmap, NodeChain};
use crate::qmp::commands::{Block, NamedNode};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// Block nodes that show what is below them.
const FILTERS: [&str; 9] = [
    "copy-on-read",
    "copy-before-write",
    "throttle",
    "compress",
    "preallocate",
    "mirror_top",
    "commit_top",
    "blkdebug",
    "blklogwrites",
];

/// What QEMU told at one moment.
#[derive(Debug)]
pub(super) struct Graph {
    devices: Vec<Block>,
    /// By the device's name or path in QEMU.
    chains: BTreeMap<String, Vec<String>>,
    nodes: BTreeMap<String, NamedNode>,
    /// Devices whose commands go past block nodes, by the same name.
    passed_through: BTreeSet<String>,
}

/// A disk that the guest can write to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// What users and QEMU's command line call it.
    pub id: String,
    /// Its device in QEMU's object tree.
    pub path: String,
    /// The block node next to the guest.
    pub root: String,
    /// The first block node that is no filter: where bitmaps belong.
    pub data: String,
    pub driver: String,
    pub size_bytes: u64,
    pub file: Option<PathBuf>,
    /// Bitmaps can be kept in its image.
    pub keeps_bitmaps: bool,
    pub bitmaps: Vec<DirtyBitmap>,
    /// So many snapshots are in its image.
    pub snapshots: usize,
}

/// Where the guest's firmware keeps its variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Variables {
    pub id: String,
    pub root: String,
    pub size_bytes: u64,
}

/// A device that is not part of a view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedDevice {
    pub id: String,
    pub reason: SkipReason,
}

#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SkipReason {
    /// A drive without a medium.
    Empty,
    /// A CD, or a disk that the guest cannot write to.
    ReadOnly,
    /// A drive that no device shows to the guest.
    NoDevice,
    /// The firmware or its variables, which belong to the VM's definition. Its file, if it has one.
    Firmware(Option<PathBuf>),
    /// A directory of the host, shown as a disk.
    HostDirectory,
    /// The guest talks to a device of the host itself, past QEMU's block layer.
    PassedThrough,
}

impl SkipReason {
    /// The guest may have written data there that a backup of the view lacks.
    pub fn loses_data(&self) -> bool {
        matches!(self, Self::HostDirectory | Self::PassedThrough)
    }
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "it is empty"),
            Self::ReadOnly => write!(f, "the guest cannot write to it"),
            Self::NoDevice => write!(f, "no device shows it to the guest"),
            Self::Firmware(_) => write!(f, "it holds the firmware or its variables"),
            Self::HostDirectory => write!(f, "it is a directory of the host"),
            Self::PassedThrough => write!(f, "the guest talks to the host's device itself, past QEMU"),
        }
    }
}

/// Where a view's node `top` is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub above: Above,
    /// The view was taken: writes pass its copying node.
    pub taken: bool,
    /// What the view was put on, or what has taken that place since.
    pub below: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Above {
    /// The device itself, by its path.
    Device(String),
    Node(String),
}

impl Graph {
    pub(super) async fn read(client: &Client) -> Result<Self> {
        let devices = client.query_block().await?;
        let chains = client.query_node_chains().await?;
        let nodes = client.query_named_block_nodes().await?;
        let mut graph = Self::new(devices, chains, nodes);
        for qdev in graph.devices.iter().filter_map(|device| device.qdev.clone()) {
            let kind = client.qom_get(&object_path(&qdev), "type").await?;
            if matches!(kind.as_str(), Some("scsi-block" | "scsi-generic")) {
                graph.passed_through.insert(qdev);
            }
        }
        Ok(graph)
    }

    fn new(devices: Vec<Block>, chains: Vec<NodeChain>, nodes: Vec<NamedNode>) -> Self {
        let chains = chains.iter().filter_map(|chain| {
            let names = chain.names().into_iter().map(str::to_owned).collect::<Vec<_>>();
            Some((chain.qdev.clone()?, names)).filter(|(_, names)| !names.is_empty())
        });
        let nodes = nodes.into_iter().map(|node| (node.node_name.clone(), node));
        Self { devices, chains: chains.collect(), nodes: nodes.collect(), passed_through: BTreeSet::new() }
    }

    /// The disks that the guest can write to, and what else there is.
    pub(super) fn disks(&self) -> Result<(Vec<Disk>, Vec<SkippedDevice>)> {
        self.refuse_hidden_jobs()?;
        let (mut disks, mut skipped) = (Vec::new(), Vec::new());
        for device in &self.devices {
            let id = device_id(device);
            match self.look_at(device) {
                Ok(disk) if disks.iter().any(|known: &Disk| known.id == disk.id) => {
                    let action = "tell this VM's disks apart";
                    let detail = format!("two of them are called `{id}`: give their devices an `id=`");
                    return Err(Error::new(ErrorKind::Refused, action, detail));
                }
                Ok(disk) => disks.push(disk),
                Err(reason) => skipped.push(SkippedDevice { id, reason }),
            }
        }
        Ok((disks, skipped))
    }

    /// A job that was started without a name for its filter has one that QEMU does not show: to put a node under the
    /// device would cut the job off from the guest's writes.
    fn refuse_hidden_jobs(&self) -> Result<()> {
        let shown = |name: &String| self.chains.values().any(|chain| chain.contains(name));
        let hidden = self.nodes.values().find(|node| {
            let filter = matches!(node.drv.as_str(), "mirror_top" | "commit_top" | "copy-before-write");
            filter && node.node_name.starts_with('#') && !shown(&node.node_name)
        });
        match hidden {
            None => Ok(()),
            Some(node) => {
                let detail = format!(
                    "a block job of another program runs on it (block node `{}`): try again when it has ended",
                    node.node_name
                );
                Err(Error::new(ErrorKind::Refused, "take a view of this VM", detail))
            }
        }
    }

    /// Somebody keeps old bytes of a disk, or a second copy, in step with it.
    pub(super) fn copies_elsewhere(&self) -> bool {
        self.nodes
            .values()
            .any(|node| matches!(node.drv.as_str(), "mirror_top" | "commit_top" | "copy-before-write"))
    }

    fn look_at(&self, device: &Block) -> Result<Disk, SkipReason> {
        let inserted = device.inserted.as_ref().ok_or(SkipReason::Empty)?;
        let qdev = device.qdev.as_ref().ok_or(SkipReason::NoDevice)?;
        let chain = self.chains.get(qdev).ok_or(SkipReason::NoDevice)?;
        let file = chain.last().and_then(|name| self.file_of(name));
        if is_firmware(device, qdev) {
            return Err(SkipReason::Firmware(file));
        }
        if inserted.read_only {
            return Err(SkipReason::ReadOnly);
        }
        if self.passed_through.contains(qdev) {
            return Err(SkipReason::PassedThrough);
        }
        if chain.iter().any(|name| self.driver(name) == "vvfat") {
            return Err(SkipReason::HostDirectory);
        }
        let is_filter =
            |name: &&String| FILTERS.contains(&self.driver(name)) || names::parse_node(name).is_some();
        let data = chain.iter().find(|name| !is_filter(name)).unwrap_or(&chain[0]);
        let node = self.nodes.get(data);
        let compat = node.map(|node| &node.image.format_specific["data"]["compat"]);
        Ok(Disk {
            id: device_id(device),
            path: object_path(qdev),
            root: chain[0].clone(),
            data: data.clone(),
            driver: self.driver(data).to_owned(),
            size_bytes: node.map_or(inserted.image.virtual_size, |node| node.image.virtual_size),
            file,
            keeps_bitmaps: self.driver(data) == "qcow2"
                && compat.is_some_and(|compat| *compat != "0.10" && !compat.is_null()),
            bitmaps: node.map(|node| node.bitmaps.clone()).unwrap_or_default(),
            snapshots: node.map_or(0, |node| node.image.snapshots.len()),
        })
    }

    /// The flash that the guest can write to; the later one where its program lies in such a flash, too.
    pub(super) fn variables(&self) -> Option<Variables> {
        let found = self.devices.iter().filter_map(|device| {
            let (inserted, qdev) = (device.inserted.as_ref()?, device.qdev.as_ref()?);
            let root = self.chains.get(qdev)?.first()?.clone();
            let is_kept = is_firmware(device, qdev) && !inserted.read_only;
            let size_bytes = inserted.image.virtual_size;
            is_kept.then(|| Variables { id: device_id(device), root, size_bytes })
        });
        found.max_by(|one, other| one.id.cmp(&other.id))
    }

    fn driver(&self, node: &str) -> &str {
        self.nodes.get(node).map_or("", |node| &node.drv)
    }

    fn file_of(&self, node: &str) -> Option<PathBuf> {
        let path = Path::new(&self.nodes.get(node)?.image.filename);
        path.is_absolute().then(|| path.to_owned())
    }

    /// The nodes that views have made.
    pub(super) fn view_nodes(&self) -> impl Iterator<Item = (ViewId, Role, usize)> + '_ {
        self.nodes.keys().filter_map(|name| names::parse_node(name))
    }

    /// The file behind a view's scratch image.
    pub(super) fn scratch_file(&self, view: ViewId) -> Option<PathBuf> {
        let store = self.view_nodes().find(|(owner, role, _)| *owner == view && *role == Role::Store)?;
        self.file_of(&names::node(view, Role::Store, store.2)).or_else(|| {
            // A `raw` node of bounded size tells itself as `json:{…}`.
            let text = &self.nodes.get(&names::node(view, Role::Store, store.2))?.image.filename;
            let options: serde_json::Value = serde_json::from_str(text.strip_prefix("json:")?).ok()?;
            Some(PathBuf::from(options["file"]["filename"].as_str()?))
        })
    }

    /// Named bitmaps, with the node that each is on.
    pub(super) fn bitmaps(&self) -> impl Iterator<Item = (&str, &DirtyBitmap)> {
        self.nodes
            .values()
            .flat_map(|node| node.bitmaps.iter().map(move |bitmap| (node.node_name.as_str(), bitmap)))
    }

    /// Where a view is in the path from a device to its disk; None if it is in no such path.
    pub(super) fn place(&self, view: ViewId, disk: usize) -> Option<Place> {
        let [top, copy, base] = [Role::Top, Role::Copy, Role::Base].map(|role| names::node(view, role, disk));
        let (device, chain) = self.chains.iter().find(|(_, chain)| chain.contains(&top))?;
        let at = chain.iter().position(|name| *name == top)?;
        let taken = chain.get(at + 1) == Some(&copy);
        let last = if taken { chain.iter().position(|name| *name == base)? } else { at };
        let below = chain.get(last + 1)?.clone();
        let above = match at {
            0 => Above::Device(object_path(device)),
            _ => Above::Node(chain[at - 1].clone()),
        };
        Some(Place { above, taken, below })
    }
}

/// # Panics
/// If a view is in the path of a disk that is not there.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(devices: &serde_json::Value, chains: &serde_json::Value, nodes: &serde_json::Value) {
    fn read<T: serde::de::DeserializeOwned>(value: &serde_json::Value) -> Option<Vec<T>> {
        serde_json::from_value(value.clone()).ok()
    }
    let (Some(devices), Some(chains), Some(nodes)) = (read(devices), read(chains), read(nodes)) else {
        return;
    };
    let graph = Graph::new(devices, chains, nodes);
    let _ = (graph.disks().is_ok(), graph.bitmaps().count());
    for (view, _, disk) in graph.view_nodes() {
        let _ = (graph.scratch_file(view), graph.place(view, disk).is_some());
    }
}

/// Where a device is in QEMU's object tree, by its id or path.
fn object_path(qdev: &str) -> String {
    if qdev.starts_with('/') { qdev.to_owned() } else { format!("/machine/peripheral/{qdev}") }
}

/// The name of an old-style drive, else the device's id, else its path.
fn is_firmware(device: &Block, qdev: &str) -> bool {
    qdev.starts_with("/machine/") && qdev.contains(".flash") || device.device.starts_with("pflash")
}

fn device_id(device: &Block) -> String {
    if !device.device.is_empty() {
        return device.device.clone();
    }
    let Some(qdev) = &device.qdev else {
        let node = device.inserted.as_ref().and_then(|inserted| inserted.node_name.clone());
        return node.unwrap_or_default();
    };
    match qdev.strip_prefix("/machine/peripheral/") {
        Some(rest) => rest.split('/').next().unwrap_or(rest).to_owned(),
        None => qdev.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// One device per entry: its name in QEMU and its nodes from top to bottom, each with its driver.
    fn graph(devices: &[(&str, &[(&str, &str)])], loose: &[(&str, &str)]) -> Graph {
        let chain = |nodes: &[(&str, &str)]| {
            nodes
                .iter()
                .rev()
                .fold(Value::Null, |below, (name, _)| json!({ "node-name": name, "parent": below }))
        };
        let mut blocks = Vec::new();
        let mut chains = Vec::new();
        let mut nodes = Vec::new();
        let node = |(name, driver): &(&str, &str)| {
            let image =
                json!({ "virtual-size": 4096, "filename": format!("/images/{name}"), "format": driver });
            json!({ "node-name": name, "drv": driver, "image": image })
        };
        for (qdev, list) in devices {
            let inserted = json!({ "node-name": list[0].0, "ro": false, "image": { "virtual-size": 4096 } });
            blocks.push(json!({ "device": "", "qdev": qdev, "inserted": inserted }));
            let mut top = chain(list);
            top["qdev"] = json!(qdev);
            chains.push(top);
            nodes.extend(list.iter().map(node));
        }
        nodes.extend(loose.iter().map(node));
        let [blocks, chains, nodes] = [blocks, chains, nodes].map(Value::from);
        Graph::new(
            serde_json::from_value(blocks).unwrap(),
            serde_json::from_value(chains).unwrap(),
            serde_json::from_value(nodes).unwrap(),
        )
    }

    #[test]
    fn bitmaps_belong_below_filters() {
        let nodes = [("theirs", "throttle"), ("format", "qcow2"), ("file", "file")];
        let (disks, _) = graph(&[("/machine/peripheral/a/virtio-backend", &nodes)], &[]).disks().unwrap();
        let disk = &disks[0];
        assert_eq!(
            (disk.id.as_str(), disk.root.as_str(), disk.data.as_str(), disk.keeps_bitmaps),
            ("a", "theirs", "format", false)
        );
        assert_eq!(disk.file, Some("/images/file".into()));
    }

    #[test]
    fn a_view_finds_what_is_below_and_above_it() {
        let (low, high) = (ViewId(1), ViewId(2));
        let name = |view, role| names::node(view, role, 0);
        let names = [Role::Top, Role::Copy, Role::Base];
        let of = |view| names.map(|role| (name(view, role), "raw"));
        let chain: Vec<_> = [of(high), of(low)].concat();
        let mut nodes: Vec<(&str, &str)> =
            chain.iter().map(|(name, driver)| (name.as_str(), *driver)).collect();
        nodes.extend([("job", "copy-before-write"), ("format", "raw")]);
        let both = graph(&[("disk", &nodes)], &[]);
        let place = both.place(low, 0).unwrap();
        assert_eq!(
            place,
            Place { above: Above::Node(name(high, Role::Base)), taken: true, below: "job".into() }
        );
        let place = both.place(high, 0).unwrap();
        let device = Above::Device("/machine/peripheral/disk".into());
        assert_eq!(place, Place { above: device.clone(), taken: true, below: name(low, Role::Top) });
        assert_eq!(both.disks().unwrap().0[0].data, "format");
        assert_eq!(both.place(ViewId(3), 0), None);
        // Before it was taken.
        let top = name(low, Role::Top);
        let prepared = graph(
            &[("disk", &[(&top, "raw"), ("format", "raw")])],
            &[(&name(low, Role::Copy), "copy-before-write")],
        );
        let place = prepared.place(low, 0).unwrap();
        assert_eq!(place, Place { above: device, taken: false, below: "format".into() });
    }

    #[test]
    fn jobs_that_hide_are_refused_and_disks_must_have_names() {
        let disk: (&str, &[(&str, &str)]) = ("a", &[("format", "raw")]);
        assert!(graph(&[disk], &[("#block1", "mirror_top")]).disks().is_err());
        graph(&[disk], &[("libvirt-mirror", "mirror_top")]).disks().unwrap();
        let error = graph(&[disk, disk], &[]).disks().unwrap_err();
        assert!(error.to_string().contains("give their devices an `id=`"), "{error}");
    }

    #[test]
    fn what_goes_past_the_block_layer_is_no_part_of_a_view() {
        let mut graph = graph(&[("a", &[("format", "raw")])], &[]);
        graph.passed_through.insert("a".into());
        let (disks, skipped) = graph.disks().unwrap();
        assert_eq!(disks, []);
        assert!(skipped[0].reason.loses_data());
    }

    proptest! {
        #[test]
        fn no_chain_panics(names in prop::collection::vec("(rempart-0000000[12]-(top|copy|base)-0|#block1|d)", 1..8)) {
            let nodes: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "raw")).collect();
            let graph = graph(&[("disk", &nodes)], &[]);
            let _ = (graph.disks(), graph.place(ViewId(1), 0), graph.place(ViewId(2), 0), graph.scratch_file(ViewId(1)));
        }
    }
}
