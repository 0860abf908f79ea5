//! Sources against the real programs; disks there and back; collections.

mod collection;
mod lab;
mod qemu_image;
mod random_access;
mod round_trip;
