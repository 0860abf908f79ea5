//! Sources against the real programs.

mod qemu_image;
