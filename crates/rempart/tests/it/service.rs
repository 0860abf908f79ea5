//! What the daemon tells other programs: a collector of metrics, systemd.

use crate::rack::{PROGRAM, Rack};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The samples that a scrape holds.
pub fn scrape(mut stream: impl Read + Write) -> Vec<String> {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer.lines().filter(|line| line.starts_with("rempart_")).map(str::to_owned).collect()
}

fn scraped(stream: impl Read + Write) -> BTreeSet<String> {
    let samples = scrape(stream);
    samples.iter().map(|line| line.split(['{', ' ']).next().unwrap().to_owned()).collect()
}

/// The names in the manual's table. There `_name` stands for `rempart_vm_name`.
fn documented() -> BTreeSet<String> {
    let manual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/operations.md");
    let manual = std::fs::read_to_string(manual).unwrap();
    let chapter = manual.split("\n## ").find(|chapter| chapter.starts_with("Metrics\n")).unwrap();
    let cells = chapter.lines().filter_map(|line| line.strip_prefix("| `")?.split('|').next());
    let names = cells.flat_map(|cell| cell.split(',').map(|name| name.trim().trim_matches('`').to_owned()));
    names.map(|name| if name.starts_with('_') { format!("rempart_vm{name}") } else { name }).collect()
}

#[test]
fn the_metrics_are_those_of_the_manual() {
    let rack = Rack::new();
    let listen = Rack::free_address();
    // A schedule that fails has figures, too.
    let schedule = "[[backup]]\nname = 'nightly'\nrepository = '/no-such'\nkey_file = '/no-such'\n\
                    machines = ['shop']\nschedule = '0 0 30 2 *'\nretries = 0";
    let sections = format!("{schedule}\n[metrics]\nlisten = \"{listen}\"");
    let a = rack.node_with("node-a", "[metrics]", &sections);
    let b = rack.node("node-b");
    a.ok(&["cluster", "create", "lab"]);
    rack.join(&b, &a);
    let _witness = rack.witness("witness", &a);
    a.import("shop", &[&rack.image("disk.raw", 1 << 20, 7)]);
    // So that there is a peer to tell of.
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.refused(&["schedule", "run", "nightly"]);
    let names = scraped(TcpStream::connect(listen).unwrap());
    assert_eq!(names, documented());
    assert_eq!(names, scraped(UnixStream::connect(a.home.join("run/api.sock")).unwrap()));
}

/// A daemon that does not outlive its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn systemd_is_told_that_the_daemon_is_ready_and_alive() {
    let rack = Rack::new();
    let path = rack.path("notify");
    let notify = UnixDatagram::bind(&path).unwrap();
    // Far above what it takes: it only ends a test that would never end.
    notify.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let node = rack.initialised("node-a");
    // systemd names the process that it means.
    let mut command = Command::new("sh");
    command.args(["-c", "WATCHDOG_PID=$$ exec \"$0\" \"$@\"", PROGRAM, "--config"]).arg(node.config());
    command.args(["node", "run"]).env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "300000");
    let _daemon = Ended(command.env("REMPART_LOG", "off").stdin(Stdio::null()).spawn().unwrap());
    let mut told = Vec::new();
    while told.iter().filter(|line| *line == "WATCHDOG=1").count() < 3 {
        let mut message = [0; 1024];
        let length = notify.recv(&mut message).unwrap_or_else(|e| panic!("{e}: {told:?}"));
        told.extend(String::from_utf8_lossy(&message[..length]).lines().map(str::to_owned));
        if told == ["READY=1"] {
            assert_eq!(node.run(&["status"]).code, 0, "ready means that it answers");
        }
    }
    assert_eq!(told[0], "READY=1", "{told:?}");
}
