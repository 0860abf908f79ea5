//! Promises of the driver and the guard, kept by real QEMU under emulation. Needs root, QEMU, busybox-static, nft and
//! a Debian package archive to get a guest's kernel from.

mod backup;
mod backup_guest;
mod backup_memory;
mod backup_vm;
mod disks;
mod firmware;
mod guest;
mod hooks;
mod lab;
mod lease;
mod life;
mod network;
mod own_memory;
