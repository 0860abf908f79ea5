//! Sources against the real programs; disks there and back.

mod qemu_image;
mod round_trip;
