//! What a bucket's user hears of servers that fail.

use crate::http::{Answer, Server, serve};
use rempart_objects::bucket::{Credentials, Location, Patience};
use rempart_objects::{Bucket, Created, Error, ErrorKind, Name, Objects};
use std::net::TcpListener;
use std::sync::Mutex;
use std::time::{Duration, Instant};

fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

/// A bucket of Azure's kind, which asks nothing when it is opened.
fn bucket(port: u16) -> Bucket {
    let url = format!("az://account/container?endpoint=http://127.0.0.1:{port}");
    let patience = Patience {
        tries: 3,
        pause: Duration::from_millis(5),
        deadline: Duration::from_millis(300),
        ..Patience::default()
    };
    let home = tempfile::tempdir().expect("a directory");
    let path = home.path().join("credentials");
    std::fs::write(&path, "AZURE_STORAGE_ACCOUNT_KEY=c2VjcmV0\n").expect("written");
    let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&path, owner_only).expect("set");
    let credentials = Credentials::from_file(&path).expect("they are ours");
    Bucket::open(Location::parse(&url).expect("a location"), &credentials, patience).expect("it opens")
}

/// A server that gives these answers, then the last one for ever.
fn answers(list: impl Into<Vec<Answer>>) -> Server {
    let list = Mutex::new(list.into());
    serve(move |_| {
        let mut list = list.lock().expect("no holder panics");
        if list.len() > 1 { list.remove(0) } else { list[0].clone() }
    })
}

fn asked(server: &Server) -> usize {
    server.asked.lock().expect("no holder panics").len()
}

fn create(server: &Server) -> Result<Created, Error> {
    bucket(server.port).create(&name("log/1"), &[b"content"], None)
}

const CREATED: &str = "201 Created";

#[test]
fn a_creation_is_repeated_until_somebody_answers() {
    for fault in [
        Answer::status("500 Internal Server Error"),
        Answer::status("503 Slow Down"),
        Answer::status("429 Too Many Requests"),
        Answer::HangUp,
        Answer::Silence,
    ] {
        let server = answers([fault.clone(), fault.clone(), Answer::status(CREATED)]);
        assert_eq!(create(&server).expect("answered in the end"), Created::New, "{fault:?}");
        assert_eq!(asked(&server), 3, "{fault:?}");
    }
}

#[test]
fn a_creation_that_nobody_answers_is_unknown() {
    for fault in [
        Answer::status("500 Internal Server Error"),
        Answer::status("503 Slow Down"),
        Answer::status("504 Gateway Timeout"),
        Answer::HangUp,
        Answer::Silence,
    ] {
        let server = answers([fault.clone()]);
        assert_eq!(create(&server).expect_err("no answer").kind, ErrorKind::Unknown, "{fault:?}");
        assert_eq!(asked(&server), 3, "{fault:?}");
    }
}

#[test]
fn a_creation_refused_after_one_without_an_answer_is_unknown() {
    let server = answers([Answer::HangUp, Answer::status("403 Forbidden")]);
    assert_eq!(create(&server).expect_err("refused").kind, ErrorKind::Unknown);
}

#[test]
fn a_creation_that_was_certainly_not_done_says_so() {
    for (answer, kind, requests) in [
        ("403 Forbidden", ErrorKind::Denied, 1),
        ("401 Unauthorized", ErrorKind::Denied, 1),
        ("400 Bad Request", ErrorKind::Failed, 1),
        ("404 Not Found", ErrorKind::Missing, 1),
        ("429 Too Many Requests", ErrorKind::Unavailable, 3),
    ] {
        let server = answers([Answer::status(answer)]);
        assert_eq!(create(&server).expect_err(answer).kind, kind, "{answer}");
        assert_eq!(asked(&server), requests, "{answer}");
    }
    // Nobody listens.
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let error = bucket(port).create(&name("log/1"), &[b"content"], None).expect_err("nobody there");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}: {}", error.source);
}

#[test]
fn a_creation_that_meets_itself_is_taken() {
    let server = answers([
        Answer::HangUp,
        Answer::status("409 The specified blob already exists"),
        Answer::with("200 OK", ""),
    ]);
    assert_eq!(create(&server).expect("answered"), Created::Taken);
    assert_eq!(asked(&server), 3);
}

/// 409 may mean that another's creation was under way.
#[test]
fn a_name_that_conflicts_and_is_not_there_is_tried_again() {
    let conflict = "409 Conflict";
    let server =
        answers([Answer::status(conflict), Answer::status("404 Not Found"), Answer::status(CREATED)]);
    assert_eq!(create(&server).expect("created in the end"), Created::New);
    let server =
        serve(|asked| Answer::status(if asked.method == "PUT" { "409 Conflict" } else { "404 Not Found" }));
    assert_eq!(create(&server).expect_err("for ever").kind, ErrorKind::Unavailable);
}

#[test]
fn reads_are_repeated_and_end() {
    let down = Answer::status("503 Server Busy");
    let server = answers([down.clone(), Answer::HangUp, Answer::with("200 OK", "content")]);
    assert_eq!(bucket(server.port).get(&name("log/1"), 100).expect("answered in the end"), b"content");
    for fault in [down, Answer::HangUp, Answer::Silence] {
        let server = answers([fault.clone()]);
        let started = Instant::now();
        let bucket = bucket(server.port);
        let errors = [
            bucket.get(&name("log/1"), 100).expect_err("no answer"),
            bucket.len(&name("log/1")).expect_err("no answer"),
            bucket.list("log/", None).expect_err("no answer"),
        ];
        assert!(errors.iter().all(|error| error.kind == ErrorKind::Unavailable), "{fault:?}: {errors:?}");
        assert_eq!(asked(&server), 9, "{fault:?}");
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}

#[test]
fn what_ends_early_is_not_read() {
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\nETag: \"1\"\r\nLast-Modified: Sun, 22 Nov 2026 00:00:00 GMT\r\n\r\n";
    let server = serve(move |_| Answer::Text(format!("{head}short")));
    let error = bucket(server.port).get(&name("log/1"), 1000).expect_err("it ended early");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}: {}", error.source);
}

#[test]
fn what_is_too_long_is_not_read() {
    let server = answers([Answer::with("200 OK", &"x".repeat(1000))]);
    let error = bucket(server.port).get(&name("log/1"), 999).expect_err("too long");
    assert_eq!(error.kind, ErrorKind::TooLong, "{error}: {}", error.source);
    // More than it said, where no length binds it.
    let chunked = "HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes 0-3/4\r\n\
                   Content-Length: 4\r\nETag: \"1\"\r\nLast-Modified: Sun, 22 Nov 2026 00:00:00 GMT\r\n\r\n\
                   8\r\nmuchmore\r\n0\r\n\r\n";
    let server = serve(move |_| Answer::Text(chunked.to_owned()));
    bucket(server.port).get_range(&name("log/1"), 0..4).expect_err("more than it said");
}

#[test]
fn an_error_names_no_secret() {
    let server = answers([Answer::with("403 Forbidden", "no")]);
    let error = create(&server).expect_err("refused");
    let mut told = format!("{error} {error:?}");
    let mut source: Option<&dyn std::error::Error> = Some(&*error.source);
    while let Some(error) = source {
        told += &format!(" {error} {error:?}");
        source = error.source();
    }
    assert!(
        told.contains("container") && !told.contains("c2VjcmV0") && !told.contains("Signature"),
        "{told}"
    );
    let shown = format!("{:?}", bucket(server.port));
    assert!(!shown.contains("c2VjcmV0"), "{shown}");
}
