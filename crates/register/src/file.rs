//! Registers in a directory of this machine: for a single machine and for tests.
//!
//! One JSON file a register. A change holds an exclusive lock on `lock` (so several processes may share the
//! directory), writes a new file, syncs it, renames it over the old one and syncs the directory.

use crate::{Answer, ErrorKind, Refusal, Register, RegisterError, SwapOutcome, rules};
use rempart_types::{Epoch, RegisterId, RegisterValue};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a call may take: another process may hold the lock, or the disk may hang.
const DEADLINE: Duration = Duration::from_secs(1);

/// Registers as files. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FileRegister {
    directory: Arc<PathBuf>,
    deadline: Duration,
}

impl FileRegister {
    /// Uses `directory`, and creates it if need be.
    pub fn open(directory: impl Into<PathBuf>) -> Result<FileRegister, RegisterError> {
        let directory = directory.into();
        let failed = |error: io::Error| {
            let doing = format!("open the register directory `{}`", directory.display());
            RegisterError::new(ErrorKind::Unreachable, doing).because(error)
        };
        fs::create_dir_all(&directory).map_err(failed)?;
        lock_file(&directory).map_err(failed)?;
        Ok(FileRegister { directory: Arc::new(directory), deadline: DEADLINE })
    }

    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> FileRegister {
        self.deadline = deadline;
        self
    }

    async fn blocking<T: Send + 'static>(
        &self,
        late: ErrorKind,
        work: impl FnOnce(&Path) -> Result<T, RegisterError> + Send + 'static,
    ) -> Result<T, RegisterError> {
        let directory = self.directory.clone();
        let task = tokio::task::spawn_blocking(move || work(&directory));
        match tokio::time::timeout(self.deadline, task).await {
            Ok(Ok(result)) => result,
            Ok(Err(panicked)) => Err(RegisterError::new(late, "reach the register's file").because(panicked)),
            Err(_) => Err(RegisterError::new(late, "reach the register's file").because("deadline passed")),
        }
    }
}

fn lock_file(directory: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(directory.join("lock"))
}

fn path_of(directory: &Path, register: RegisterId) -> PathBuf {
    directory.join(format!("{register}.json"))
}

fn load(directory: &Path, register: RegisterId) -> Result<Option<RegisterValue>, RegisterError> {
    let path = path_of(directory, register);
    let failed = || RegisterError::new(ErrorKind::Unreachable, format!("read `{}`", path.display()));
    match fs::read(&path) {
        Ok(bytes) => {
            let value: RegisterValue = serde_json::from_slice(&bytes).map_err(|error| {
                RegisterError::refused(
                    Refusal::NotServing("the file is damaged".to_owned()),
                    format!("read `{}`", path.display()),
                )
                .because(error)
            })?;
            Ok(Some(value))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed().because(error)),
    }
}

fn swap(
    directory: &Path,
    register: RegisterId,
    expected: Option<Epoch>,
    value: &RegisterValue,
) -> Result<SwapOutcome, RegisterError> {
    let path = path_of(directory, register);
    let doing = || format!("change `{}`", path.display());
    let untouched = |error: io::Error| RegisterError::new(ErrorKind::Unreachable, doing()).because(error);
    let unknown = |error: io::Error| RegisterError::new(ErrorKind::Unknown, doing()).because(error);
    let refused = |refusal| RegisterError::refused(refusal, doing());

    rules::check(register, expected, value).map_err(refused)?;
    let bytes = rules::encode(value).map_err(refused)?;
    // Released when the file is closed, also by a crash.
    let lock = lock_file(directory).map_err(untouched)?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|error| untouched(error.into()))?;
    if let Some(lost) = rules::compare(load(directory, register)?.as_ref(), expected) {
        return Ok(lost);
    }
    let temporary = path.with_extension("new");
    OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
        .map_err(untouched)?;
    // From here on others may see it, or a crash may keep it.
    fs::rename(&temporary, &path).map_err(unknown)?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(unknown)?;
    Ok(SwapOutcome::Won)
}

impl Register for FileRegister {
    fn read(&self, register: RegisterId) -> Answer<'_, Option<RegisterValue>> {
        Box::pin(self.blocking(ErrorKind::Unreachable, move |directory| load(directory, register)))
    }

    fn swap(
        &self,
        register: RegisterId,
        expected: Option<Epoch>,
        value: RegisterValue,
    ) -> Answer<'_, SwapOutcome> {
        Box::pin(
            self.blocking(ErrorKind::Unknown, move |directory| swap(directory, register, expected, &value)),
        )
    }
}
