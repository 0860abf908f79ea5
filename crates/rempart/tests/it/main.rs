//! The program as its users meet it: real daemons on loopback, with files of their own, told what to do by its own
//! command line. No machine runs in them, but for where one is needed; disks are written through the NBD export.
//! Needs root, QEMU's and libnbd's programs.

mod agent;
mod at_once;
mod backup;
mod bad_input;
mod buckets;
mod changes;
mod command_line;
mod copy;
mod export;
mod frozen;
mod golden;
// A part of the hypervisor's tests; not all of it is wanted here.
#[allow(dead_code)]
#[path = "../../../hypervisor/tests/qemu/guest.rs"]
mod guest;
mod guest_files;
mod guests;
mod images;
mod json;
mod keys;
mod killed;
mod killer;
#[path = "../../../objects/tests/it/lab.rs"]
mod lab;
mod left_out;
mod memory;
mod mount;
mod onto_node;
mod own_memory;
mod protection;
mod qemu;
mod rack;
mod readers;
#[allow(dead_code)]
#[path = "../../../notify/tests/it/receiver.rs"]
mod receiver;
mod recover;
mod repositories;
mod retention;
mod running;
mod schedule;
mod serve;
mod service;
mod stage;
mod units;
mod verify_boot;
mod views;
mod witnesses;
