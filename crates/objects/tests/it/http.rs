//! A few lines of HTTP: what a test asks, and what a faulty server answers.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

pub struct Request<'a> {
    pub method: &'a str,
    pub path: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
    pub body: &'a str,
}

/// Asks a server of this machine; its status.
pub fn ask(port: u16, request: Request) -> u16 {
    let Request { method, path, headers, body } = request;
    let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += &format!("Content-Length: {}\r\n\r\n{body}", body.len());
    socket.write_all(text.as_bytes()).expect("sent");
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).expect("answered");
    let answer = String::from_utf8_lossy(&answer);
    answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or_else(|| panic!("no status: {answer}"))
}

/// What a server does with a request.
#[derive(Debug, Clone)]
pub enum Answer {
    /// A status line, headers, and a body: as they are.
    Text(String),
    /// Nothing: it hangs up.
    HangUp,
    /// Nothing, and it does not hang up either.
    Silence,
}

impl Answer {
    pub fn status(status: &str) -> Answer {
        Answer::with(status, "")
    }

    pub fn with(status: &str, body: &str) -> Answer {
        let len = body.len();
        Answer::Text(format!(
            "HTTP/1.1 {status}\r\nContent-Length: {len}\r\nETag: \"1\"\r\nLast-Modified: Sun, 22 Nov 2026 00:00:00 GMT\r\n\r\n{body}"
        ))
    }
}

/// A server that answers as `answer` says, and remembers the first lines of requests.
pub struct Server {
    pub port: u16,
    pub asked: Arc<Mutex<Vec<String>>>,
}

/// Its threads end with the process.
pub fn serve(answer: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (answer, lines) = (Arc::new(answer), asked.clone());
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let (answer, lines) = (answer.clone(), lines.clone());
            std::thread::spawn(move || {
                let mut socket = socket;
                while let Some(line) = take_request(&mut socket) {
                    lines.lock().expect("no holder panics").push(line.clone());
                    match answer(&line) {
                        Answer::Text(text) if socket.write_all(text.as_bytes()).is_ok() => {}
                        Answer::Silence => std::thread::park(),
                        Answer::Text(_) | Answer::HangUp => return,
                    }
                }
            });
        }
    });
    Server { port, asked }
}

/// Reads a request and its body; its first line.
fn take_request(socket: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let len = head
        .lines()
        .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
    let mut body = vec![0; len.unwrap_or(0)];
    socket.read_exact(&mut body).ok()?;
    head.lines().next().map(str::to_owned)
}
