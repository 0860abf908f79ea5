//! `rempart serve`.

use super::access::{Access, chain, describe};
use super::in_use::InUse;
use super::points::find;
use super::stop::Stop;
use crate::{Output, parse};
use clap::Args;
use rempart_api::Error;
use rempart_backup::{ChunkCache, Content, DiskReader, DiskServer, Listener, ReadError};
use rempart_repository::log::Log;
use rempart_repository::{PointDisk, Repository};
use rustix::fs::Mode;
use serde_json::json;
use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Ranges that cannot be read are told once each; past so many, no more.
const TOLD: usize = 1000;

/// Serves a restore point's disks over NBD, read-only, until it is ended by SIGTERM or SIGINT.
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    access: Access,
    /// `VM` for its newest point, or `VM@POINT`.
    point: String,
    /// A unix socket to be made, for its owner only. Each disk is an export of its name; the first is also the default.
    #[arg(long, required_unless_present = "listen", conflicts_with = "listen")]
    socket: Option<PathBuf>,
    /// A loopback address and port: whoever has an account on this machine can read the disks there.
    #[arg(long)]
    listen: Option<SocketAddr>,
    #[command(flatten)]
    memory: Memory,
}

/// What may be kept in memory.
#[derive(Debug, Args)]
pub struct Memory {
    /// How much of what was read is kept in memory.
    #[arg(long = "memory", default_value = "64M", value_parser = parse::byte_count)]
    bytes: u64,
}

impl Memory {
    /// Bytes.
    pub const DEFAULT: u64 = 64 << 20;

    pub fn cache(&self, repository: &Arc<Repository>) -> Result<Arc<ChunkCache>, Error> {
        let opened = ChunkCache::new(repository.clone(), self.bytes);
        opened.map_err(|e| describe("cannot read the repository's index", &e))
    }
}

pub fn disk_reader(cache: &Arc<ChunkCache>, disk: &PointDisk) -> DiskReader {
    let chunk_size = cache.chunk_size();
    let content = Content::of(disk, chunk_size);
    DiskReader::new(cache, &disk.name, content)
}

/// Tells each range that cannot be read, once.
pub fn tell_unreadable(output: Output) -> impl Fn(&ReadError) + Send + Sync {
    let told = Mutex::new(BTreeSet::new());
    move |error| {
        let mut told = told.lock().expect("no holder panics");
        if told.len() < TOLD && told.insert((error.what.clone(), error.start)) {
            output.tell(&chain(error));
        }
    }
}

/// A unix socket for its owner only, which goes with this value.
pub struct SocketFile(PathBuf);

impl SocketFile {
    pub fn listen(path: &Path) -> Result<(SocketFile, UnixListener), Error> {
        let what = format!("cannot listen on `{}`", path.display());
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(Error::refused(what).cause("there is a file of that name, and it is no socket"));
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(Error::new(rempart_api::ErrorKind::Conflict, what)
                    .cause("somebody listens there already"));
            }
            // Left behind by one that was killed.
            Ok(_) => std::fs::remove_file(path).map_err(|e| Error::failed(&what).cause(e))?,
            Err(_) => {}
        }
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(before);
        let listener = bound.map_err(|e| Error::failed(what).cause(e))?;
        Ok((SocketFile(path.to_owned()), listener))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn listen_on_loopback(address: SocketAddr) -> Result<TcpListener, Error> {
    let what = format!("cannot listen on `{address}`");
    if !address.ip().is_loopback() {
        return Err(Error::refused(what)
            .cause("whoever reaches that address could read the disks: it is not a loopback address")
            .hint("serve on 127.0.0.1, or on a --socket, and reach it from elsewhere through `ssh -L`"));
    }
    TcpListener::bind(address).map_err(|e| Error::failed(what).cause(e))
}

pub fn run(command: &Serve, output: Output) -> Result<(), Error> {
    let mut stop = Stop::new()?;
    let tcp = command.listen.map(listen_on_loopback).transpose()?;
    let repository = command.access.open()?;
    let found = |log: &Log| {
        let (root, point) = find(&repository, log, &command.point)?;
        if point.disks.is_empty() {
            return Err(Error::refused(format!("cannot serve `{}@{root}`", point.vm))
                .cause("it has files, and no disks")
                .hint("`rempart files` lists them, `rempart restore --path` brings them back"));
        }
        Ok((vec![root], (root, point)))
    };
    let (_in_use, _, (root, point)) = InUse::begin(&repository, "serve", output, found)?;
    let cache = command.memory.cache(&repository)?;
    let disks: Vec<DiskReader> = point.disks.iter().map(|disk| disk_reader(&cache, disk)).collect();
    let (socket, listener, uri) = match (tcp, &command.socket) {
        (Some(tcp), _) => {
            let address = tcp.local_addr().map_err(|e| Error::failed("cannot listen").cause(e))?;
            (None, Listener::Tcp(tcp), format!("nbd://{address}/"))
        }
        (None, Some(path)) => {
            let (socket, listener) = SocketFile::listen(path)?;
            (Some(socket), Listener::Unix(listener), format!("nbd+unix:///?socket={}", path.display()))
        }
        (None, None) => unreachable!("the arguments ask for one of both"),
    };
    let served = json!({
        "vm": point.vm, "point": root, "uri": uri,
        "exports": disks.iter().map(|disk| json!({ "disk": disk.name(), "size_bytes": disk.size() })).collect::<Vec<_>>(),
    });
    let server = DiskServer::start(disks, listener, Box::new(tell_unreadable(output)));
    let server =
        server.map_err(|e| Error::failed(format!("cannot serve `{}@{root}`", point.vm)).cause(chain(&e)))?;
    if output.json {
        output.print_json(&served)?;
    }
    output.tell(&format!("`{}@{root}` is served at {uri}", point.vm));
    stop.wait();
    drop(server);
    drop(socket);
    Ok(())
}
