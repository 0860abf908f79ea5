//! Real files: the synchronous disk for opening, and the executor for running.

mod disk;
mod executor;
mod ring;

pub use disk::FileDisk;
pub use executor::Executor;

/// Gives memory that is not in use back to the system: this thread's spare buffers, and what the allocator keeps of
/// all threads. Takes milliseconds; for a thread that has nothing to do for some time.
pub fn release_memory() {
    rempart_buffer::release_spares();
    #[cfg(target_env = "gnu")]
    // SAFETY: it may be called at any time, on any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
