//! The parent's end of one child: it asks, reads what the child asks for meanwhile, and bounds both.

use super::blocks::Blocks;
use super::protocol::{Answer, Reply, Request};
use crate::ReadError;
use crate::leave_out::protocol::{ANSWER, LONGEST, read_number, read_text, write_number, write_text};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use thiserror::Error;

/// What answering one question may take.
#[derive(Debug, Clone, Copy)]
pub struct ReadLimits {
    /// Of the child; not what it takes to read for it.
    pub time: Duration,
    /// Read from the volume.
    pub bytes: u64,
}

impl Default for ReadLimits {
    /// A minute, 1 GiB.
    fn default() -> ReadLimits {
        ReadLimits { time: Duration::from_secs(60), bytes: 1 << 30 }
    }
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum GuestError {
    /// The child says so: what is there is damaged, or of a kind that is not known.
    #[error("{0}")]
    Refused(String),
    /// The child died, hung, or said what makes no sense.
    #[error("the process that reads the file system failed: {0}")]
    Broken(String),
    #[error(transparent)]
    Unreadable(ReadError),
}

impl From<io::Error> for GuestError {
    fn from(error: io::Error) -> GuestError {
        GuestError::Broken(match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "it took too long".to_owned(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                "it died".to_owned()
            }
            _ => error.to_string(),
        })
    }
}

/// A running child.
pub(super) struct Process {
    child: Child,
    from: BufReader<Timed>,
    to: BufWriter<Timed>,
}

impl Process {
    pub fn start(command: &mut Command, blocks: &Blocks, limits: ReadLimits) -> Result<Process, GuestError> {
        let (ours, its) = UnixStream::pair()?;
        let (input, output) = (OwnedFd::from(its.try_clone()?), OwnedFd::from(its));
        let child = command
            .env_clear()
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::null())
            .spawn()?;
        // Else its ends stay open here, and its death is not seen.
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let (from, to) = (Timed::new(ours.try_clone()?, limits.time), Timed::new(ours, limits.time));
        let mut process = Process { child, from: BufReader::new(from), to: BufWriter::new(to) };
        write_number(&mut process.to, blocks.len())?;
        Ok(process)
    }

    pub fn ask(
        &mut self,
        request: &Request,
        blocks: &Blocks,
        limits: ReadLimits,
    ) -> Result<Answer, GuestError> {
        let Process { from, to, .. } = self;
        (from.get_mut().left, to.get_mut().left) = (limits.time, limits.time);
        write_text(to, &postcard::to_allocvec(request).map_err(io::Error::other)?)?;
        to.flush()?;
        let (mut buffer, mut read, mut unreadable) = (Vec::new(), 0u64, None);
        loop {
            let offset = read_number(from)?;
            if offset == ANSWER {
                let reply: Reply = postcard::from_bytes(&read_text(from)?).map_err(io::Error::other)?;
                return match (reply, unreadable) {
                    (Ok(answer), _) => Ok(answer),
                    (Err(_), Some(error)) => Err(GuestError::Unreadable(error)),
                    (Err(why), None) => Err(GuestError::Refused(why)),
                };
            }
            let len = read_number(from)?;
            read = read.saturating_add(len);
            if len > LONGEST || offset.checked_add(len).is_none_or(|end| end > blocks.len()) {
                return Err(GuestError::Broken("it asks for what is not there".to_owned()));
            }
            if read > limits.bytes {
                return Err(GuestError::Broken("it would read too much".to_owned()));
            }
            buffer.resize(len as usize, 0);
            match blocks.read(offset, &mut buffer) {
                Ok(()) => {
                    write_number(to, 1)?;
                    to.write_all(&buffer)?;
                }
                Err(error) => {
                    unreadable = Some(error);
                    write_number(to, 0)?;
                }
            }
            to.flush()?;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A socket that waits for so long, all waits together.
struct Timed {
    stream: UnixStream,
    left: Duration,
}

impl Timed {
    fn new(stream: UnixStream, left: Duration) -> Timed {
        Timed { stream, left }
    }

    fn within<T>(
        &mut self,
        set: impl FnOnce(&UnixStream, Option<Duration>) -> io::Result<()>,
        wait: impl FnOnce(&mut UnixStream) -> io::Result<T>,
    ) -> io::Result<T> {
        if self.left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        set(&self.stream, Some(self.left))?;
        let start = Instant::now();
        let done = wait(&mut self.stream);
        self.left = self.left.saturating_sub(start.elapsed());
        done
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.within(UnixStream::set_read_timeout, |stream| stream.read(buffer))
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.within(UnixStream::set_write_timeout, |stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
