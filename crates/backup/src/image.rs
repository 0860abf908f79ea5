//! Images in the formats of other programs, made by `qemu-img` from a disk of a restore point: it reads our NBD server, so
//! that nothing is written twice.

use crate::{BackupError, DiskReader, DiskServer, Listener, Progress};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde_json::json;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// Bytes kept of what `qemu-img` complains of.
const COMPLAINT: u64 = 4096;

/// A file that comes to its name when it is whole, and not before.
#[derive(Debug)]
pub struct NewFile {
    target: PathBuf,
    /// With its own name in a folder of its own: some formats have the name in them.
    draft: PathBuf,
    folder: TempDir,
}

impl NewFile {
    /// There must be no file of that name.
    pub fn create(target: &Path) -> Result<NewFile, BackupError> {
        let fail = failed_to(target);
        let name = target.file_name().ok_or(io::Error::from(Errno::ISDIR)).map_err(&fail)?;
        if target.symlink_metadata().is_ok() {
            return Err(fail(Errno::EXIST.into()));
        }
        let parent = parent(target);
        let folder = tempfile::Builder::new().prefix(".rempart-").tempdir_in(parent).map_err(&fail)?;
        Ok(NewFile { target: target.to_owned(), draft: folder.path().join(name), folder })
    }

    /// Where it is written.
    pub fn draft(&self) -> &Path {
        &self.draft
    }

    /// Makes it durable and gives it its name.
    pub fn finish(self) -> Result<(), BackupError> {
        let fail = failed_to(&self.target);
        File::open(&self.draft).and_then(|file| file.sync_all()).map_err(&fail)?;
        match renameat_with(CWD, &self.draft, CWD, &self.target, RenameFlags::NOREPLACE) {
            // Not every file system is able to.
            Err(Errno::INVAL | Errno::NOSYS) => {
                std::fs::hard_link(&self.draft, &self.target).map_err(&fail)?
            }
            renamed => renamed.map_err(|errno| fail(errno.into()))?,
        }
        self.folder.close().map_err(&fail)?;
        File::open(parent(&self.target)).and_then(|folder| folder.sync_all()).map_err(&fail)
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn failed_to(target: &Path) -> impl Fn(io::Error) -> BackupError + use<> {
    let disk = target.display().to_string();
    move |source| BackupError::Target { disk: disk.clone(), offset: 0, source }
}

/// A disk as `qemu-img` sees it.
#[derive(Debug)]
pub struct QemuImg {
    /// Its name for the disk.
    source: String,
    size: u64,
    unreadable: Arc<Mutex<Option<String>>>,
    // Dropped in this order.
    _server: DiskServer,
    _folder: TempDir,
}

impl QemuImg {
    pub fn new(disk: DiskReader) -> Result<QemuImg, BackupError> {
        let fail = |why: io::Error| BackupError::Image { action: "serve it to", why: why.to_string() };
        // A folder that nobody else may enter.
        let folder = tempfile::Builder::new().prefix("rempart-").tempdir().map_err(fail)?;
        let socket = folder.path().join("nbd");
        let listener = UnixListener::bind(&socket).map_err(fail)?;
        let size = disk.size();
        let unreadable = Arc::new(Mutex::new(None));
        let first = unreadable.clone();
        let server = DiskServer::start(
            vec![disk],
            Listener::Unix(listener),
            Box::new(move |error| {
                let why = error.source.to_string();
                first.lock().expect("no holder panics").get_or_insert_with(|| format!("{error}: {why}"));
            }),
        );
        let server = server.map_err(fail)?;
        let nbd = json!({ "driver": "nbd", "server": { "type": "unix", "path": socket } });
        let source = format!("json:{}", json!({ "driver": "raw", "file": nbd }));
        Ok(QemuImg { source, size, unreadable, _server: server, _folder: folder })
    }

    /// Makes an image. `format` is a name of QEMU's block drivers.
    pub fn convert(&self, format: &str, path: &Path, progress: &Progress) -> Result<(), BackupError> {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-p", "-O", format, &self.source]).arg(file_name(path)?);
        self.run(&mut command, "convert with", progress)
    }

    /// Compares an image with the disk, all of it.
    pub fn compare(&self, format: &str, path: &Path, progress: &Progress) -> Result<(), BackupError> {
        let mut command = Command::new("qemu-img");
        command.args(["compare", "-p", "-F", format, &self.source]).arg(file_name(path)?);
        self.run(&mut command, "compare with", progress)
    }

    fn run(
        &self,
        command: &mut Command,
        action: &'static str,
        progress: &Progress,
    ) -> Result<(), BackupError> {
        let fail = |why: io::Error| BackupError::Image { action, why: why.to_string() };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: only an async-signal-safe call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(|why| match why.kind() {
            io::ErrorKind::NotFound => {
                BackupError::Image { action, why: "there is none: install the package qemu-utils".to_owned() }
            }
            _ => fail(why),
        })?;
        let (mut said, mut done) = (Vec::new(), 0);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            let complaints = scope.spawn(|| {
                let mut text = String::new();
                if let Some(mut stderr) = stderr {
                    let _ = stderr.by_ref().take(COMPLAINT).read_to_string(&mut text);
                    let _ = io::copy(&mut stderr, &mut io::sink());
                }
                text
            });
            // `    (12.34/100%)`, each over the one before.
            for part in stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).split(b'\r')) {
                let Ok(part) = part else { break };
                let text = String::from_utf8_lossy(&part).trim().to_owned();
                let number = text.strip_prefix('(').and_then(|text| text.split('/').next());
                match number.and_then(|number| number.parse::<f64>().ok()) {
                    Some(percent) => {
                        let now = (self.size as f64 / 100.0 * percent) as u64;
                        progress.add(now.saturating_sub(done));
                        done = done.max(now);
                    }
                    None if !text.is_empty() => said.push(text),
                    None => {}
                }
            }
            said.insert(0, complaints.join().expect("it does not panic"));
        });
        if child.wait().map_err(fail)?.success() {
            return Ok(());
        }
        // What could not be read says more than that something could not.
        let unreadable = self.unreadable.lock().expect("no holder panics").clone();
        let said = said.join(" ").trim().trim_start_matches("qemu-img: ").to_owned();
        Err(BackupError::Image { action, why: unreadable.unwrap_or(said) })
    }
}

/// As a file's name is told to QEMU, whatever is in it.
fn file_name(path: &Path) -> Result<String, BackupError> {
    let path = std::path::absolute(path).map_err(failed_to(path))?;
    let text = path.to_str().ok_or_else(|| {
        failed_to(&path)(io::Error::new(io::ErrorKind::InvalidInput, "its path is not valid UTF-8"))
    })?;
    Ok(format!("file:{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_its_name_when_it_is_whole() {
        let home = tempfile::tempdir().expect("a folder");
        let names = || {
            let entries = std::fs::read_dir(home.path()).expect("reads");
            entries
                .map(|entry| entry.expect("reads").file_name().into_string().expect("text"))
                .collect::<Vec<_>>()
        };
        let target = home.path().join("disk.vmdk");
        let file = NewFile::create(&target).expect("creates");
        assert_eq!(file.draft().file_name(), target.file_name());
        std::fs::write(file.draft(), "half").expect("writes");
        drop(file);
        assert_eq!(names(), Vec::<String>::new(), "what was given up leaves nothing");

        let [one, two] = [(); 2].map(|()| NewFile::create(&target).expect("creates"));
        std::fs::write(one.draft(), "one").expect("writes");
        std::fs::write(two.draft(), "two").expect("writes");
        one.finish().expect("finishes");
        let why = format!("{:?}", two.finish().expect_err("it is taken"));
        assert!(why.contains("AlreadyExists") || why.contains("File exists"), "{why}");
        assert_eq!(
            (names(), std::fs::read(&target).expect("reads")),
            (vec!["disk.vmdk".to_owned()], b"one".to_vec())
        );
        assert!(NewFile::create(&target).is_err());
        assert!(NewFile::create(&home.path().join("..")).is_err());
    }
}
