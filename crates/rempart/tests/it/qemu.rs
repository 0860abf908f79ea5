//! Backups of machines of a QEMU that is not ours, through its monitor. But for one test no guest runs in it: the test has
//! QEMU's devices write, as a guest would, and knows every byte.

use crate::backup::Vault;
use crate::buckets;
use crate::guest::Guest;
use crate::lab::{moto, moto_ask};
use crate::rack::{Rack, noise};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Numbered, flushed writes, each into other 64 KiB, round and round the first 64 MiB of the disk; says each,
/// or its failure.
const SCATTERED_WRITER: &str = "n=0;while%:;do%n=$((n+1));if%echo%$n|dd%of=/dev/vda%bs=64k%seek=$((n&1023))%conv=notrunc,fsync%2>/dev/null;then%echo%wrote%$n;else%echo%failed%$n;fi;done";
const SIZE: usize = 24 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// A qcow2 disk, and a raw one.
const DISKS: [&str; 2] = ["vda", "sda"];
const DEVICES: [&str; 2] = ["/machine/peripheral/vda/virtio-backend", "sda"];

/// A monitor of the test's own.
struct Control {
    lines: BufReader<UnixStream>,
}

impl Control {
    /// As soon as QEMU is there.
    fn connect(qemu: &mut Child, monitor: &str) -> Control {
        let end = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(monitor) {
                Ok(stream) => break stream,
                Err(error) => {
                    assert_eq!(qemu.try_wait().unwrap(), None, "QEMU ended");
                    assert!(Instant::now() < end, "{error}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut control = Control { lines: BufReader::new(stream) };
        let mut greeting = String::new();
        control.lines.read_line(&mut greeting).unwrap();
        control.execute("qmp_capabilities", json!({}));
        control
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.lines.get_mut(), "{line}").unwrap();
        loop {
            let mut line = String::new();
            assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "QEMU ended at {command}");
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(answer["error"], Value::Null, "{command}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }

    /// A device's own request, as if the guest had made it.
    fn io(&mut self, device: &str, command: &str) {
        let line = format!("qemu-io -d {device} \"{command}\"");
        let said = self.execute("human-monitor-command", json!({ "command-line": line }));
        assert_eq!(said, "", "{line}");
    }

    /// What views have left in QEMU, but for the bitmaps that record.
    fn leavings(&mut self) -> Vec<String> {
        let exports = self.execute("query-block-exports", json!({}));
        let nodes = self.execute("query-named-block-nodes", json!({ "flat": true }));
        let names = |list: &Value, key: &str| -> Vec<String> {
            let list = list.as_array().unwrap().iter();
            list.map(|entry| entry[key].as_str().unwrap().to_owned()).collect()
        };
        let all = [names(&exports, "id"), names(&nodes, "node-name")].concat();
        all.into_iter().filter(|name| name.starts_with("rempart-")).collect()
    }
}

/// A QEMU, and what was written to its disks.
struct Foreign {
    vault: Vault,
    qemu: Child,
    control: Control,
    disks: [Vec<u8>; 2],
    random: u64,
}

impl Foreign {
    fn new() -> Foreign {
        let vault = Vault::new();
        for (name, format) in [("vda", "qcow2"), ("sda", "raw")] {
            let image = vault.rack.path(name);
            let size = SIZE.to_string();
            let made =
                Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(image).arg(size).status();
            assert!(made.unwrap().success());
        }
        std::fs::write(vault.rack.path("variables"), vec![5; 528 << 10]).unwrap();
        let (qemu, control) = Foreign::start(&vault);
        Foreign {
            vault,
            qemu,
            control,
            disks: [vec![0; SIZE], vec![0; SIZE]],
            random: 88_172_645_463_325_252,
        }
    }

    fn start(vault: &Vault) -> (Child, Control) {
        let path = |name: &str| vault.rack.path(name).display().to_string();
        for socket in ["qmp", "control"] {
            let _ = std::fs::remove_file(path(socket));
        }
        let mut qemu = Command::new("qemu-system-x86_64")
            .args([
                "-nodefaults",
                "-no-user-config",
                "-M",
                "q35",
                "-accel",
                "tcg",
                "-m",
                "64",
                "-display",
                "none",
            ])
            // The vCPUs never run.
            .arg("-S")
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path("control"))])
            .args(["-object", "iothread,id=io"])
            .args(["-drive", &format!("file={},format=qcow2,if=none,id=vda,discard=unmap", path("vda"))])
            .args(["-device", "virtio-blk-pci,drive=vda,id=vda,iothread=io"])
            .args([
                "-blockdev",
                &format!("driver=raw,node-name=data,file.driver=file,file.filename={}", path("sda")),
            ])
            .args(["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=data,id=sda"])
            .args(["-drive", &format!("file={},format=raw,if=pflash,unit=1", path("variables"))])
            .args(["-drive", "file=/usr/share/OVMF/OVMF_CODE_4M.fd,format=raw,if=pflash,unit=0,readonly=on"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let control = Control::connect(&mut qemu, &path("control"));
        (qemu, control)
    }

    fn restart(&mut self) {
        let _ = self.qemu.wait().unwrap();
        (self.qemu, self.control) = Foreign::start(&self.vault);
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % bound as u64) as usize
    }

    /// A few requests anywhere.
    fn scribble(&mut self) {
        for disk in [0, 1] {
            for _ in 0..8 {
                let length = (1 + self.below(200)) * 512;
                let offset = self.below((self.disks[disk].len() - length) / 512) * 512;
                let byte = self.below(256) as u8;
                let command = match byte {
                    0..50 => format!("write -z -u {offset} {length}"),
                    _ => format!("write -P {byte} {offset} {length}"),
                };
                self.control.io(DEVICES[disk], &command);
                self.disks[disk][offset..offset + length].fill(if byte < 50 { 0 } else { byte });
            }
        }
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let path = |name: &str| self.vault.rack.path(name).display().to_string();
        let own = [
            "backup",
            "shop",
            "--qmp",
            &path("qmp"),
            "--scratch-dir",
            &path("views"),
            "--scratch-size",
            "64M",
        ];
        own.iter().chain(more).map(|word| (*word).to_owned()).collect()
    }

    fn back_up(&self, more: &[&str]) -> Value {
        let arguments = self.arguments(more);
        self.vault.json(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The program, which is not waited for.
    fn spawn(&self) -> Child {
        let arguments = self.arguments(&[]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.vault.command(&arguments).stderr(Stdio::null()).spawn().unwrap()
    }

    fn restored(&self, point: u64) -> [Vec<u8>; 2] {
        let to = self.vault.rack.path(&format!("to-{point}"));
        self.vault.ok(&["restore", &format!("shop@{point}"), "--to", to.to_str().unwrap()]);
        let disks = DISKS.map(|disk| std::fs::read(to.join(format!("{disk}.raw"))).unwrap());
        std::fs::remove_dir_all(to).unwrap();
        disks
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Why disks were read in full, with the numbers of bitmaps left out.
fn full(backup: &Value) -> Vec<String> {
    let disks = backup["disks"].as_array().unwrap().iter();
    let told = disks.filter_map(|disk| Some((disk["disk"].as_str()?, disk["full_because"].as_str()?)));
    let without_number = |why: &str| match why.split_once("`rempart-job.") {
        Some((before, after)) => format!("{before}`…{}", &after[after.find('`').unwrap()..]),
        None => why.to_owned(),
    };
    told.map(|(disk, why)| format!("{disk}: {}", without_number(why))).collect()
}

#[test]
fn a_chain_goes_on_whatever_happened_in_between() {
    let mut foreign = Foreign::new();
    let other = foreign.vault.rack.path("other").display().to_string();
    foreign.vault.ok(&["repo", "create", &other]);
    let mut points = Vec::new();
    let mut why = Vec::new();
    let rounds = [
        "first",
        "running",
        "another job",
        "restarted",
        "running",
        "resized",
        "running",
        "killed",
        "running",
    ];
    for round in rounds {
        foreign.scribble();
        match round {
            "another job" => {
                foreign.back_up(&["--repo", &other]);
                foreign.scribble();
            }
            "restarted" => {
                foreign.control.execute("quit", json!({}));
                foreign.restart();
            }
            "killed" => {
                for device in DEVICES {
                    // What the guest has flushed is on the disk.
                    foreign.control.io(device, "flush");
                }
                foreign.qemu.kill().unwrap();
                foreign.restart();
            }
            "resized" => {
                let grown = SIZE + (1 << 20);
                foreign.control.execute("block_resize", json!({ "node-name": "data", "size": grown }));
                foreign.disks[1].resize(grown, 0);
            }
            _ => (),
        }
        foreign.scribble();
        let backup = foreign.back_up(&[]);
        why.extend(full(&backup).into_iter().map(|line| format!("{round}, {line}")));
        for disk in backup["disks"].as_array().unwrap() {
            let new = disk["new_bytes"].as_u64().unwrap();
            assert!(
                round == "first" || new < SIZE as u64 / 2,
                "{round}: only what is new is stored: {backup}"
            );
        }
        assert_eq!(backup["consistency"]["level"], "crash");
        assert_eq!(foreign.control.leavings(), [""; 0], "{round}");
        points.push((backup["point"].as_u64().unwrap(), foreign.disks.clone(), round));
    }
    assert_eq!(
        why,
        [
            "first, vda: no earlier backup of this disk is known",
            "first, sda: no earlier backup of this disk is known",
            "restarted, sda: QEMU has no bitmap `…`: it was restarted, and this kind of image does not keep bitmaps",
            "resized, sda: the disk's size changed from 25165824 to 26214400 bytes",
            "killed, vda: QEMU has no bitmap `…`: it was killed before it stored it, or the image is another one",
            "killed, sda: QEMU has no bitmap `…`: it was restarted, and this kind of image does not keep bitmaps",
        ]
    );
    for (point, disks, round) in points {
        assert!(foreign.restored(point) == disks, "{round}: point {point} is not what was on the disks");
    }
    let told = foreign.vault.json(&["points"]);
    assert_eq!((&told[0]["definition"], &told[0]["nvram_bytes"]), (&json!("qemu"), &json!(528 << 10)));
}

#[test]
fn that_snapshots_in_an_image_are_left_out_is_told() {
    let mut foreign = Foreign::new();
    foreign.scribble();
    let notes = |backup: &Value| -> Vec<String> {
        let notes = backup["notes"].as_array().unwrap().iter().map(|note| note.as_str().unwrap().to_owned());
        notes.filter(|note| note.contains("snapshots")).collect()
    };
    assert_eq!(notes(&foreign.back_up(&[])), [""; 0]);
    foreign.control.execute("quit", json!({}));
    let _ = foreign.qemu.wait();
    for name in ["before", "after"] {
        let image = foreign.vault.rack.path("vda");
        let made = Command::new("qemu-img").args(["snapshot", "-c", name]).arg(image).status();
        assert!(made.unwrap().success());
    }
    foreign.restart();
    foreign.scribble();
    let backup = foreign.back_up(&[]);
    let told = "of `vda` only the disk is in it, not the snapshots in its image: 2";
    assert_eq!(notes(&backup), [told], "{backup}");
    assert!(foreign.restored(backup["point"].as_u64().unwrap()) == foreign.disks);
}

/// What its guest gives back is neither read nor stored, and comes back as zeroes.
#[test]
fn what_another_qemus_guest_discards_is_not_backed_up_any_more() {
    const CHUNK: usize = 128 << 10;
    let mut foreign = Foreign::new();
    // Chunks that differ: what is equal is stored once.
    for (chunk, content) in foreign.disks[0].chunks_mut(CHUNK).enumerate() {
        let byte = 1 + chunk as u8;
        foreign.control.io(DEVICES[0], &format!("write -P {byte} {} {CHUNK}", chunk * CHUNK));
        content.fill(byte);
    }
    let first = foreign.back_up(&[]);
    assert_eq!(first["disks"][0]["read_bytes"], SIZE, "{first}");

    foreign.control.io(DEVICES[0], "discard 4M 16M");
    foreign.disks[0][4 << 20..20 << 20].fill(0);
    let second = foreign.back_up(&[]);
    assert_eq!(full(&second), [""; 0]);
    // The 64 chunks that did not change are read all the same, and compared.
    let read = second["disks"][0]["read_bytes"].as_u64().unwrap() as usize;
    assert!(read <= SIZE - (16 << 20) + CHUNK, "{second}");
    assert!(foreign.restored(second["point"].as_u64().unwrap()) == foreign.disks);
}

#[test]
fn a_backup_that_is_ended_takes_its_view_away_and_one_that_is_killed_leaves_that_to_the_next() {
    let mut foreign = Foreign::new();
    foreign.scribble();
    foreign.back_up(&[]);
    foreign.scribble();
    for signal in ["TERM", "KILL"] {
        let mut program = foreign.spawn();
        let end = Instant::now() + PATIENCE;
        while foreign.control.leavings().len() < 10 {
            assert_eq!(program.try_wait().unwrap(), None, "it ended before its view was there");
            assert!(Instant::now() < end, "there is no view");
        }
        let sent = Command::new("kill").args([&format!("-{signal}"), &program.id().to_string()]).status();
        assert!(sent.unwrap().success());
        let code = program.wait().unwrap().code();
        if signal == "TERM" {
            assert_eq!((code, foreign.control.leavings()), (Some(143), Vec::new()));
        } else {
            assert_eq!((code, foreign.control.leavings().is_empty()), (None, false));
        }
        foreign.scribble();
    }
    let backup = foreign.back_up(&[]);
    assert_eq!(full(&backup), [""; 0], "what was not stored is not forgotten");
    assert_eq!(foreign.control.leavings(), [""; 0]);
    assert!(foreign.restored(backup["point"].as_u64().unwrap()) == foreign.disks);
}

/// Request after request, on one disk and the other in turn: the point has all up to one of them, and nothing after it.
#[test]
fn a_point_is_all_disks_at_one_moment() {
    let mut foreign = Foreign::new();
    let begin = foreign.disks.clone();
    let over = AtomicBool::new(false);
    let mut writes: Vec<(usize, usize, u8)> = Vec::new();
    let arguments = foreign.arguments(&["--json"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (vault, control) = (&foreign.vault, &mut foreign.control);
    let (before, backup) = std::thread::scope(|scope| {
        let (over, writes) = (&over, &mut writes);
        let (begun, has_begun) = std::sync::mpsc::channel();
        scope.spawn(move || {
            while !over.load(Ordering::Acquire) {
                let number = writes.len();
                let (disk, byte) = (number % 2, 1 + (number % 255) as u8);
                let offset = (number * 7919 % (SIZE / 4096)) * 4096;
                control.io(DEVICES[disk], &format!("write -P {byte} {offset} 4096"));
                writes.push((disk, offset, byte));
                if number == 20 {
                    begun.send(number).unwrap();
                }
            }
        });
        let before = has_begun.recv().unwrap();
        let answer = vault.run(&arguments);
        over.store(true, Ordering::Release);
        assert_eq!(answer.code, 0, "{}", answer.err);
        (before, serde_json::from_str::<Value>(&answer.out).unwrap())
    });
    let restored = foreign.restored(backup["point"].as_u64().unwrap());
    let mut state = begin;
    let mut matches = Vec::new();
    for (number, (disk, offset, byte)) in writes.iter().enumerate() {
        state[*disk][*offset..offset + 4096].fill(*byte);
        if state == restored {
            matches.push(number);
        }
    }
    let [moment] = matches[..] else { panic!("of {} writes, {matches:?} match", writes.len()) };
    println!("the moment of the view is after write {moment} of {}", writes.len());
    assert!((before..writes.len() - 1).contains(&moment), "it is while the backup runs, and writes went on");
}

#[test]
fn what_cannot_be_done_is_said() {
    let foreign = Foreign::new();
    let path = |name: &str| foreign.vault.rack.path(name).display().to_string();
    let arguments = foreign.arguments(&[]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (nowhere, without_size) = (path("nowhere"), &arguments[..arguments.len() - 2]);
    for (arguments, more, expected) in [
        (&arguments[..], &["--consistency", "application"][..], "needs the guest's agent"),
        (&arguments, &["--agent", &nowhere, "--else", "nothing"], "cannot connect to the guest agent"),
        (&arguments, &["--disk", "/dev/null"], "cannot be used with"),
        (without_size, &["--scratch-size", "1M"], "are less than"),
        (&["backup", "shop"], &["--qmp", &nowhere, "--scratch-dir", &nowhere], "find QEMU's monitor"),
        (&["backup", "shop"], &["--disk", "/dev/null", "--agent", &nowhere], "cannot be used with"),
    ] {
        let answer = foreign.vault.refused(&[arguments, more].concat());
        assert!(answer.err.contains(expected), "{more:?}: {}", answer.err);
    }
    let backup = foreign.back_up(&["--agent", &nowhere]);
    assert_eq!(backup["consistency"]["level"], "crash");
    let why = backup["consistency"]["why"].as_str().unwrap();
    assert!(why.contains("cannot connect to the guest agent"), "{why}");
}

#[test]
fn a_schedule_asks_for_the_consistency_that_it_names() {
    let mut foreign = Foreign::new();
    // Only what runs can be stopped: its firmware does.
    foreign.control.execute("cont", json!({}));
    let (vault, rack) = (&foreign.vault, Rack::new());
    let mut node = rack.initialised("node-a");
    let of = |name: &str, more: &str| {
        format!(
            "[[backup]]\nname = '{name}'\nrepository = '{}'\npassphrase_file = '{}'\ncache_dir = '{}'\n\
             schedule = '0 0 30 2 *'\nretries = 0\nmachines = ['shop']\nqmp = '{}'\n{more}\n",
            vault.repo().display(),
            vault.rack.path("passphrase").display(),
            node.home.join("cache").display(),
            vault.rack.path("qmp").display(),
        )
    };
    let agent = format!("agent = '{}'\n", vault.rack.path("nowhere").display());
    let sections = [
        of("plain", ""),
        of("stopped", "consistency = 'saved-state'"),
        of("else-stopped", &format!("{agent}else = 'saved-state'")),
        of("strict", &format!("{agent}consistency = 'application'\nelse = 'nothing'")),
    ];
    node.configure("# [[backup]]\n", &sections.concat());
    node.start();
    for (name, expected) in [("plain", "crash"), ("stopped", "saved-state"), ("else-stopped", "saved-state")]
    {
        let run = node.json(&["schedule", "run", name]);
        assert_eq!(run["machines"][0]["consistency"], expected, "{name}: {run}");
    }
    let refused = node.refused(&["schedule", "run", "strict"]);
    assert!(refused.err.contains("cannot connect to the guest agent"), "{}", refused.err);
    assert_eq!(vault.json(&["points", "shop"]).as_array().unwrap().len(), 3);
}

/// A process that is killed at the end.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The repository's server stops in the middle of a backup. The guest flushes what it writes, and overwrites more than there
/// is room for aside: neither holds it up, and none of its writes fails.
#[test]
fn a_dead_repository_holds_up_no_guest_and_neither_does_a_full_scratch_image() {
    /// So long the repository is dead, and so long the guest may wait for one write: a busy machine, and far less than that.
    const DEAD: Duration = Duration::from_secs(15);
    const LONGEST: Duration = Duration::from_secs(8);
    /// Each takes 64 KiB of the scratch image, which has 4 MiB.
    const WRITES: usize = 80;
    let Some(server) = moto() else { return };
    assert_eq!(moto_ask(&server, "PUT", "/foreign", &[], ""), 200);
    let vault = Vault::new();
    let path = |name: &str| vault.rack.path(name).display().to_string();
    let url = buckets::url(&server, "foreign", "shop");
    let rempart = |arguments: &[&str]| {
        let mut command = vault.command(&[arguments, &["--repo", &url]].concat());
        command.envs(buckets::CREDENTIALS).stdout(Stdio::null());
        command
    };
    let made = vault.command(&["repo", "create", &url]).envs(buckets::CREDENTIALS).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // More than a backup holds in its hands: it has to read on when the server is back.
    std::fs::write(path("disk"), noise(9, 320 << 20)).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-M", "q35", "-accel", "tcg,tb-size=128", "-cpu", "max"])
        .args(["-m", "192", "-display", "none", "-serial", &format!("file:{}", path("console"))])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", path("control"))])
        .args([
            "-blockdev",
            &format!("driver=raw,node-name=disk,file.driver=file,file.filename={}", path("disk")),
        ])
        .args(["-device", "virtio-blk-pci,drive=disk,id=disk"])
        .args(Guest::options(SCATTERED_WRITER));
    let mut qemu = Killed(qemu.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
    let mut control = Control::connect(&mut qemu.0, &path("control"));
    let console = || std::fs::read_to_string(path("console")).unwrap_or_default();
    let written = || console().matches("wrote ").count();
    let end = Instant::now() + PATIENCE;
    while written() < 5 {
        assert!(Instant::now() < end, "the guest does not write: {}", console());
        std::thread::sleep(Duration::from_millis(20));
    }

    let (monitor, views) = (path("qmp"), path("views"));
    let begin = |control: &mut Control, room: &str| {
        let mut backup =
            rempart(&["backup", "shop", "--qmp", &monitor, "--scratch-dir", &views, "--scratch-size", room]);
        let mut backup = Killed(backup.stderr(Stdio::piped()).spawn().unwrap());
        let end = Instant::now() + PATIENCE;
        // Four nodes between the guest and its disk, one for who reads, and the export.
        while control.leavings().len() < 7 {
            assert_eq!(backup.0.try_wait().unwrap(), None, "it ended before its view was there");
            assert!(Instant::now() < end, "there is no view: {:?}", control.leavings());
        }
        server.signal("STOP");
        backup
    };
    let mut backup = begin(&mut control, "4M");
    let died = Instant::now();
    let before = written();
    let (mut last, mut longest) = ((died, before), Duration::ZERO);
    while died.elapsed() < DEAD || last.1 < before + WRITES {
        let (now, number) = (Instant::now(), written());
        longest = longest.max(now - last.0);
        assert!(
            longest < LONGEST,
            "the guest stands still, {} writes after the repository died",
            last.1 - before
        );
        if number > last.1 {
            last = (now, number);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("{} writes while the repository was dead, at most {longest:?} without one", last.1 - before);
    assert!(!console().contains("failed"), "a write failed");
    assert_eq!(backup.0.try_wait().unwrap(), None, "the repository is dead to it all the while");

    server.signal("CONT");
    let mut said = String::new();
    backup.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(backup.0.wait().unwrap().code(), Some(1), "{said}");
    assert!(said.contains("its disks can be read no more") && said.contains("--scratch-size"), "{said}");
    assert_eq!(control.leavings(), [""; 0]);
    let now = written();
    let end = Instant::now() + PATIENCE;
    while written() < now + 5 {
        assert!(Instant::now() < end, "the guest does not write on");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!console().contains("failed"), "a write failed");

    // One that is told to end goes at once, though its readers are held up by the repository, and QEMU by them.
    let mut backup = begin(&mut control, "1G");
    let end = Instant::now() + PATIENCE;
    let mut busy = processor_time(&backup.0);
    while {
        std::thread::sleep(Duration::from_secs(1));
        let before = std::mem::replace(&mut busy, processor_time(&backup.0));
        before != busy
    } {
        assert!(Instant::now() < end, "it is held up by nothing");
    }
    let told = Instant::now();
    let sent = Command::new("kill").arg(backup.0.id().to_string()).status();
    assert!(sent.unwrap().success());
    assert_eq!(backup.0.wait().unwrap().code(), Some(143));
    assert!(told.elapsed() < DEAD, "it took {:?} to end", told.elapsed());
    assert_eq!(control.leavings(), [""; 0]);
    server.signal("CONT");
}

/// Of all threads of a process, in ticks.
fn processor_time(process: &Child) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap();
    let (_, after_name) = stat.rsplit_once(')').unwrap();
    after_name.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}
