//! A small NBD client that keeps several requests in flight on one connection.
//!
//! It is the measuring instrument, so it shares no code with the server it measures. Fixed newstyle handshake with
//! `NBD_OPT_GO`, simple replies (NetworkBlockDevice/nbd, doc/proto.md).

use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
const REPLY_MAGIC: u64 = 0x0003_E889_0455_65A9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const FIXED_NEWSTYLE_NO_ZEROES: u32 = 3;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISCONNECT: u16 = 2;
const CMD_FLUSH: u16 = 3;

#[derive(Debug)]
pub struct Client {
    requests: UnixStream,
    replies: BufReader<UnixStream>,
    pub size: u64,
}

impl Client {
    pub fn connect(socket: &Path, export: &str) -> Result<Client> {
        let mut requests =
            UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        let mut replies = BufReader::with_capacity(64 << 10, requests.try_clone()?);
        let mut greeting = [0; 18];
        replies.read_exact(&mut greeting).context("read the greeting")?;
        ensure!(&greeting[..16] == b"NBDMAGICIHAVEOPT", "no newstyle NBD server");
        requests.write_all(&FIXED_NEWSTYLE_NO_ZEROES.to_be_bytes())?;
        let mut option = Vec::new();
        option.extend(OPTION_MAGIC.to_be_bytes());
        option.extend(OPT_GO.to_be_bytes());
        option.extend((export.len() as u32 + 6).to_be_bytes());
        option.extend((export.len() as u32).to_be_bytes());
        option.extend(export.as_bytes());
        option.extend(0u16.to_be_bytes());
        requests.write_all(&option)?;
        let mut size = None;
        loop {
            let mut header = [0; 20];
            replies.read_exact(&mut header).context("read the answer to NBD_OPT_GO")?;
            ensure!(u64::from_be_bytes(header[..8].try_into()?) == REPLY_MAGIC, "bad magic in a reply");
            let kind = u32::from_be_bytes(header[12..16].try_into()?);
            let mut payload = vec![0; u32::from_be_bytes(header[16..].try_into()?) as usize];
            replies.read_exact(&mut payload)?;
            match kind {
                REP_ACK => break,
                REP_INFO if payload.len() == 12 && payload[..2] == INFO_EXPORT.to_be_bytes() => {
                    size = Some(u64::from_be_bytes(payload[2..10].try_into()?));
                }
                REP_INFO => {}
                _ => bail!("the server refuses export `{export}`: {}", String::from_utf8_lossy(&payload)),
            }
        }
        let size = size.context("the server did not tell the size")?;
        Ok(Client { requests, replies, size })
    }

    pub fn send_write(&mut self, cookie: u64, offset: u64, bytes: &[u8]) -> Result<()> {
        // Small ones in one piece: two system calls a request would measure the client.
        let header = request(CMD_WRITE, cookie, offset, bytes.len() as u32);
        if bytes.len() <= 64 << 10 {
            self.requests.write_all(&[&header[..], bytes].concat())?;
        } else {
            self.requests.write_all(&header)?;
            self.requests.write_all(bytes)?;
        }
        Ok(())
    }

    pub fn send_read(&mut self, cookie: u64, offset: u64, length: u32) -> Result<()> {
        Ok(self.requests.write_all(&request(CMD_READ, cookie, offset, length))?)
    }

    /// Waits for the reply to a read that wanted as many bytes as `into` has, and returns its cookie.
    pub fn receive_read(&mut self, into: &mut [u8]) -> Result<u64> {
        let cookie = self.receive()?;
        self.replies.read_exact(into).context("read what was read")?;
        Ok(cookie)
    }

    pub fn send_flush(&mut self, cookie: u64) -> Result<()> {
        Ok(self.requests.write_all(&request(CMD_FLUSH, cookie, 0, 0))?)
    }

    /// Waits for the next reply and returns its cookie; an error reply is an error.
    pub fn receive(&mut self) -> Result<u64> {
        let mut header = [0; 16];
        self.replies.read_exact(&mut header).context("read a reply")?;
        ensure!(u32::from_be_bytes(header[..4].try_into()?) == SIMPLE_REPLY_MAGIC, "no simple reply");
        let error = u32::from_be_bytes(header[4..8].try_into()?);
        ensure!(error == 0, "the server answered with error {error}");
        Ok(u64::from_be_bytes(header[8..].try_into()?))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.requests.write_all(&request(CMD_DISCONNECT, 0, 0, 0));
    }
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut header = [0; 28];
    header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    header[6..8].copy_from_slice(&command.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..].copy_from_slice(&length.to_be_bytes());
    header
}
