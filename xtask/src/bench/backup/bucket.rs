//! A backup into a bucket, against a plain upload of as many bytes to the same server.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::measure::{self, Taken};
use super::tool::{NAME, PASSPHRASE};
use crate::bench::moto::{self, BUCKET, Moto};
use crate::bench::random::Random;
use crate::workspace::output;

/// Cannot be compressed: what is uploaded is what is backed up.
const BYTES: u64 = 1 << 30;
const HOST: &str = "127.0.0.1";
/// As large as the objects that a backup makes.
const OBJECT: u64 = 16 << 20;
/// Uploads at once.
const UPLOADS: u32 = 4;

/// Sends a file in objects, several at once, and does nothing else with it.
const UPLOAD: &str = "
import http.client, os, sys, threading
port, bucket, path, size, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
sign = 'AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0'
places, lock, failed = iter(range(0, os.path.getsize(path), size)), threading.Lock(), []
def send():
    to = http.client.HTTPConnection('127.0.0.1', int(port))
    with open(path, 'rb', buffering=0) as file:
        while True:
            with lock: at = next(places, None)
            if at is None: return
            to.request('PUT', f'/{bucket}/plain/{at}', os.pread(file.fileno(), size, at), {'Authorization': sign})
            answer = to.getresponse()
            answer.read()
            if answer.status != 200: failed.append(answer.status)
sending = [threading.Thread(target=send) for _ in range(threads)]
for thread in sending: thread.start()
for thread in sending: thread.join()
sys.exit(f'refused: {failed}' if failed else 0)
";

/// Seconds of each round.
#[derive(Debug, Default)]
pub struct Bucket {
    pub ours: Vec<Taken>,
    pub plain: Vec<Taken>,
}

impl Bucket {
    pub const MIB: f64 = (BYTES >> 20) as f64;

    pub fn measure(program: &Path, folder: &Path, rounds: u32) -> Result<Bucket> {
        let folder = folder.join("bucket");
        fs::create_dir_all(&folder)?;
        let image = folder.join("noise.raw");
        make_noise(&image)?;
        let mut bucket = Bucket::default();
        for round in 1..=rounds {
            // A new server each time, whose memory is empty.
            match round % 2 {
                0 => {
                    bucket.ours.push(ours(program, &folder, &image)?);
                    bucket.plain.push(plain(&image)?);
                }
                _ => {
                    bucket.plain.push(plain(&image)?);
                    bucket.ours.push(ours(program, &folder, &image)?);
                }
            }
            for (name, taken) in [("rempart", &bucket.ours), ("plain", &bucket.plain)] {
                eprintln!("{:24} {name:9} {:7.2} s", "upload", taken.last().expect("just measured").seconds);
            }
        }
        fs::remove_dir_all(&folder)?;
        Ok(bucket)
    }
}

fn make_noise(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    let (mut random, mut buffer) = (Random::new(BYTES), vec![0; 1 << 20]);
    for _ in 0..BYTES >> 20 {
        random.fill(&mut buffer);
        file.write_all(&buffer)?;
    }
    Ok(())
}

fn ours(program: &Path, folder: &Path, image: &Path) -> Result<Taken> {
    let (_server, port) = server()?;
    let home = folder.join("home");
    fs::create_dir_all(&home)?;
    fs::write(home.join("passphrase"), format!("{PASSPHRASE}\n"))?;
    let command = |arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).env("REMPART_PASSPHRASE_FILE", home.join("passphrase"));
        command.env("REMPART_CACHE_DIR", home.join("cache"));
        command.env("AWS_ACCESS_KEY_ID", "id").env("AWS_SECRET_ACCESS_KEY", "secret");
        command
    };
    let url = format!("s3://{BUCKET}/ours?endpoint=http://{HOST}:{port}&allow_http=true");
    output(&mut command(&["repo", "create", &url])).context("make a repository in a bucket")?;
    let mut backup = command(&["backup", NAME, "--repo", &url, "--disk"]);
    measure::have_memory_at_hand()?;
    let taken = measure::run(backup.arg(image))?;
    fs::remove_dir_all(&home)?;
    Ok(taken)
}

fn plain(image: &Path) -> Result<Taken> {
    let (_server, port) = server()?;
    let mut upload = Command::new(moto::python());
    upload
        .args(["-c", UPLOAD, &port.to_string(), BUCKET])
        .arg(image)
        .args([OBJECT.to_string(), UPLOADS.to_string()]);
    measure::have_memory_at_hand()?;
    measure::run(&mut upload)
}

/// On loopback.
fn server() -> Result<(Moto, u16)> {
    let port = TcpListener::bind((HOST, 0))?.local_addr()?.port();
    Ok((Moto::start(Command::new, Command::new, HOST, port)?, port))
}
