//! Sources against the real programs; disks there and back.

mod qemu_image;
mod random_access;
mod round_trip;
