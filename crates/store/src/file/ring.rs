//! Several writes, or reads, at once, with io_uring: one system call, and the device has them all.

use io_uring::{IoUring, opcode, squeue, types};
use rempart_buffer::{BufferMut, Slice};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Reads or writes at once, at most.
pub(crate) const ENTRIES: usize = 64;

/// One thread's ring.
pub(crate) struct Ring(IoUring);

/// Where what is written.
pub(crate) struct RingWrite<'a> {
    pub file: Arc<File>,
    pub offset: u64,
    pub data: &'a [Slice],
}

/// What is to be filled from where.
pub(crate) struct RingRead {
    pub file: Arc<File>,
    pub offset: u64,
    pub buffer: BufferMut,
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
        let iovec =
            |slice: &Slice| libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() };
        let parts: Vec<Vec<libc::iovec>> =
            writes.iter().map(|write| write.data.iter().map(iovec).collect()).collect();
        let entries = writes.iter().zip(&parts).map(|(write, parts)| {
            let file = types::Fd(write.file.as_raw_fd());
            opcode::Writev::new(file, parts.as_ptr(), parts.len() as u32).offset(write.offset).build()
        });
        // SAFETY: the descriptors, the bytes and the lists of them live in `writes` and `parts` until this returns.
        unsafe { self.run(entries) }
    }

    /// Reads them all and waits for the last. What was read of each, in bytes; `None` if the ring is of no use any more.
    ///
    /// # Panics
    /// If there are more than [`ENTRIES`].
    pub fn read(&mut self, reads: &mut [RingRead]) -> Option<Vec<Result<usize, Errno>>> {
        let entries = reads.iter_mut().map(|read| {
            let file = types::Fd(read.file.as_raw_fd());
            let len = u32::try_from(read.buffer.len()).expect("a read is bounded");
            opcode::Read::new(file, read.buffer.as_mut_ptr(), len).offset(read.offset).build()
        });
        // SAFETY: the descriptors and the buffers, which nobody else has, live in `reads` until this returns.
        unsafe { self.run(entries) }
    }

    /// Gives the kernel all `entries` and waits for the last.
    ///
    /// # Safety
    /// What they point to has to live until this returns, which it does only when the kernel has none of them.
    unsafe fn run(
        &mut self,
        entries: impl ExactSizeIterator<Item = squeue::Entry>,
    ) -> Option<Vec<Result<usize, Errno>>> {
        let count = entries.len();
        assert!(count <= ENTRIES, "{count} at once");
        for (index, entry) in entries.enumerate() {
            // SAFETY: as the caller promises.
            unsafe { self.0.submission().push(&entry.user_data(index as u64)) }
                .expect("it is empty, and has room for all");
        }
        let mut results = vec![Err(Errno::IO); count];
        let mut waiting = count;
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
        let unreadable = Arc::new(File::options().write(true).open(&path).expect("opens"));
        let end = (written.len() - 4) as u64;
        let mut reads = [(&readable, 0), (&unreadable, 0), (&readable, end), (&readable, 16)]
            .map(|(file, offset)| RingRead { file: file.clone(), offset, buffer: BufferMut::zeroed(8) });
        assert_eq!(ring.read(&mut reads), Some(vec![Ok(8), Err(Errno::BADF), Ok(4), Ok(8)]));
        assert!([0, 3].iter().all(|&read: &usize| *reads[read].buffer == *b"one, two"));
        assert_eq!(reads[2].buffer[..4], *b" two");
    }
}
