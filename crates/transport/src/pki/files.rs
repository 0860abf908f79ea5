//! Files that nobody else may read, and that are whole or absent.

use crate::{Error, ErrorKind};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Larger files are none of ours.
const MAX_FILE: u64 = 1024 * 1024;

/// Writes a file of mode 0600 durably: a crash leaves the old one or the new one.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let failed = |error| Error::io(format!("write `{}`", path.display()), error);
    let mut name = path.file_name().expect("a file has a name").to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    // A leftover of an earlier crash might have another mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}

pub(crate) fn read_text(path: &Path) -> Result<String, Error> {
    let doing = || format!("read `{}`", path.display());
    let length = fs::metadata(path).map_err(|error| Error::io(doing(), error))?.len();
    if length > MAX_FILE {
        return Err(Error::new(ErrorKind::CertificateInvalid, doing()).because("the file is too large"));
    }
    fs::read_to_string(path).map_err(|error| Error::io(doing(), error))
}

pub(crate) fn make_directory(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| Error::io(format!("create `{}`", path.display()), error))
}
