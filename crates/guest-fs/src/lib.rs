//! What lies on a guest's disk: what need not be backed up (swap, page files, free space), and files.
//!
//! A guest writes these bytes, so everything here is hostile input: all is bounded, nothing is believed that is not checked
//! against the disk's size, and no file system is mounted. Whoever runs this confines it, too.
//!
//! Where anything is not as it should be, nothing is left out: a byte too many in a backup costs space, one too few costs
//! a company.

mod disk;
mod ext4;
pub mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod lvm;
mod map;
mod ntfs;
mod partition;
mod survey;
mod swap;
mod volumes;

pub use disk::{Disk, Fault, Section};
pub use map::{Map, Part};
pub use survey::{LeftOut, Reason, Remark, Survey, Wanted, survey};
pub use volumes::{Volume, volumes};
