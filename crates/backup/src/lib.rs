//! Backing up disks into a repository, and bringing them back.

mod chunk_set;
mod copy;
mod disk;
mod error;
mod files;
mod freeze;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod guest_files;
mod image;
pub mod leave_out;
mod live_disk;
mod mount;
mod pipeline;
mod point;
mod restore;
mod retention;
mod server;
mod snapshot;
mod source;

pub use chunk_set::ChunkSet;
pub use copy::PointSource;
pub use disk::{Changes, DiskJob, Pace, back_up_disk};
pub use error::BackupError;
pub use files::{
    CheckedFiles, DamagedFile, Entry, FileFinder, FileReader, FilesJob, Found, InvalidPattern, Kind,
    RestoredFiles, Selection, StoredFiles, Time, back_up_files, check_files, copy_files, restore_files,
};
pub use freeze::{FreezeError, FrozenDevices, FrozenSource, Thawed, thaw_file_systems};
pub use guest_files::{
    FileContent, GuestDisks, GuestError, GuestReaders, GuestVolume, Looked, ReadLimits, list_guest_files,
    read_files, restore_guest_files,
};
pub use image::{NewFile, QemuImg};
pub use live_disk::LiveDisk;
pub use mount::{Mounted, PointFiles};
pub use pipeline::Progress;
pub use point::{ChunkCache, DiskReader, ReadError, Run};
pub use rempart_guest_fs::Volume;
pub use rempart_nbd::server::Listener;
pub use restore::{
    Checked, Content, DamagedRange, FileTarget, Target, check_disk, check_kept, data_bytes, restore_disk,
};
pub use retention::{Reason, Retention, UnknownZone, Zone};
pub use server::DiskServer;
pub use snapshot::VolumeSnapshot;
pub use source::{Connections, FileSource, NbdEndpoint, NbdSource, QemuImage, Reader, Source, SourceError};
