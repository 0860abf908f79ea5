//! The four loads, and what is measured of each.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::disk;
use super::server::Server;
use crate::bench::client::Client;
use crate::bench::random::Random;

/// Three times the log bytes our server holds in memory before the image must follow: a load that fits into the window
/// would measure half the work. The same for everybody.
const LEAST_BYTES: u64 = 3 * (64 << 20);

/// More than twice the log that our nodes keep for peers that were away.
const WARM_UP_BYTES: u64 = 3 * LEAST_BYTES;

#[derive(Debug, PartialEq, Eq)]
pub struct Load {
    pub name: &'static str,
    block: usize,
    in_flight: usize,
    random: bool,
    /// A flush after each write, both counted as one operation.
    flush_each: bool,
}

#[derive(Debug, Clone)]
pub struct Measured {
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub processor_s_per_gib: f64,
}

impl Load {
    pub const SEQUENTIAL: Load = Load {
        name: "1 MiB sequential, 4 in flight",
        block: 1 << 20,
        in_flight: 4,
        random: false,
        flush_each: false,
    };

    pub const ALL: [Load; 4] = [
        Load { name: "4 KiB write+flush", block: 4096, in_flight: 1, random: true, flush_each: true },
        Load {
            name: "4 KiB random, 1 in flight",
            block: 4096,
            in_flight: 1,
            random: true,
            flush_each: false,
        },
        Load {
            name: "4 KiB random, 32 in flight",
            block: 4096,
            in_flight: 32,
            random: true,
            flush_each: false,
        },
        Load::SEQUENTIAL,
    ];

    /// Writes so much that a log has reached its size: from then on its files are used again, and none is made.
    pub fn warm_up(server: &Server) -> Result<()> {
        let [.., sequential] = &Load::ALL;
        for _ in 0..WARM_UP_BYTES / LEAST_BYTES {
            sequential.run(server, 0)?;
        }
        Ok(())
    }

    /// Runs for the time given and at least [`LEAST_BYTES`] (write+flush, which takes minutes for so many: three times
    /// the time). It ends when everything is flushed and every image of the server has it, on the disk.
    pub fn run(&self, server: &Server, seconds: u64) -> Result<Measured> {
        let mut client = Client::connect(&server.socket, server.export)?;
        let blocks = client.size.min(disk::BYTES) / self.block as u64;
        let mut random = Random::new(u64::from(std::process::id()));
        let mut data = vec![0; self.block];
        random.fill(&mut data);
        let (least, times) = if self.flush_each { (0, 3) } else { (LEAST_BYTES / self.block as u64, 1) };
        let end = Duration::from_secs(seconds) * times;

        let processor_before = server.processor_seconds()?;
        let started = Instant::now();
        let mut sent_at = vec![started; self.in_flight];
        let mut took = Vec::new();
        let mut sent = 0;
        let mut done: u64 = 0;
        let mut send = |client: &mut Client, cookie: u64, sent_at: &mut [Instant]| -> Result<()> {
            let block = if self.random { random.next() % blocks } else { sent % blocks };
            // No two blocks alike: some store would notice.
            data[..8].copy_from_slice(&random.next().to_le_bytes());
            sent_at[cookie as usize] = Instant::now();
            sent += 1;
            client.send_write(cookie, block * self.block as u64, &data)
        };
        for cookie in 0..self.in_flight as u64 {
            send(&mut client, cookie, &mut sent_at)?;
        }
        let mut outstanding = self.in_flight;
        while outstanding > 0 {
            let cookie = client.receive()?;
            if self.flush_each {
                client.send_flush(cookie)?;
                client.receive()?;
            }
            took.push(sent_at[cookie as usize].elapsed());
            done += 1;
            outstanding -= 1;
            if started.elapsed() < end || done < least {
                send(&mut client, cookie, &mut sent_at)?;
                outstanding += 1;
            }
        }
        client.send_flush(0)?;
        client.receive()?;
        server.drain()?;
        let elapsed = started.elapsed().as_secs_f64();
        let processor = server.processor_seconds()? - processor_before;
        took.sort_unstable();
        let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
        let written_gib = (done * self.block as u64) as f64 / f64::from(1 << 30);
        Ok(Measured {
            per_second: done as f64 / elapsed,
            p50_us: at(0.5),
            p99_us: at(0.99),
            processor_s_per_gib: processor / written_gib,
        })
    }
}
