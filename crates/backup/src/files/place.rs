//! Names in open folders, and their extended attributes.

use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lsetxattr};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Names of attributes of one file, and bytes of one value, as the kernel takes them at most.
const LONGEST: usize = 64 << 10;
/// Not its own: the kernel makes them of something else.
const OF_OTHERS: &[&[u8]] = &[b"system.nfs4_acl", b"security.ima", b"security.evm"];

type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// A path to a name in an open folder that leads through no other name.
fn path(folder: BorrowedFd<'_>, name: &CStr) -> Vec<u8> {
    [format!("/proc/self/fd/{}/", folder.as_raw_fd()).as_bytes(), name.to_bytes()].concat()
}

/// A file system without them has none.
fn without<T>(found: Result<T, Errno>, none: T) -> Result<T, Errno> {
    match found {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(none),
        found => found,
    }
}

/// Extended attributes, of a link itself if it is one, by their names.
pub(super) fn attributes(folder: BorrowedFd<'_>, name: &CStr) -> Result<Attributes, Errno> {
    let path = path(folder, name);
    let mut short = [0u8; 1024];
    let listed = match llistxattr(path.as_slice(), &mut short) {
        Ok(len) => short[..len].to_vec(),
        Err(Errno::RANGE) => {
            let mut long = vec![0; LONGEST];
            let len = llistxattr(path.as_slice(), long.as_mut_slice())?;
            long.truncate(len);
            long
        }
        Err(errno) => return without(Err(errno), Vec::new()),
    };
    let mut attributes = Vec::new();
    for key in listed.split(|byte| *byte == 0).filter(|key| !key.is_empty() && !OF_OTHERS.contains(key)) {
        let mut value = vec![0; LONGEST];
        match lgetxattr(path.as_slice(), key, value.as_mut_slice()) {
            Ok(len) => attributes.push((key.to_vec(), value[..len].to_vec())),
            // Removed meanwhile.
            Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno),
        }
    }
    attributes.sort_unstable();
    Ok(attributes)
}

pub(super) fn set_attribute(
    folder: BorrowedFd<'_>,
    name: &CStr,
    key: &[u8],
    value: &[u8],
) -> Result<(), Errno> {
    lsetxattr(path(folder, name).as_slice(), key, value, XattrFlags::empty())
}
