//! Points in use: nobody forgets them, and a reader that is gone keeps them no longer than somebody wants.

use crate::backup::Vault;
use crate::killer::{self, Step, Watched};
use crate::rack::{Answer, noise};
use crate::running::{Mounted, Running, tool};
use crate::stage;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::path::Path;

const SERVED: &str = "is served at";

struct Lab {
    vault: Vault,
    point: String,
}

impl Lab {
    fn new() -> Lab {
        let vault = Vault::new();
        let disk = vault.rack.path("disk.raw");
        std::fs::write(&disk, noise(1, 1 << 20)).unwrap();
        let backup = vault.json(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
        Lab { point: format!("shop@{}", backup["point"]), vault }
    }

    fn serve(&self) -> Running {
        let socket = self.vault.rack.path("nbd.sock");
        Running::start(&self.vault, &["serve", "shop", "--socket", socket.to_str().unwrap()], SERVED)
    }

    fn forget(&self) -> Answer {
        self.vault.run(&["forget", &self.point])
    }

    #[track_caller]
    fn is_kept_by(&self, reader: &str) {
        let answer = self.forget();
        assert_eq!(answer.code, 4, "{}", answer.err);
        assert!(answer.err.contains("cannot forget what is in use"), "{}", answer.err);
        assert!(answer.err.contains(&format!("cause: by `rempart {reader}")), "{}", answer.err);
    }

    #[track_caller]
    fn is_kept_by_nobody(&self) {
        let answer = self.forget();
        assert_eq!(answer.code, 0, "{}", answer.err);
    }
}

#[test]
fn a_served_point_is_kept_until_the_server_ends() {
    let lab = Lab::new();
    let serving = lab.serve();
    lab.is_kept_by("serve` on ");
    let judged = lab.vault.json(&["retain", "--all", "--keep-none"]);
    assert_eq!((&judged[0]["kept"], &judged[0]["why"]), (&json!(true), &json!(["in-use"])), "{judged}");
    lab.vault.ok(&["gc"]);
    serving.terminate();
    assert_eq!(serving.ended(), 0);
    lab.is_kept_by_nobody();
}

#[test]
fn a_killed_reader_keeps_its_point_until_it_is_forced_or_silent_for_long() {
    let lab = Lab::new();
    drop(lab.serve());
    lab.is_kept_by("serve` on ");
    lab.vault.ok(&["gc"]);
    lab.is_kept_by("serve` on ");
    let collected = lab.vault.json(&["gc", "--idle", "0"]);
    assert_eq!(collected["ended_sessions"], 1, "{collected}");
    lab.is_kept_by_nobody();

    let lab = Lab::new();
    let mount = lab.vault.rack.path("mnt");
    std::fs::create_dir(&mount).unwrap();
    let (mounted, _): (_, Value) = Running::start_json(&lab.vault, &["mount", mount.to_str().unwrap()]);
    lab.is_kept_by("mount` on ");
    drop(mounted);
    tool(&["umount", mount.to_str().unwrap()]);
    lab.vault.ok(&["forget", "--force", &lab.point]);
    let points = lab.vault.json(&["points"]);
    assert_eq!(points, json!([]));
}

/// What is in `folder`, at `place`, where nobody can write.
pub fn read_only(folder: &Path, place: &Path) -> Mounted {
    Mounted::at(place, &["--bind", "-o", "ro", folder.to_str().unwrap()])
}

#[test]
fn a_point_that_cannot_be_told_to_be_in_use_is_read_all_the_same() {
    let lab = Lab::new();
    let path = lab.vault.rack.path("read-only");
    let _mounted = read_only(&lab.vault.repo(), &path);
    let place = path.to_str().unwrap().to_owned();
    let socket = lab.vault.rack.path("nbd.sock");
    let arguments = ["serve", "shop", "--repo", &place, "--socket", socket.to_str().unwrap()];
    let serving = Running::start(&lab.vault, &arguments, SERVED);
    let told = serving.log();
    assert!(told.contains("nothing keeps the restore points that are read here"), "{told}");
    serving.terminate();
    assert_eq!(serving.ended(), 0);
    lab.is_kept_by_nobody();
}

#[track_caller]
fn keeps_its_point(reader: &str, arguments: &dyn Fn(&Lab) -> Vec<String>) {
    let lab = Lab::new();
    let arguments = arguments(&lab);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let why = || lab.vault.json(&["retain", "--all", "--keep-none", "--dry-run"])[0]["why"].clone();
    let unheard = || {
        let (mut running, said) = Running::start_unheard(&lab.vault, &arguments);
        running.until("it has its point in use", |_| why() == json!(["in-use"]));
        (running, said)
    };
    let (running, _said) = unheard();
    lab.is_kept_by(reader);
    running.terminate();
    assert_eq!(running.ended(), 130, "it was interrupted");
    assert_eq!(why(), json!([]));

    let (running, mut said) = unheard();
    lab.is_kept_by(reader);
    let mut heard = String::new();
    said.read_to_string(&mut heard).unwrap();
    assert_eq!(running.ended(), 0, "{}", heard.trim());
    lab.is_kept_by_nobody();
}

#[test]
fn what_is_restored_verified_exported_or_copied_is_kept_meanwhile() {
    let path = |lab: &Lab, name: &str| lab.vault.rack.path(name).to_str().unwrap().to_owned();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    keeps_its_point("restore` on ", &|lab| words(&["restore", "shop", "--to", &path(lab, "restored")]));
    keeps_its_point("export` on ", &|lab| words(&["export", "shop", "--to", &path(lab, "exported")]));
    keeps_its_point("verify` on ", &|_| words(&["verify", "shop"]));
    keeps_its_point("copy` on ", &|lab| {
        let (second, passphrase) = (path(lab, "second"), path(lab, "passphrase"));
        lab.vault.ok(&["repo", "create", &second, "--passphrase-file", &passphrase]);
        words(&["copy", "--all", "--to", &second, "--to-passphrase-file", &passphrase])
    });
}

/// A command finds what it is about, and somebody is faster: right before the log hears of it for the first time.
#[track_caller]
fn overtaken(lab: &Lab, arguments: &[&str], meanwhile: impl FnOnce()) -> (i32, String) {
    let said = lab.vault.rack.path("said");
    let to = File::create(&said).unwrap();
    let mut command = lab.vault.command(arguments);
    command.stdout(to.try_clone().unwrap()).stderr(to);
    let folder = &lab.vault.repo();
    let writes = |step: &Step| step.call == "link" && step.path.starts_with(folder.join("log"));
    let run = killer::interrupt(command, Watched { folder, requests: false }, writes, meanwhile);
    (run.status.unwrap(), std::fs::read_to_string(said).unwrap())
}

#[test]
fn what_is_forgotten_just_before_it_is_in_use_is_no_point_any_more() {
    let path = |lab: &Lab, name: &str| lab.vault.rack.path(name).to_str().unwrap().to_owned();
    let forgotten = |lab: &Lab| {
        lab.is_kept_by_nobody();
        lab.vault.ok(&["gc"]);
    };
    for reader in ["verify", "restore", "copy"] {
        let lab = Lab::new();
        stage::second(&lab.vault);
        let (to, second) = (path(&lab, "restored"), path(&lab, stage::SECOND.0));
        let (passphrase, key) = (path(&lab, "passphrase"), path(&lab, stage::SECOND.1));
        let more: &[&str] = match reader {
            "verify" => &[],
            "restore" => &["--to", &to],
            _ => &["--to", &second, "--to-key-file", &key],
        };
        let arguments = [&[reader, &lab.point, "--passphrase-file", &passphrase], more].concat();
        let (code, said) = overtaken(&lab, &arguments, || forgotten(&lab));
        assert!(code == 1 && said.contains("there is no restore point"), "{reader}: {said}");
        assert!(!Path::new(&to).exists(), "{reader}: {said}");
    }
    let lab = Lab::new();
    stage::second(&lab.vault);
    let (second, key) = (path(&lab, stage::SECOND.0), path(&lab, stage::SECOND.1));
    let all = ["copy", "--all", "--to", &second, "--to-key-file", &key];
    let (code, said) = overtaken(&lab, &all, || forgotten(&lab));
    assert_eq!((code, said.as_str()), (0, ""), "there are no points");
}

#[test]
fn what_is_in_use_just_before_it_is_forgotten_is_kept() {
    let lab = Lab::new();
    let disk = lab.vault.rack.path("disk.raw");
    lab.vault.ok(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
    let mut serving = None;
    let serve = || {
        let socket = lab.vault.rack.path("nbd.sock");
        let arguments = ["serve", &lab.point, "--socket", socket.to_str().unwrap()];
        serving = Some(Running::start(&lab.vault, &arguments, SERVED));
    };
    let (code, said) = overtaken(&lab, &["retain", "shop", "--keep-last", "1"], serve);
    assert!(code == 0 && said.contains("in-use") && said.contains("0 of 2 points were forgotten"), "{said}");
    lab.is_kept_by("serve` on ");
}
