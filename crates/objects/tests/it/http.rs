//! A few lines of HTTP: what a faulty server answers.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

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

    /// What HEAD is answered of an object of `len` bytes.
    pub fn head(len: usize) -> Answer {
        Answer::of("200 OK", len, "")
    }

    pub fn with(status: &str, body: &str) -> Answer {
        Answer::of(status, body.len(), body)
    }

    fn of(status: &str, len: usize, body: &str) -> Answer {
        Answer::Text(format!(
            "HTTP/1.1 {status}\r\nContent-Length: {len}\r\nETag: \"1\"\r\nLast-Modified: Sun, 22 Nov 2026 00:00:00 GMT\r\n\r\n{body}"
        ))
    }
}

/// What a server was asked.
pub struct Asked {
    pub method: String,
    /// With the query.
    pub path: String,
    /// In small letters.
    pub headers: String,
    pub body: Vec<u8>,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

/// A server that answers as `answer` says, and remembers the first lines of requests.
pub struct Server {
    pub port: u16,
    pub asked: Arc<Mutex<Vec<String>>>,
}

/// Its threads end with the process.
pub fn serve(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (answer, lines) = (Arc::new(answer), asked.clone());
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let (answer, lines) = (answer.clone(), lines.clone());
            std::thread::spawn(move || {
                let mut socket = socket;
                while let Some(asked) = take_request(&mut socket) {
                    let line = format!("{} {}", asked.method, asked.path);
                    lines.lock().expect("no holder panics").push(line);
                    match answer(&asked) {
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

fn take_request(socket: &mut TcpStream) -> Option<Asked> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let (line, headers) = head.split_once("\r\n")?;
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let mut asked = Asked { method, path, headers: headers.to_ascii_lowercase(), body: Vec::new() };
    let len = asked.header("content-length").and_then(|len| len.parse().ok());
    asked.body = vec![0; len.unwrap_or(0)];
    socket.read_exact(&mut asked.body).ok()?;
    Some(asked)
}
