//! Real file systems, made by their own programs.

mod ext4;
mod images;
mod ntfs;
mod partitions;
