//! Forgetting restore points, and removing what only they had.

use crate::backup::Vault;
use crate::rack::noise;
use std::path::Path;

const MIB: usize = 1 << 20;

/// Three points of a disk whose bytes are others each time; their names, and what the last one held.
fn three_points(vault: &Vault, vm: &str) -> (Vec<String>, Vec<u8>) {
    let disk = vault.rack.path(&format!("{vm}.raw"));
    let mut content = Vec::new();
    for round in 1..=3 {
        content = noise(round << 8 | u64::from(vm.as_bytes()[0]), 2 * MIB);
        std::fs::write(&disk, &content).unwrap();
        vault.ok(&["backup", vm, "--disk", disk.to_str().unwrap()]);
    }
    (points(vault, vm), content)
}

fn points(vault: &Vault, vm: &str) -> Vec<String> {
    let points = vault.json(&["points", vm]);
    points.as_array().unwrap().iter().map(|point| format!("{vm}@{}", point["point"])).collect()
}

fn bytes_below(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| match entry.metadata().unwrap() {
            metadata if metadata.is_dir() => bytes_below(&entry.path()),
            metadata => metadata.len(),
        })
        .sum()
}

#[test]
fn points_are_forgotten_by_a_rule_and_what_only_they_had_is_removed() {
    let vault = Vault::new();
    let (all, content) = three_points(&vault, "shop");
    let (others, _) = three_points(&vault, "till");
    let before = bytes_below(&vault.repo());

    let rule = ["retain", "shop", "--keep-last", "1"];
    let dry = vault.json(&[&rule[..], &["--dry-run"]].concat());
    let judged = |kept: bool| dry.as_array().unwrap().iter().filter(|point| point["kept"] == kept).count();
    assert_eq!((judged(true), judged(false)), (1, 2), "{dry}");
    assert_eq!(dry[2]["why"], serde_json::json!(["newest", "last"]));
    assert_eq!(points(&vault, "shop"), all, "only said");
    vault.ok(&rule);
    assert_eq!(points(&vault, "shop"), all[2..]);
    assert_eq!(points(&vault, "till"), others, "of another machine");
    vault.ok(&["forget", &others[1]]);

    let outlook = vault.json(&["gc", "--dry-run"]);
    let removable = outlook["removable_bytes"].as_u64().unwrap();
    assert!(removable > 5 * MIB as u64, "{outlook}");
    assert!(bytes_below(&vault.repo()) > before, "only said");
    let done = vault.json(&["gc"]);
    assert!(done["freed_bytes"].as_u64().unwrap() >= removable, "{done}");
    assert!(bytes_below(&vault.repo()) < before - removable, "{done}");
    let to = vault.rack.path("back");
    vault.ok(&["restore", &all[2], "--to", to.to_str().unwrap()]);
    assert!(std::fs::read(to.join("disk0.raw")).unwrap() == content);
    vault.ok(&["verify", &others[0], &others[2]]);

    vault.ok(&["retain", "--all", "--keep-none"]);
    vault.ok(&["gc"]);
    assert_eq!(vault.json(&["points"]), serde_json::json!([]));
    assert_eq!(bytes_below(&vault.repo().join("packs")), 0);
}

#[test]
fn what_would_forget_too_much_is_refused() {
    let vault = Vault::new();
    let (all, _) = three_points(&vault, "shop");
    for (arguments, why) in [
        (&["retain", "shop"][..], "nothing says which"),
        (&["retain", "shop", "nobody", "--keep-last", "1"], "`nobody` has no restore points"),
        (&["retain", "shop", "--keep-last", "1", "--time-zone", "Europe/Nowhere"], "no time zone"),
        (&["retain", "shop", "--keep-last", "1", "--keep-none"], "cannot be used with"),
        (&["forget", "shop"], "does not say which point"),
        (&["forget", &all[0], "shop@99"], "there is no restore point"),
        (&["gc", "--repack", "101"], "101"),
    ] {
        let refused = vault.refused(arguments);
        assert!(refused.err.contains(why), "{arguments:?}: {}", refused.err);
    }
    assert_eq!(points(&vault, "shop"), all);
}

#[test]
fn a_point_that_was_forgotten_by_mistake_is_brought_back() {
    let vault = Vault::new();
    let (all, content) = three_points(&vault, "shop");
    let (others, _) = three_points(&vault, "till");
    vault.ok(&["forget", &all[2], &all[0], &others[0]]);
    let forgotten = vault.json(&["points", "--forgotten"]);
    let forgotten = forgotten.as_array().unwrap();
    assert_eq!(forgotten.len(), 3, "{forgotten:?}");
    assert!(forgotten.iter().all(|point| point["kept_until_unix_ms"].is_null()), "{forgotten:?}");
    for (arguments, why) in [
        (&["undelete"][..], "required"),
        (&["undelete", "shop", "--all"], "cannot be used with"),
        (&["undelete", &all[0], "shop@99"], "there is no forgotten restore point"),
        (&["undelete", "nobody"], "there is no forgotten restore point"),
    ] {
        let refused = vault.refused(arguments);
        assert!(refused.err.contains(why), "{arguments:?}: {}", refused.err);
    }
    assert_eq!(points(&vault, "shop"), all[1..2], "nothing was brought back");
    let done = vault.json(&["undelete", &all[1], "shop"]);
    assert_eq!(done.as_array().unwrap().len(), 2, "{done}");
    // In the order that they had: the newest is the newest.
    assert_eq!(points(&vault, "shop"), all);
    vault.ok(&["gc"]);
    let to = vault.rack.path("back");
    vault.ok(&["restore", "shop", "--to", to.to_str().unwrap()]);
    assert!(std::fs::read(to.join("disk0.raw")).unwrap() == content);
    vault.ok(&["verify", &all[0], &all[1]]);

    // What a collection removed is not brought back in part.
    let shown = vault.ok(&["points", "--forgotten", "till"]);
    assert!(shown.out.contains("packs were removed"), "{}", shown.out);
    let refused = vault.refused(&["undelete", &others[0]]);
    assert!(refused.err.contains("packs were removed"), "{}", refused.err);
    let none = vault.ok(&["undelete", "--all"]);
    assert!(none.err.contains("cannot be brought back: "), "{}", none.err);
    assert_eq!(points(&vault, "till"), others[1..]);
}

/// Whoever has a key of the repository names machines as they like.
#[test]
fn the_name_of_a_machine_writes_on_no_terminal() {
    let vault = Vault::opened_by_file();
    let disk = vault.rack.path("disk.raw");
    std::fs::write(&disk, noise(1, MIB)).unwrap();
    // The second is the same for terminals that know it as one character.
    let (name, shown) = ("shop\u{1b}[2J\u{9b}2J", "shop\\u{1b}[2J\\u{9b}2J");
    let writes = |text: &str| text.chars().any(|c| c.is_control() && c != '\n');
    let made = vault.json(&["backup", name, "--disk", disk.to_str().unwrap()]);
    let point = format!("{name}@{}", made["point"]);
    for (arguments, by_name) in [
        (&["points"][..], true),
        (&["verify", name], true),
        (&["forget", &point], false),
        (&["points", "--forgotten"], true),
        (&["undelete", &point], true),
        (&["retain", name, "--keep-none"], true),
    ] {
        let answer = vault.ok(arguments);
        let said = answer.out + &answer.err;
        assert!(said.contains(shown) == by_name && !writes(&said), "{arguments:?}: {said:?}");
    }
    for arguments in
        [&["restore", name, "--to", "/nowhere"][..], &["forget", &point], &["retain", name, "--keep-none"]]
    {
        let refused = vault.refused(arguments);
        assert!(refused.err.contains(shown) && !writes(&refused.err), "{arguments:?}: {:?}", refused.err);
    }
    vault.ok(&["undelete", &point]);
    let json = vault.ok(&["points", "--json"]).out;
    assert!(!writes(&json), "{json:?}");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()[0]["vm"], name);
    let verified = vault.ok(&["verify", name, "--json", "--progress", "json"]);
    assert!(verified.err.contains("2J") && !writes(&(verified.out + &verified.err)), "{:?}", verified.err);
}
