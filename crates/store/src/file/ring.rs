//! Several writes at once, with io_uring: one system call, and the device has them all.

use io_uring::{IoUring, opcode, types};
use rempart_buffer::Slice;
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Writes at once, at most.
pub(crate) const ENTRIES: usize = 64;

/// One thread's ring.
pub(crate) struct Ring(IoUring);

/// Where what is written.
pub(crate) struct RingWrite<'a> {
    pub file: Arc<File>,
    pub offset: u64,
    pub data: &'a [Slice],
}

impl Ring {
    /// `None` where the system has no such thing, or does not allow it.
    pub fn new() -> Option<Ring> {
        IoUring::new(ENTRIES as u32).ok().map(Ring)
    }

    /// Writes them all and waits for the last. What each wrote, in bytes; `None` if the ring is of no use any more.
    ///
    /// # Panics
    /// If there are more than [`ENTRIES`].
    pub fn write(&mut self, writes: &[RingWrite<'_>]) -> Option<Vec<Result<usize, Errno>>> {
        assert!(writes.len() <= ENTRIES, "{} writes at once", writes.len());
        let iovec =
            |slice: &Slice| libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() };
        let parts: Vec<Vec<libc::iovec>> =
            writes.iter().map(|write| write.data.iter().map(iovec).collect()).collect();
        for (index, (write, parts)) in writes.iter().zip(&parts).enumerate() {
            let file = types::Fd(write.file.as_raw_fd());
            let entry = opcode::Writev::new(file, parts.as_ptr(), parts.len() as u32)
                .offset(write.offset)
                .build()
                .user_data(index as u64);
            // SAFETY: the descriptors, the bytes and the lists of them live in `writes` and `parts` until this function
            // returns, which it does only when the kernel has none of the entries.
            unsafe { self.0.submission().push(&entry) }.expect("it is empty, and has room for all");
        }
        let mut results = vec![Err(Errno::IO); writes.len()];
        let mut waiting = writes.len();
        while waiting > 0 {
            if let Err(error) = self.0.submit_and_wait(waiting) {
                let unsent = self.0.submission().len();
                if unsent == waiting && error.raw_os_error() != Some(libc::EINTR) {
                    return None;
                }
            }
            for completion in self.0.completion() {
                let result = completion.result();
                results[completion.user_data() as usize] =
                    usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result));
                waiting -= 1;
            }
        }
        Some(results)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn each_write_is_told_how_it_ended() {
        let Some(mut ring) = Ring::new() else { return eprintln!("skipped: this system has no io_uring") };
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let writable = Arc::new(File::create_new(&path).expect("creates"));
        let readable = Arc::new(File::open(&path).expect("opens"));
        let data = [Slice::copy_of(b"one, "), Slice::copy_of(b"two")];
        for round in 0..3 * ENTRIES as u64 {
            let write = |file: &Arc<File>, offset| RingWrite { file: file.clone(), offset, data: &data };
            let writes =
                [write(&writable, 16 * round), write(&readable, 0), write(&writable, 16 * round + 8)];
            let results = ring.write(&writes).expect("it works");
            assert_eq!(results, [Ok(8), Err(Errno::BADF), Ok(8)]);
        }
        let mut written = vec![0; 3 * ENTRIES * 16];
        File::open(&path).expect("opens").read_exact_at(&mut written, 0).expect("all of it");
        assert!(written.chunks(8).all(|chunk| chunk == b"one, two"));
        assert_eq!(ring.write(&[]), Some(Vec::new()));
    }
}
