//! Sources against the real programs; disks there and back; collections.

mod check;
mod collection;
mod domains;
mod files;
mod find_files;
mod guest_files;
mod interrupted;
mod lab;
mod left_out;
mod qemu_image;
mod random_access;
mod round_trip;
mod writers;
