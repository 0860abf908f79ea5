//! A last word to a guest that stands still, should the process that stopped it die or hang.
//!
//! A frozen file system, or a stopped guest, must not depend on this process going on: it may be killed at any moment,
//! or stopped itself. So a child is forked that does nothing but wait for the end of a pipe or of a time, and then
//! writes one prepared message to the connection, which it shares: no new connection is needed where only one client is
//! served. The child is in a session of its own and outlives signals to its parent's group; not what kills the whole
//! control group at once, nor the host's death, which takes the guest along.
//!
//! QEMU refuses to go on in the last moments of a migration, and stands still once that came to its end. So one who
//! [insists](DeadMan::insist) cuts the migration off first and says its message again and again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

/// How long the child keeps the connection after its message, for the other side to take it in.
const LINGER_MS: i32 = 2_000;

/// Between two times that it is said by one who insists, and how often.
const AGAIN_MS: i32 = 200;
const INSISTENCE: u32 = 15;

/// While it lives, and for `limit` at most, nothing happens. When it is dropped without [`DeadMan::stand_down`], or the
/// process ends in whatever way, the message is sent.
#[derive(Debug)]
pub(crate) struct DeadMan {
    pipe: OwnedFd,
}

impl DeadMan {
    pub(crate) fn arm(connection: BorrowedFd<'_>, message: &[u8], limit: Duration) -> io::Result<Self> {
        Self::fork(connection, None, message, limit, 1)
    }

    /// Shuts the socket `broken` down first, and says the message for three seconds.
    pub(crate) fn insist(
        connection: BorrowedFd<'_>,
        broken: Option<BorrowedFd<'_>>,
        message: &[u8],
        limit: Duration,
    ) -> io::Result<Self> {
        Self::fork(connection, broken, message, limit, INSISTENCE)
    }

    fn fork(
        connection: BorrowedFd<'_>,
        broken: Option<BorrowedFd<'_>>,
        message: &[u8],
        limit: Duration,
        times: u32,
    ) -> io::Result<Self> {
        let (wait, pipe) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let limit_ms = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        let broken = broken.map_or(-1, |broken| broken.as_raw_fd());
        // SAFETY: the child calls async-signal-safe functions only, and touches no memory but its stack and `message`.
        let child = unsafe { libc::fork() };
        match child {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: this is the child, with copies of all descriptors.
            0 => unsafe {
                child_main(wait.as_raw_fd(), connection.as_raw_fd(), broken, message, limit_ms, times)
            },
            _ => {
                // The child only forks once more: nobody has to wait for the one that stays.
                // SAFETY: it takes plain numbers.
                while unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) } == -1
                    && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
                {}
                Ok(Self { pipe })
            }
        }
    }

    /// All is well so far: the limit counts from now on.
    pub(crate) fn go_on(&self) {
        // The child may be gone.
        let _ = rustix::io::write(self.pipe.as_fd(), b".");
    }

    /// All is well again: nothing is sent. Too late if the limit has passed.
    pub(crate) fn stand_down(self) {
        // The child may be gone.
        let _ = rustix::io::write(self.pipe.as_fd(), b"!");
    }
}

/// SAFETY: only in a forked child, with descriptors that are open; `broken` may be -1.
unsafe fn child_main(
    wait: RawFd,
    connection: RawFd,
    broken: RawFd,
    message: &[u8],
    limit_ms: i32,
    times: u32,
) -> ! {
    // SAFETY: system calls with plain numbers and with memory of this frame.
    unsafe {
        if libc::fork() != 0 {
            libc::_exit(0);
        }
        libc::setsid();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGPIPE, libc::SIGQUIT] {
            libc::signal(signal, libc::SIG_IGN);
        }
        // Locks and connections of the parent must not live on in here, nor the pipe's other end.
        let mut kept = [wait, connection, broken];
        kept.sort_unstable();
        let mut next = 0u32;
        for descriptor in kept.into_iter().filter_map(|descriptor| u32::try_from(descriptor).ok()) {
            if descriptor > next {
                libc::syscall(libc::SYS_close_range, next, descriptor - 1, 0u32);
            }
            next = descriptor + 1;
        }
        libc::syscall(libc::SYS_close_range, next, u32::MAX, 0u32);

        loop {
            let mut poll = libc::pollfd { fd: wait, events: libc::POLLIN, revents: 0 };
            libc::poll(&mut poll, 1, limit_ms);
            let mut byte = 0u8;
            if poll.revents & libc::POLLIN == 0 || libc::read(wait, (&raw mut byte).cast(), 1) != 1 {
                break;
            }
            if byte == b'!' {
                libc::_exit(0);
            }
        }
        if broken >= 0 {
            libc::shutdown(broken, libc::SHUT_RDWR);
        }
        for time in 0..times {
            if time > 0 {
                libc::poll(std::ptr::null_mut(), 0, AGAIN_MS);
            }
            let mut sent = 0;
            while sent < message.len() {
                let rest = &message[sent..];
                let count = libc::send(connection, rest.as_ptr().cast(), rest.len(), libc::MSG_NOSIGNAL);
                if count > 0 {
                    sent += count as usize;
                    continue;
                }
                // Nobody is there any more.
                if *libc::__errno_location() != libc::EAGAIN {
                    libc::_exit(1);
                }
                // It is non-blocking, and its buffer may be full.
                let mut poll = libc::pollfd { fd: connection, events: libc::POLLOUT, revents: 0 };
                if libc::poll(&mut poll, 1, LINGER_MS) != 1 || poll.revents & libc::POLLOUT == 0 {
                    libc::_exit(1);
                }
            }
        }
        // A parent that is alive reads the answer itself: this one only keeps the connection open.
        libc::poll(std::ptr::null_mut(), 0, LINGER_MS);
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    const FAR: Duration = Duration::from_secs(600);

    fn pair() -> (UnixStream, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        far.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        (near, far)
    }

    #[test]
    fn its_message_is_sent_when_it_is_dropped() {
        let (near, mut far) = pair();
        let dead_man = DeadMan::arm(near.as_fd(), b"thaw\n", FAR).unwrap();
        drop((dead_man, near));
        let mut heard = String::new();
        far.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "thaw\n");
    }

    #[test]
    fn its_message_is_sent_when_the_time_is_over_though_the_maker_lives() {
        let (near, mut far) = pair();
        let begin = Instant::now();
        let dead_man = DeadMan::arm(near.as_fd(), b"thaw\n", Duration::from_millis(300)).unwrap();
        let mut heard = [0; 5];
        far.read_exact(&mut heard).unwrap();
        assert_eq!((&heard, begin.elapsed() >= Duration::from_millis(300)), (b"thaw\n", true));
        drop(dead_man);
    }

    #[test]
    fn nothing_is_sent_after_it_stood_down() {
        let (near, mut far) = pair();
        DeadMan::arm(near.as_fd(), b"thaw\n", FAR).unwrap().stand_down();
        drop(near);
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"");
    }

    #[test]
    fn who_insists_cuts_off_first_and_says_it_until_it_is_heard() {
        let (near, mut far) = pair();
        let (stream, mut other) = pair();
        let dead_man =
            DeadMan::insist(near.as_fd(), Some(stream.as_fd()), b"go on\n", Duration::from_millis(1500))
                .unwrap();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            dead_man.go_on();
            std::thread::sleep(Duration::from_millis(20));
        }
        far.set_nonblocking(true).unwrap();
        assert_eq!(far.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        far.set_nonblocking(false).unwrap();
        drop((dead_man, near));
        let mut heard = String::new();
        far.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "go on\n".repeat(INSISTENCE as usize));
        // Though one of its ends is still open.
        other.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 0);
        drop(stream);
    }

    #[test]
    fn it_ends_where_nobody_hears_it() {
        let (near, far) = pair();
        far.shutdown(std::net::Shutdown::Read).unwrap();
        let dead_man = DeadMan::arm(near.as_fd(), b"thaw\n", FAR).unwrap();
        drop((dead_man, near));
        // The last copy of the other end is the child's.
        let mut poll = libc::pollfd { fd: far.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one entry, which is there.
        unsafe { libc::poll(&mut poll, 1, 20_000) };
        assert_ne!(poll.revents & libc::POLLHUP, 0);
    }
}
