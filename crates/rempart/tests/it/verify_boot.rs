//! Machines that are started from the repository, apart from everything, to see whether they come up: a real guest under
//! emulation, from its own boot loader on.

use crate::backup::Vault;
use crate::guest::Guest;
use crate::rack::Server;
use crate::readers::read_only;
use crate::running::{Running, tool};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// What the guest does: says something vile, listens, and tries to reach the host's loopback and the world.
fn run(port: u16) -> String {
    let script = format!(
        "mkdir -p /run /var;mount -t tmpfs run /run;ln -s /run /var/run;echo '<script>alert(1)</script>';\
         ip link set lo up;ip link set eth0 up;ip addr add 10.0.2.15/24 dev eth0;ip route add default via 10.0.2.2;\
         (while :;do echo 220 shop is ready|nc -l -p 25;done)&\
         /usr/sbin/qemu-ga -m virtio-serial -p /dev/vport0p1 -t /run >/run/agent.log 2>&1 &\
         reached=nobody;for host in 10.0.2.2 10.0.2.3 192.0.2.1;do nc -w 2 $host {port} </dev/null&&reached=$host;done;\
         echo it reached $reached"
    );
    script.replace(' ', "%")
}

/// A disk that boots the lab's guest by itself under a BIOS. Takes the programs of the lab's setup.
fn boot_disk(path: &Path, run: &str) {
    let options = Guest::options_for_agent();
    let [_, kernel, _, initramfs, _, append] = options.as_slice() else { panic!("{options:?}") };
    let append = append.replace("run=/agent", &format!("run={run}"));
    let config = path.with_extension("cfg");
    let lines = format!("DEFAULT g\nLABEL g\nKERNEL vmlinuz\nINITRD initrd\nAPPEND {append}\n");
    std::fs::write(&config, lines).unwrap();
    let script = "truncate -s 64M $1
        dd if=/usr/lib/SYSLINUX/mbr.bin of=$1 conv=notrunc status=none
        echo '2048,,e,*' | sfdisk -q $1
        mkfs.fat -F 16 --offset 2048 -h 2048 $1 64512
        syslinux --install --offset 1048576 $1
        export MTOOLS_SKIP_CHECK=1
        mcopy -i $1@@1M $2 ::vmlinuz && mcopy -i $1@@1M $3 ::initrd && mcopy -i $1@@1M $4 ::syslinux.cfg";
    tool(&["sh", "-ec", script, "sh", path.to_str().unwrap(), kernel, initramfs, config.to_str().unwrap()]);
}

/// Takes one mail, and gives it back.
fn mail_server() -> (u16, JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let take = move || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let say = |text: &str| (&stream).write_all(format!("{text}\r\n").as_bytes()).unwrap();
        say("220 lab");
        while let Some(Ok(line)) = lines.next() {
            match line.as_str() {
                "DATA" => {
                    say("354 go on");
                    let mail = lines.by_ref().map(|line| line.unwrap()).take_while(|line| line != ".");
                    let mail = mail.collect::<Vec<_>>().join("\n");
                    say("250 taken");
                    return mail;
                }
                _ => say("250 fine"),
            }
        }
        String::new()
    };
    (port, std::thread::spawn(take))
}

struct Lab {
    vault: Vault,
    node: Server,
}

impl Lab {
    fn new() -> Lab {
        let vault = Vault::new();
        let node = vault.rack.node("node-a");
        Lab { vault, node }
    }

    /// Backs up a machine that never ran.
    fn back_up(&self, vm: &str, disk: &Path) {
        self.back_up_with(vm, disk, "256M");
    }

    fn back_up_with(&self, vm: &str, disk: &Path, memory: &str) {
        let import = ["vm", "import", vm, "--memory", memory, "--cpu-model", "max", "--bridge", "br-none"];
        self.node.ok(&[&import[..], &["--disk", disk.to_str().unwrap()]].concat());
        let config = self.node.config();
        self.vault.json(&["backup", vm, "--config", config.to_str().unwrap()]);
    }

    /// A disk on which no boot loader is found.
    fn back_up_broken(&self) {
        self.back_up("broken", &self.vault.rack.image("broken.raw", 1 << 20, 0));
    }

    fn scratch(&self) -> PathBuf {
        self.vault.rack.path("scratch")
    }

    /// One machine's result, and the command's exit status.
    fn verify(&self, vm: &str, more: &[&str]) -> (Value, i32) {
        let scratch = self.scratch();
        let arguments = ["verify", "--boot", vm, "--json", "--scratch-dir", scratch.to_str().unwrap()];
        let answer = self.vault.run(&[&arguments[..], more].concat());
        let mut told: Vec<Value> =
            serde_json::from_str(&answer.out).unwrap_or_else(|_| panic!("{}", answer.err));
        assert_eq!(told.len(), 1);
        (told.remove(0), answer.code)
    }

    /// `broken` did, and its one point says so as long as it is there; those after it were never started.
    fn is_known_to_have_failed(&self) {
        let first = self.vault.json(&["points", "broken"])[0].clone();
        let boot = &first["boot"];
        assert_eq!((&boot["passed"], &boot["answered_ms"]), (&json!(false), &Value::Null), "{first}");
        assert_eq!(boot["why"], "not all checks held within 6 s");
        assert!(boot["powered_on_ms"].as_u64() > Some(0), "{first}");
        assert_eq!(boot_checks(&first).collect::<Vec<_>>(), ["agent", "tcp:25", "quiet"]);
        let config = self.node.config();
        let again = self.vault.json(&["backup", "broken", "--config", config.to_str().unwrap()]);
        assert_eq!(
            (&again["last_boot"]["point"], &again["last_boot"]["passed"]),
            (&first["point"], &json!(false))
        );
        // A collection folds the log, and removes what it says.
        self.vault.ok(&["gc"]);
        let points = self.vault.json(&["points", "broken"]);
        assert_eq!((&points[0]["boot"], &points[1]["boot"]), (boot, &Value::Null));
        let table = self.vault.ok(&["points", "broken"]).out;
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[1].contains("did not come up") && lines[2].ends_with("never"), "{table}");
        let (second, passphrase) = (self.vault.rack.path("second"), self.vault.rack.path("passphrase"));
        let (second, passphrase) = (second.to_str().unwrap(), passphrase.to_str().unwrap());
        self.vault.ok(&["repo", "create", second]);
        self.vault.ok(&["copy", "--all", "--to", second, "--to-passphrase-file", passphrase]);
        let copies = self.vault.json(&["points", "--repo", second]);
        assert_eq!((&copies[0]["boot"], copies.as_array().unwrap().len()), (&Value::Null, 2), "{copies}");

        self.vault.ok(&["forget", &format!("broken@{}", first["point"])]);
        assert_eq!(self.vault.json(&["points", "broken"])[0]["boot"], Value::Null);
        let again = self.vault.json(&["backup", "broken", "--config", config.to_str().unwrap()]);
        assert_eq!(again["last_boot"], Value::Null, "{again}");
    }

    fn contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let files = self.vault.files_below("");
        files.into_iter().map(|path| (path.clone(), std::fs::read(&path).unwrap())).collect()
    }

    fn is_clean(&self) -> bool {
        std::fs::read_dir(self.scratch()).unwrap().next().is_none()
    }
}

/// The names of what was asked of a point's machine.
fn boot_checks(point: &Value) -> impl Iterator<Item = &Value> {
    point["boot"]["checks"].as_array().unwrap().iter().map(|check| &check["check"])
}

fn check<'a>(told: &'a Value, name: &str) -> &'a Value {
    let checks = told["checks"].as_array().unwrap();
    checks.iter().find(|check| check["check"] == name).unwrap_or_else(|| panic!("no {name} in {told}"))
}

#[test]
fn a_machine_that_comes_up_is_seen_to_and_reaches_nobody() {
    let lab = Lab::new();
    let host = TcpListener::bind("127.0.0.1:0").unwrap();
    host.set_nonblocking(true).unwrap();
    let disk = lab.vault.rack.path("boot.raw");
    boot_disk(&disk, &run(host.local_addr().unwrap().port()));
    lab.back_up("shop", &disk);
    let before = lab.contents();
    let report = lab.vault.rack.path("report.html");
    let pictures = lab.vault.rack.path("pictures");
    let asked =
        ["agent", "exec:/bin/sh -c 'echo fine'", "tcp:25", "tcp:25=220 shop", "serial:it reached nobody"];
    let mut arguments =
        vec!["--report", report.to_str().unwrap(), "--screenshots", pictures.to_str().unwrap()];
    arguments.extend(["--timeout", "90s"]);
    arguments.extend(asked.iter().flat_map(|check| ["--check", check]));
    let (told, code) = lab.verify("shop", &arguments);
    assert_eq!((code, &told["passed"], &told["why"]), (0, &json!(true), &Value::Null), "{told}");
    assert_eq!(check(&told, "tcp:25=220 shop")["detail"], "it said `220 shop is ready`");
    assert_eq!(check(&told, "exec:/bin/sh -c echo fine")["detail"], "it ended with 0: fine");
    let (on, first) = (told["powered_on_ms"].as_u64().unwrap(), told["answered_ms"].as_u64().unwrap());
    assert!(0 < on && on < first && first <= told["ended_ms"].as_u64().unwrap(), "{told}");
    println!("power on after {on} ms, first answer after {first} ms: {}", told["checks"]);

    assert!(host.accept().is_err(), "the guest reached the host");
    assert!(told["isolation"].as_str().unwrap().contains("a network namespace of its own"), "{told}");
    assert!(told["console"].as_str().unwrap().contains("<script>alert(1)</script>"), "{told}");
    let page = std::fs::read_to_string(report).unwrap();
    assert!(page.contains("&lt;script&gt;alert(1)") && !page.contains("<script"), "{page}");
    assert!(page.contains("src=\"data:image/png;base64,iVBORw0KGgo"), "{page}");
    let picture = told["screenshot_file"].as_str().unwrap();
    assert!(std::fs::read(picture).unwrap().starts_with(PNG));
    assert_eq!(told["screen_is_blank"], false);
    // What came of it is said of its point, and of no other, nor of a copy.
    let boot = |points: &Value| points[0]["boot"].clone();
    let points = lab.vault.json(&["points", "shop"]);
    let checks: Vec<&Value> = boot_checks(&points[0]).collect();
    assert_eq!((&told["kept"], &boot(&points)["passed"]), (&json!(true), &json!(true)), "{points}");
    assert_eq!(boot(&points)["answered_ms"], told["answered_ms"]);
    let names = told["checks"].as_array().unwrap().iter().map(|check| &check["check"]);
    assert_eq!(checks, names.collect::<Vec<_>>());
    let table = lab.vault.ok(&["points"]).out;
    assert!(table.contains(&format!(", came up in {:.1} s", first as f64 / 1000.0)), "{table}");
    // That the point was in use, what came of it, and nothing else.
    let (log, mut after) = (lab.vault.repo().join("log"), lab.contents());
    after.retain(|path, _| !path.starts_with(&log) || before.contains_key(path));
    assert!(after == before, "nothing was written to the repository");
    assert!(lab.is_clean());
}

#[test]
fn a_machine_that_does_not_boot_is_told_with_what_it_shows() {
    let lab = Lab::new();
    lab.back_up_broken();
    let checks = ["--timeout", "6s", "--check", "agent", "--check", "tcp:25", "--check", "quiet"];
    let pictures = lab.vault.rack.path("pictures");
    let (port, mails) = mail_server();
    let mail = lab.vault.rack.path("mail.toml");
    let config = format!(
        "server = \"127.0.0.1:{port}\"\ntls = \"none\"\nfrom = \"rempart@example.com\"\nto = [\"ops@example.com\"]\n"
    );
    std::fs::write(&mail, config).unwrap();
    let files = ["--screenshots", pictures.to_str().unwrap(), "--mail-config", mail.to_str().unwrap()];
    let (told, code) = lab.verify("broken", &[&checks[..], &files].concat());
    let mail = mails.join().unwrap();
    assert!(mail.contains("Subject: verified backups: 1 of 1 machines did not come up"), "{mail}");
    assert!(mail.contains("did not come up: not all checks held within 6 s"), "{mail}");
    assert!(mail.contains("report.html"), "{mail}");
    assert_eq!((code, &told["passed"]), (1, &json!(false)), "{told}");
    assert_eq!(told["why"], "not all checks held within 6 s");
    assert_eq!(check(&told, "agent")["detail"], "no program in the guest has opened the agent's channel");
    let quiet = check(&told, "quiet")["detail"].as_str().unwrap();
    assert!(quiet.ends_with("less than an operating system"), "{quiet}");
    assert_eq!(check(&told, "tcp:25")["passed"], false);
    let picture = told["screenshot_file"].as_str().unwrap();
    assert!(std::fs::read(picture).unwrap().starts_with(PNG));
    assert_eq!(told["screen_is_blank"], false, "its firmware says so");
    assert!(lab.is_clean());
    lab.is_known_to_have_failed();
    // What a point cannot be run by is told of that point.
    let disk = lab.vault.rack.path("broken.raw");
    lab.vault.ok(&["backup", "disks", "--disk", disk.to_str().unwrap()]);
    let (told, code) = lab.verify("disks", &[]);
    assert_eq!((code, &told["powered_on_ms"]), (1, &Value::Null));
    assert!(told["why"].as_str().unwrap().contains("no definition of a machine"), "{told}");
    let scratch = lab.scratch();
    let all = ["verify", "--boot", "--timeout", "1s", "--json", "--scratch-dir", scratch.to_str().unwrap()];
    let all: Value = serde_json::from_str(&lab.vault.refused(&all).out).unwrap();
    assert_eq!((all.as_array().unwrap().len(), &all[0]["vm"]), (1, &json!("broken")), "{all}");
    let ours =
        ["-machine", "q35,accel=tcg", "-m", "64M", "-nodefaults", "-serial", "chardev:console", "-device"];
    let by_arguments =
        [&["--timeout", "1s", "--check", "serial:x", "--"], &ours[..], &["virtio-blk-pci,drive={disk0}"]];
    let (told, code) = lab.verify("disks", &by_arguments.concat());
    assert_eq!((code, &told["why"]), (1, &json!("not all checks held within 1 s")), "{told}");
}

/// Machines that come to nothing within 4 s each: from when to when they ran, by the host's clock.
fn run_two(memory_mib: u64) -> Vec<(u64, u64)> {
    let lab = Lab::new();
    for vm in ["one", "two"] {
        let disk = lab.vault.rack.image(&format!("{vm}.raw"), 1 << 20, 0);
        lab.back_up_with(vm, &disk, &format!("{memory_mib}M"));
    }
    let scratch = lab.scratch();
    let report = lab.vault.rack.path("report.html");
    let arguments = ["verify", "--boot", "--parallel", "2", "--timeout", "4s", "--json", "--scratch-dir"];
    let files = [scratch.to_str().unwrap(), "--report", report.to_str().unwrap()];
    let answer = lab.vault.refused(&[&arguments[..], &files].concat());
    let told: Vec<Value> = serde_json::from_str(&answer.out).unwrap();
    assert_eq!((told.len(), &told[0]["vm"], &told[1]["vm"]), (2, &json!("one"), &json!("two")), "in order");
    assert!(answer.err.contains("2 of 2 machines did not come up"), "{}", answer.err);
    let page = std::fs::read_to_string(report).unwrap();
    assert!(page.contains("2 machines of") && page.contains("one@") && page.contains("two@"), "{page}");
    assert!(lab.is_clean());
    let points = lab.vault.json(&["points"]);
    let mut spans: Vec<(u64, u64)> = told
        .iter()
        .map(|told| {
            let point = points.as_array().unwrap().iter().find(|point| point["vm"] == told["vm"]).unwrap();
            assert_eq!(told["why"], "not all checks held within 4 s", "{told}");
            // The result is made a moment after the machine's end.
            let end = point["boot"]["at_unix_ms"].as_u64().unwrap();
            (end - told["ended_ms"].as_u64().unwrap() + told["powered_on_ms"].as_u64().unwrap(), end)
        })
        .collect();
    spans.sort_unstable();
    spans
}

#[test]
fn machines_run_at_once_as_far_as_their_memory_fits_into_the_host() {
    let spans = run_two(64);
    assert!(spans[1].0 < spans[0].1, "they ran at the same time: {spans:?}");
    // Each fits, and both do not.
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let available = meminfo.lines().find(|line| line.starts_with("MemAvailable:")).unwrap();
    let kib: u64 = available.split_whitespace().nth(1).unwrap().parse().unwrap();
    let spans = run_two((kib >> 10) * 7 / 10);
    assert!(spans[1].0 >= spans[0].1, "one ran after the other: {spans:?}");
}

#[test]
fn what_a_repository_cannot_keep_is_told_and_the_machine_seen_to() {
    let lab = Lab::new();
    lab.back_up_broken();
    let place = lab.vault.rack.path("read-only");
    let _mounted = read_only(&lab.vault.repo(), &place);
    let (told, code) = lab.verify("broken", &["--timeout", "1s", "--repo", place.to_str().unwrap()]);
    assert_eq!(
        (code, &told["kept"], &told["why"]),
        (1, &json!(false), &json!("not all checks held within 1 s"))
    );
    assert_eq!(lab.vault.json(&["points"])[0]["boot"], Value::Null);
}

#[test]
fn a_machine_goes_with_the_command_that_started_it() {
    let lab = Lab::new();
    lab.back_up_broken();
    let scratch = lab.scratch();
    let arguments = ["verify", "--boot", "broken", "--scratch-dir", scratch.to_str().unwrap()];
    let mut verifying = Running::start(&lab.vault, &arguments, "it is started");
    let mut pid = String::new();
    verifying.until("QEMU runs", |_| {
        let folder = std::fs::read_dir(&scratch).unwrap().flatten().next();
        pid = folder
            .and_then(|folder| std::fs::read_to_string(folder.path().join("qemu.pid")).ok())
            .unwrap_or_default();
        !pid.is_empty()
    });
    let process = PathBuf::from(format!("/proc/{}", pid.trim()));
    assert!(process.exists());
    // SIGKILL.
    drop(verifying);
    let end = Instant::now() + Duration::from_secs(30);
    while process.exists() || !lab.is_clean() {
        assert!(Instant::now() < end, "QEMU or its folder is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}
