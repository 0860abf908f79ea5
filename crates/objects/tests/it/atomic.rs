//! Races for a bucket: an S3 in memory that decides in one step who created what, that fails by a seed, and that can lie.

use crate::http::{Answer, Asked, Server, serve};
use rempart_objects::bucket::{Credentials, Location, Patience};
use rempart_objects::testing::conformance;
use rempart_objects::{Bucket, Created, ErrorKind, Name, Objects, create, probe};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Debug, Clone, Copy, Default)]
struct Behaviour {
    seed: u64,
    /// Requests of a hundred that fail, before or after their effect.
    failing: u32,
    /// Creates over what is there.
    lies: bool,
}

struct Store {
    random: fastrand::Rng,
    objects: BTreeMap<String, Vec<u8>>,
}

/// A server of one bucket, `bucket`.
fn s3(behaviour: Behaviour) -> Server {
    let random = fastrand::Rng::with_seed(behaviour.seed);
    let store = Mutex::new(Store { random, objects: BTreeMap::new() });
    serve(move |asked| {
        let mut store = store.lock().expect("no holder panics");
        let fails = store.random.u32(..100) < behaviour.failing && asked.path.contains("/race/");
        let fault = store.random.u32(..4);
        match fault {
            0 if fails => return Answer::HangUp,
            1 if fails => return Answer::status("503 Slow Down"),
            _ => {}
        }
        let answer = store.answer(asked, behaviour.lies);
        match fault {
            2 if fails => Answer::HangUp,
            3 if fails => Answer::status("500 Internal Error"),
            _ => answer,
        }
    })
}

impl Store {
    fn answer(&mut self, asked: &Asked, lies: bool) -> Answer {
        let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
        let key = path.strip_prefix("/bucket/").unwrap_or("");
        match (&*asked.method, self.objects.get(key)) {
            ("GET", _) if query.starts_with("versioning") => {
                Answer::with("200 OK", "<VersioningConfiguration/>")
            }
            ("PUT", Some(_)) if asked.header("if-none-match") == Some("*") && !lies => {
                Answer::status("412 Precondition Failed")
            }
            ("PUT", _) => {
                self.objects.insert(key.to_owned(), asked.body.clone());
                Answer::status("200 OK")
            }
            ("GET", Some(content)) => {
                Answer::with("200 OK", std::str::from_utf8(content).expect("tests write text"))
            }
            ("HEAD", Some(content)) => Answer::head(content.len()),
            ("DELETE", _) => {
                self.objects.remove(key);
                Answer::status("204 No Content")
            }
            (_, None) => Answer::status("404 Not Found"),
            (_, Some(_)) => Answer::status("400 Bad Request"),
        }
    }
}

/// A file of credentials, and the directory it lies in.
fn credentials() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("credentials");
    fs::write(&path, "AWS_ACCESS_KEY_ID=id\nAWS_SECRET_ACCESS_KEY=secret\n").expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("set");
    (home, path)
}

fn url(server: &Server) -> String {
    format!("s3://bucket?endpoint=http://127.0.0.1:{}", server.port)
}

fn bucket(server: &Server) -> Bucket {
    let (_home, path) = credentials();
    let credentials = Credentials::from_file(&path).expect("they are ours");
    let patience = Patience { tries: 6, pause: Duration::from_millis(1), ..Patience::default() };
    let location = Location::parse(&url(server)).expect("a location");
    Bucket::open(location, &credentials, patience).unwrap_or_else(|error| panic!("{error}: {}", error.source))
}

#[test]
fn a_bucket_decides_races() {
    let server = s3(Behaviour::default());
    conformance::race(|| Arc::new(bucket(&server)));
    let shared: Arc<dyn Objects> = Arc::new(bucket(&s3(Behaviour::default())));
    conformance::race(|| shared.clone());
}

#[test]
fn races_in_a_bucket_that_fails_have_one_winner_at_most() {
    const CONTENDERS: u8 = 4;
    const NAMES: u32 = 40;
    let server = s3(Behaviour { seed: 1, failing: 30, lies: false });
    let outcomes: Vec<Vec<Result<Created, ErrorKind>>> = std::thread::scope(|scope| {
        let contend = |contender: u8| {
            let bucket = bucket(&server);
            move || {
                let create = |number| {
                    let name = Name::new(format!("race/{number}")).expect("a name");
                    bucket.create(&name, &[&[b'a' + contender; 50]], None).map_err(|error| error.kind)
                };
                (0..NAMES).map(create).collect()
            }
        };
        let contenders: Vec<_> = (0..CONTENDERS).map(|number| scope.spawn(contend(number))).collect();
        contenders.into_iter().map(|contender| contender.join().expect("it keeps its promises")).collect()
    });
    let bucket = bucket(&server);
    let mut met = BTreeSet::new();
    for number in 0..NAMES {
        let of_name: Vec<_> = outcomes.iter().map(|outcomes| outcomes[number as usize]).collect();
        met.extend(of_name.iter().map(|outcome| format!("{outcome:?}")));
        let winners: Vec<usize> = (0..of_name.len()).filter(|at| of_name[*at] == Ok(Created::New)).collect();
        assert!(winners.len() <= 1, "{number}: {of_name:?}");
        let name = Name::new(format!("race/{number}")).expect("a name");
        let found = (0..50).find_map(|_| bucket.get(&name, 100).ok()).expect("somebody created it");
        assert!(found.len() == 50 && found.iter().all(|byte| *byte == found[0]), "seen in part");
        if let Some(winner) = winners.first() {
            assert_eq!(found[0], b'a' + *winner as u8, "{number}: {of_name:?}");
        }
    }
    assert!(met.contains("Ok(New)") && met.contains("Ok(Taken)"), "{met:?}");
}

#[test]
fn a_store_that_ignores_the_condition_is_refused_at_create() {
    let (_home, path) = credentials();
    let server = s3(Behaviour { lies: true, ..Behaviour::default() });
    let error = create(&url(&server), Some(&path)).expect_err("it lies");
    assert_eq!(error.kind, ErrorKind::Unsupported, "{error}: {}", error.source);
    assert!(error.source.to_string().contains("cannot hold a repository"), "{}", error.source);
    probe(&bucket(&s3(Behaviour::default()))).expect("an honest one is not");
    let place = create(&url(&s3(Behaviour::default())), Some(&path)).expect("an honest one is not");
    assert!(place.url().starts_with("s3://bucket?endpoint="), "{}", place.url());
}

/// Versions were kept once, and `log/1` was hidden by a marker: what is created there now is not the object.
#[test]
fn suspended_versions_free_no_name() {
    let server = serve(|asked| {
        let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
        let version = |id: &str| format!("<Version><Key>log/1</Key><VersionId>{id}</VersionId></Version>");
        match &*asked.method {
            "GET" if query.starts_with("versioning") => Answer::with(
                "200 OK",
                "<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>",
            ),
            "GET" if query.contains("prefix=log%2F1") => {
                let marker = "<DeleteMarker><Key>log/1</Key><VersionId>7</VersionId></DeleteMarker>";
                let all = [&version("null"), marker, &version("6")].concat();
                Answer::with("200 OK", &format!("<ListVersionsResult>{all}</ListVersionsResult>"))
            }
            "GET" if query.contains("versions") => {
                let only = version("null").replace("log/1", "log/2");
                Answer::with("200 OK", &format!("<ListVersionsResult>{only}</ListVersionsResult>"))
            }
            "GET" if query.contains("versionId=6") => Answer::with("200 OK", "first"),
            "PUT" if path.starts_with("/bucket/log/") => Answer::status("200 OK"),
            _ => Answer::status("404 Not Found"),
        }
    });
    let bucket = bucket(&server);
    let name = |text: &str| Name::new(text).expect("a name");
    assert_eq!(bucket.create(&name("log/1"), &[b"forged"], None).expect("answered"), Created::Taken);
    assert_eq!(bucket.get(&name("log/1"), 100).expect("read"), b"first");
    assert_eq!(bucket.create(&name("log/2"), &[b"second"], None).expect("answered"), Created::New);
}
