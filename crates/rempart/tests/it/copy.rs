//! A second repository.

use crate::backup::Vault;
use crate::rack::noise;
use serde_json::Value;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

struct Two {
    first: Vault,
    second: PathBuf,
    passphrase: PathBuf,
}

impl Two {
    /// The second has another passphrase, and larger chunks.
    fn new() -> Two {
        let first = Vault::new();
        let (second, passphrase) = (first.rack.path("second"), first.rack.path("other"));
        std::fs::write(&passphrase, "staple\n").unwrap();
        let (url, file) = (second.to_str().unwrap(), passphrase.to_str().unwrap());
        first.ok(&["repo", "create", url, "--chunk-size", "1M", "--passphrase-file", file]);
        Two { first, second, passphrase }
    }

    fn copy(&self, arguments: &[&str]) -> Value {
        let to = [
            "--to",
            self.second.to_str().unwrap(),
            "--to-passphrase-file",
            self.passphrase.to_str().unwrap(),
        ];
        self.first.json(&[&["copy"], arguments, &to].concat())
    }

    fn of_second<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        let second =
            ["--repo", self.second.to_str().unwrap(), "--passphrase-file", self.passphrase.to_str().unwrap()];
        [arguments, &second].concat()
    }

    fn back_up(&self, content: &[u8]) -> String {
        let disk = self.first.rack.path("disk.raw");
        std::fs::write(&disk, content).unwrap();
        let backup = self.first.json(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
        format!("shop@{}", backup["point"])
    }
}

#[test]
fn points_come_back_from_a_second_repository_with_keys_of_its_own() {
    let two = Two::new();
    let mut content = noise(1, 5 * MIB + 512);
    let mut points = Vec::new();
    for round in 0..3u8 {
        content[2 * MIB + 7..2 * MIB + 99].fill(round);
        points.push((two.back_up(&content), content.clone()));
    }
    let copied = two.copy(&["--all"]);
    let sent = |which: usize| copied[which]["sent_bytes"].as_u64().unwrap();
    assert!(sent(0) > 5 * MIB as u64 && sent(1) < 3 * MIB as u64 && sent(2) < 3 * MIB as u64, "{copied}");
    let listed = two.first.json(&two.of_second(&["points"]));
    let originals = two.first.json(&["points"]);
    for (which, (_, content)) in points.iter().enumerate() {
        assert_eq!(listed[which]["taken_unix_ms"], originals[which]["taken_unix_ms"]);
        assert!(listed[which]["notes"][0].as_str().unwrap().contains("from point"), "{listed}");
        let name = format!("shop@{}", copied[which]["copy"]);
        let to = two.first.rack.path(&format!("to-{which}"));
        two.first.ok(&two.of_second(&["restore", &name, "--to", to.to_str().unwrap()]));
        assert!(std::fs::read(to.join("disk0.raw")).unwrap() == *content, "{name}");
    }
    // Once is enough.
    let again = two.copy(&["--all"]);
    assert!(again.as_array().unwrap().iter().all(|copy| copy["was_there"] == true), "{again}");
    assert_eq!(again[1]["copy"], copied[1]["copy"]);
}

#[test]
fn a_copy_keeps_to_its_bandwidth_and_damage_is_told() {
    let two = Two::new();
    two.back_up(&noise(2, 4 * MIB));
    let begun = Instant::now();
    two.copy(&["shop", "--bandwidth", "2M"]);
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());

    two.back_up(&noise(3, 4 * MIB));
    let packs = two.first.files_below("packs");
    for pack in packs {
        let mut bytes = std::fs::read(&pack).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&pack, bytes).unwrap();
    }
    let (to, file) = (two.second.to_str().unwrap(), two.passphrase.to_str().unwrap());
    let refused = two.first.refused(&["copy", "shop", "--to", to, "--to-passphrase-file", file]);
    assert!(refused.err.contains("cannot copy `shop@"), "{}", refused.err);
    let listed = two.first.json(&two.of_second(&["points"]));
    assert_eq!(listed.as_array().unwrap().len(), 1, "what is damaged is not copied in part");
    let same = two.first.refused(&["copy", "shop", "--to", two.first.repo().to_str().unwrap()]);
    assert!(!same.err.is_empty());
}
