//! How fast one data connection carries payload, one way, over the loopback interface.
//!
//! `cargo run --release -p rempart-transport --example throughput [payload bytes] [seconds]`
//! Prints one JSON object. Two threads: sender and receiver; CPU time is given for each.

use bytes::Bytes;
use rempart_transport::pki::{Authority, CertificateRequest, Credentials, Validity};
use rempart_transport::{
    Accepted, ClusterId, Connection, Deadlines, Frame, Hello, Identity, Purpose, TlsContext, accept,
    dial_data,
};
use rempart_types::{GroupId, NodeId, WallTime};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number =
        |default: usize| arguments.next().map_or(default, |text| text.parse().expect("a number"));
    let (size, seconds) = (number(1024 * 1024), number(3));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (mut sender, mut receiver) = runtime.block_on(pair());

    let receiving = std::thread::spawn(move || {
        let mut frames = VecDeque::new();
        let mut bytes = 0u64;
        let mut count = 0u64;
        loop {
            wait(&receiver, PollFlags::IN);
            let closed =
                receiver.on_readable(&mut frames).expect("frames") == rempart_transport::ReadStatus::Closed;
            for frame in frames.drain(..) {
                bytes += frame.payload.len() as u64;
                count += 1;
            }
            if closed {
                return (bytes, count, thread_cpu());
            }
        }
    });
    let payload = Bytes::from(vec![0x5a; size]);
    let started = Instant::now();
    let cpu_before = thread_cpu();
    let limit = Duration::from_secs(seconds as u64);
    while started.elapsed() < limit {
        while sender.queued_bytes() < 4 * 1024 * 1024 {
            sender.send(Frame::new(16, Bytes::from_static(&[1; 40]), payload.clone())).expect("room");
        }
        sender.on_writable().expect("sent");
        if sender.interest().writable {
            wait(&sender, PollFlags::OUT);
        }
    }
    sender.close();
    while sender.interest().writable {
        sender.on_writable().expect("sent");
        wait(&sender, PollFlags::OUT);
    }
    let sender_cpu = thread_cpu() - cpu_before;
    let (bytes, count, receiver_cpu) = receiving.join().expect("the receiver ends");
    let elapsed = started.elapsed().as_secs_f64();
    let gib = bytes as f64 / (1u64 << 30) as f64;
    println!(
        "{{\"figure\":\"transport one way\",\"payload_bytes\":{size},\"gigabytes_per_second\":{:.2},\
         \"frames_per_second\":{:.0},\"sender_cpu_seconds_per_gib\":{:.3},\
         \"receiver_cpu_seconds_per_gib\":{:.3}}}",
        bytes as f64 / 1e9 / elapsed,
        count as f64 / elapsed,
        sender_cpu / gib,
        receiver_cpu / gib,
    );
}

fn wait(connection: &Connection, flags: PollFlags) {
    poll(&mut [PollFd::new(connection, flags)], None).expect("poll");
}

fn thread_cpu() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

async fn pair() -> (Connection, Connection) {
    let now = WallTime(SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as u64);
    let cluster = ClusterId(1);
    let mut authority = Authority::create(cluster, now).expect("an authority");
    let mut member = |id| {
        let request = CertificateRequest::generate().expect("a request");
        let identity = Identity::node(cluster, NodeId(id));
        let pem =
            authority.issue(&request.request_pem, identity, Validity::usual(now)).expect("a certificate");
        let credentials = Credentials::new(request.key, &pem, authority.certificate_pem(), None);
        TlsContext::new(&credentials.expect("credentials")).expect("TLS")
    };
    let (a, b) = (member(1), member(2));
    let hello = |tls: &TlsContext| Hello::new(cluster, tls.identity().id, GroupId(1), Purpose::Replication);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let (ours, server) = (hello(&b), b.clone());
    let accepting = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.expect("a connection");
        match accept(socket, &server, Deadlines::default()).await.expect("accepted") {
            Accepted::Data(incoming) => incoming.accept(ours).await.expect("greeted"),
            other => panic!("{other:?}"),
        }
    });
    let dialled =
        dial_data(address, &a, b.identity(), hello(&a), Deadlines::default()).await.expect("greeted");
    (dialled, accepting.await.expect("accepted"))
}
