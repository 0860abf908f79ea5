//! Buckets of real servers keep their promises.

use crate::lab::{ACCOUNT, KEY, Server, azurite, make_container, moto, moto_ask};
use rempart_objects::bucket::{Credentials, Location, Patience};
use rempart_objects::testing::conformance;
use rempart_objects::{Bucket, Created, ErrorKind, Name, Objects};
use rempart_types::WallTime;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Credentials of a file, as a user's.
fn credentials(lines: &str) -> Credentials {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("credentials");
    fs::write(&path, lines).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("set");
    Credentials::from_file(&path).expect("they are ours")
}

fn s3(server: &Server, bucket: &str, prefix: &str) -> Bucket {
    let endpoint = format!("http://127.0.0.1:{}", server.port);
    let location =
        Location::parse(&format!("s3://{bucket}/{prefix}?endpoint={endpoint}")).expect("a location");
    let credentials = credentials("AWS_ACCESS_KEY_ID=id\nAWS_SECRET_ACCESS_KEY=secret\n");
    Bucket::open(location, &credentials, Patience::default())
        .unwrap_or_else(|error| panic!("{error}: {}", error.source))
}

/// Runs the conformance suite, each place under a prefix of its own.
fn check(open: impl Fn(&str) -> Bucket) {
    let number = AtomicU32::new(0);
    conformance::check(|| -> Arc<dyn Objects> {
        Arc::new(open(&format!("some/prefix-{}", number.fetch_add(1, Ordering::Relaxed))))
    });
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

fn in_an_hour() -> WallTime {
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("it is later than 1970");
    WallTime(now.as_millis() as u64 + 3_600_000)
}

#[test]
fn a_bucket_of_s3_keeps_its_promises() {
    let Some(server) = moto() else { return };
    assert_eq!(moto_ask(&server, "PUT", "/plain", &[], ""), 200);
    check(|prefix| s3(&server, "plain", prefix));
    assert!(!s3(&server, "plain", "x").abilities().retention);
    // Without a prefix, too.
    let whole = s3(&server, "plain", "");
    assert_eq!(whole.create(&name("log/1"), &[b"1"], None).expect("created"), Created::New);
    assert_eq!(whole.list("log/", None).expect("listed").len(), 1);
}

#[test]
fn a_versioned_bucket_keeps_its_promises() {
    let Some(server) = moto() else { return };
    assert_eq!(moto_ask(&server, "PUT", "/versioned", &[], ""), 200);
    let on = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
    assert_eq!(moto_ask(&server, "PUT", "/versioned?versioning", &[], on), 200);
    check(|prefix| s3(&server, "versioned", prefix));
}

#[test]
fn a_bucket_with_object_lock_keeps_its_promises() {
    let Some(server) = moto() else { return };
    let lock = [("x-amz-bucket-object-lock-enabled", "true")];
    assert_eq!(moto_ask(&server, "PUT", "/locked", &lock, ""), 200);
    check(|prefix| s3(&server, "locked", prefix));
    let bucket = s3(&server, "locked", "repository");
    assert!(bucket.abilities().retention);
    let until = in_an_hour();
    bucket.create(&name("log/1"), &[b"first"], Some(until)).expect("created");
    // The store itself refuses, not only we.
    bucket.create(&name("log/2"), &[b"second"], None).expect("created");
    bucket.retain(&name("log/2"), until).expect("retained");
    bucket.retain(&name("log/2"), WallTime(until.0 - 1_000_000)).expect("never shortened, and no error");
    let again = s3(&server, "locked", "repository");
    for text in ["log/1", "log/2"] {
        assert_eq!(again.remove(&name(text)).expect_err("retained").kind, ErrorKind::Retained);
        again.len(&name(text)).expect("it is there");
    }
}

#[test]
fn a_delete_marker_frees_no_name() {
    let Some(server) = moto() else { return };
    let lock = [("x-amz-bucket-object-lock-enabled", "true")];
    assert_eq!(moto_ask(&server, "PUT", "/locked", &lock, ""), 200);
    let bucket = s3(&server, "locked", "r");
    assert_eq!(
        bucket.create(&name("log/1"), &[b"first"], Some(in_an_hour())).expect("created"),
        Created::New
    );
    assert_eq!(moto_ask(&server, "DELETE", "/locked/r/log/1", &[], ""), 204, "a marker may be put on it");
    // Anew, so that nothing is remembered.
    for bucket in [&bucket, &s3(&server, "locked", "r")] {
        assert_eq!(bucket.get(&name("log/1"), 100).expect("it is hidden, and there"), b"first");
        assert_eq!(bucket.create(&name("log/1"), &[b"forged"], None).expect("answered"), Created::Taken);
        assert_eq!(
            bucket.get(&name("log/1"), 100).expect("read"),
            b"first",
            "the oldest version is the object"
        );
        assert_eq!(bucket.get_range(&name("log/1"), 1..3).expect("read"), b"ir");
        assert_eq!(bucket.len(&name("log/1")).expect("its length"), 5);
    }
}

#[test]
fn what_delete_markers_hide_is_found_and_shown_again() {
    let Some(server) = moto() else { return };
    let lock = [("x-amz-bucket-object-lock-enabled", "true")];
    assert_eq!(moto_ask(&server, "PUT", "/locked", &lock, ""), 200);
    let bucket = s3(&server, "locked", "r");
    let names = ["keys/1", "log/1", "log/2", "packs/1"].map(name);
    for name in &names {
        bucket.create(name, &[b"first"], Some(in_an_hour())).expect("created");
    }
    let listed = || bucket.list("", None).expect("listed").into_iter().map(|listed| listed.name);
    let hidden = |prefix| bucket.hidden(prefix).expect("listed");
    assert_eq!(hidden(""), []);
    for path in ["keys/1", "log/1", "log/1", "log/2", "log/never"] {
        assert_eq!(moto_ask(&server, "DELETE", &format!("/locked/r/{path}"), &[], ""), 204);
    }
    assert!(listed().eq([names[3].clone()]), "the others are hidden");
    assert_eq!(hidden(""), names[..3]);
    assert_eq!(hidden("log/"), names[1..3]);
    for name in [&names[0], &names[2], &names[3]] {
        bucket.reveal(name).expect("shown");
        bucket.remove(name).expect_err("it is kept as before");
    }
    assert!(listed().eq([0, 2, 3].map(|place| names[place].clone())));
    assert_eq!(hidden(""), names[1..2]);
    // Two markers hide it.
    bucket.reveal(&names[1]).expect("shown");
    assert!(listed().eq(names.iter().cloned()));
    assert_eq!(hidden(""), []);
}

#[test]
fn a_bucket_that_is_not_there_is_told() {
    let Some(server) = moto() else { return };
    let bucket = s3(&server, "none", "");
    for error in [
        bucket.create(&name("a"), &[b"a"], None).expect_err("no bucket"),
        bucket.get(&name("a"), 1).expect_err("no bucket"),
        bucket.list("", None).expect_err("no bucket"),
    ] {
        assert_eq!(error.kind, ErrorKind::Missing, "{error}: {}", error.source);
    }
}

#[test]
fn a_container_of_azure_keeps_its_promises() {
    let Some(server) = azurite() else { return };
    let endpoint = format!("http://127.0.0.1:{}/{ACCOUNT}", server.port);
    make_container(&endpoint, "backups");
    let credentials = credentials(&format!("AZURE_STORAGE_ACCOUNT_KEY={KEY}\n"));
    check(|prefix| {
        let url = format!("az://{ACCOUNT}/backups/{prefix}?endpoint={endpoint}");
        let location = Location::parse(&url).expect("a location");
        Bucket::open(location, &credentials, Patience::default()).expect("it opens")
    });
}
