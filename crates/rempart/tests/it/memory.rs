//! A machine of another QEMU goes on from a point with its memory, after the point went through all that points go through.

use crate::backup::Vault;
use crate::guest::run::COUNTER;
use crate::guest::{Guest, counts_on, never_went_back, take_numbers_off, went_on_from};
use crate::running::tool;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

const MIB: usize = 1 << 20;
struct Machine {
    child: Child,
    console: PathBuf,
}

impl Machine {
    fn start(vault: &Vault, disks: [&str; 2], console: &str, monitor: &str, more: &[&str]) -> Machine {
        let path = |name: &str| vault.rack.path(name).display().to_string();
        let disks = ["vda", "vdb"].into_iter().zip(disks).flat_map(|(id, disk)| {
            let node = format!("driver=raw,node-name={id},file.driver=file,file.filename={disk}");
            ["-blockdev".into(), node, "-device".into(), format!("virtio-blk-pci,drive={id},id={id}")]
        });
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-M", "q35", "-accel", "tcg,tb-size=128", "-cpu", "max"])
            .args(["-m", "192", "-display", "none", "-serial", &format!("file:{}", path(console))])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path(monitor))])
            .args(["-object", "secret,id=key,data=topsecret"])
            .args(disks)
            .args(Guest::options(COUNTER))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        Machine { child: child.unwrap(), console: vault.rack.path(console) }
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
    // Its numbers lie in what is swap space by its header, which is never backed up otherwise.
    vault.rack.image("numbers", 24 * MIB, 0);
    tool(&["mkswap", "-q", &path("numbers")]);
    let machine = Machine::start(&vault, [&path("system"), &path("numbers")], "console", "qmp", &[]);
    let before = counts_on(&machine.console, 1);
    let (monitor, views) = (path("qmp"), path("views"));
    let asked =
        ["backup", "shop", "--qmp", &monitor, "--scratch-dir", &views, "--consistency", "saved-state"];
    let made = vault.json(&[&asked[..], &["--else", "nothing"]].concat());
    let after = counts_on(&machine.console, 20);
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
    assert_eq!(listed[0]["memory"]["size_bytes"], size);
    for disk in 0..2 {
        assert_eq!(listed[0]["disks"][disk]["excluded"], Value::from(Vec::<u8>::new()), "{listed}");
    }
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

    // Without memory all but the header is.
    let asked = ["backup", "crash", "--qmp", &monitor, "--scratch-dir", &views, "--consistency", "crash"];
    let without = vault.json(&asked);
    let left_out = without["disks"][1]["left_out_bytes"].as_u64().unwrap();
    assert!(left_out > 22 << 20, "{without}");

    drop(machine);
    let incoming = memory["incoming"].as_str().unwrap();
    let (system, numbers) = (format!("{to}/vda.raw"), PathBuf::from(format!("{to}/vdb.raw")));
    let last = take_numbers_off(&numbers);
    assert!((before - 1..=after).contains(&last), "{before} {last} {after}");
    let disks = [system.as_str(), numbers.to_str().unwrap()];
    let resumed = Machine::start(&vault, disks, "console-2", "qmp-2", &["-incoming", incoming]);
    counts_on(&resumed.console, 5);
    let console = resumed.console.clone();
    drop(resumed);
    never_went_back(&console);
    went_on_from(last, &numbers);
}
