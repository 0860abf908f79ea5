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

#[test]
fn damage_is_mended_from_the_copy_and_a_lost_tree_is_named() {
    let two = Two::new();
    let content = noise(4, 5 * MIB + 512);
    let point = two.back_up(&content);
    two.copy(&["--all"]);
    let from =
        ["--from", two.second.to_str().unwrap(), "--from-passphrase-file", two.passphrase.to_str().unwrap()];
    let repair = || two.first.json(&[&["repo", "repair"], &from[..]].concat());
    assert_eq!(repair(), serde_json::json!([]), "nothing is damaged");

    let packs = two.first.files_below("packs");
    let largest = packs.iter().max_by_key(|pack| std::fs::metadata(pack).unwrap().len()).unwrap();
    let mut bytes = std::fs::read(largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(largest, bytes).unwrap();
    two.first.refused(&["verify", &point]);
    let mended = repair();
    assert_eq!((&mended[0]["part"], &mended[0]["mended"]), (&"disk0".into(), &true.into()), "{mended}");
    two.first.ok(&["verify", &point]);

    // All that there is of it, its tree among it.
    for pack in two.first.files_below("packs") {
        std::fs::remove_file(pack).unwrap();
    }
    let lost = two.first.refused(&["verify", &point]);
    assert!(lost.err.contains(&format!("disk0, bytes 0 to {}", content.len())), "{}", lost.err);
    assert_eq!(repair()[0]["mended"], true);
    two.first.ok(&["verify", &point]);
    let to = two.first.rack.path("to");
    two.first.ok(&["restore", &point, "--to", to.to_str().unwrap()]);
    assert!(std::fs::read(to.join("disk0.raw")).unwrap() == content);

    // The copy is mended from where it came; what is in one only is not.
    for pack in std::fs::read_dir(two.second.join("packs")).unwrap() {
        std::fs::remove_dir_all(pack.unwrap().path()).unwrap();
    }
    let (first, passphrase) = (two.first.repo(), two.first.rack.path("passphrase"));
    let back = ["--from", first.to_str().unwrap(), "--from-passphrase-file", passphrase.to_str().unwrap()];
    let of_second = two.of_second(&[&["repo", "repair"], &back[..]].concat());
    two.first.ok(&of_second);
    two.first.ok(&two.of_second(&["verify", "shop"]));
    let newer = two.back_up(&noise(5, MIB));
    for pack in two.first.files_below("packs") {
        std::fs::remove_file(pack).unwrap();
    }
    let refused = two.first.refused(&[&["repo", "repair", &newer], &from[..]].concat());
    assert!(refused.err.contains("has no copy of it"), "{}", refused.err);
}

/// It is in chunks of its own beside the disks.
#[test]
fn damaged_nvram_is_named_stored_anew_by_the_next_backup_and_mended_from_the_copy() {
    let two = Two::new();
    let vault = &two.first;
    let node = vault.rack.node("node-a");
    let disk = vault.rack.path("disk.raw");
    two.back_up(&noise(6, MIB));
    let mut variables = std::fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").expect("package ovmf");
    let size = variables.len();
    variables[size - 256 * 1024..].copy_from_slice(&noise(7, 256 * 1024));
    let nvram = vault.rack.path("vars.fd");
    std::fs::write(&nvram, variables).unwrap();
    let import = ["vm", "import", "shop", "--disk", disk.to_str().unwrap(), "--memory", "96M"];
    node.ok(&[&import[..], &["--firmware", "uefi", "--nvram", nvram.to_str().unwrap()]].concat());
    node.run(&["vm", "stop", "shop", "--force"]);

    // The disk is there already: what is new is the NVRAM.
    let earlier = vault.files_below("packs");
    let new = || {
        let mut packs = vault.files_below("packs");
        packs.retain(|pack| !earlier.contains(pack));
        packs
    };
    let damage = || {
        for pack in new() {
            let mut bytes = std::fs::read(&pack).unwrap();
            let middle = bytes.len() / 2;
            // Twice is not as it was.
            bytes[middle] = bytes[middle].wrapping_add(1);
            std::fs::write(&pack, bytes).unwrap();
        }
    };
    let back_up = || format!("shop@{}", vault.back_up(&node)["point"]);
    let first = back_up();
    two.copy(&["--all"]);
    let verified = vault.json(&["verify", &first]);
    assert_eq!((&verified[1]["nvram_bytes"], &verified[1]["sound_bytes"]), (&size.into(), &size.into()));

    damage();
    let verify = vault.refused(&["verify", &first]);
    assert!(verify.err.contains(&format!("{first}, nvram, bytes ")), "{}", verify.err);
    assert!(!verify.err.contains("disk0, bytes "), "{}", verify.err);
    let told = vault.run(&["verify", &first, "--json"]);
    let told: Value = serde_json::from_str(&told.out).expect("one JSON value");
    let range = &told[1]["damaged"][0];
    let lost = range["end"].as_u64().unwrap() - range["start"].as_u64().unwrap();
    assert_eq!(told[1]["sound_bytes"], size as u64 - lost, "{told}");
    let before = new().len();
    let second = back_up();
    assert!(new().len() > before, "it is stored anew");
    vault.ok(&["verify", &first, &second]);

    damage();
    let from =
        ["--from", two.second.to_str().unwrap(), "--from-passphrase-file", two.passphrase.to_str().unwrap()];
    let repair = || vault.json(&[&["repo", "repair", &first], &from[..]].concat());
    let mended = repair();
    assert_eq!((&mended[0]["part"], &mended[0]["mended"]), (&"nvram".into(), &true.into()), "{mended}");
    vault.ok(&["verify", &first, &second]);
    assert_eq!(repair(), serde_json::json!([]), "nothing is damaged");
    for pack in new() {
        std::fs::remove_file(pack).unwrap();
    }
    assert_eq!(repair()[0]["part"], "nvram");
    vault.ok(&["verify", &first, &second]);
}

/// The guest has overwritten what was damaged: no backup brings the older point's bytes back, and only the copy has them.
#[test]
fn what_was_overwritten_since_it_was_damaged_stays_lost_to_the_older_point_until_it_comes_from_the_copy() {
    const SIZE: usize = 8 * MIB;
    let two = Two::new();
    let vault = &two.first;
    let node = vault.rack.node("node-a");
    let old = noise(8, SIZE);
    let image = vault.rack.path("disk.raw");
    std::fs::write(&image, &old).unwrap();
    node.import("shop", &[&image]);
    let back_up = || format!("shop@{}", vault.back_up(&node)["point"]);
    let first = back_up();
    two.copy(&["--all"]);

    let packs = vault.files_below("packs");
    let pack = packs.iter().max_by_key(|pack| pack.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(pack).unwrap();
    for place in [bytes.len() / 4, bytes.len() * 3 / 4] {
        bytes[place] ^= 1;
    }
    std::fs::write(pack, bytes).unwrap();
    // Which bytes a point has lost, and that people are told the same.
    let lost = |point: &str| -> Vec<(usize, usize)> {
        let verified = vault.refused(&["verify", point, "--json"]);
        let told: Value = serde_json::from_str(&verified.out).expect("one JSON value");
        let said = vault.refused(&["verify", point]).err;
        assert_eq!((&told[0]["vm"], &told[0]["disk"]), (&"shop".into(), &"disk0".into()), "{told}");
        let number = |value: &Value| value.as_u64().unwrap() as usize;
        let ranges = told[0]["damaged"].as_array().unwrap().iter();
        let ranges: Vec<_> = ranges.map(|range| (number(&range["start"]), number(&range["end"]))).collect();
        for (start, end) in &ranges {
            let line = format!("{point}, disk0, bytes {start} to {end}: ");
            assert!(said.contains(&line), "{line} in {said}");
        }
        let bytes: usize = ranges.iter().map(|(start, end)| end - start).sum();
        assert_eq!(told[0]["sound_bytes"], SIZE - bytes, "{told}");
        ranges
    };
    let both = lost(&first);
    let [gone, kept] = both[..] else { panic!("two chunks: {both:?}") };
    assert!(gone.1 <= kept.0 && gone.1 - gone.0 <= 128 << 10, "{both:?}");

    node.io("shop", 0, &[&format!("write -P 9 {} {}", gone.0, gone.1 - gone.0), "flush"]);
    let mut new = old.clone();
    new[gone.0..gone.1].fill(9);
    let second = back_up();
    vault.ok(&["verify", &second]);
    for _ in 0..2 {
        assert_eq!(lost(&first), [gone], "what the machine still has was stored anew, and nothing else");
    }
    let third = back_up();
    vault.ok(&["verify", &second, &third]);
    assert_eq!(lost(&first), [gone], "however many backups there are");
    let no = vault.rack.path("no");
    let refused = vault.refused(&["restore", &first, "--to", no.to_str().unwrap()]);
    assert!(refused.err.contains("it is not what was written"), "{}", refused.err);
    assert!(!no.join("disk0.raw").exists(), "half an image is none");
    assert!(vault.restored(&second, "second") == [new.clone()] && vault.restored(&third, "third") == [new]);

    let from =
        ["--from", two.second.to_str().unwrap(), "--from-passphrase-file", two.passphrase.to_str().unwrap()];
    // The copy has nothing that is newer, and need not.
    let mended = vault.json(&[&["repo", "repair"], &from[..]].concat());
    let [only] = &mended.as_array().unwrap()[..] else { panic!("{mended}") };
    assert_eq!((&only["part"], &only["mended"]), (&"disk0".into(), &true.into()), "{mended}");
    assert_eq!(format!("shop@{}", only["point"]), first);
    vault.ok(&["verify", &first, &second, &third]);
    assert!(vault.restored(&first, "first") == [old]);
}
