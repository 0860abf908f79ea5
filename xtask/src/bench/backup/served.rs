//! A restore point that is served over NBD, read in 4 KiB pieces at random.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::image::Image;
use super::tool::{NAME, Tool};
use crate::bench::client::Client;
use crate::bench::random::Random;
use crate::interrupt;

const PIECE: u64 = 4096;
const IN_FLIGHT: u64 = 32;
/// What is read one after the other, to have it in memory.
const WARM_PIECE: u64 = 1 << 20;
/// Fits what the program keeps in memory by default, with its reading ahead.
const WARM: u64 = 24 << 20;
const MEASURED: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// Reads a second.
#[derive(Debug, Clone, Copy)]
pub struct Served {
    /// Of what is in the program's memory.
    pub warm: f64,
    /// Of the whole disk: each has a chunk read from the repository, which is in the page cache, most of the time.
    pub anywhere: f64,
}

/// Serves the repository's newest point, and reads it; what is read is compared with the image.
pub fn measure(tool: &Tool, image: &Image) -> Result<Served> {
    let socket = tool.folder().join("nbd.sock");
    let mut command = tool.command(&["serve", NAME, "--socket"]);
    command.arg(&socket).stdin(Stdio::null()).stdout(Stdio::null());
    let mut server = Server(command.spawn().context("serve a point")?);
    let mut client = server.connect(&socket)?;
    ensure!(client.size == image.bytes, "the point's disk has {} bytes", client.size);
    let original = File::open(&image.path)?;
    // Behind the file system's first structures, where files lie.
    let start = image.bytes / 2;
    let (mut ours, mut theirs) = (vec![0; WARM_PIECE as usize], vec![0; WARM_PIECE as usize]);
    for at in (start..start + WARM).step_by(WARM_PIECE as usize) {
        client.send_read(at, at, WARM_PIECE as u32)?;
        client.receive_read(&mut ours)?;
        original.read_exact_at(&mut theirs, at)?;
        ensure!(ours == theirs, "what is served at {at} is not what was backed up");
    }
    let warm = rate(&mut client, &original, start, WARM)?;
    let anywhere = rate(&mut client, &original, 0, image.bytes)?;
    Ok(Served { warm, anywhere })
}

/// Reads pieces at random in a part of the disk, and looks at the content of some.
fn rate(client: &mut Client, original: &File, start: u64, len: u64) -> Result<f64> {
    let mut random = Random::new(start ^ len);
    let mut place = || start + random.next() % (len / PIECE) * PIECE;
    for _ in 0..IN_FLIGHT {
        let at = place();
        client.send_read(at, at, PIECE as u32)?;
    }
    let (mut ours, mut theirs) = ([0; PIECE as usize], [0; PIECE as usize]);
    let (mut count, begun) = (0u32, Instant::now());
    while begun.elapsed() < MEASURED {
        let at = client.receive_read(&mut ours)?;
        if count.is_multiple_of(1024) {
            original.read_exact_at(&mut theirs, at)?;
            ensure!(ours == theirs, "what is served at {at} is not what was backed up");
        }
        count += 1;
        let at = place();
        client.send_read(at, at, PIECE as u32)?;
    }
    let rate = f64::from(count) / begun.elapsed().as_secs_f64();
    for _ in 0..IN_FLIGHT {
        client.receive_read(&mut ours)?;
    }
    Ok(rate)
}

struct Server(Child);

impl Server {
    fn connect(&mut self, socket: &std::path::Path) -> Result<Client> {
        let begun = Instant::now();
        loop {
            interrupt::check()?;
            if let Ok(client) = Client::connect(socket, "") {
                return Ok(client);
            }
            if let Some(status) = self.0.try_wait()? {
                bail!("the server ended: {status}");
            }
            ensure!(begun.elapsed() < PATIENCE, "the server was not there within {} s", PATIENCE.as_secs());
            thread::sleep(POLL);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
