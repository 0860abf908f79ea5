//! A machine that runs for as long as this is there, and what can be seen of it.

use super::scratch::{Scratch, inherit};
use crate::backup::hardware::{Drive, Hardware, Layout, connect, firmware, unconnected};
use rempart_api::Error;
use rempart_hypervisor::command_line::netdev_id;
use rempart_hypervisor::guest_agent::GuestAgent;
use rempart_hypervisor::qmp::Client;
use rempart_repository::PointDisk;
use rustix::process::{Resource, Rlimit, Signal};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

const QUICK: Duration = Duration::from_secs(10);
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Of what the serial console said.
const KEPT: usize = 64 << 10;
/// Read of it at once; more is read at the next look.
const AT_ONCE: u64 = 1 << 20;
/// No screen is larger.
const LARGEST_SCREEN: u64 = 256 << 20;

/// Where a guest expects itself, whose address is fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestAddress {
    address: Ipv4Addr,
    prefix: u32,
}

impl FromStr for GuestAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<GuestAddress, String> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let (address, prefix) = (address.parse().ok()?, prefix.parse().ok()?);
            // There must be room for the other end, too.
            (1..=29).contains(&prefix).then_some(GuestAddress { address, prefix })
        });
        parsed.ok_or_else(|| format!("`{text}` is no address with a prefix, such as `192.168.1.10/24`"))
    }
}

impl GuestAddress {
    /// As options of QEMU's user network: its own addresses must not be the guest's.
    fn options(self) -> String {
        let mask = u32::MAX << (32 - self.prefix);
        let network = u32::from(self.address) & mask;
        let others = (network + 1..).filter(|other| *other != u32::from(self.address)).take(2);
        let others: Vec<Ipv4Addr> = others.map(Ipv4Addr::from).collect();
        let (network, prefix) = (Ipv4Addr::from(network), self.prefix);
        format!(",net={network}/{prefix},host={},dns={},dhcpstart={}", others[0], others[1], self.address)
    }
}

/// What is to be run, and how.
#[derive(Debug)]
pub struct Start<'a> {
    pub hardware: &'a Hardware,
    pub disks: &'a [PointDisk],
    pub nvram: Option<&'a [u8]>,
    pub qemu: &'a str,
    pub scratch: &'a Scratch,
    /// Bytes that any file of it may have.
    pub scratch_bytes: u64,
    /// Ports of the guest that somebody will ask.
    pub ports: &'a [u16],
    pub address: Option<GuestAddress>,
    pub what: &'a str,
}

#[derive(Debug)]
pub struct Guest<'a> {
    pub client: Client,
    pub console: Console,
    agent: Option<GuestAgent>,
    scratch: &'a Scratch,
    child: Child,
}

impl<'a> Start<'a> {
    /// Starts it, with its processors at rest. The thread that does so must outlive it: it dies with that.
    pub async fn machine(&self) -> Result<Guest<'a>, Error> {
        let failed = |e: &dyn std::fmt::Display| Error::failed(self.what).cause(e);
        let mut command = self.command()?;
        let log =
            OpenOptions::new().create(true).append(true).mode(0o600).open(self.scratch.file("qemu.log"));
        let log = log.map_err(|e| failed(&e))?;
        let output = log.try_clone().map_err(|e| failed(&e))?;
        command.stdin(Stdio::null()).stdout(output).stderr(log);
        let (pipe, largest) = (self.scratch.pipe().as_raw_fd(), self.scratch_bytes);
        let parent = rustix::process::getpid();
        // SAFETY: only async-signal-safe calls between fork and exec, on a descriptor that the scratch folder has open.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid() != Some(parent) {
                    return Err(rustix::io::Errno::SRCH.into());
                }
                let limit = |bytes| Rlimit { current: Some(bytes), maximum: Some(bytes) };
                rustix::process::setrlimit(Resource::Fsize, limit(largest))?;
                // A core would be the guest's memory.
                rustix::process::setrlimit(Resource::Core, limit(0))?;
                inherit(BorrowedFd::borrow_raw(pipe))
            });
        }
        let mut child = command.spawn().map_err(|e| failed(&format!("start {}: {e}", self.qemu)))?;
        match connect(&self.scratch.file("qmp.sock"), &mut child).await {
            Ok(client) => {
                let console = Console::new(&self.scratch.file("console.log"));
                Ok(Guest { client, console, agent: None, scratch: self.scratch, child })
            }
            Err(why) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = std::fs::read(self.scratch.file("qemu.log")).unwrap_or_default();
                Err(failed(&format!("{why}: {}", String::from_utf8_lossy(&said).trim())))
            }
        }
    }

    fn command(&self) -> Result<Command, Error> {
        let (mut points, mut drives) = (Vec::new(), Vec::new());
        for (place, disk) in self.disks.iter().enumerate() {
            let (node, point) = (self.hardware.node(&disk.name, place), format!("point-{place}"));
            let overlay = self.scratch.file(&format!("{place}.qcow2"));
            self.make_overlay(&overlay, disk.size)?;
            points.push(json!({
                "driver": "nbd", "node-name": point, "read-only": true, "export": disk.name, "open-timeout": 30,
                "server": { "type": "unix", "path": self.scratch.file("nbd.sock") },
            }));
            // Nothing of it is kept: a flush need not reach the disk.
            let cache = json!({ "no-flush": true });
            let file = json!({ "driver": "file", "filename": overlay, "cache": cache });
            let options = json!({
                "driver": "qcow2", "node-name": node, "discard": "unmap", "cache": cache, "file": file,
                "backing": point,
            });
            drives.push(Drive { disk: disk.name.clone(), node, options });
        }
        let variables = || firmware(self.scratch.file("nvram.fd"), self.nvram, self.what);
        let firmware = self.hardware.is_uefi().then(variables).transpose()?;
        let layout = Layout { qemu: self.qemu, run_dir: self.scratch.path(), drives: &drives, firmware };
        let arguments = self.hardware.arguments(&layout);
        let mut command = Command::new(&arguments[0]);
        // Before the overlays, which name them.
        for point in &points {
            command.arg("-blockdev").arg(point.to_string());
        }
        command.args(&arguments[1..]);
        let mut nics = self.hardware.nics();
        if let Hardware::Arguments(_) = self.hardware {
            nics = 1;
            self.add_to_arguments(&mut command);
        }
        let joined = usize::from(!self.ports.is_empty()).min(nics);
        if joined == 1 {
            command.args(["-netdev", &self.network()]);
        }
        command.args((joined..nics).flat_map(unconnected));
        Ok(command)
    }

    /// What a machine has by its definition: chardevs `console` and `agent`, to be used or not.
    fn add_to_arguments(&self, command: &mut Command) {
        let socket = |name: &str| {
            let path = self.scratch.file(&format!("{name}.sock"));
            format!("socket,id={name},path={},server=on,wait=off", path.display())
        };
        let log = self.scratch.file("console.log");
        command.args(["-chardev", &format!("{},logfile={}", socket("console"), log.display())]);
        command.args(["-chardev", &socket("agent"), "-display", "none", "-sandbox", SANDBOX]);
    }

    /// A network of one guest, which can be asked from here and reaches nobody.
    fn network(&self) -> String {
        let (address, guest) = match self.address {
            Some(address) => (address.options(), address.address.to_string()),
            None => (String::new(), String::new()),
        };
        let forwards = self.ports.iter().map(|port| format!(",hostfwd=tcp:127.0.0.1:0-{guest}:{port}"));
        let forwards: String = forwards.collect();
        format!("user,id={},restrict=on,ipv6=off{address}{forwards}", netdev_id(0))
    }

    fn make_overlay(&self, path: &Path, size: u64) -> Result<(), Error> {
        let failed = |e: &dyn std::fmt::Display| Error::failed(self.what).cause(e);
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size.to_string());
        let output = command.output().map_err(|e| failed(&format!("start qemu-img: {e}")))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(failed(&String::from_utf8_lossy(&output.stderr).trim())),
        }
    }
}

impl Guest<'_> {
    /// Its agent, which takes part in one conversation at a time.
    pub async fn agent(&mut self) -> Result<&mut GuestAgent, String> {
        if self.agent.is_none() {
            if !self.client.is_open_in_guest("agent").await.map_err(|e| e.to_string())? {
                return Err("no program in the guest has opened the agent's channel".to_owned());
            }
            let connected = GuestAgent::connect(&self.scratch.file("agent.sock"), QUICK).await;
            self.agent = Some(connected.map_err(|e| e.to_string())?);
        }
        Ok(self.agent.as_mut().expect("connected just now"))
    }

    /// After an error, the next look begins anew.
    pub fn forget_agent(&mut self) {
        self.agent = None;
    }

    /// The port here that leads to a port of the guest.
    pub async fn forwarded(&self, port: u16) -> Option<u16> {
        let told = self.user_network().await;
        let found = connections(&told)
            .into_iter()
            .find(|found| found.state == "HOST_FORWARD" && found.guest_port == port);
        found.map(|found| found.host_port)
    }

    /// Whether the guest took the connection that came in by this port.
    pub async fn is_established(&self, host_port: u16) -> bool {
        let told = self.user_network().await;
        connections(&told).iter().any(|found| found.state == "ESTABLISHED" && found.host_port == host_port)
    }

    async fn user_network(&self) -> String {
        let asked = json!({ "command-line": "info usernet" });
        let told = self.client.execute("human-monitor-command", asked, QUICK).await;
        told.ok().and_then(|told| told.as_str().map(str::to_owned)).unwrap_or_default()
    }

    /// What it read of its disks.
    pub async fn read_bytes(&self) -> u64 {
        let told = self.client.execute("query-blockstats", Value::Null, QUICK).await.unwrap_or_default();
        let devices = told.as_array().into_iter().flatten();
        devices.filter_map(|device| device["stats"]["rd_bytes"].as_u64()).sum()
    }

    /// Its screen as a portable pixmap; empty where there is none.
    pub async fn screen(&self) -> Vec<u8> {
        let file = self.scratch.file("screen.ppm");
        let order = json!({ "filename": file, "format": "ppm" });
        match self.client.execute("screendump", order, QUICK).await {
            Ok(_) => bounded(&file),
            Err(_) => Vec::new(),
        }
    }

    /// Its screen as a PNG, and whether there is nothing to be seen on it.
    pub async fn screenshot(&self) -> Option<(Vec<u8>, bool)> {
        let file = self.scratch.file("screen.png");
        self.client.screendump(&file).await.ok()?;
        Some((bounded(&file), is_blank(&self.screen().await)))
    }

    /// Waits for its end, and says how it came.
    pub fn ended(&mut self) -> String {
        match self.child.wait() {
            Ok(status) => {
                let signal = std::os::unix::process::ExitStatusExt::signal(&status);
                if signal == Some(Signal::XFSZ.as_raw()) {
                    return "it wrote more than --scratch-size".to_owned();
                }
                let said = std::fs::read(self.scratch.file("qemu.log")).unwrap_or_default();
                format!("QEMU ended with {status}: {}", String::from_utf8_lossy(&said).trim())
            }
            Err(error) => error.to_string(),
        }
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the serial console says, from its log.
#[derive(Debug)]
pub struct Console {
    log: Option<File>,
    said: Vec<u8>,
    bytes: u64,
}

impl Console {
    fn new(log: &Path) -> Console {
        Console { log: File::open(log).ok(), said: Vec::new(), bytes: 0 }
    }

    /// Takes in what came since; what is older than that, and more than is kept, goes.
    pub fn listen(&mut self) {
        let more = self.said.len().saturating_sub(KEPT);
        self.said.drain(..more);
        let Some(log) = &mut self.log else { return };
        // An error is no news.
        self.bytes += log.take(AT_ONCE).read_to_end(&mut self.said).unwrap_or(0) as u64;
    }

    pub fn contains(&self, text: &str) -> bool {
        String::from_utf8_lossy(&self.said).contains(text)
    }

    /// How much it said.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The end of it.
    pub fn tail(&self, longest: usize) -> &[u8] {
        &self.said[self.said.len().saturating_sub(longest)..]
    }
}

fn bounded(file: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let read = File::open(file).and_then(|file| file.take(LARGEST_SCREEN).read_to_end(&mut bytes));
    read.map_or(Vec::new(), |_| bytes)
}

/// Whether all pixels of a portable pixmap are the same.
fn is_blank(image: &[u8]) -> bool {
    // `P6`, width and height, 255: three lines.
    let pixels = image.splitn(4, |byte| *byte == b'\n').nth(3).unwrap_or_default();
    pixels.chunks_exact(3).all(|pixel| pixel == &pixels[..3])
}

#[derive(Debug, PartialEq, Eq)]
struct Forwarded<'a> {
    state: &'a str,
    host_port: u16,
    guest_port: u16,
}

/// What QEMU's `info usernet` tells of connections that come in.
fn connections(told: &str) -> Vec<Forwarded<'_>> {
    told.lines().filter_map(connection).collect()
}

fn connection(line: &str) -> Option<Forwarded<'_>> {
    let mut words = line.split_whitespace();
    let state = words.next()?.strip_prefix("TCP[")?.strip_suffix(']')?;
    // Behind its descriptor and the address here.
    let host_port = words.nth(2)?.parse().ok()?;
    Some(Forwarded { state, host_port, guest_port: words.nth(1)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_found_in_what_qemu_tells() {
        let told = "Hub -1 (nic-net-0):\r\n  \
                    Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                    TCP[ESTABLISHED]   24       127.0.0.1 33507       10.0.2.15    22     0     0\r\n  \
                    TCP[HOST_FORWARD]  12       127.0.0.1 33507       10.0.2.15    22     0     0\r\n  \
                    UDP[236 sec]       30       10.0.2.15    68        10.0.2.2    67     0     0\r\n  TCP[x] y\r\n";
        let found = |state| Forwarded { state, host_port: 33507, guest_port: 22 };
        assert_eq!(connections(told), [found("ESTABLISHED"), found("HOST_FORWARD")]);
    }

    #[test]
    fn a_network_leaves_its_guest_its_address() {
        let options = |text: &str| text.parse::<GuestAddress>().expect(text).options();
        assert_eq!(
            options("192.168.1.10/24"),
            ",net=192.168.1.0/24,host=192.168.1.1,dns=192.168.1.2,dhcpstart=192.168.1.10"
        );
        assert!(options("10.1.2.1/16").contains("host=10.1.0.1,dns=10.1.0.2"));
        assert!(options("10.0.0.2/29").contains("host=10.0.0.1,dns=10.0.0.3"));
        for wrong in ["", "10.0.0.1", "10.0.0.1/30", "10.0.0.1/0", "10.0.0/8", "a/24", "::1/64"] {
            wrong.parse::<GuestAddress>().expect_err(wrong);
        }
    }

    #[test]
    fn a_screen_of_one_colour_is_blank() {
        let screen = |pixels: &[u8]| [b"P6\n2 2\n255\n", pixels].concat();
        assert!(is_blank(&screen(&[10; 12])));
        assert!(is_blank(b""));
        assert!(!is_blank(&screen(&[10, 10, 10, 10, 10, 10, 10, 10, 11, 10, 10, 10])));
    }

    #[test]
    fn a_console_that_floods_costs_no_memory() {
        let log = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(log.path(), vec![b'x'; 3 << 20]).expect("room");
        let mut console = Console::new(log.path());
        for _ in 0..5 {
            console.listen();
            assert!(console.said.len() <= KEPT + AT_ONCE as usize);
        }
        assert_eq!((console.bytes(), console.tail(3)), (3 << 20, b"xxx".as_slice()));
    }
}
