//! The freeze hook that we ship for guests, and its samples, run here.

use rempart_hypervisor::guest_agent::HookReport;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

struct Guest {
    dir: TempDir,
}

impl Guest {
    /// With these hooks, by name and script.
    fn new(hooks: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("hooks")).unwrap();
        let guest = Self { dir };
        for (name, script) in hooks {
            guest.program(&format!("hooks/{name}"), script);
        }
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.path(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn run(&self, program: &Path, what: &str) -> bool {
        let mut command = Command::new(program);
        command.arg(what).env("REMPART_HOOKS", self.path("hooks")).env("REMPART_STATE", self.path("state"));
        command
            .env("REMPART_HOOK_SECONDS", "2")
            .env("REMPART_MYSQL", self.path("mysql"))
            .env("DIR", self.dir.path());
        command.status().unwrap().success()
    }

    fn hook(&self, what: &str) -> bool {
        self.run(&shipped("fsfreeze-hook"), what)
    }

    fn report(&self) -> HookReport {
        HookReport::parse(&std::fs::read(self.path("state/report")).unwrap())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/guest").join(name)
}

const TELL: &str = "echo \"${0##*/} $1\" >>\"$DIR/log\"";

#[test]
fn hooks_freeze_in_order_and_thaw_backwards() {
    let guest = Guest::new(&[("20-b", TELL), ("10-a", TELL), ("30-c.dpkg-old", TELL), ("40-d.sample", TELL)]);
    std::fs::write(guest.path("hooks/50-not-executable"), "").unwrap();
    assert!(guest.hook("thaw"), "the agent thaws without having frozen, too");
    assert!(guest.hook("freeze"));
    let first = guest.report();
    assert_eq!((first.hooks.len(), first.stamp.len()), (2, 36));
    assert!(guest.hook("thaw"));
    assert_eq!(guest.log(), "10-a freeze\n20-b freeze\n20-b thaw\n10-a thaw\n");
    assert_eq!(
        (guest.report().to_string(), guest.report().stamp),
        ("10-a, 20-b".to_owned(), first.stamp.clone())
    );
    assert!(guest.hook("freeze") && guest.report().stamp != first.stamp);
}

#[test]
fn a_hook_that_fails_or_hangs_fails_the_freeze_and_undoes_it() {
    for bad in ["exit 3", "[ \"$1\" = thaw ] || sleep 60"] {
        let bad = format!("{TELL}\n{bad}");
        let guest = Guest::new(&[("10-a", TELL), ("20-bad", &bad), ("30-c", TELL)]);
        assert!(!guest.hook("freeze"));
        assert_eq!(guest.log(), "10-a freeze\n20-bad freeze\n20-bad thaw\n10-a thaw\n");
        let failed: Vec<_> = guest.report().hooks.into_iter().filter(|hook| !hook.frozen).collect();
        assert_eq!((failed.len(), failed[0].name.as_str()), (1, "20-bad"));
        assert!(guest.hook("thaw"), "nothing is left to thaw");
    }
}

#[test]
fn a_hook_that_does_not_thaw_is_told() {
    let bad = format!("{TELL}\n[ \"$1\" = freeze ]");
    let guest = Guest::new(&[("10-a", TELL), ("20-bad", &bad)]);
    assert!(guest.hook("freeze"));
    assert!(!guest.hook("thaw"));
    assert_eq!(guest.report().not_thawed().collect::<Vec<_>>(), ["20-bad"]);
    assert!(guest.log().ends_with("20-bad thaw\n10-a thaw\n"), "the others are thawed all the same");
}

/// A client that answers once it was asked for the lock, and stays until its input ends.
const MYSQL: &str =
    "read -r lock; echo \"$lock\" >>\"$DIR/log\"; read -r _; echo $$ >\"$DIR/pid\"; echo locked; read -r _";

#[test]
fn the_lock_of_mysql_is_held_until_the_thaw() {
    let guest = Guest::new(&[]);
    guest.program("mysql", MYSQL);
    let sample = shipped("fsfreeze-hook.d.samples/50-mysql");
    assert!(guest.run(&sample, "freeze"));
    assert_eq!(guest.log(), "FLUSH TABLES WITH READ LOCK;\n");
    let pid = std::fs::read_to_string(guest.path("pid")).unwrap();
    let lives = || Path::new("/proc").join(pid.trim()).join("cwd").exists();
    assert!(lives());
    assert!(guest.run(&sample, "thaw"));
    while lives() {
        std::thread::yield_now();
    }
    assert!(guest.run(&sample, "thaw"), "there is nothing to undo");
}

#[test]
fn a_lock_of_mysql_that_was_lost_or_refused_is_an_error() {
    let guest = Guest::new(&[]);
    let sample = shipped("fsfreeze-hook.d.samples/50-mysql");
    guest.program("mysql", "echo 'Access denied' >&2; exit 1");
    assert!(!guest.run(&sample, "freeze"));
    guest.program("mysql", MYSQL);
    assert!(guest.run(&sample, "freeze"));
    let pid: i32 = std::fs::read_to_string(guest.path("pid")).unwrap().trim().parse().unwrap();
    crate::lab::signal(pid, libc::SIGKILL);
    while Path::new("/proc").join(pid.to_string()).join("cwd").exists() {
        std::thread::yield_now();
    }
    assert!(!guest.run(&sample, "thaw"));
}
