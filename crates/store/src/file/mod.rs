//! Real files: the synchronous disk for opening, and the executor for running.

mod disk;
mod executor;

pub use disk::FileDisk;
pub use executor::Executor;
