//! What the lab's guest and the program that watches it from outside must agree on.
//!
//! The guest (the binary of this package, run as the only service of a tiny Linux) writes numbered records to two
//! disks. [`record`] is their layout, [`ring`] how the newest one is found, [`report`] what is said over the network,
//! [`plan`] what is written besides.

pub mod plan;
pub mod record;
pub mod report;
pub mod ring;
