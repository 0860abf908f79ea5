//! A machine of another QEMU goes on from a point with its memory, after the point went through all that points go through.

use crate::backup::Vault;
use crate::guest::Guest;
use serde_json::Value;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
/// Far above what a guest takes to boot.
const PATIENCE: Duration = Duration::from_secs(150);
/// Counts in memory, and in a file that it never flushes, which it reads again.
const COUNTER: &str = "mount%-t%ext4%/dev/vda%/tmp;n=0;while%:;do%n=$((n+1));echo%counted%$n%of%$(cat%/tmp/n).;echo%$n>/tmp/n;usleep%50000;done";

struct Machine {
    child: Child,
    console: String,
}

impl Machine {
    fn start(vault: &Vault, disk: &str, console: &str, monitor: &str, more: &[&str]) -> Machine {
        let path = |name: &str| vault.rack.path(name).display().to_string();
        let node = format!("driver=raw,node-name=data,file.driver=file,file.filename={disk}");
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-M", "q35", "-accel", "tcg,tb-size=128", "-cpu", "max"])
            .args(["-m", "192", "-display", "none", "-serial", &format!("file:{}", path(console))])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path(monitor))])
            .args(["-object", "secret,id=key,data=topsecret"])
            .args(["-blockdev", &node, "-device", "virtio-blk-pci,drive=data,id=vda"])
            .args(Guest::options(COUNTER))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Machine { child: child.unwrap(), console: path(console) }
    }

    fn counted(&self) -> Vec<(u64, u64)> {
        let text = std::fs::read_to_string(&self.console).unwrap_or_default();
        let numbers = text.lines().filter_map(|line| {
            let (number, read) =
                line.trim().strip_suffix('.')?.strip_prefix("counted ")?.split_once(" of ")?;
            Some((number.parse().ok()?, read.parse().ok()?))
        });
        numbers.collect()
    }

    /// Waits until it counts on.
    fn counts_on(&self) -> u64 {
        let last = || self.counted().last().map_or(0, |(number, _)| *number);
        let (before, end) = (last(), Instant::now() + PATIENCE);
        while last() <= before {
            assert!(Instant::now() < end, "it does not count on from {before}");
            std::thread::sleep(Duration::from_millis(20));
        }
        last()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_machine_goes_on_from_a_point_with_its_memory() {
    let vault = Vault::new();
    let path = |name: &str| vault.rack.path(name).display().to_string();
    vault.rack.image("system", 24 * MIB, 0);
    assert!(Command::new("mkfs.ext4").args(["-q", &path("system")]).status().unwrap().success());
    let machine = Machine::start(&vault, &path("system"), "console", "qmp", &[]);
    let before = machine.counts_on();
    let (monitor, views) = (path("qmp"), path("views"));
    let asked =
        ["backup", "shop", "--qmp", &monitor, "--scratch-dir", &views, "--consistency", "saved-state"];
    let made = vault.json(&[&asked[..], &["--else", "nothing"]].concat());
    let after = machine.counts_on();
    assert_eq!(made["consistency"]["level"], "saved-state", "{made}");
    let pause = made["consistency"]["pause_ms"].as_u64().unwrap();
    println!("stood still for {pause} ms, memory {}", made["memory"]);
    assert!(pause < 20_000, "{made}");
    let size = made["memory"]["size_bytes"].as_u64().unwrap();
    assert!(size > 10 << 20, "{made}");
    let notes = made["notes"].as_array().unwrap();
    assert!(
        notes.iter().any(|note| note == "not kept of QEMU's command line: `data` of `-object`"),
        "{made}"
    );

    // Nothing is left out of what the guest goes on with, and nobody takes the memory for waste.
    let listed = vault.json(&["points"]);
    assert_eq!(
        (&listed[0]["memory"]["size_bytes"], &listed[0]["disks"][0]["excluded"]),
        (&size.into(), &Value::from(Vec::<u8>::new()))
    );
    vault.ok(&["gc"]);
    let checked = vault.json(&["verify", "shop"]);
    let memory = checked.as_array().unwrap().iter().find(|part| part["disk"] == "memory");
    assert_eq!(memory.expect("it is looked at")["sound_bytes"], size, "{checked}");

    // To the second repository, with other keys and chunks, and back from there.
    let (second, passphrase) = (path("second"), path("other"));
    std::fs::write(&passphrase, "staple\n").unwrap();
    let there = ["--repo", &second, "--passphrase-file", &passphrase];
    vault.ok(&["repo", "create", &second, "--chunk-size", "1M", "--passphrase-file", &passphrase]);
    vault.json(&["copy", "--all", "--to", &second, "--to-passphrase-file", &passphrase]);
    let to = path("to");
    let restored = vault.json(&[&["restore", "shop", "--to", &to][..], &there].concat());
    let memory = &restored["memory"];
    assert_eq!(
        (&memory["size_bytes"], memory["machine"].as_str().unwrap().starts_with("pc-q35")),
        (&size.into(), true),
        "{memory}"
    );
    assert!(!memory["command_line"].to_string().contains("topsecret"), "{memory}");
    let exported = path("exported");
    vault.ok(&["export", "shop", "--disk", "memory", "--to", &exported]);
    assert!(std::fs::read(&exported).unwrap() == std::fs::read(memory["path"].as_str().unwrap()).unwrap());

    // It counted on all the time.
    drop(machine);
    let incoming = memory["incoming"].as_str().unwrap();
    let resumed =
        Machine::start(&vault, &format!("{to}/vda.raw"), "console-2", "qmp-2", &["-incoming", incoming]);
    resumed.counts_on();
    let numbers = resumed.counted();
    assert!((before..=after).contains(&numbers[0].0), "{before} {:?} {after}", numbers[0]);
    assert!(numbers.iter().all(|(number, read)| *read == number - 1), "{numbers:?}");
}
