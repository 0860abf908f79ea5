//! What a session costs for each request, without sockets: `cargo run --release --example session_cost`.

use bytes::Bytes;
use rempart_nbd::client::{Codec, Command as Ask, ConnectOptions, Handshake, Outcome};
use rempart_nbd::server::{Command, Event, Limits, Piece, RequestId, Session, TlsPolicy};
use rempart_nbd::{Export, ExportList, HeaderStyle};
use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

const REQUESTS: u32 = 400_000;
const BATCH: u64 = 32;

fn main() {
    for style in [HeaderStyle::Structured, HeaderStyle::Extended] {
        let data = Bytes::from(vec![1; 4096]);
        let write = Ask::Write { offset: 4096, payload: data.clone(), fua: false };
        let read = Ask::Read { offset: 4096, length: 4096 };
        let flush = measure(style, &Ask::Flush, |session, id| session.reply_ok(id));
        let writes = measure(style, &write, |session, id| session.reply_ok(id));
        let shared = measure(style, &read, |session, id| session.reply_read(id, [Piece::Data(data.clone())]));
        let copied = measure(style, &read, |session, id| {
            let fill = |buffer: &mut [u8]| {
                buffer.fill(1);
                Ok::<(), ()>(())
            };
            session.reply_read_with(id, fill).expect("it is filled");
        });
        println!(
            "{style:?}: flush {flush:.0?}, 4 KiB write {writes:.0?}, read of shared data {shared:.0?}, \
             read written in place {copied:.0?}"
        );
    }
}

/// Time per request from received bytes to sent bytes, the copy into the receive buffer apart. The best
/// batch counts: the others were disturbed.
fn measure(style: HeaderStyle, ask: &Ask, reply: impl Fn(&mut Session, RequestId)) -> Duration {
    let exports = Arc::new(ExportList::new(vec![Export::new("disk", 1 << 30)]).expect("a fine export"));
    let mut session = Session::new(exports, TlsPolicy::Refused, Limits::default());
    let mut options = ConnectOptions::new("disk");
    options.header_style = style;
    let mut codec = Codec::new(attach(&mut session, Handshake::attach(&options)));
    for _ in 0..BATCH {
        codec.submit(ask.clone()).expect("it is offered");
    }
    let mut batch = Vec::new();
    let mut slices = vec![IoSlice::new(&[]); 256];
    let filled = codec.output_slices(&mut slices);
    slices[..filled].iter().for_each(|slice| batch.extend_from_slice(slice));

    let (mut ids, mut best, mut checksum) = (Vec::new(), Duration::MAX, 0u64);
    for _ in 0..REQUESTS / BATCH as u32 {
        session.recv_space()[..batch.len()].copy_from_slice(&batch);
        let start = Instant::now();
        session.received(batch.len());
        while let Some(event) = session.next_event().expect("a good client") {
            let Event::Request(request) = event else { unreachable!("only requests were sent") };
            if let Command::Write { payload } = request.command {
                checksum += u64::from(payload[0]);
            }
            ids.push(request.id);
        }
        ids.drain(..).for_each(|id| reply(&mut session, id));
        while session.queued_output() > 0 {
            let mut slices = [IoSlice::new(&[]); 64];
            let filled = session.output_slices(&mut slices);
            let count = slices[..filled].iter().map(|slice| slice.len()).sum();
            session.sent(count);
        }
        best = best.min(start.elapsed());
    }
    std::hint::black_box(checksum);
    best / BATCH as u32
}

fn attach(session: &mut Session, mut handshake: Handshake) -> Outcome {
    loop {
        let mut said = Vec::new();
        session.send_to(&mut said).expect("a vector takes all");
        if let Some(outcome) = handshake.received(&said).expect("a good server") {
            return outcome;
        }
        let answer = handshake.take_output();
        session.recv_space()[..answer.len()].copy_from_slice(&answer);
        session.received(answer.len());
        while session.next_event().expect("a good client").is_some() {}
    }
}
