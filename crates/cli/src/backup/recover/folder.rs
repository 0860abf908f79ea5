//! What an instant recovery keeps: an overlay for each disk, what it is of, and its sockets.

use crate::backup::access::chain;
use rempart_api::{Error, ErrorKind};
use rempart_backup::NewFile;
use rempart_repository::{Point, Repository};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const RECORD: &str = "recovery.json";
const DEFINITION: &str = "definition.json";
const VERSION: u32 = 1;
/// A unix socket's path is shorter than this.
const SOCKET_PATH: usize = 108;

/// What is recovered in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub repository: String,
    pub vm: String,
    pub point: u64,
    pub disks: Vec<RecordedDisk>,
    /// By which the repository's log knows that the point is in use.
    #[serde(default)]
    pub reader: Option<String>,
    /// It ran once: from then on the overlays hold what nothing else does.
    pub has_run: bool,
    /// The node's machine that was made of it: from then on the overlays are history.
    #[serde(default)]
    pub became: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedDisk {
    pub name: String,
    pub size_bytes: u64,
    pub overlay: String,
}

impl Record {
    pub fn new(repository: &Repository, root: u64, point: &Point) -> Record {
        let disk = |disk: &rempart_repository::PointDisk| RecordedDisk {
            name: disk.name.clone(),
            size_bytes: disk.size,
            overlay: format!("{}.qcow2", encoded(&disk.name)),
        };
        Record {
            version: VERSION,
            repository: repository.id().to_string(),
            vm: point.vm.clone(),
            point: root,
            disks: point.disks.iter().map(disk).collect(),
            reader: None,
            has_run: false,
            became: None,
        }
    }

    /// The same recovery, whether it ran or not.
    pub fn is_of(&self, other: &Record) -> bool {
        let wanted =
            |record: &Record| Record { has_run: false, reader: None, became: None, ..record.clone() };
        wanted(self) == wanted(other)
    }
}

#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    what: String,
}

impl Folder {
    /// Makes it, for its owner only, if it is not there.
    pub fn create(path: &Path) -> Result<Folder, Error> {
        let folder = Folder::open(path)?;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder.path);
        made.map_err(|e| Error::failed(&folder.what).cause(e))?;
        Ok(folder)
    }

    pub fn open(path: &Path) -> Result<Folder, Error> {
        let what = format!("cannot recover in `{}`", path.display());
        let path = std::path::absolute(path).map_err(|e| Error::invalid(&what).cause(e))?;
        let folder = Folder { path, what };
        if folder.path.to_str().is_none() || folder.second_monitor().as_os_str().len() >= SOCKET_PATH {
            return Err(Error::invalid(&folder.what)
                .cause("sockets are made in it, and its path is too long for them, or not UTF-8"));
        }
        Ok(folder)
    }

    pub fn what(&self) -> &str {
        &self.what
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the point is served.
    pub fn nbd(&self) -> PathBuf {
        self.file("nbd.sock")
    }

    /// QEMU's monitor for who attends to it.
    pub fn monitor(&self) -> PathBuf {
        self.file("qmp.sock")
    }

    /// QEMU's monitor for everybody else.
    pub fn second_monitor(&self) -> PathBuf {
        self.file("monitor.sock")
    }

    /// The same for who means to attend to it: whoever only looks does so for a moment.
    pub fn lock_soon(&self) -> Result<Option<File>, Error> {
        for _ in 0..20 {
            if let Some(lock) = self.lock()? {
                return Ok(Some(lock));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(None)
    }

    /// None while somebody else attends to what is in it.
    pub fn lock(&self) -> Result<Option<File>, Error> {
        let failed = |e: std::io::Error| Error::failed(&self.what).cause(e);
        let file = File::create(self.file("lock")).map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    pub fn record(&self) -> Result<Option<Record>, Error> {
        let text = match std::fs::read(self.file(RECORD)) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::failed(&self.what).cause(e)),
        };
        let record: Record = serde_json::from_slice(&text)
            .map_err(|e| Error::failed(&self.what).cause(format!("`{RECORD}` there makes no sense: {e}")))?;
        if record.version != VERSION {
            return Err(Error::failed(&self.what).cause("a newer version of this program recovers there"));
        }
        Ok(Some(record))
    }

    /// It survives a power cut.
    pub fn write_record(&self, record: &Record) -> Result<(), Error> {
        let failed = |e: std::io::Error| Error::failed(&self.what).cause(e);
        let text = serde_json::to_vec_pretty(record).expect("a record is plain data");
        let draft = self.file("recovery.json.new");
        std::fs::write(&draft, text).map_err(failed)?;
        File::open(&draft).and_then(|file| file.sync_all()).map_err(failed)?;
        std::fs::rename(&draft, self.file(RECORD)).map_err(failed)?;
        File::open(&self.path).and_then(|folder| folder.sync_all()).map_err(failed)
    }

    /// The record of what is there already, or a new one.
    pub fn begin(&self, wanted: Record) -> Result<Record, Error> {
        match self.record()? {
            Some(found) if found.is_of(&wanted) => Ok(found),
            Some(found) => Err(Error::new(ErrorKind::Conflict, &self.what)
                .cause(format!("`{}@{}` is recovered there", found.vm, found.point))
                .hint("go on with that point, or name another folder")),
            None => {
                let mut entries =
                    std::fs::read_dir(&self.path).map_err(|e| Error::failed(&self.what).cause(e))?;
                if entries.any(|entry| entry.is_ok_and(|entry| entry.file_name() != "lock")) {
                    return Err(Error::refused(&self.what).cause("there is something else in it"));
                }
                self.write_record(&wanted)?;
                Ok(wanted)
            }
        }
    }

    /// Keeps what the point says of its machine, which it is needed for when the point is not needed any more.
    pub fn keep_definition(&self, content: &[u8]) -> Result<(), Error> {
        let path = self.file(DEFINITION);
        if path.exists() {
            return Ok(());
        }
        let failed = |e: rempart_backup::BackupError| Error::failed(&self.what).cause(chain(&e));
        let file = NewFile::create(&path).map_err(failed)?;
        std::fs::write(file.draft(), content).map_err(|e| Error::failed(&self.what).cause(e))?;
        file.finish().map_err(failed)
    }

    pub fn definition(&self) -> Result<Option<Vec<u8>>, Error> {
        self.read(DEFINITION)
    }

    /// The firmware's variables, as the machine left them.
    pub fn variables(&self) -> Result<Option<Vec<u8>>, Error> {
        self.read("nvram.fd")
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        match std::fs::read(self.file(name)) {
            Ok(content) => Ok(Some(content)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::failed(&self.what).cause(e)),
        }
    }

    /// Bytes that an overlay takes.
    pub fn allocated(&self, disk: &RecordedDisk) -> Result<u64, Error> {
        let meta = self.file(&disk.overlay).metadata().map_err(|e| Error::failed(&self.what).cause(e))?;
        Ok(meta.blocks() * 512)
    }

    /// Makes the overlays that are not there yet. Each names its disk of the point as what is behind it.
    pub fn make_overlays(&self, record: &Record) -> Result<(), Error> {
        for disk in &record.disks {
            let path = self.file(&disk.overlay);
            if path.exists() {
                continue;
            }
            if record.has_run {
                let why = format!("`{}` is gone, and what the machine wrote with it", path.display());
                return Err(Error::refused(&self.what).cause(why));
            }
            let failed = |e: rempart_backup::BackupError| Error::failed(&self.what).cause(chain(&e));
            let socket = encoded_path(&self.nbd());
            let behind = format!("nbd+unix:///{}?socket={socket}", encoded(&disk.name));
            let file = NewFile::create(&path).map_err(failed)?;
            let mut command = Command::new("qemu-img");
            // Without opening what is behind it: nobody serves that yet.
            command.args(["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", &behind]);
            command.arg(file.draft()).arg(disk.size_bytes.to_string());
            self.run(&mut command)?;
            file.finish().map_err(failed)?;
        }
        Ok(())
    }

    /// Whether a disk needs the repository still.
    pub fn needs_point(&self, disk: &RecordedDisk) -> Result<bool, Error> {
        let mut command = Command::new("qemu-img");
        command.args(["info", "-U", "-f", "qcow2", "--output=json"]).arg(self.file(&disk.overlay));
        let told = self.run(&mut command)?;
        let info: Value = serde_json::from_slice(&told)
            .map_err(|e| Error::failed(&self.what).cause(format!("qemu-img is not understood: {e}")))?;
        Ok(info["backing-filename"].is_string() || info["full-backing-filename"].is_string())
    }

    /// Replaces the overlay of a machine that does not run by an image that has all of the disk. (`qemu-img rebase` would
    /// have the header forget the point before what it copied is on the disk.)
    pub fn complete(&self, disk: &RecordedDisk) -> Result<(), Error> {
        let failed = |e: std::io::Error| Error::failed(&self.what).cause(e);
        let (overlay, draft) = (self.file(&disk.overlay), self.file(&format!("{}.new", disk.overlay)));
        let mut command = Command::new("qemu-img");
        self.run(command.args(["convert", "-f", "qcow2", "-O", "qcow2"]).arg(&overlay).arg(&draft))?;
        File::open(&draft).and_then(|file| file.sync_all()).map_err(failed)?;
        std::fs::rename(&draft, &overlay).map_err(failed)?;
        File::open(&self.path).and_then(|folder| folder.sync_all()).map_err(failed)
    }

    /// Writes all of the disk of a machine that does not run as a raw image, durably.
    pub fn copy_raw(&self, disk: &RecordedDisk, to: &Path) -> Result<(), Error> {
        let failed = |e: std::io::Error| Error::failed(&self.what).cause(e);
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "qcow2", "-O", "raw", "-S", "64k"]);
        self.run(command.arg(self.file(&disk.overlay)).arg(to))?;
        File::open(to).and_then(|file| file.sync_all()).map_err(failed)
    }

    fn run(&self, command: &mut Command) -> Result<Vec<u8>, Error> {
        let program = command.get_program().to_string_lossy().into_owned();
        let output =
            command.output().map_err(|e| Error::failed(&self.what).cause(format!("start {program}: {e}")))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::failed(&self.what).cause(said))
    }

    /// The block nodes of a disk: of the point, where it still needs that, and of the overlay on it, named `node`.
    pub fn nodes(
        &self,
        disk: &RecordedDisk,
        node: &str,
        place: usize,
    ) -> Result<(Option<Value>, Value), Error> {
        // Named apart: options beside the name that is in the image's header are refused.
        let point = self.needs_point(disk)?.then(|| {
            json!({
                "driver": "nbd",
                "node-name": point_node(place),
                "read-only": true,
                "server": { "type": "unix", "path": self.nbd() },
                "export": disk.name,
                // Until somebody serves it again the guest waits.
                "reconnect-delay": 24 * 60 * 60,
                "open-timeout": 30,
            })
        });
        let overlay = json!({
            "driver": "qcow2",
            "node-name": node,
            "discard": "unmap",
            "file": { "driver": "file", "filename": self.file(&disk.overlay) },
            "backing": point.as_ref().map(|_| point_node(place)),
        });
        Ok((point, overlay))
    }
}

/// What QEMU calls a disk of the point.
pub fn point_node(place: usize) -> String {
    format!("point-{place}")
}

/// As a part of a URI, and of a file's name.
fn encoded(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    text.bytes()
        .map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn encoded_path(path: &Path) -> String {
    let text = path.to_str().expect("looked at when the folder was opened");
    text.split('/').map(encoded).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_part_of_a_uri() {
        assert_eq!(encoded("disk0"), "disk0");
        assert_eq!(encoded("a/b?c=1&d.%"), "a%2Fb%3Fc%3D1%26d%2E%25");
        assert_eq!(encoded_path(Path::new("/a b/nbd.sock")), "/a%20b/nbd%2Esock");
    }
}
