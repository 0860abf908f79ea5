//! Random and mutated byte streams against both ends: never a panic, never unbounded memory.

use proptest::prelude::*;
use rempart_nbd::{HeaderStyle, fuzz};

/// A request's bytes that are right in most places.
fn request(extended: bool) -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![
        Just(0u64),
        Just(512),
        Just(4096),
        Just(65536),
        Just(100_000),
        Just(1 << 20),
        Just(32 << 20),
        Just(33 << 20),
        Just(u64::from(u32::MAX)),
        any::<u64>(),
    ];
    let offset = prop_oneof![
        Just(0u64),
        Just(512),
        Just(4096),
        Just(64 << 20),
        Just((64 << 20) - 512),
        Just(77),
        any::<u64>(),
    ];
    let flags = prop_oneof![3 => Just(0u16), 1 => 0u16..64, 1 => any::<u16>()];
    let command = prop_oneof![9 => 0u16..9, 1 => any::<u16>()];
    (flags, command, any::<u64>(), offset, length, 0usize..5000).prop_map(
        move |(mut flags, command, cookie, offset, length, extra)| {
            let mut bytes = Vec::new();
            if extended && command == 1 {
                flags |= 32;
            }
            bytes.extend((if extended { 0x21e4_1c71u32 } else { 0x2560_9513 }).to_be_bytes());
            bytes.extend(flags.to_be_bytes());
            bytes.extend(command.to_be_bytes());
            bytes.extend(cookie.to_be_bytes());
            bytes.extend(offset.to_be_bytes());
            if extended {
                bytes.extend(length.to_be_bytes())
            } else {
                bytes.extend((length as u32).to_be_bytes())
            }
            let brings = if extended { flags & 32 != 0 } else { command == 1 };
            if brings {
                let honest = if length <= 200_000 { length as usize } else { extra };
                bytes.extend(vec![0; honest]);
            }
            bytes
        },
    )
}

/// An option's bytes that are right in most places.
fn option() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        Just(Vec::new()),
        Just(b"disk".to_vec()),
        Just(b"\0\0\0\x04disk\0\0".to_vec()),
        Just(b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x05base:".to_vec()),
        proptest::collection::vec(any::<u8>(), 0..80),
    ];
    let lie = prop_oneof![6 => Just(0i64), 1 => -4i64..5, 1 => Just(70_000), 1 => Just(40 << 20)];
    (prop_oneof![9 => 0u32..12, 1 => any::<u32>()], data, lie).prop_map(|(option, data, lie)| {
        let length = (data.len() as i64 + lie).max(0) as u32;
        [&b"IHAVEOPT"[..], &option.to_be_bytes(), &length.to_be_bytes(), &data].concat()
    })
}

fn flipped(mut bytes: Vec<u8>, flips: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    for (place, value) in flips {
        if !bytes.is_empty() {
            let at = place.index(bytes.len());
            bytes[at] = *value;
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_server_survives_any_bytes(data in proptest::collection::vec(any::<u8>(), 0..600)) {
        fuzz::server_session(&data);
    }

    #[test]
    fn a_server_survives_options_that_lie(
        how in 0u8..16, cut: u8, options in proptest::collection::vec(option(), 0..20),
    ) {
        let mut data = vec![how & !3, cut];
        data.extend(3u32.to_be_bytes());
        data.extend(options.concat());
        fuzz::server_session(&data);
    }

    #[test]
    fn a_server_survives_requests_that_lie(
        how: u8, cut: u8, requests in proptest::collection::vec((request(false), request(true)), 0..40),
        flips in proptest::collection::vec(any::<(prop::sample::Index, u8)>(), 0..2),
    ) {
        let how = how & !0x0c;
        let pick = |(compact, extended): (Vec<u8>, Vec<u8>)| if how & 3 == 3 { extended } else { compact };
        let requests: Vec<u8> = requests.into_iter().flat_map(pick).collect();
        let mut data = vec![how, cut];
        data.extend(flipped(requests, &flips));
        fuzz::server_session(&data);
    }

    #[test]
    fn a_server_survives_a_handshake_with_flipped_bytes(
        cut: u8, flips in proptest::collection::vec(any::<(prop::sample::Index, u8)>(), 1..4),
    ) {
        for style in [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended] {
            let mut data = vec![0, cut];
            data.extend(flipped(fuzz::handshake(style), &flips));
            fuzz::server_session(&data);
        }
    }

    #[test]
    fn a_client_survives_any_bytes(data in proptest::collection::vec(any::<u8>(), 0..600)) {
        fuzz::client(&data);
    }

    #[test]
    fn a_client_survives_replies_that_lie(
        style in 0u8..3, cut: u8,
        chunks in proptest::collection::vec(
            (any::<u16>(), prop_oneof![Just(0u16), Just(1), Just(2), Just(5), Just(6), Just(0x8001), Just(0x8002)],
             0u64..8, prop_oneof![Just(0u64), Just(1 << 20), any::<u64>()], 0u64..5000,
             prop_oneof![Just(0u64), Just(4096), Just(1 << 20), any::<u64>()]), 0..30),
    ) {
        let mut data = vec![style, cut];
        for (flags, kind, cookie, offset, length, place) in chunks {
            match style {
                0 => {
                    data.extend(0x6744_6698u32.to_be_bytes());
                    data.extend(u32::from(flags & 1).to_be_bytes());
                    data.extend(cookie.to_be_bytes());
                }
                1 => {
                    data.extend(0x668e_33efu32.to_be_bytes());
                    data.extend(flags.to_be_bytes());
                    data.extend(kind.to_be_bytes());
                    data.extend(cookie.to_be_bytes());
                    data.extend((length as u32).to_be_bytes());
                }
                _ => {
                    data.extend(0x6e8a_278cu32.to_be_bytes());
                    data.extend(flags.to_be_bytes());
                    data.extend(kind.to_be_bytes());
                    data.extend(cookie.to_be_bytes());
                    data.extend(offset.to_be_bytes());
                    data.extend(length.to_be_bytes());
                }
            }
            let mut payload = place.to_be_bytes().to_vec();
            payload.resize(length as usize, 0);
            data.extend(payload);
        }
        fuzz::client(&data);
    }
}
