//! Backups by the clock: real daemons, repositories, mail and webhooks.

use crate::backup::Vault;
use crate::rack::{Rack, Server, noise};
use crate::receiver::Receiver;
use crate::running::{Mounted, tool};
use crate::service::scrape;
use serde_json::Value;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

const MIB: usize = 1 << 20;
/// So seldom that only an operator runs it.
const NEVER: &str = "0 0 30 2 *";

/// Adds to the node's configuration, where the example stands.
pub fn schedule(node: &Server, vault: &Vault, when: &str, more: &str) {
    let text = format!(
        "[[backup]]\nname = 'nightly'\nrepository = '{}'\npassphrase_file = '{}'\ncache_dir = '{}'\n\
         schedule = '{when}'\nretry_delay_s = 1\nretries = 1\n{more}\n\n# [[backup]]\n",
        vault.repo().display(),
        vault.rack.path("passphrase").display(),
        node.home.join("cache").display(),
    );
    node.configure("# [[backup]]\n", &text);
}

fn history(node: &Server) -> Vec<Value> {
    node.json(&["schedule", "history", "nightly"]).as_array().expect("a list").clone()
}

fn show(node: &Server) -> Value {
    node.json(&["schedule", "show", "nightly"])
}

fn outcome<'a>(run: &'a Value, vm: &str) -> &'a Value {
    let machines = run["machines"].as_array().expect("a list");
    machines.iter().find(|machine| machine["vm"] == vm).unwrap_or_else(|| panic!("{vm}: {run}"))
}

fn points(vault: &Vault, vm: &str) -> usize {
    vault.json(&["points", vm]).as_array().expect("a list").len()
}

fn text_of(mail: &Value) -> String {
    let text = mail["parts"][0]["base64"].as_str().expect("a text");
    let mut decoder = Command::new("base64");
    let mut child = decoder.arg("-d").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

#[test]
fn success_and_failure_are_told_by_mail_and_webhook() {
    let (rack, vault) = (Rack::new(), Vault::new());
    let mails = Receiver::start("smtp_server.py", &["plain"]);
    let calls = Receiver::start("http_receiver.py", &["200"]);
    let mut node = rack.initialised("node-a");
    let retain = "machines = 'all'\nexclude = ['test']\nnotify = 'always'\nverify = true\ngc = true\n\
                  retain = { keep_last = 2 }";
    schedule(&node, &vault, NEVER, retain);
    let receivers = format!(
        "[mail]\nserver = '127.0.0.1:{}'\ntls = 'none'\nfrom = 'rempart@example.com'\nto = ['ops@example.com']\n\
         [webhook]\nurl = 'http://127.0.0.1:{}/hook'\n# [mail]\n",
        mails.port, calls.port
    );
    node.configure("# [mail]\n", &receivers);
    node.start();
    for name in ["shop", "test"] {
        node.import(name, &[&rack.image(&format!("{name}.raw"), MIB, 7)]);
    }
    for expected in [1, 2, 2] {
        let run = node.json(&["schedule", "run", "nightly"]);
        assert_eq!((&run["result"], &run["trigger"]), (&"success".into(), &"operator".into()), "{run}");
        assert_eq!(run["machines"].as_array().unwrap().len(), 1, "{run}");
        assert_eq!(points(&vault, "shop"), expected);
    }
    let (mail, call) = (mails.kept().pop().unwrap(), calls.kept().pop().unwrap());
    assert_eq!(mail["subject"], "Backup `nightly` on node-a done: 1 of 1 machines");
    assert!(text_of(&mail).contains("shop: point "), "{}", text_of(&mail));
    let call: Value = serde_json::from_str(call["body"].as_str().unwrap()).unwrap();
    assert_eq!((&call["event"], &call["run"]["run"]), (&"backup-run".into(), &3.into()));

    // The place is gone.
    std::fs::rename(vault.repo(), rack.path("elsewhere")).unwrap();
    let refused = node.refused(&["schedule", "run", "nightly"]);
    assert!(refused.err.contains("1 of 1 machines were not backed up"), "{}", refused.err);
    let mail = mails.kept().pop().unwrap();
    assert_eq!(mail["subject"], "Backup `nightly` on node-a FAILED: 0 of 1 machines");
    assert!(text_of(&mail).contains("tried 2 times"), "{}", text_of(&mail));
    let shown = show(&node);
    assert_eq!((&shown["machines"][0]["failures"], shown["running"].is_null()), (&1.into(), true));
    let warnings = node.json(&["status"])["node"]["conditions"].to_string();
    assert!(warnings.contains("its last run failed"), "{warnings}");
    assert_eq!(history(&node).len(), 4);
    assert_eq!((mails.kept().len(), calls.kept().len()), (4, 4));

    // Said when the daemon starts, and not only at night.
    node.kill();
    node.start();
    node.until("it is said", || !show(&node)["problem"].is_null());
    assert!(node.log().contains("does not open"), "{}", node.log());
    assert_eq!(history(&node).len(), 4, "it is kept");
    std::fs::rename(rack.path("elsewhere"), vault.repo()).unwrap();
    let run = node.json(&["schedule", "run", "nightly"]);
    assert_eq!((&run["result"], &run["run"]), (&"success".into(), &5.into()), "{run}");
    assert_eq!((&show(&node)["machines"][0]["failures"], &show(&node)["problem"]), (&0.into(), &Value::Null));
}

/// The line to it fails for a night.
#[test]
fn new_points_are_copied_to_a_second_repository() {
    let (rack, vault, centre) = (Rack::new(), Vault::new(), Vault::opened_by_file());
    let mails = Receiver::start("smtp_server.py", &["plain"]);
    let mut node = rack.initialised("node-a");
    let copied = format!(
        "machines = ['shop']\nnotify = 'always'\nretain = {{ keep_last = 2 }}\n\
         copy = {{ repository = '{}', key_file = '{}', limit_bytes_per_s = 8000000 }}",
        centre.repo().display(),
        centre.rack.path("key").display()
    );
    schedule(&node, &vault, NEVER, &copied);
    let receiver = format!(
        "[mail]\nserver = '127.0.0.1:{}'\ntls = 'none'\nfrom = 'rempart@example.com'\nto = ['ops@example.com']\n# [mail]\n",
        mails.port
    );
    node.configure("# [mail]\n", &receiver);
    node.start();
    let content = noise(5, 3 * MIB);
    let disk = rack.path("disk.raw");
    std::fs::write(&disk, &content).unwrap();
    node.import("shop", &[&disk]);
    let run = node.json(&["schedule", "run", "nightly"]);
    let first = outcome(&run, "shop")["copy"].as_u64().expect("it was copied");
    assert!(centre.restored(&format!("shop@{first}"), "copy") == [content.clone()]);
    let mail = text_of(&mails.kept().pop().unwrap());
    assert!(mail.contains(&format!("point {first} of the second repository")), "{mail}");

    // The backups, and what is done with older ones, go on.
    std::fs::rename(centre.repo(), rack.path("away")).unwrap();
    for _ in 0..2 {
        let refused = node.refused(&["schedule", "run", "nightly"]);
        assert!(
            refused.err.contains("the machines were backed up, and not all else was done"),
            "{}",
            refused.err
        );
        assert!(refused.err.contains("is not in the second repository"), "{}", refused.err);
    }
    assert_eq!(
        (points(&vault, "shop"), outcome(&history(&node)[2], "shop")["copy"].clone()),
        (2, Value::Null)
    );
    let mail = mails.kept().pop().unwrap();
    assert_eq!(mail["subject"], "Backup `nightly` on node-a FAILED: 1 of 1 machines");
    assert!(text_of(&mail).contains("is not in the second repository"), "{}", text_of(&mail));
    node.kill();
    node.start();
    node.until("it is said", || !show(&node)["problem"].is_null());

    std::fs::rename(rack.path("away"), centre.repo()).unwrap();
    let run = node.json(&["schedule", "run", "nightly"]);
    let newest = outcome(&run, "shop")["copy"].as_u64().expect("it was copied");
    assert!(newest > first && show(&node)["machines"][0]["last"]["copy"] == newest, "{run}");
    assert_eq!(points(&centre, "shop"), 2);
    assert!(centre.restored("shop", "newest") == [content]);
    assert!(node.ok(&["schedule", "show", "nightly"]).contains(&format!("copied as point {newest}")));
}

/// Whoever is told of a backup is told of what came of starting an earlier one, too.
#[test]
fn what_came_of_a_boot_is_in_the_history_and_the_metrics_of_later_runs() {
    let (rack, vault) = (Rack::new(), Vault::new());
    let mut node = rack.initialised("node-a");
    schedule(&node, &vault, NEVER, "machines = 'all'\nretain = { keep_last = 1 }");
    node.start();
    node.import("shop", &[&rack.image("shop.raw", MIB, 0)]);
    let run = || outcome(&node.json(&["schedule", "run", "nightly"]), "shop").clone();
    assert_eq!(run()["last_boot"], Value::Null);
    let metric = |name: &str| {
        let metrics = scrape(UnixStream::connect(node.home.join("run/api.sock")).unwrap());
        let start = format!("rempart_backup_boot_{name}{{schedule=\"nightly\",vm=\"shop\"}} ");
        let value = metrics.iter().find_map(|sample| sample.strip_prefix(&start));
        value.unwrap_or_else(|| panic!("{name}: {metrics:?}")).parse::<f64>().unwrap()
    };
    assert_eq!((metric("timestamp_seconds"), metric("passed")), (0.0, 0.0));

    let boot = |arguments: &[&str]| {
        let scratch = rack.path("scratch");
        let start = ["verify", "--boot", "shop", "--json", "--scratch-dir", scratch.to_str().unwrap()];
        let told: Value = serde_json::from_str(&vault.run(&[&start[..], arguments].concat()).out).unwrap();
        told[0].clone()
    };
    // The firmware says on the console that it found nothing to start.
    let ours = [
        "--",
        "-machine",
        "q35,accel=tcg,graphics=off",
        "-m",
        "64M",
        "-nodefaults",
        "-serial",
        "chardev:console",
    ];
    let came_up = boot(&[&["--timeout", "60s", "--check", "serial:SeaBIOS"], &ours[..]].concat());
    assert_eq!(came_up["passed"], true, "{came_up}");
    let known = run()["last_boot"].clone();
    assert_eq!((&known["passed"], &known["point"]), (&true.into(), &came_up["point"]), "{known}");
    assert_eq!(known["answered_ms"], came_up["answered_ms"]);
    let at = known["at_unix_ms"].as_u64().unwrap();
    assert_eq!((metric("timestamp_seconds"), metric("passed")), (at as f64 / 1000.0, 1.0));
    assert_eq!(metric("recovery_seconds"), came_up["answered_ms"].as_u64().unwrap() as f64 / 1000.0);
    let shown = node.ok(&["schedule", "show", "nightly"]);
    assert!(shown.contains(&format!("point {} came up", came_up["point"])), "{shown}");

    // Its point was forgotten by the rule: the node still knows, as do the runs that are over.
    assert_eq!(run()["last_boot"], Value::Null);
    assert_eq!((show(&node)["machines"][0]["last_boot"].clone(), metric("passed")), (known, 1.0));
    boot(&["--timeout", "1s", "--check", "agent"]);
    assert_eq!(
        (&run()["last_boot"]["passed"], metric("passed"), metric("recovery_seconds")),
        (&false.into(), 0.0, 0.0)
    );
    assert_eq!(outcome(&history(&node)[1], "shop")["last_boot"]["passed"], true);
}

#[test]
fn it_runs_by_the_clock() {
    let (rack, vault) = (Rack::new(), Vault::new());
    let mut node = rack.initialised("node-a");
    schedule(&node, &vault, "* * * * * *", "machines = ['shop']\nretain = { keep_last = 1 }");
    node.start();
    node.import("shop", &[&rack.image("disk.raw", MIB, 7)]);
    node.until("two runs", || history(&node).iter().filter(|run| run["result"] == "success").count() >= 2);
    let runs = history(&node);
    let good = runs.iter().filter(|run| run["result"] == "success");
    assert!({ good }.all(|run| run["trigger"] == "schedule"), "{runs:?}");
    let shown = node.ok(&["schedule", "list"]);
    assert!(shown.contains("nightly") && shown.contains("* * * * * *"), "{shown}");
    assert!(node.ok(&["schedule", "show", "nightly"]).contains("shop"));
    let unknown = node.refused(&["schedule", "run", "weekly"]);
    assert!(unknown.err.contains("`weekly`"), "{}", unknown.err);
}

/// An hour of the day that is not now, nor soon.
fn shut() -> String {
    let seconds = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let hour = seconds / 3600 % 24;
    format!("{:02}:00-{:02}:00", (hour + 10) % 24, (hour + 11) % 24)
}

#[test]
fn a_shut_window_holds_up_the_clock_and_no_operator() {
    let (rack, vault) = (Rack::new(), Vault::new());
    let mut node = rack.initialised("node-a");
    let disk = rack.path("disk.raw");
    std::fs::write(&disk, noise(3, 2 * MIB)).unwrap();
    let foreign = |name: &str| format!("machines = ['{name}']\ndisks = ['{}']", disk.display());
    let shut = format!(
        "{}\n[[backup]]\nname = 'shut'\nrepository = '{}'\npassphrase_file = '{}'\nschedule = '* * * * * *'\n\
         cache_dir = '{}'\ntime_zone = 'UTC'\nwindow = '{}'\nlimit_bytes_per_s = 100000000\n{}",
        foreign("open"),
        vault.repo().display(),
        vault.rack.path("passphrase").display(),
        node.home.join("cache").display(),
        shut(),
        foreign("shut")
    );
    schedule(&node, &vault, "* * * * * *", &shut);
    node.start();
    node.until("the other ran twice", || history(&node).len() >= 2);
    let shown = node.json(&["schedule", "show", "shut"]);
    assert_eq!((&shown["running"], &shown["last"]), (&Value::Null, &Value::Null), "{shown}");
    let run = node.json(&["schedule", "run", "shut"]);
    assert_eq!(outcome(&run, "shut")["outcome"], "success", "{run}");
    assert_eq!(points(&vault, "shut"), 1);
}

/// The processes that work on the repository.
fn at_work(vault: &Vault) -> usize {
    let repo = vault.repo().to_str().unwrap().to_owned();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).split('\0').any(|word| word == repo)).count()
}

#[test]
fn a_run_goes_on_after_the_daemon_was_killed_in_it() {
    let (rack, vault) = (Rack::new(), Vault::new());
    let mut node = rack.initialised("node-a");
    // Held back, so that it is not over before it is looked at.
    schedule(&node, &vault, NEVER, "machines = ['large', 'a-first']\nlimit_bytes_per_s = 8000000");
    node.start();
    let large = rack.path("large.raw");
    std::fs::write(&large, noise(1, 32 * MIB)).unwrap();
    node.import("a-first", &[&rack.image("first.raw", MIB, 7)]);
    node.import("large", &[&large]);
    let answer: Value = node.json(&["schedule", "run", "nightly", "--no-wait"]);
    assert_eq!(answer["state"], "running", "{answer}");
    let busy = node.refused(&["schedule", "run", "nightly"]);
    assert!(busy.err.contains("runs already"), "{}", busy.err);
    node.until("the second is under way", || {
        let shown = show(&node);
        let under_way = shown["progress"]
            .as_array()
            .unwrap()
            .iter()
            .any(|machine| machine["vm"] == "large" && machine["done_bytes"].as_u64() > Some(0));
        assert!(!shown["running"].is_null(), "it ended too soon: {shown}");
        under_way
    });
    assert!(at_work(&vault) > 0);
    node.kill();
    node.until_dead(&vault);
    assert_eq!((points(&vault, "a-first"), points(&vault, "large")), (1, 0));
    node.start();
    node.until("the run ended", || !history(&node).is_empty());
    let runs = history(&node);
    assert_eq!(
        (runs.len(), &runs[0]["run"], &runs[0]["result"]),
        (1, &1.into(), &"success".into()),
        "{runs:?}"
    );
    assert_eq!((points(&vault, "a-first"), points(&vault, "large")), (1, 1));
    vault.ok(&["verify", "large"]);
}

impl Server {
    fn until_dead(&self, vault: &Vault) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while at_work(vault) > 0 {
            assert!(std::time::Instant::now() < end, "what the daemon started lives on");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[test]
fn each_machine_is_backed_up_by_the_node_that_leads_it() {
    let (rack, vault) = (Rack::new(), Vault::new());
    let (mut a, mut b, _witness) = rack.cluster();
    for node in [&mut a, &mut b] {
        node.kill();
        schedule(node, &vault, NEVER, "machines = ['shop', 'alone']\nparallel = 2");
        node.start();
    }
    let disk = rack.path("disk.raw");
    std::fs::write(&disk, noise(1, 40 * MIB)).unwrap();
    a.import("shop", &[&disk]);
    b.import("alone", &[&rack.image("alone.raw", MIB, 7)]);
    a.ok(&["protect", "shop", "--peer", "node-b"]);
    a.until_mirrored("shop");
    let run = |node: &Server| node.json(&["schedule", "run", "nightly"]);
    let (by_a, by_b) = (run(&a), run(&b));
    assert_eq!(outcome(&by_a, "shop")["outcome"], "success", "{by_a}");
    assert_eq!(outcome(&by_a, "alone")["outcome"], "elsewhere", "{by_a}");
    assert_eq!(outcome(&by_b, "shop")["outcome"], "elsewhere", "{by_b}");
    assert_eq!(outcome(&by_b, "alone")["outcome"], "success", "{by_b}");
    assert_eq!(outcome(&by_a, "shop")["read_bytes"], 40 * MIB);

    // The new leader goes on where the old one was.
    b.ok(&["failover", "shop"]);
    b.until("it leads", || b.vm("shop")["role"] == "primary");
    let (by_a, by_b) = (run(&a), run(&b));
    assert_eq!(outcome(&by_a, "shop")["outcome"], "elsewhere", "{by_a}");
    let shop = outcome(&by_b, "shop");
    assert_eq!(shop["outcome"], "success", "{by_b}");
    let read = shop["read_bytes"].as_u64().unwrap();
    assert!(read <= 64 * 128 * 1024, "what did not change is not read, but for samples: {shop}");
    assert_eq!(points(&vault, "shop"), 2);

    // Nobody knows whether a node that is gone has it.
    b.kill();
    a.refused(&["schedule", "run", "nightly"]);
    let last = history(&a).pop().unwrap();
    let error = &outcome(&last, "alone")["error"];
    assert_eq!(error["message"], "no node is known to lead `alone`", "{last}");
    assert!(error["cause"].as_str().unwrap().contains("node-b"), "{last}");
}

/// A file system that hangs whoever writes to it, while it is frozen.
struct Place(Mounted);

impl Place {
    fn new(rack: &Rack) -> Place {
        Place(Mounted::image(&rack.path("place"), 64 * MIB as u64, &["mkfs.ext4", "-q"]))
    }

    fn freeze(&self) {
        tool(&["fsfreeze", "--freeze", self.0.0.to_str().unwrap()]);
    }

    fn thaw(&self) {
        tool(&["fsfreeze", "--unfreeze", self.0.0.to_str().unwrap()]);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0.0).stderr(Stdio::null()).status();
    }
}

#[test]
fn a_backup_whose_repository_hangs_is_ended_by_its_time_limit_and_holds_up_no_other() {
    let (rack, vault) = (Rack::new(), Vault::new());
    let place = Place::new(&rack);
    let repo = place.0.0.join("repo");
    vault.ok(&["repo", "create", repo.to_str().unwrap()]);
    let mails = Receiver::start("smtp_server.py", &["plain"]);
    let calls = Receiver::start("http_receiver.py", &["200"]);
    let mut node = rack.initialised("node-a");
    let disk = rack.path("disk.raw");
    std::fs::write(&disk, noise(3, 2 * MIB)).unwrap();
    let of = |name: &str, repo: &std::path::Path, when: &str, more: &str| {
        format!(
            "[[backup]]\nname = '{name}'\nrepository = '{}'\npassphrase_file = '{}'\ncache_dir = '{}'\n\
             schedule = '{when}'\nmachines = ['{name}']\ndisks = ['{}']\n{more}\n",
            repo.display(),
            vault.rack.path("passphrase").display(),
            node.home.join("cache").display(),
            disk.display(),
        )
    };
    let sections = [
        of("nightly", &repo, NEVER, "time_limit_s = 20\nretries = 3\nretry_delay_s = 1"),
        of("other", &vault.repo(), "* * * * * *", ""),
    ];
    let receivers = format!(
        "[mail]\nserver = '127.0.0.1:{}'\ntls = 'none'\nfrom = 'rempart@example.com'\nto = ['ops@example.com']\n\
         [webhook]\nurl = 'http://127.0.0.1:{}/hook'\n# [mail]\n",
        mails.port, calls.port
    );
    node.configure("# [[backup]]\n", &sections.concat());
    node.configure("# [mail]\n", &receivers);
    node.start();
    let run = node.json(&["schedule", "run", "nightly"]);
    assert_eq!((&run["result"], &run["ended_by"]), (&"success".into(), &Value::Null), "{run}");

    std::fs::write(&disk, noise(4, 2 * MIB)).unwrap();
    place.freeze();
    let refused = node.refused(&["schedule", "run", "nightly"]);
    assert!(refused.err.contains("ended by its time limit of 20 s"), "{}", refused.err);
    let run = history(&node).pop().unwrap();
    assert_eq!((&run["result"], &run["ended_by"]), (&"failure".into(), &"time-limit".into()), "{run}");
    let machine = outcome(&run, "nightly");
    assert_eq!((&machine["outcome"], &machine["tries"]), (&"failed".into(), &1.into()), "{run}");
    assert!(machine["error"]["cause"].as_str().unwrap().contains("hangs in the kernel"), "{run}");
    let pid = show(&node)["hanging"][0].as_u64().expect("it hangs");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it is there");
    assert!(!status.is_empty());
    let metrics = scrape(UnixStream::connect(node.home.join("run/api.sock")).unwrap());
    for expected in [
        "rempart_backup_hanging_processes{schedule=\"nightly\"} 1",
        "rempart_backup_run_ended_early{schedule=\"nightly\"} 1",
        "rempart_backup_run_ended_early{schedule=\"other\"} 0",
        "rempart_backup_failures{schedule=\"nightly\",vm=\"nightly\"} 1.0",
    ] {
        assert!(metrics.iter().any(|sample| sample == expected), "{expected}: {metrics:?}");
    }
    let mail = mails.kept().pop().unwrap();
    assert_eq!(mail["subject"], "Backup `nightly` on node-a FAILED: 0 of 1 machines");
    assert!(text_of(&mail).contains("ended by its time limit of 20 s"), "{}", text_of(&mail));
    let call: Value = serde_json::from_str(calls.kept().pop().unwrap()["body"].as_str().unwrap()).unwrap();
    assert_eq!((&call["schedule"], &call["run"]["ended_by"]), (&"nightly".into(), &"time-limit".into()));
    let others = node.json(&["schedule", "history", "other"]);
    let (begun, ended) = (run["begun_unix_ms"].as_u64(), run["ended_unix_ms"].as_u64());
    let meanwhile =
        others.as_array().unwrap().iter().filter(|other| {
            other["begun_unix_ms"].as_u64() > begun && other["ended_unix_ms"].as_u64() < ended
        });
    let meanwhile: Vec<_> = meanwhile.collect();
    assert!(meanwhile.len() > 1 && meanwhile.iter().all(|run| run["result"] == "success"), "{others}");

    // Another one would hang as well; there are not more of them with each run.
    let refused = node.refused(&["schedule", "run", "nightly"]);
    assert!(refused.err.contains("of an earlier run hangs in the kernel"), "{}", refused.err);
    assert_eq!(show(&node)["hanging"].as_array().unwrap().len(), 1);
    assert!(node.json(&["status"])["node"]["conditions"].to_string().contains("hangs in the kernel"));
    place.thaw();
    node.until("it is gone", || show(&node)["hanging"].as_array().unwrap().is_empty());
    let run = node.json(&["schedule", "run", "nightly"]);
    assert_eq!((&run["result"], &run["ended_by"]), (&"success".into(), &Value::Null), "{run}");
    vault.ok(&["verify", "nightly", "--repo", repo.to_str().unwrap()]);
}

/// Sends a signal to the processes that back `vm` up.
fn signal(vault: &Vault, vm: &str, name: &str) -> usize {
    let repo = vault.repo().to_str().unwrap().to_owned();
    let mut count = 0;
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let words: Vec<_> = line.split('\0').collect();
        if words.contains(&repo.as_str()) && words.contains(&vm) {
            tool(&["kill", name, process.file_name().to_str().unwrap()]);
            count += 1;
        }
    }
    count
}

#[test]
fn a_run_that_an_operator_ends_is_neither_tried_again_nor_gone_on_with() {
    let (rack, vault) = (Rack::new(), Vault::new());
    let mut node = rack.initialised("node-a");
    // So slow that it is not over by itself.
    let slow =
        "machines = ['large', 'a-first', 'z-last']\nlimit_bytes_per_s = 1000000\nretain = { keep_last = 1 }";
    let pausing = format!(
        "{slow}\n[[backup]]\nname = 'pausing'\nrepository = '/nowhere'\npassphrase_file = '{}'\n\
         cache_dir = '{}'\nschedule = '{NEVER}'\nretry_delay_s = 3600\nmachines = ['a-first']\n",
        vault.rack.path("passphrase").display(),
        node.home.join("cache").display(),
    );
    schedule(&node, &vault, NEVER, &pausing);
    node.start();
    let large = rack.path("large.raw");
    std::fs::write(&large, noise(1, 64 * MIB)).unwrap();
    node.import("a-first", &[&rack.image("first.raw", MIB, 7)]);
    node.import("large", &[&large]);
    node.import("z-last", &[&rack.image("last.raw", MIB, 7)]);
    let none = node.refused(&["schedule", "stop", "nightly"]);
    assert!(none.err.contains("no run of backup schedule `nightly` is under way"), "{}", none.err);
    let begin = || {
        node.ok(&["schedule", "run", "nightly", "--no-wait"]);
        node.until("the second is under way", || {
            let machines = show(&node)["progress"].as_array().unwrap().clone();
            machines.iter().any(|one| one["vm"] == "large" && one["done_bytes"].as_u64() > Some(0))
        });
    };
    begin();
    // One that does not hear: it is killed.
    assert_eq!(signal(&vault, "large", "-STOP"), 1);
    let told = node.json(&["schedule", "stop", "nightly"]);
    assert_eq!((&told["result"], &told["ended_by"]), (&"failure".into(), &"operator".into()), "{told}");
    for (vm, expected, tries) in
        [("a-first", "success", 1), ("large", "failed", 1), ("z-last", "not-begun", 0)]
    {
        let machine = outcome(&told, vm);
        assert_eq!((&machine["outcome"], &machine["tries"]), (&expected.into(), &tries.into()), "{told}");
        let why = &machine["error"]["message"];
        assert_eq!(why.is_null(), expected == "success", "{told}");
        assert!(why.is_null() || why == "the run was ended by an operator", "{told}");
    }
    assert_eq!((at_work(&vault), history(&node)), (0, vec![told]));
    assert!(show(&node)["running"].is_null());
    let shown = node.ok(&["schedule", "history", "nightly"]);
    assert!(shown.contains("ended by an operator"), "{shown}");

    // The daemon dies before it is ended.
    begin();
    assert_eq!(signal(&vault, "large", "-STOP"), 1);
    let mut stop = node.spawn(&["schedule", "stop", "nightly"]);
    node.until("it is written down", || show(&node)["running"]["ended_by"] == "operator");
    node.kill();
    assert!(!stop.wait().unwrap().success());
    signal(&vault, "large", "-CONT");
    node.until_dead(&vault);
    node.start();
    node.until("the run ended", || history(&node).len() == 2);
    let run = history(&node).pop().unwrap();
    assert_eq!((&run["run"], &run["ended_by"]), (&2.into(), &"operator".into()), "{run}");
    assert_eq!(outcome(&run, "large")["outcome"], "not-begun", "{run}");
    assert_eq!(points(&vault, "large"), 0);

    // Between two tries.
    node.ok(&["schedule", "run", "pausing", "--no-wait"]);
    let says = |line: &str| line.contains("pausing") && line.contains("a backup failed");
    node.until("it failed once", || node.log().lines().any(says));
    let told = node.json(&["schedule", "stop", "pausing"]);
    let machine = outcome(&told, "a-first");
    assert_eq!((&machine["outcome"], &machine["tries"]), (&"failed".into(), &1.into()), "{told}");
    assert_eq!(machine["error"]["message"], "the run was ended by an operator", "{told}");
    assert!(machine["error"]["cause"].as_str().unwrap().contains("/nowhere"), "{told}");
}
