//! Views of a guest that writes, with its file systems frozen: Debian's guest agent, the hook that we ship, ext4.

use crate::backup_vm::{Host, Vm, disk, read_all, run, tokens};
use crate::guest::Guest;
use crate::lab::{HELPER, PATIENCE};
use rempart_hypervisor::ErrorKind;
use rempart_hypervisor::guest_agent::{GuestAgent, Level};
use rempart_hypervisor::qemu::backup::{Agent, LiveView, Otherwise, Policy, Prepared, Reached, Saving};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

const ORDERS: &str = "/machine/peripheral/orders/virtio-backend";

struct Subject {
    host: Host,
    vm: Vm,
}

impl Subject {
    async fn start() -> Self {
        let host = Host::new();
        let image = host.image("ext4", "raw");
        run("mkfs.ext4", &["-q", &image]);
        host.image("orders", "raw");
        let mut options = Guest::options_with_agent(&host.path("agent"));
        for (name, id) in [("ext4", "system"), ("orders", "orders")] {
            let path = host.path(name).display().to_string();
            let node = format!("driver=raw,node-name={id}-node,file.driver=file,file.filename={path}");
            let device = format!("virtio-blk-pci,drive={id}-node,id={id}");
            options.extend(["-blockdev".into(), node, "-device".into(), device]);
        }
        let console = host.path("console").display().to_string();
        options.extend(["-serial".into(), format!("file:{console}")]);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let vm = host.start(&options).await;
        let subject = Self { host, vm };
        subject.agent().await;
        subject
    }

    /// Connected as soon as it answers.
    async fn agent(&self) -> GuestAgent {
        let end = std::time::Instant::now() + PATIENCE;
        loop {
            match GuestAgent::connect(&self.host.path("agent"), Duration::from_secs(2)).await {
                Ok(agent) => return agent,
                Err(error) => {
                    let console = std::fs::read_to_string(self.host.path("console")).unwrap_or_default();
                    assert!(std::time::Instant::now() < end, "{error}\n{console}");
                }
            }
        }
    }

    async fn status(&self) -> Value {
        let mut agent = self.agent().await;
        agent.execute("guest-fsfreeze-status", Value::Null, PATIENCE).await.unwrap()
    }

    async fn order(&self, order: &str) {
        std::fs::write(self.host.path("order"), format!("{order}\n").as_bytes()).unwrap();
        let file = self.host.path("order").display().to_string();
        self.vm.io(ORDERS, "write -z 0 512").await;
        self.vm.io(ORDERS, &format!("write -s {file} 0 512")).await;
    }

    fn policy(&self) -> Policy {
        let agent = Agent::new(self.host.path("agent"));
        Policy { agent: Ok(agent), otherwise: Otherwise::Refuse }
    }

    async fn take(&self, policy: &Policy) -> rempart_hypervisor::Result<(LiveView, Reached)> {
        let prepared =
            Prepared::new(&self.host.monitor(), &self.host.options("nightly"), &BTreeMap::new()).await?;
        prepared.take_consistently(policy).await
    }

    /// The file system's image in the view.
    fn image(&self, view: &LiveView) -> String {
        let path = self.host.path("seen");
        std::fs::write(&path, read_all(disk(view, "system"))).unwrap();
        path.display().to_string()
    }

    /// Waits until the guest has written more.
    async fn writes(&self) {
        let console = self.host.path("console");
        let written = |path: &PathBuf| std::fs::read_to_string(path).unwrap().matches("wrote").count();
        let (before, end) = (written(&console), std::time::Instant::now() + PATIENCE);
        while written(&console) == before {
            assert!(std::time::Instant::now() < end, "the guest does not write");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn needs_recovery(image: &str) -> bool {
    run("dumpe2fs", &["-h", image]).contains("needs_recovery")
}

#[tokio::test]
async fn a_frozen_guest_gives_a_clean_file_system_is_always_thawed_and_every_fall_back_is_told() {
    let subject = Subject::start().await;
    subject.writes().await;
    all_goes_well(&subject).await;
    a_killed_freezer(&subject).await;
    a_hook_that_fails(&subject).await;
    a_hook_that_takes_too_long(&subject).await;
    no_agent(&subject).await;
}

async fn all_goes_well(subject: &Subject) {
    let (view, reached) = subject.take(&subject.policy()).await.unwrap();
    assert_eq!((reached.level, reached.why.as_str()), (Level::Application, "hooks: 50-test"));
    println!("frozen for {:?}, of which {:?} to take the view", reached.frozen_for.unwrap(), view.stall());
    let image = subject.image(&view);
    assert!(!needs_recovery(&image));
    run("e2fsck", &["-fn", &image]);
    // The hook ran before, and was undone after.
    assert_eq!(run("debugfs", &["-R", "cat /marker", &image]), "prepared\n");
    subject.writes().await;
    view.retire().await.unwrap();
}

/// What Debian's own hook would hide.
async fn a_hook_that_fails(subject: &Subject) {
    subject.order("fail").await;
    let error = subject.take(&subject.policy()).await.unwrap_err();
    assert!(error.to_string().contains("hook `50-test` in the guest failed"), "{error}");
    assert_eq!(subject.status().await, "thawed");
    let policy = Policy { otherwise: Otherwise::Crash, ..subject.policy() };
    let (view, reached) = subject.take(&policy).await.unwrap();
    assert_eq!(reached.level, Level::Crash);
    assert!(reached.why.contains("hook `50-test` in the guest failed"), "{}", reached.why);
    // As after a loss of power: the journal is needed, and is enough.
    let image = subject.image(&view);
    assert!(needs_recovery(&image));
    let repaired = Command::new("e2fsck").args(["-fy", &image]).output().unwrap();
    assert!(repaired.status.code().unwrap() <= 1, "{}", String::from_utf8_lossy(&repaired.stdout));
    view.abandon().await.unwrap();
}

async fn a_hook_that_takes_too_long(subject: &Subject) {
    subject.order("slow").await;
    let saving = Saving::new(Duration::from_secs(20));
    let otherwise = Otherwise::SaveState { saving, or_crash: false };
    let mut policy = Policy { otherwise, ..subject.policy() };
    policy.agent.as_mut().unwrap().freeze_deadline = Duration::from_secs(1);
    let (view, reached) = subject.take(&policy).await.unwrap();
    assert_eq!(reached.level, Level::SavedState);
    println!("stopped for {:?}: {}", view.pause().unwrap(), reached.why);
    assert!(reached.why.contains("no answer within 1000 ms"), "{}", reached.why);
    assert_eq!(subject.status().await, "thawed");
    view.abandon().await.unwrap();
    subject.writes().await;
}

/// Its process dies while the guest is frozen.
async fn a_killed_freezer(subject: &Subject) {
    let mut child = Command::new(HELPER)
        .args(["freeze".as_ref(), subject.host.path("agent").as_os_str()])
        .arg(subject.host.path("mark"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child.kill().unwrap();
    child.wait().unwrap();
    // It is told so before anybody else can ask.
    assert_eq!(subject.status().await, "thawed");
    subject.writes().await;
    assert!(subject.host.path("mark").exists());

    let (view, reached) = subject.take(&subject.policy()).await.unwrap();
    assert_eq!(reached.level, Level::Application);
    assert_eq!(tokens(&view).len(), 2);
    view.retire().await.unwrap();
}

async fn no_agent(subject: &Subject) {
    let mut agent = Agent::new(subject.host.path("nobody"));
    agent.connect_timeout = Duration::from_millis(200);
    let error = subject.take(&Policy { agent: Ok(agent), ..subject.policy() }).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("cannot connect to the guest agent"), "{error}");
    assert_eq!(subject.vm.leavings().await, [""; 0]);
}
