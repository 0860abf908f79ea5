//! `rempart restore` and `rempart export`.

use super::access::{Access, chain, describe};
use super::create::shown;
use super::files;
use super::guest_files::Wanted;
use super::in_use::InUse;
use super::onto_node::{self, NewMachineArgs, Over};
use super::points::find;
use super::serve::{Memory, disk_reader};
use crate::output::printable;
use crate::{Output, output::bytes, parse};
use clap::{Args, ValueEnum};
use rempart_api::{Client, Error};
use rempart_backup::{
    BackupError, ChunkCache, Content, FileTarget, NewFile, Pace, Progress, QemuImg, Target, restore_disk,
};
use rempart_repository::log::Log;
use rempart_repository::{BlobReader, Domain, DomainId, MEMORY, Point, PointDisk, Repository};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Restores a virtual machine onto this node, disks as images, or one disk onto a block device; files, inside a disk
/// or of a machine that `rempart agent` backed up, into a folder.
///
/// A new machine (`--vm`) is there when it is whole, and not before. Over a machine (`--over`) only what differs is written,
/// to its copies on other nodes, too; what it held is backed up first, and if this is interrupted it does not start until
/// the same command, or one with another point, came to its end.
///
/// Files get their owners, permissions, times and attributes where this runs as root. Nothing is overwritten, and nothing is
/// written outside of the folder, whatever is in the point.
#[derive(Debug, Args)]
pub struct Restore {
    #[command(flatten)]
    access: Access,
    /// `VM` for its newest point, or `VM@POINT`.
    point: String,
    /// Only this disk.
    #[arg(long, conflicts_with = "vm")]
    disk: Option<String>,
    /// A new virtual machine of this node, of this name: all disks, what machine it was, its UEFI variables. It gets
    /// a UUID and network addresses of its own, and does not start by itself.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["over", "to", "device", "path", "format", "compare"])]
    vm: Option<String>,
    /// A virtual machine that this node leads, stopped: what its disks hold is overwritten, and its UEFI variables.
    #[arg(long, value_name = "VM", conflicts_with_all = ["to", "device", "path", "format", "compare"])]
    over: Option<String>,
    /// A folder in which an image is made of each disk. There must be none of its name. For files it must be new, or empty.
    #[arg(long, required_unless_present_any = ["device", "vm", "over"], conflicts_with = "device")]
    to: Option<PathBuf>,
    /// Only this file, or folder with all that is in it: of a point that has files, or inside a disk.
    #[arg(long, conflicts_with_all = ["device", "format", "compare"])]
    path: Option<PathBuf>,
    /// Inside this file system of a disk: `rempart files` lists them.
    #[arg(long, conflicts_with_all = ["vm", "over", "device", "format", "compare"])]
    volume: Option<String>,
    #[command(flatten)]
    image: ImageArgs,
    /// A block device that the disk is written to; all it holds is lost.
    #[arg(long, requires = "yes", conflicts_with_all = ["format", "compare"])]
    device: Option<PathBuf>,
    /// Overwrite the device, or the machine's disks.
    #[arg(long)]
    yes: bool,
    /// Give up what the machine's disks hold, instead of backing it up first.
    #[arg(long, conflicts_with_all = ["vm", "to", "device"])]
    no_backup: bool,
    /// The new machine's memory, such as `4G`; what it was without this. Needed where the point does not say it.
    #[arg(long, value_parser = parse::byte_count)]
    memory: Option<u64>,
    #[command(flatten)]
    new_machine: NewMachineArgs,
}

/// Writes one disk as an image file.
#[derive(Debug, Args)]
pub struct Export {
    #[command(flatten)]
    access: Access,
    /// `VM` for its newest point, or `VM@POINT`.
    point: String,
    /// Which disk, if it has several.
    #[arg(long)]
    disk: Option<String>,
    /// The file that is made. There must be none of that name.
    #[arg(long)]
    to: PathBuf,
    #[command(flatten)]
    image: ImageArgs,
}

#[derive(Debug, Args)]
struct ImageArgs {
    /// The images' format. All but raw take `qemu-img`.
    #[arg(long, default_value = "raw")]
    format: Format,
    /// Read each image again and compare it with the restore point before it gets its name. This takes `qemu-img`.
    #[arg(long)]
    compare: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Vhdx,
}

impl Format {
    /// QEMU's name of it, and what files of it end with.
    fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vhdx => "vhdx",
        }
    }
}

/// A point, opened for reading all of a disk.
pub struct Opened {
    pub repository: Arc<Repository>,
    pub reader: BlobReader,
    pub root: u64,
    pub point: Point,
    pub what: String,
    /// Whose keys its chunks' ids are made with.
    domain: DomainId,
    _in_use: InUse,
}

impl Opened {
    fn new(access: &Access, wanted: &str, verb: &str, output: Output) -> Result<Opened, Error> {
        let repository = access.open()?;
        let found =
            |log: &Log| find(&repository, log, wanted).map(|(root, point)| (vec![root], (root, point)));
        let (in_use, log, (root, point)) = InUse::until_stopped(&repository, verb, output, found)?;
        let what = format!("cannot {verb} `{}@{root}`", point.vm);
        let reader = BlobReader::following(&repository, log.state()).map_err(|e| describe(&what, &e))?;
        let domain = log.state().roots()[&root].domain;
        Ok(Opened { repository, reader, root, point, what, domain, _in_use: in_use })
    }

    /// The disk of that name, or all.
    pub fn disks(&self, name: Option<&str>) -> Result<Vec<&PointDisk>, Error> {
        let Some(name) = name else { return Ok(self.point.disks.iter().collect()) };
        let found = self.point.disk(name).ok_or_else(|| {
            let names: Vec<&str> = self.point.disks.iter().map(|disk| disk.name.as_str()).collect();
            Error::not_found(format!("{}: it has no disk `{name}`", self.what))
                .hint(format!("it has {}", names.join(", ")))
        })?;
        Ok(vec![found])
    }

    fn has_files_only(&self) -> bool {
        self.point.disks.is_empty() && self.point.files.is_some()
    }

    fn one_disk(&self, name: Option<&str>) -> Result<&PointDisk, Error> {
        match self.disks(name)?[..] {
            [disk] => Ok(disk),
            ref disks => Err(Error::invalid(format!("{}: it has {} disks", self.what, disks.len()))
                .hint("name one with --disk")),
        }
    }

    pub fn failed(&self, error: &BackupError) -> Error {
        Error::failed(&self.what).cause(chain(error))
    }

    pub fn domain(&self) -> Result<Domain, Error> {
        let opener = self.repository.opener().map_err(|e| describe(&self.what, &e))?;
        Ok(opener.domain(self.domain))
    }

    pub fn write_to(
        &self,
        disk: &PointDisk,
        target: &dyn Target,
        threads: usize,
        progress: &Progress,
    ) -> Result<(), BackupError> {
        let content = Content::of(disk, self.repository.chunk_size());
        restore_disk(&self.reader, content, target, threads, progress)
    }

    fn write_raw(&self, disk: &PointDisk, target: &FileTarget, output: Output) -> Result<(), Error> {
        let progress = Progress::default();
        let phase = format!("restore {}", disk.name);
        let write = || self.write_to(disk, target, Pace::default().threads, &progress);
        shown(output, &phase, disk.size, &progress, write).map_err(|e| self.failed(&e))
    }

    fn write_image(
        &self,
        disk: &PointDisk,
        path: &Path,
        image: &ImageArgs,
        output: Output,
    ) -> Result<(), Error> {
        let failed = |e: BackupError| self.failed(&e);
        let file = NewFile::create(path).map_err(failed)?;
        let qemu_img = if image.format == Format::Raw && !image.compare {
            None
        } else {
            let cache = ChunkCache::new(self.repository.clone(), Memory::DEFAULT);
            let cache = cache.map_err(|e| describe(&self.what, &e))?;
            Some(QemuImg::new(disk_reader(&cache, disk)).map_err(failed)?)
        };
        let shown_of = |verb: &str, work: &dyn Fn(&Progress) -> Result<(), BackupError>| {
            let progress = Progress::default();
            let phase = format!("{verb} {}", disk.name);
            shown(output, &phase, disk.size, &progress, || work(&progress)).map_err(failed)
        };
        match (image.format, &qemu_img) {
            (Format::Raw, _) => {
                let target = FileTarget::create(file.draft(), disk.size).map_err(failed)?;
                self.write_raw(disk, &target, output)?;
            }
            (format, Some(qemu_img)) => {
                shown_of("restore", &|progress| qemu_img.convert(format.name(), file.draft(), progress))?
            }
            (_, None) => unreachable!("it is there for all but raw"),
        }
        if let Some(qemu_img) = qemu_img.as_ref().filter(|_| image.compare) {
            shown_of("compare", &|progress| qemu_img.compare(image.format.name(), file.draft(), progress))?;
        }
        file.finish().map_err(failed)?;
        output.tell(&format!("`{}`: {}", path.display(), bytes(disk.size)));
        Ok(())
    }
}

pub fn run(
    command: &Restore,
    client: impl FnOnce() -> Result<Client, Error>,
    output: Output,
) -> Result<(), Error> {
    command.new_machine.refuse_without(command.vm.as_deref(), command.memory)?;
    let opened = Opened::new(&command.access, &command.point, "restore", output)?;
    let onto_node = match (&command.vm, &command.over) {
        (Some(name), _) => {
            let wanted = (&command.new_machine, command.memory);
            Some(onto_node::new_machine(&opened, name, wanted, client()?, output)?)
        }
        (None, Some(name)) => {
            let (disk, is_agreed) = (command.disk.as_deref(), command.yes);
            let over = Over { name, disk, is_agreed, with_backup: !command.no_backup };
            Some(onto_node::over(&opened, &over, client()?, output)?)
        }
        (None, None) => None,
    };
    if opened.point.memory.is_some()
        && (onto_node.is_some() || command.disk.is_some() || command.device.is_some())
    {
        output.tell(WITHOUT_MEMORY);
    }
    if let Some(told) = onto_node {
        return if output.json { output.print_json(&told) } else { Ok(()) };
    }
    if let Some(to) = command
        .to
        .as_ref()
        .filter(|_| command.path.is_some() || command.volume.is_some() || opened.has_files_only())
    {
        let (disk, volume) = (command.disk.as_deref(), command.volume.as_deref());
        let path = command.path.as_deref();
        let (restored, told) = if disk.is_some() || volume.is_some() || opened.point.files.is_none() {
            let path = path.map(files::entry_path).unwrap_or_default();
            let wanted = Wanted { disk, volume, path: &path };
            wanted.restore(&opened.repository, opened.root, &opened.point, to, &opened.what, output)?
        } else {
            files::restore(&opened.reader, &opened.point, path, to, &opened.what, output)?
        };
        if output.json {
            output.print_json(
                &json!({ "vm": opened.point.vm, "point": opened.root, "disks": [], "files": told }),
            )?;
        }
        return files::judge(&restored, &opened.what);
    }
    let mut restored = Vec::new();
    let (mut files_told, mut memory_told) = (None, None);
    let mut tell = |disk: &PointDisk, path: &Path| {
        restored.push(json!({ "disk": disk.name, "path": path, "size_bytes": disk.size }));
    };
    match (&command.to, &command.device) {
        (Some(folder), _) => {
            let disks = opened.disks(command.disk.as_deref())?;
            std::fs::create_dir_all(folder).map_err(|e| {
                Error::failed(&opened.what).cause(format!("make `{}`: {e}", folder.display()))
            })?;
            for disk in disks {
                let path = folder.join(format!("{}.{}", disk.name, command.image.format.name()));
                opened.write_image(disk, &path, &command.image, output)?;
                tell(disk, &path);
            }
            if let Some(memory) = opened.point.memory.as_ref().filter(|_| command.disk.is_none()) {
                let path = folder.join(format!("{MEMORY}.qemu"));
                let raw = ImageArgs { format: Format::Raw, compare: command.image.compare };
                opened.write_image(memory, &path, &raw, output)?;
                memory_told = Some(tell_how_to_resume(&opened.point, memory, &path, output));
            }
            if opened.point.files.is_some() && command.disk.is_none() {
                let to = folder.join("files");
                let told = files::restore(&opened.reader, &opened.point, None, &to, &opened.what, output)?;
                files_told = Some(told);
            }
        }
        (None, Some(device)) => {
            let disk = opened.one_disk(command.disk.as_deref())?;
            let target = FileTarget::device(device, disk.size).map_err(|e| opened.failed(&e))?;
            opened.write_raw(disk, &target, output)?;
            output.tell(&format!("`{}`: {}", device.display(), bytes(disk.size)));
            tell(disk, device);
        }
        (None, None) => unreachable!("the arguments ask for one of both"),
    }
    if output.json {
        let files = files_told.as_ref().map(|(_, told)| told);
        output.print_json(&json!({
            "vm": opened.point.vm, "point": opened.root, "disks": restored, "files": files,
            "memory": memory_told,
        }))?;
    }
    files_told.map_or(Ok(()), |(restored, _)| files::judge(&restored, &opened.what))
}

/// Told where a machine is made of a point's disks alone.
pub const WITHOUT_MEMORY: &str = "the guest's memory is in this point, and is not used: to the guest this is a power cut. `restore --to` \
                                  writes it beside the images";

/// What it takes to go on from the moment that the memory is of.
fn tell_how_to_resume(point: &Point, memory: &PointDisk, path: &Path, output: Output) -> serde_json::Value {
    let definition =
        point.definition.as_ref().and_then(|definition| serde_json::from_slice(&definition.content).ok());
    let definition: serde_json::Value = definition.unwrap_or_default();
    // A machine of a node has a definition of its own, with what QEMU told beside it.
    let definition = definition.get("qemu").unwrap_or(&definition);
    let version = &definition["told"]["query-version"]["qemu"];
    let version = ["major", "minor", "micro"].map(|part| version[part].to_string()).join(".");
    let machine =
        definition["machine"].as_str().or(definition["told"]["machine"].as_str()).unwrap_or_default();
    let machine = machine.trim_end_matches("-machine");
    let incoming = format!("exec:cat {}", quoted(&path.display().to_string()));
    output.tell(&format!(
        "to go on from that moment, start QEMU {version} or newer as machine `{}` with the same devices, on these images \
         (`format=raw`, or what was chosen), with `-incoming {}`; then `cont` in its monitor, if it does not run by itself",
        printable(machine),
        quoted(&incoming)
    ));
    let words = definition["command_line"].as_array().into_iter().flatten().filter_map(|word| word.as_str());
    let line = shell_line(words);
    if !line.is_empty() {
        output.tell(&format!("it was started, on its own images, by: {line}"));
    }
    json!({
        "path": path, "size_bytes": memory.size, "qemu_version": version, "machine": machine,
        "incoming": incoming, "command_line": definition["command_line"], "left_out": definition["left_out"],
    })
}

/// As a shell takes it for one word.
fn quoted(word: &str) -> String {
    // What has a zero is no word of any shell.
    shlex::try_quote(word).map_or_else(|_| word.to_owned(), Into::into)
}

/// Words that a repository holds, as one would type them; what would write on the terminal is told instead.
fn shell_line<'a>(words: impl Iterator<Item = &'a str>) -> String {
    printable(&words.map(quoted).collect::<Vec<_>>().join(" "))
}

pub fn export(command: &Export, output: Output) -> Result<(), Error> {
    let opened = Opened::new(&command.access, &command.point, "export", output)?;
    let disk = opened.one_disk(command.disk.as_deref())?;
    opened.write_image(disk, &command.to, &command.image, output)?;
    if output.json {
        return output.print_json(&json!({
            "vm": opened.point.vm, "point": opened.root, "disk": disk.name, "path": command.to,
            "format": command.image.format.name(), "size_bytes": disk.size,
        }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_typed_again_and_writes_on_no_terminal() {
        let words = ["qemu-system-x86_64", "-name", "the shop's", "", "-m", "192", "$HOME"];
        assert_eq!(shlex::split(&shell_line(words.into_iter())).expect("words"), words);
        let hostile = shell_line(["a\u{1b}[2Jb\nc", "d\0e"].into_iter());
        assert!(!hostile.contains(char::is_control), "{hostile:?}");
    }
}
