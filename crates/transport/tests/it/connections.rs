use crate::support::{Cluster, GROUP, PATIENT, data, hello, listen, pair};
use bytes::Bytes;
use rempart_buffer::PAGE_SIZE;
use rempart_transport::frame::MAX_PAYLOAD;
use rempart_transport::{
    Accepted, Compression, Connection, ErrorKind, Frame, Hello, ProtocolVersion, ReadStatus, dial_data,
    dial_http,
};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::VecDeque;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Runs both ends by the readiness of their sockets until `done`.
fn turn(
    ends: &mut [&mut Connection; 2],
    inbox: &mut [VecDeque<Frame>; 2],
    done: impl Fn(&[VecDeque<Frame>; 2]) -> bool,
) {
    while !done(inbox) {
        let ready = {
            let mut fds: Vec<_> = ends
                .iter()
                .map(|end| {
                    let interest = end.interest();
                    let mut flags = PollFlags::empty();
                    flags.set(PollFlags::IN, interest.readable);
                    flags.set(PollFlags::OUT, interest.writable);
                    PollFd::from_borrowed_fd(std::os::fd::AsFd::as_fd(*end), flags)
                })
                .collect();
            let limit = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
            assert_ne!(poll(&mut fds, Some(&limit)).unwrap(), 0, "nothing moves any more");
            fds.iter().map(PollFd::revents).collect::<Vec<_>>()
        };
        for (index, flags) in ready.into_iter().enumerate() {
            if flags.contains(PollFlags::OUT) {
                ends[index].on_writable().unwrap();
            }
            if flags.intersects(PollFlags::IN | PollFlags::HUP) {
                ends[index].on_readable(&mut inbox[index]).unwrap();
            }
        }
    }
}

fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

#[tokio::test]
async fn both_learn_who_the_other_is_and_frames_arrive_in_order_both_ways() {
    let (mut a, mut b) = pair().await;
    assert_eq!(b.hello().node, a_identity(&b));
    assert_eq!(a.hello().protocol, ProtocolVersion::CURRENT);
    assert_eq!(a.hello().group, GROUP);
    let sizes = [0, 1, 15, 4095, 4096, 16_384, 16_385, 100_000, 3_000_000];
    let frames: Vec<Frame> = sizes
        .iter()
        .enumerate()
        .map(|(index, &size)| Frame::new(16 + index as u16, noise(size % 3000, 3), noise(size, 5)))
        .collect();
    for frame in &frames {
        a.send(frame.clone()).unwrap();
        b.send(frame.clone()).unwrap();
    }
    let mut inbox = [VecDeque::new(), VecDeque::new()];
    turn(&mut [&mut a, &mut b], &mut inbox, |inbox| inbox.iter().all(|inbox| inbox.len() == frames.len()));
    for received in inbox {
        for frame in &received {
            if frame.payload.len() >= PAGE_SIZE {
                assert_eq!(frame.payload.as_ptr().align_offset(PAGE_SIZE), 0);
            }
        }
        assert_eq!(Vec::from(received), frames);
    }
    assert_eq!((a.queued_bytes(), b.queued_bytes()), (0, 0));
    assert!(a.received_bytes() > 3_000_000 && a.sent_bytes() > 3_000_000);
}

fn a_identity(b: &Connection) -> rempart_types::NodeId {
    b.peer().identity.id
}

#[tokio::test]
async fn payloads_in_pieces_arrive_as_one() {
    let (mut a, mut b) = pair().await;
    let pieces = [noise(10, 1), noise(40_000, 2), Bytes::new(), noise(7, 3), noise(16_384, 4)];
    a.send_parts(30, noise(20, 9), &pieces).unwrap();
    let mut inbox = [VecDeque::new(), VecDeque::new()];
    turn(&mut [&mut a, &mut b], &mut inbox, |inbox| inbox[1].len() == 1);
    let whole: Vec<u8> = pieces.iter().flatten().copied().collect();
    assert_eq!(inbox[1][0], Frame::new(30, noise(20, 9), whole));
}

#[tokio::test]
async fn compression_pays_or_is_left() {
    let (mut a, mut b) = pair().await;
    a.set_compression(Compression::Sampled);
    let zeroes = Bytes::from(vec![0; 1_000_000]);
    let dense = noise(1_000_000, 7);
    for _ in 0..20 {
        a.send(Frame::new(16, Bytes::new(), zeroes.clone())).unwrap();
    }
    let mut inbox = [VecDeque::new(), VecDeque::new()];
    turn(&mut [&mut a, &mut b], &mut inbox, |inbox| inbox[1].len() == 20);
    assert!(a.sent_bytes() < 500_000, "{} bytes for 20 MB of zeroes", a.sent_bytes());
    assert!(inbox[1].iter().all(|frame| frame.payload == zeroes));
    assert_eq!(inbox[1][0].payload.as_ptr().align_offset(PAGE_SIZE), 0);
    for _ in 0..20 {
        a.send(Frame::new(16, Bytes::new(), dense.clone())).unwrap();
        a.send(Frame::new(16, Bytes::new(), noise(100, 1))).unwrap();
    }
    turn(&mut [&mut a, &mut b], &mut inbox, |inbox| inbox[1].len() == 60);
    assert_eq!(inbox[1][20].payload, dense);
}

#[tokio::test]
async fn the_queue_is_bounded_and_nothing_is_half_queued() {
    let (mut a, mut b) = pair().await;
    a.set_max_queued(1_000_000);
    let frame = Frame::new(16, Bytes::new(), noise(300_000, 1));
    let mut queued = 0;
    let error = loop {
        match a.send(frame.clone()) {
            Ok(()) => queued += 1,
            Err(error) => break error,
        }
        assert!(queued < 100);
    };
    assert_eq!(*error.kind(), ErrorKind::QueueFull);
    assert_eq!(queued, 4);
    let mut inbox = [VecDeque::new(), VecDeque::new()];
    turn(&mut [&mut a, &mut b], &mut inbox, |inbox| inbox[1].len() == 4);
    a.send(frame).unwrap();
    let large = Frame::new(16, Bytes::new(), vec![0; MAX_PAYLOAD + 1]);
    assert_eq!(*a.send(large).unwrap_err().kind(), ErrorKind::Oversize);
    turn(&mut [&mut a, &mut b], &mut inbox, |inbox| inbox[1].len() == 5);
}

#[tokio::test]
async fn a_close_comes_after_everything_queued() {
    let (mut a, mut b) = pair().await;
    a.send(Frame::new(16, Bytes::new(), noise(2_000_000, 1))).unwrap();
    a.close();
    let reader = std::thread::spawn(move || {
        let mut inbox = VecDeque::new();
        loop {
            let mut fds = [PollFd::new(&b, PollFlags::IN)];
            poll(&mut fds, None).unwrap();
            if b.on_readable(&mut inbox).unwrap() == ReadStatus::Closed {
                return (inbox, b);
            }
        }
    });
    while a.interest().writable {
        a.on_writable().unwrap();
        let mut fds = [PollFd::new(&a, PollFlags::OUT)];
        poll(&mut fds, None).unwrap();
    }
    let (inbox, b) = reader.join().unwrap();
    assert_eq!(inbox.len(), 1);
    assert!(!b.interest().readable);
}

#[tokio::test]
async fn a_cut_connection_is_not_a_close() {
    let (a, mut b) = pair().await;
    drop(a);
    let mut fds = [PollFd::new(&b, PollFlags::IN)];
    poll(&mut fds, None).unwrap();
    let error = b.on_readable(&mut VecDeque::new()).unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn the_lower_minor_is_spoken() {
    let mut cluster = Cluster::new(1);
    let (a, b) = (cluster.tls(0xa), cluster.tls(0xb));
    let (address, server) = listen(&b).await;
    let ours = hello(&b);
    let answer =
        tokio::spawn(async move { data(server.await.unwrap().unwrap()).accept(ours).await.unwrap() });
    let newer = ProtocolVersion { minor: 9, ..ProtocolVersion::CURRENT };
    let greeting = Hello { protocol: newer, ..hello(&a) };
    let dialled = dial_data(address, &a, b.identity(), greeting, PATIENT).await.unwrap();
    assert_eq!(dialled.hello().protocol, ProtocolVersion::CURRENT);
    assert_eq!(answer.await.unwrap().hello().protocol, ProtocolVersion::CURRENT);
}

#[tokio::test]
async fn http_runs_on_the_same_port() {
    let mut cluster = Cluster::new(1);
    let (a, b) = (cluster.tls(0xa), cluster.tls(0xb));
    let (address, server) = listen(&b).await;
    let mut dialled = dial_http(address, &a, Some(b.identity()), PATIENT).await.unwrap();
    dialled.write_all(b"ping").await.unwrap();
    dialled.flush().await.unwrap();
    let Accepted::Http(mut stream) = server.await.unwrap().unwrap() else { panic!("not HTTP") };
    assert_eq!(stream.peer().unwrap().identity, a.identity());
    assert_eq!(dialled.peer().unwrap().identity, b.identity());
    let mut got = [0; 4];
    stream.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"ping");
}

#[tokio::test]
async fn frames_right_behind_the_answer_to_a_greeting_arrive() {
    let mut cluster = Cluster::new(1);
    let (a, b) = (cluster.tls(0xa), cluster.tls(0xb));
    let (address, server) = listen(&b).await;
    let ours = hello(&b);
    // One thread: what is sent before the task waits again is there when the dialler first looks.
    let answer = tokio::spawn(async move {
        let mut connection = data(server.await.unwrap().unwrap()).accept(ours).await.unwrap();
        connection.send(Frame::new(16, "first", noise(9000, 1))).unwrap();
        connection.on_writable().unwrap();
        connection
    });
    let mut dialled = dial_data(address, &a, b.identity(), hello(&a), PATIENT).await.unwrap();
    let mut other = answer.await.unwrap();
    let mut inbox = [VecDeque::new(), VecDeque::new()];
    dialled.on_readable(&mut inbox[0]).unwrap();
    turn(&mut [&mut dialled, &mut other], &mut inbox, |inbox| !inbox[0].is_empty());
    assert_eq!(inbox[0][0].payload, noise(9000, 1));
}
