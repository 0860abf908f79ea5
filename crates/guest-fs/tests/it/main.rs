//! Real file systems, made by their own programs.

mod ext4;
mod files;
mod images;
mod lvm;
mod ntfs;
mod partitions;
mod xfs;
mod xfs_free;
