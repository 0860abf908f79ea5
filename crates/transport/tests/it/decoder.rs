//! The frame decoder against streams that were cut, split, mutated or made up.

use bytes::Bytes;
use proptest::prelude::*;
use rempart_buffer::PAGE_SIZE;
use rempart_transport::frame::{HEADER_SIZE, MAX_META, MAX_PAYLOAD};
use rempart_transport::{Decoder, ErrorKind, Frame, Limits};
use std::collections::VecDeque;

fn encode(frame: &Frame) -> Vec<u8> {
    header(frame.meta.len() as u32, frame.payload.len() as u32, frame.kind, 0, frame.payload.len() as u32)
        .into_iter()
        .chain(frame.meta.iter().copied())
        .chain(frame.payload.iter().copied())
        .collect()
}

fn header(meta: u32, sent: u32, kind: u16, flags: u16, payload: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_SIZE);
    bytes.extend(meta.to_le_bytes());
    bytes.extend(sent.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(payload.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> (Vec<Frame>, Option<ErrorKind>) {
    let mut decoder = Decoder::new(Limits::default());
    let mut frames = VecDeque::new();
    let result = decoder.feed(bytes, &mut frames);
    (frames.into(), result.err().map(|error| error.kind().clone()))
}

fn frame() -> impl Strategy<Value = Frame> {
    // Contents from a seed: a random choice for each of thousands of bytes takes a minute.
    let bytes = |length: usize, seed: u8| -> Vec<u8> {
        (0..length).map(|index| (index as u8).wrapping_mul(31).wrapping_add(seed)).collect()
    };
    (1u16.., 0usize..200, 0usize..20_000, any::<u8>()).prop_map(move |(kind, meta, payload, seed)| {
        Frame::new(kind, bytes(meta, seed), bytes(payload, !seed))
    })
}

proptest! {
    #[test]
    fn frames_survive_any_splitting(
        frames in proptest::collection::vec(frame(), 1..5),
        cuts in proptest::collection::vec(1usize..5000, 1..20),
    ) {
        let stream: Vec<u8> = frames.iter().flat_map(encode).collect();
        let mut decoder = Decoder::new(Limits::default());
        let mut out = VecDeque::new();
        let mut rest = &stream[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() { break; }
            let (piece, next) = rest.split_at((*cut).min(rest.len()));
            decoder.feed(piece, &mut out).unwrap();
            rest = next;
        }
        prop_assert!(decoder.at_boundary());
        for frame in &out {
            if frame.payload.len() >= PAGE_SIZE {
                prop_assert_eq!(frame.payload.as_ptr().align_offset(PAGE_SIZE), 0);
            }
        }
        prop_assert_eq!(Vec::from(out), frames);
    }

    #[test]
    fn a_mutated_stream_never_panics_and_an_error_is_final(
        frames in proptest::collection::vec(frame(), 1..4),
        hits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut stream: Vec<u8> = frames.iter().flat_map(encode).collect();
        for (index, value) in &hits {
            let at = index.index(stream.len());
            stream[at] = *value;
        }
        let mut decoder = Decoder::new(Limits { meta: 1000, payload: 50_000 });
        let mut out = VecDeque::new();
        if decoder.feed(&stream, &mut out).is_err() {
            let before = out.len();
            prop_assert!(decoder.feed(&encode(&frames[0]), &mut out).is_err());
            prop_assert_eq!(out.len(), before);
        }
        let limits = |frame: &Frame| frame.meta.len() <= 1000 && frame.payload.len() <= 50_000;
        prop_assert!(out.iter().all(limits));
    }

    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        decode(&bytes);
    }

    #[test]
    fn damaged_compressed_payloads_never_panic(
        bytes in proptest::collection::vec(any::<u8>(), 1..500),
        length in 1u32..100_000,
    ) {
        let mut stream = header(0, bytes.len() as u32, 20, 1, length);
        stream.extend(&bytes);
        let (frames, _) = decode(&stream);
        prop_assert!(frames.iter().all(|frame| frame.payload.len() == length as usize));
    }
}

#[test]
fn oversize_and_nonsense_headers_are_refused_before_any_body() {
    let oversize = Some(ErrorKind::Oversize);
    let bad = Some(ErrorKind::BadFrame);
    let (meta, payload) = (MAX_META as u32, MAX_PAYLOAD as u32);
    assert_eq!(decode(&header(meta + 1, 0, 16, 0, 0)).1, oversize);
    assert_eq!(decode(&header(0, payload + 1, 16, 0, payload + 1)).1, oversize);
    assert_eq!(decode(&header(u32::MAX, u32::MAX, 16, 0, u32::MAX)).1, oversize);
    assert_eq!(decode(&header(0, 0, 0, 0, 0)).1, bad, "kind zero");
    assert_eq!(decode(&header(0, 0, 16, 2, 0)).1, bad, "unknown flag");
    assert_eq!(decode(&header(0, 5, 16, 0, 6)).1, bad, "two lengths");
    assert_eq!(decode(&header(0, u32::MAX, 16, 1, 6)).1, bad, "a compressed payload that grew");
    assert_eq!(decode(&header(meta, payload, 16, 0, payload)).1, None);
}

#[test]
fn before_the_greeting_only_small_frames_pass() {
    let mut decoder = Decoder::new(Limits::GREETING);
    let mut frames = VecDeque::new();
    let large = Frame::new(16, Bytes::new(), vec![0; 1]);
    assert_eq!(*decoder.feed(&encode(&large), &mut frames).unwrap_err().kind(), ErrorKind::Oversize);
}

#[test]
fn a_truncated_stream_is_noticed() {
    let stream = encode(&Frame::new(16, vec![1; 10], vec![2; 10]));
    for length in 1..stream.len() {
        let mut decoder = Decoder::new(Limits::default());
        decoder.feed(&stream[..length], &mut VecDeque::new()).unwrap();
        assert!(!decoder.at_boundary(), "{length}");
    }
}
