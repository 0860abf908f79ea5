//! A machine of a node goes on from a point with its memory, and on the node, whatever ends in between.

use crate::backup::Vault;
use crate::guest::run::COUNTER;
use crate::guest::{Guest, counts_on, never_went_back, numbers_on, take_numbers_off, went_on_from};
use crate::rack::Server;
use crate::running::tool;
use rempart_hypervisor::qmp;
use rempart_hypervisor::qmp::migration::MigrationParameters;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn counting(vault: &Vault) -> (Server, Server, Server) {
    counting_with(vault, &[], "")
}

/// Two nodes that mirror a machine whose guest counts, led and run by the first. QEMU has more `options`, and the first node
/// more `sections` in its configuration.
fn counting_with(vault: &Vault, options: &[&str], sections: &str) -> (Server, Server, Server) {
    let script = vault.rack.path("qemu");
    let options =
        Guest::options(COUNTER).into_iter().chain(options.iter().map(|option| (*option).to_owned()));
    let boots: String = options.map(|option| format!(" '{option}'")).collect();
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *guest=shop*) exec qemu-system-x86_64 \"$@\"{boots};; esac\n\
         exec qemu-system-x86_64 \"$@\"\n"
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    // The guest does not hear its power button.
    let own = format!("[vm]\nqemu = \"{}\"\nshutdown_timeout_s = 2\n", script.display());
    let mut a = vault.rack.initialised("node-a");
    a.configure("[vm]\n", &own);
    a.configure("# [[backup]]\n", &format!("{sections}# [[backup]]\n"));
    a.start();
    let b = vault.rack.node_with("node-b", "[vm]\n", &own);
    a.ok(&["cluster", "create", "lab"]);
    vault.rack.join(&b, &a);
    let witness = vault.rack.witness("witness", &a);
    let [system, numbers] =
        ["system", "numbers"].map(|name| vault.rack.image(name, 24 * MIB, 0).display().to_string());
    tool(&["mkfs.ext4", "-q", &system]);
    // Swap space by its header, which is never backed up otherwise.
    tool(&["mkswap", "-q", &numbers]);
    let import = ["vm", "import", "shop", "--memory", "192M", "--cpu-model", "max"];
    a.ok(&[&import[..], &["--disk", &system, "--disk", &numbers]].concat());
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.until_mirrored("shop");
    a.ok(&["vm", "start", "shop"]);
    counts_on(&console(&a), 1);
    (a, b, witness)
}

fn console(node: &Server) -> PathBuf {
    node.home.join("run/vms/shop/console.log")
}

fn mark(node: &Server) -> PathBuf {
    node.home.join("run/vms/shop/memory.saving")
}

/// Files with a guest's memory on this node.
fn memories(node: &Server) -> usize {
    let files = std::fs::read_dir(node.data("vms/shop")).unwrap().flatten();
    files.filter(|file| file.file_name().to_str().unwrap().ends_with(".memory")).count()
}

fn signal(signal: &str, pid: u64) {
    tool(&["kill", signal, &pid.to_string()]);
}

fn asked(config: &str) -> [&str; 10] {
    let words = ["backup", "shop", "--consistency", "saved-state", "--else", "nothing"];
    let [a, b, c, d, e, f] = words;
    [a, b, c, d, e, f, "--longest-pause", "60", "--config", config]
}

/// A QEMU by a command line, killed at the end.
struct Resumed(Child);

impl Drop for Resumed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a point says that QEMU was started with, on other images, and in a folder of its own.
fn resume(vault: &Vault, memory: &Value, disks: [&str; 2]) -> Resumed {
    let run = vault.rack.path("resumed");
    std::fs::create_dir(&run).unwrap();
    let words: Vec<&str> =
        memory["command_line"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    let (mut line, mut disks, mut place) = (Vec::new(), disks.into_iter(), 1);
    while place < words.len() {
        let (word, value) = (words[place], words.get(place + 1).copied().unwrap_or_default());
        match word {
            "-S" => {}
            "-blockdev" => {
                let node: Value = serde_json::from_str(value).unwrap();
                let file = json!({ "driver": "file", "filename": disks.next().unwrap() });
                let raw = json!({ "driver": "raw", "node-name": node["node-name"], "file": file });
                line.extend([word.to_owned(), raw.to_string()]);
                place += 1;
            }
            // It forbids to start what `-incoming` names.
            "-sandbox" => place += 1,
            // The guard's own monitor.
            "-chardev" | "-mon" if value.contains("guard") => place += 1,
            "-chardev" | "-pidfile" => {
                let own = value.split(',').map(|part| match part.split_once('=') {
                    Some((key @ ("path" | "logfile"), path)) => {
                        let name = Path::new(path).file_name().unwrap();
                        format!("{key}={}", run.join(name).display())
                    }
                    _ if part.starts_with('/') => run.join("pid").display().to_string(),
                    _ => part.to_owned(),
                });
                line.extend([word.to_owned(), own.collect::<Vec<_>>().join(",")]);
                place += 1;
            }
            _ => line.push(word.to_owned()),
        }
        place += 1;
    }
    line.extend(["-incoming".to_owned(), memory["incoming"].as_str().unwrap().to_owned()]);
    let child = Command::new(words[0]).args(line).stdin(Stdio::null()).spawn().unwrap();
    let resumed = Resumed(child);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let end = Instant::now() + PATIENCE;
        let client = loop {
            match qmp::Client::connect(&run.join("qmp.sock"), PATIENCE).await {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        // It stood still when it was sent, and it does so once it is there.
        while client.query_status().await.unwrap().status != "paused" {
            assert!(Instant::now() < end, "{:?}", client.query_status().await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        client.cont().await.unwrap();
    });
    resumed
}

#[test]
fn a_machine_of_a_node_goes_on_from_a_point_with_its_memory() {
    let vault = Vault::new();
    let (mut a, b, _witness) = counting(&vault);
    let config = a.config().display().to_string();
    vault.json(&["backup", "shop", "--consistency", "crash", "--config", &config]);
    let before = counts_on(&console(&a), 1);
    let made = vault.json(&asked(&config));
    let after = counts_on(&console(&a), 20);
    assert_eq!(made["consistency"]["level"], "saved-state", "{made}");
    let size = made["memory"]["size_bytes"].as_u64().unwrap();
    let pause = made["consistency"]["pause_ms"].as_u64().unwrap();
    println!("stood still for {pause} ms, memory {size} bytes");
    assert!(pause > 0 && pause < 60_000 && size > 10 << 20, "{made}");
    for disk in [0, 1] {
        assert_eq!(made["disks"][disk]["full_because"], Value::Null, "{made}");
        assert_eq!(made["disks"][disk]["left_out_bytes"], 0, "{made}");
    }
    a.until("nothing is left of it", || memories(&a) == 0 && !mark(&a).exists());

    // It works on, and so does its peer's copy: what it said to be on its disk is on the other node when this one dies.
    a.until_mirrored("shop");
    let last = counts_on(&console(&a), 5);
    never_went_back(&console(&a));
    a.kill();
    b.until("it runs on the peer", || console(&b).exists());
    counts_on(&console(&b), 1);
    b.ok(&["vm", "stop", "--force", "shop"]);
    let copy = vault.rack.path("copy");
    tool(&["nbdcopy", &b.export("shop", 1), copy.to_str().unwrap()]);
    let numbers = numbers_on(&copy);
    let whole = numbers.iter().copied().eq(1..=numbers.len() as u64);
    assert!(whole && numbers.len() as u64 >= last - 1, "{last} was said: {numbers:?}");

    let to = vault.rack.path("to").display().to_string();
    let memory = &vault.json(&["restore", "shop", "--to", &to])["memory"];
    let (system, numbers) = (format!("{to}/disk0.raw"), PathBuf::from(format!("{to}/disk1.raw")));
    let last = take_numbers_off(&numbers);
    assert!((before - 1..=after).contains(&last), "{before} {last} {after}");
    let resumed = resume(&vault, memory, [&system, numbers.to_str().unwrap()]);
    let console = vault.rack.path("resumed/console.log");
    counts_on(&console, 5);
    drop(resumed);
    never_went_back(&console);
    went_on_from(last, &numbers);
    // To others it is the machine that it was.
    vault.json(&["verify", "shop"]);
}

/// Has a machine's memory saved by a daemon that stands still in the middle of it.
fn caught_saving(vault: &Vault, node: &Server, config: &str) -> Child {
    let backup = vault.command(&asked(config)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let end = Instant::now() + PATIENCE;
    while !mark(node).exists() {
        assert!(Instant::now() < end, "nobody saves its memory: {}", node.log());
        std::thread::sleep(Duration::from_millis(1));
    }
    signal("-STOP", node.pid().into());
    backup
}

/// What QEMU says of itself, by the monitor that no daemon has any more.
fn asked_qemu(node: &Server) -> (String, String) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let monitor = node.home.join("run/vms/shop/qmp.sock");
        let client = qmp::Client::connect(&monitor, PATIENCE).await.unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            let migration = client.query_migrate().await.unwrap().status;
            let status = client.query_status().await.unwrap().status;
            if matches!(migration.as_str(), "failed" | "completed" | "cancelled")
                && status != "finish-migrate"
            {
                return (migration, status);
            }
            assert!(Instant::now() < end, "{migration} {status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
}

/// The daemon dies while the guest stands still: it does so until the next daemon has the lease, and then goes on.
#[test]
fn a_guest_goes_on_by_the_next_daemon_when_one_dies_while_it_saves_the_memory() {
    let vault = Vault::opened_by_file();
    let (mut a, mut b, _witness) = counting(&vault);
    let config = a.config().display().to_string();
    // It leads alone, by a lease that ends.
    b.kill();
    a.until("it goes on without its peer", || a.vm("shop")["mirrored"] == false);
    counts_on(&console(&a), 5);
    let mut backup = caught_saving(&vault, &a, &config);
    assert!(mark(&a).exists() && memories(&a) == 1, "it was over before it could be caught");
    a.kill();
    assert!(!backup.wait().unwrap().success());
    let (migration, status) = asked_qemu(&a);
    assert_eq!((migration.as_str(), status.as_str()), ("failed", "paused"));
    let said = crate::guest::counted(&console(&a)).len();
    // Longer than its lease and the time to stop. Nothing tells that nothing happens.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(asked_qemu(&a).1, "paused");
    assert_eq!(crate::guest::counted(&console(&a)).len(), said);
    a.start();
    counts_on(&console(&a), 5);
    never_went_back(&console(&a));
    assert!(!mark(&a).exists());
    assert_eq!(memories(&a), 0);
    let made = vault.json(&asked(&config));
    assert_eq!(made["consistency"]["level"], "saved-state", "{made}");
    b.start();
    a.until_mirrored("shop");
    counts_on(&console(&a), 1);
    never_went_back(&console(&a));
}

/// An order to hand the machine over ends what is done for its memory, and not the other way round.
#[test]
fn a_machine_whose_memory_is_being_kept_is_handed_over_all_the_same() {
    let vault = Vault::opened_by_file();
    let (a, b, _witness) = counting(&vault);
    let config = a.config().display().to_string();
    let qemu = a.vm("shop")["qemu_pid"].as_u64().unwrap();
    let backup = vault.command(&asked(&config)).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let end = Instant::now() + PATIENCE;
    while !mark(&a).exists() {
        assert!(Instant::now() < end, "nobody saves its memory: {}", a.log());
        std::thread::sleep(Duration::from_millis(1));
    }
    // It can neither come to its end nor give up until it goes on.
    signal("-STOP", qemu);
    assert!(mark(&a).exists(), "it was over before it could be caught");
    let mut moved = b.spawn(&["failover", "shop"]);
    let told = backup.wait_with_output().unwrap();
    signal("-CONT", qemu);
    assert!(!told.status.success(), "{told:?}");
    let said = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(said.contains("it is being stopped, or handed over"), "{said}");
    assert!(moved.wait().unwrap().success(), "{}", a.log());
    counts_on(&console(&b), 2);
    assert_eq!((memories(&a), mark(&a).exists()), (0, false));
}

/// Has QEMU send no more than 1 MiB of memory a second, whatever others tell it, until this is dropped.
struct Slow {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Slow {
    fn start(monitor: PathBuf) -> Slow {
        let over = Arc::new(AtomicBool::new(false));
        let told = over.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let client = qmp::Client::connect(&monitor, PATIENCE).await.unwrap();
                let slow = MigrationParameters {
                    max_bandwidth: MIB as u64,
                    downtime_limit: 1,
                    ..MigrationParameters::default()
                };
                while !told.load(Ordering::Acquire) {
                    client.migrate_set_parameters(&slow).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
        });
        Slow { over, thread: Some(thread) }
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        let ended = self.thread.take().expect("it is ended once").join();
        assert!(ended.is_ok() || std::thread::panicking(), "it was told something else");
    }
}

/// What was sent in the first part of the longest pause says how long the rest would take.
#[test]
fn a_guest_that_would_stand_still_too_long_goes_on_and_its_point_has_no_memory_and_says_why() {
    let vault = Vault::opened_by_file();
    let monitor = vault.rack.path("slow.sock");
    let second = format!("unix:{},server=on,wait=off", monitor.display());
    let nightly = format!(
        "[[backup]]\nname = 'nightly'\nrepository = '{}'\nkey_file = '{}'\ncache_dir = '{}'\nmachines = ['shop']\n\
         schedule = '0 0 30 2 *'\nretries = 0\nconsistency = 'saved-state'\nlongest_pause_s = 4\n\n",
        vault.repo().display(),
        vault.rack.path("key").display(),
        vault.rack.path("cache").display(),
    );
    let (a, _b, _witness) = counting_with(&vault, &["-qmp", &second], &nightly);
    let config = a.config().display().to_string();
    let slow = Slow::start(monitor);
    let goes_on = || {
        counts_on(&console(&a), 5);
        never_went_back(&console(&a));
        a.until("nothing is left of it", || memories(&a) == 0 && !mark(&a).exists());
    };
    // Before the limit, and not before there was something to reckon by.
    let gave_up = |why: &str, seconds: u64| {
        assert!(why.contains("the guest's memory cannot be kept"), "{why}");
        let (_, would) = why.split_once("the guest would have to stand still for about ").expect(why);
        let (would, rest) = would.split_once(" s, and ").expect(why);
        let (allowed, took) = rest.split_once(" s are allowed: ").expect(why);
        let [would, allowed] = [would, allowed].map(|told| told.parse::<f64>().unwrap());
        // What was left of it when QEMU began.
        assert!(
            would > seconds as f64 && (seconds as f64 / 4.0..=seconds as f64).contains(&allowed),
            "{why}"
        );
        let took = took.split_once("taken in ").and_then(|(_, took)| took.split_once(" ms")).expect(why).0;
        let took: u64 = took.parse().unwrap();
        assert!((seconds * 100..seconds * 1000).contains(&took), "{why}");
    };
    let newest = || vault.json(&["points", "shop"]).as_array().unwrap().last().cloned().unwrap_or_default();
    let asked =
        ["backup", "shop", "--consistency", "saved-state", "--longest-pause", "2", "--config", &config];
    let refused = vault.refused(&[&asked[..], &["--else", "nothing"]].concat());
    gave_up(&refused.err, 2);
    assert_eq!(newest(), Value::Null);
    goes_on();

    let made = vault.json(&asked);
    goes_on();
    let point = newest();
    assert_eq!((&made["memory"], &point["memory"]), (&Value::Null, &Value::Null), "{made} {point}");
    assert_eq!(point["consistency"]["level"], "crash", "{point}");
    gave_up(point["consistency"]["why"].as_str().unwrap(), 2);

    let run = a.json(&["schedule", "run", "nightly"]);
    goes_on();
    assert_eq!(run["machines"][0]["consistency"], "crash", "{run}");
    gave_up(newest()["consistency"]["why"].as_str().unwrap(), 4);

    drop(slow);
    let made = vault.json(&[&asked[..5], &["60"], &asked[6..]].concat());
    assert_eq!(made["consistency"]["level"], "saved-state", "{made}");
    goes_on();
    a.until_mirrored("shop");
}
