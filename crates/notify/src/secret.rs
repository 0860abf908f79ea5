//! What files hold: passwords and keys, and the certificates that are trusted.

use crate::{NotifyError, chain};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use zeroize::Zeroizing;

/// Nobody's password is longer; whoever names a disk image instead shall not wait.
const LONGEST: u64 = 4096;

/// A file's first line.
pub fn read(path: &Path) -> Result<Zeroizing<String>, NotifyError> {
    let wrong = |what: String| NotifyError::Secret { path: path.to_owned(), what };
    let file = File::open(path).map_err(|e| wrong(e.to_string()))?;
    let mode = file.metadata().map_err(|e| wrong(e.to_string()))?.mode();
    if mode & 0o077 != 0 {
        return Err(wrong(format!("others than its owner may use it (mode {:o}); chmod 600", mode & 0o777)));
    }
    let mut text = Zeroizing::new(String::new());
    let read = file.take(LONGEST + 1).read_to_string(&mut text).map_err(|e| wrong(e.to_string()))?;
    if read as u64 > LONGEST {
        return Err(wrong(format!("it is longer than {LONGEST} bytes")));
    }
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(Zeroizing::new(line.to_owned())),
        _ => Err(wrong("its first line is empty".to_owned())),
    }
}

/// All certificates of a file in PEM.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, NotifyError> {
    let wrong = |what: String| NotifyError::Certificates { path: path.to_owned(), what };
    let found = CertificateDer::pem_file_iter(path).map_err(|e| wrong(chain(&e)))?;
    let found = found.collect::<Result<Vec<_>, _>>().map_err(|e| wrong(chain(&e)))?;
    if found.is_empty() {
        return Err(wrong("there is none in it".to_owned()));
    }
    Ok(found)
}
