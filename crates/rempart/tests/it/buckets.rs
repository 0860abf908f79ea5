//! Repositories in buckets of real servers.

use crate::lab::{ACCOUNT, KEY, Server, azurite, make_container, moto, moto_ask};
use crate::rack::{Answer, PROGRAM, Rack, noise};
use crate::running::tool;
use object_store::aws::AmazonS3;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use serde_json::Value;
use std::process::{Command, Stdio};

const MIB: usize = 1 << 20;
/// Of a server that believes anything.
pub const CREDENTIALS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "hidden")];

/// A place in a server's bucket.
pub fn url(server: &Server, bucket: &str, prefix: &str) -> String {
    format!("s3://{bucket}/{prefix}?endpoint=http://127.0.0.1:{}", server.port)
}

/// A bucket, as any client has it.
pub struct Client {
    store: AmazonS3,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    pub fn new(server: &Server, bucket: &str) -> Client {
        let [(_, id), (_, secret)] = CREDENTIALS;
        let store = object_store::aws::AmazonS3Builder::new()
            .with_endpoint(format!("http://127.0.0.1:{}", server.port))
            .with_allow_http(true)
            .with_bucket_name(bucket)
            .with_region("us-east-1")
            .with_access_key_id(id)
            .with_secret_access_key(secret)
            .build();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Client { store: store.expect("a client"), runtime: runtime.expect("a runtime") }
    }

    pub fn objects(&self) -> Vec<ObjectMeta> {
        self.runtime.block_on(async {
            let (mut folders, mut objects) = (vec![None], Vec::new());
            while let Some(folder) = folders.pop() {
                let listed = self.store.list_with_delimiter(folder.as_ref()).await.expect("listed");
                folders.extend(listed.common_prefixes.into_iter().map(Some));
                objects.extend(listed.objects);
            }
            objects
        })
    }

    pub fn put(&self, name: &str, content: Vec<u8>) {
        let name = name.into();
        self.runtime.block_on(self.store.put(&name, content.into())).expect("it is put");
    }

    fn delete(&self, object: &ObjectMeta) {
        self.runtime.block_on(self.store.delete(&object.location)).expect("it is deleted");
    }
}

/// A repository that is not made yet.
struct Remote {
    rack: Rack,
    url: String,
    environment: Vec<(&'static str, String)>,
}

impl Remote {
    fn s3(server: &Server, bucket: &str) -> Remote {
        let environment = CREDENTIALS.map(|(name, value)| (name, value.to_owned()));
        Remote::new(url(server, bucket, "some/where"), environment.to_vec())
    }

    fn new(url: String, environment: Vec<(&'static str, String)>) -> Remote {
        let rack = Rack::new();
        std::fs::write(rack.path("passphrase"), "correct horse\n").unwrap();
        Remote { rack, url, environment }
    }

    fn run(&self, arguments: &[&str]) -> Answer {
        let output = Command::new(PROGRAM)
            .args(arguments)
            .env("REMPART_REPOSITORY", &self.url)
            .env("REMPART_PASSPHRASE_FILE", self.rack.path("passphrase"))
            .env("REMPART_CACHE_DIR", self.rack.path("cache"))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let answer = Answer::of(output);
        let secret = self.environment.iter().find(|(_, value)| answer.err.contains(value.as_str()));
        assert!(secret.is_none_or(|(name, _)| *name == "AWS_ACCESS_KEY_ID"), "{}", answer.err);
        answer
    }

    fn ok(&self, arguments: &[&str]) -> Answer {
        let answer = self.run(arguments);
        assert_eq!(answer.code, 0, "{arguments:?}: {}", answer.err);
        answer
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let answer = self.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&answer.out).expect("one JSON value")
    }

    /// Makes it. These servers look and then write: an honest refusal, of which there is none when nobody gets in between.
    fn create(&self, more: &[&str]) -> Answer {
        let answers = (0..50).map(|_| self.run(&[&["repo", "create", &self.url], more].concat()));
        let is_told = |answer: &Answer| !answer.err.contains("gave one name to two writers at once");
        answers.into_iter().find(is_told).expect("the server was caught each time")
    }

    /// A point of a disk with these bytes.
    fn back_up(&self, seed: u64) -> (String, Vec<u8>) {
        let content = noise(seed, 3 * MIB);
        let disk = self.rack.path("disk.raw");
        std::fs::write(&disk, &content).unwrap();
        let backup = self.json(&["backup", "shop", "--disk", disk.to_str().unwrap()]);
        (format!("shop@{}", backup["point"]), content)
    }

    fn restores(&self, (point, content): &(String, Vec<u8>)) {
        let to = self.rack.path(&format!("to-{point}"));
        self.ok(&["restore", point, "--to", to.to_str().unwrap()]);
        assert!(std::fs::read(to.join("disk0.raw")).unwrap() == *content, "{point}");
        std::fs::remove_dir_all(&to).unwrap();
    }

    /// All of a repository's life.
    fn lives(&self) {
        let missing = self.run(&["points"]);
        assert!(missing.code != 0 && missing.err.contains("there is no repository"), "{}", missing.err);
        let made = self.create(&[]);
        assert_eq!(made.code, 0, "{}", made.err);
        let again = self.create(&[]);
        assert!(again.code != 0 && again.err.contains("there is one already"), "{}", again.err);
        let (first, second) = (self.back_up(1), self.back_up(2));
        self.restores(&first);
        self.restores(&second);
        self.ok(&["verify", &first.0, &second.0]);
        self.ok(&["forget", &first.0]);
        let done = self.json(&["gc"]);
        assert!(done["freed_bytes"].as_u64().unwrap() > 2 * MIB as u64, "{done}");
        // Whatever this machine keeps can be made again.
        std::fs::remove_dir_all(self.rack.path("cache")).unwrap();
        self.ok(&["repo", "check"]);
        self.restores(&second);
        self.exports(&second);
        self.is_listed();
    }

    /// From above, with what opens it and without.
    fn is_listed(&self) {
        let above = self.url.replace("/some/where", "");
        let listed = self.json(&["repo", "list", &above]);
        let [one] = &listed.as_array().unwrap()[..] else { panic!("{listed}") };
        assert_eq!((&one["url"], &one["points"]), (&Value::from(self.url.as_str()), &1.into()), "{listed}");
        assert!(one["size_bytes"].as_u64().unwrap() > 3 * MIB as u64, "{listed}");
    }

    /// Through the server of disks, which reads here and there.
    fn exports(&self, (point, content): &(String, Vec<u8>)) {
        let [image, raw] = ["disk.qcow2", "back.raw"].map(|name| self.rack.path(name));
        let [image, raw] = [&image, &raw].map(|path| path.to_str().unwrap());
        self.ok(&["export", point, "--to", image, "--format", "qcow2", "--compare"]);
        tool(&["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw]);
        assert!(std::fs::read(raw).unwrap() == *content, "{point}");
    }
}

#[test]
fn a_repository_lives_in_a_bucket_of_s3() {
    let Some(server) = moto() else { return };
    assert_eq!(moto_ask(&server, "PUT", "/plain", &[], ""), 200);
    let remote = Remote::s3(&server, "plain");
    remote.lives();
    // Credentials of a file; of the environment, none.
    let path = remote.rack.path("credentials");
    std::fs::write(&path, "AWS_ACCESS_KEY_ID=id\nAWS_SECRET_ACCESS_KEY=hidden\n").unwrap();
    let file = path.to_str().unwrap().to_owned();
    let exposed = remote.run(&["points", "--credentials", &file]);
    assert!(exposed.code != 0 && exposed.err.contains("chmod 600"), "{}", exposed.err);
    assert!(Command::new("chmod").args(["600", &file]).status().unwrap().success());
    let remote = Remote { environment: Vec::new(), ..remote };
    assert_eq!(remote.json(&["points", "--credentials", &file]).as_array().unwrap().len(), 1);
}

#[test]
fn a_repository_lives_in_a_container_of_azure() {
    let Some(server) = azurite() else { return };
    let endpoint = format!("http://127.0.0.1:{}/{ACCOUNT}", server.port);
    make_container(&endpoint, "backups");
    let url = format!("az://{ACCOUNT}/backups/some/where?endpoint={endpoint}");
    Remote::new(url, vec![("AZURE_STORAGE_ACCOUNT_KEY", KEY.to_owned())]).lives();
}

#[test]
fn a_bucket_that_is_not_there_or_does_not_answer_is_told() {
    let Some(server) = moto() else { return };
    let remote = Remote::s3(&server, "none");
    let missing = remote.create(&[]);
    assert!(missing.code != 0 && missing.err.contains("NoSuchBucket"), "{}", missing.err);
    let secret = Remote::new("s3://id:hidden@bucket".to_owned(), Vec::new());
    let refused = secret.run(&["points"]);
    assert!(refused.code != 0 && !refused.err.contains("hidden"), "{}", refused.err);
}

/// Deletes all objects of a bucket as any client does: where objects are kept, a marker hides each.
fn delete_everything(server: &Server, bucket: &str) -> usize {
    let client = Client::new(server, bucket);
    let objects = client.objects();
    objects.iter().for_each(|object| client.delete(object));
    objects.len()
}

/// A thief has the keys of the repository and of the bucket, and object lock is all that there is against it.
#[test]
fn what_a_thief_forgot_and_deleted_in_a_locked_bucket_is_brought_back() {
    let Some(server) = moto() else { return };
    let lock = [("x-amz-bucket-object-lock-enabled", "true")];
    assert_eq!(moto_ask(&server, "PUT", "/locked", &lock, ""), 200);
    let remote = Remote::s3(&server, "locked");
    let made = remote.create(&["--immutable", "1h"]);
    assert_eq!(made.code, 0, "{}", made.err);
    let points = [1, 2, 3].map(|seed| remote.back_up(seed));
    let names = |listed: &Value| -> Vec<String> {
        let listed = listed.as_array().unwrap().iter();
        listed.map(|point| format!("shop@{}", point["point"])).collect()
    };
    let all: Vec<String> = points.iter().map(|(name, _)| name.clone()).collect();

    remote.ok(&["retain", "--all", "--keep-last", "1"]);
    let collected = remote.json(&["gc"]);
    assert_eq!(
        (&collected["freed_bytes"], &collected["removed_log_entries"]),
        (&0.into(), &0.into()),
        "{collected}"
    );
    assert!(delete_everything(&server, "locked") > 10);
    assert_eq!(delete_everything(&server, "locked"), 0, "for who lists there is nothing any more");

    // On a machine that never saw it; even what opens the repository is hidden.
    std::fs::remove_dir_all(remote.rack.path("cache")).unwrap();
    assert_eq!(names(&remote.json(&["points"])), all[2..]);
    remote.restores(&points[2]);
    let shown = remote.ok(&["points", "--forgotten"]);
    assert!(shown.err.contains("objects are hidden by markers of deletion"), "{}", shown.err);
    assert!(shown.out.matches("nothing is missing").count() == 2, "{}", shown.out);
    let forgotten = remote.json(&["points", "--forgotten", "shop"]);
    assert_eq!(names(&forgotten), all[..2]);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64;
    for point in forgotten.as_array().unwrap() {
        assert_eq!(
            (&point["can_be_brought_back"], &point["remains"]["state"]),
            (&true.into(), &"whole".into())
        );
        let (when, until) =
            (point["forgotten_unix_ms"].as_u64().unwrap(), point["kept_until_unix_ms"].as_u64());
        assert!((now - 600_000..=now).contains(&when) && until > Some(now + 3_000_000), "{point}");
        assert_eq!(point["forgotten_by_key"].as_str().unwrap().len(), 32, "{point}");
    }
    assert_eq!(remote.json(&["points", "--forgotten", "nobody"]).as_array().unwrap().len(), 0);

    let done = remote.ok(&["undelete", "--all"]);
    assert!(
        done.err.contains("objects were hidden by markers of deletion, and are not any more"),
        "{}",
        done.err
    );
    assert_eq!(names(&remote.json(&["points"])), all);
    let collected = remote.json(&["gc"]);
    assert_eq!(collected["retained_bytes"], 0, "all of it is of use again: {collected}");
    points.iter().for_each(|point| remote.restores(point));
    remote.ok(&["verify", &all[0], &all[1], &all[2]]);
    remote.ok(&["repo", "check"]);
    let next = remote.back_up(4);
    // By the rule as ever, and once more.
    remote.ok(&["retain", "shop", "--keep-last", "2"]);
    remote.ok(&["undelete", &all[1]]);
    let expected = [&all[1], &all[2], &next.0].map(String::clone);
    assert_eq!(names(&remote.json(&["points"])), expected);
    remote.restores(&points[1]);
}

/// The store itself keeps what was backed up, until the time is over.
#[test]
fn what_is_immutable_is_removed_when_that_is_over() {
    let Some(server) = moto() else { return };
    let plain = Remote::s3(&server, "plain");
    assert_eq!(moto_ask(&server, "PUT", "/plain", &[], ""), 200);
    let refused = plain.run(&["repo", "create", &plain.url, "--immutable", "30d"]);
    assert!(refused.code != 0 && refused.err.contains("no object lock"), "{}", refused.err);
    let lock = [("x-amz-bucket-object-lock-enabled", "true")];
    assert_eq!(moto_ask(&server, "PUT", "/locked", &lock, ""), 200);
    let remote = Remote::s3(&server, "locked");
    let period = std::time::Duration::from_secs(20);
    let made = remote.create(&["--immutable", "20s"]);
    assert_eq!(made.code, 0, "{}", made.err);
    let first = remote.back_up(1);
    let begun = std::time::Instant::now();
    remote.ok(&["forget", &first.0]);
    let early = remote.json(&["gc"]);
    if begun.elapsed() < period {
        assert_eq!(early["freed_bytes"], 0, "{early}");
        assert!(early["retained_bytes"].as_u64().unwrap() > 2 * MIB as u64, "{early}");
    }
    // It ends at the latest an eighth later, in whole seconds.
    std::thread::sleep(
        (period + period / 8 + std::time::Duration::from_secs(1)).saturating_sub(begun.elapsed()),
    );
    let late = remote.json(&["gc"]);
    assert!(late["freed_bytes"].as_u64().unwrap() > 2 * MIB as u64, "{late}");
    assert_eq!(
        late["retained_objects"].as_u64().unwrap() + late["unsettled_objects"].as_u64().unwrap(),
        0,
        "{late}"
    );
}
