//! Every message survives its way over the wire, and the bytes of some are written out.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

mod samples;

use std::collections::BTreeSet;
use std::fmt::Debug;

use fmalloc_proto::codec::{CodecError, HEADER, Message, decode, encode};
use fmalloc_proto::limits::{MAX_MESSAGE, MAX_NAME, MAX_ROWS, MAX_TEXT};
use fmalloc_proto::messages::{
    ClientList, ClientRow, ClientStats, Empty, ErrorCode, Failure, Opened, Register, Reply, Request,
};
use samples::{Random, Source, replies, requests};

/// The same number again and again, for samples of extremes.
struct Always(u64);

impl Source for Always {
    fn next(&mut self) -> u64 {
        self.0
    }
}

fn check<M: Message + PartialEq + Debug>(samples: Vec<M>, numbers: &[u16]) {
    let sampled: BTreeSet<u16> = samples.iter().map(Message::number).collect();
    assert_eq!(sampled, numbers.iter().copied().collect(), "a message without a sample, or the reverse");
    for (id, message) in (0_u32..).zip(samples) {
        let id = id.wrapping_mul(0x1001_0001);
        let frame = encode(id, &message).unwrap();
        assert_eq!(decode(&frame), Ok((id, message)));
    }
}

#[test]
fn every_message_round_trips() {
    for value in [0, 1, 250, 251, 65535, 65536, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        check(requests(&mut Always(value)), Request::NUMBERS);
        check(replies(&mut Always(value)), Reply::NUMBERS);
    }
    let mut random = Random(1);
    for _ in 0..200 {
        check(requests(&mut random), Request::NUMBERS);
        check(replies(&mut random), Reply::NUMBERS);
    }
}

#[test]
fn numbers_are_unique_and_stay() {
    assert_eq!(
        Request::NUMBERS,
        [
            1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24, 25, 32, 33, 34, 35, 36,
            37, 38, 48
        ]
    );
    assert_eq!(Reply::NUMBERS, [1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 32, 33, 34, 35, 36, 37, 48]);
}

#[test]
fn frames_have_golden_bytes() {
    assert_eq!(encode(0x0403_0201, &Request::Ping(Empty {})).unwrap(), [11, 0, 0, 0, 1, 2, 3, 4]);
    let register =
        Request::Register(Register { addr: 0x7f12_3456_7000, len: 8192, commit: true, label: "text".into() });
    #[rustfmt::skip]
    assert_eq!(encode(7, &register).unwrap(), [
        3, 0, 0, 0, 7, 0, 0, 0,
        253, 0x00, 0x70, 0x56, 0x34, 0x12, 0x7f, 0, 0, // 64 bits follow
        251, 0x00, 0x20, // 16 bits follow
        1,
        4, b't', b'e', b'x', b't',
    ]);
    let opened = Reply::Opened(Opened {
        client: 250,
        budget: 64 << 20,
        ring_batches: 4,
        ring_batch_pages: 256,
        device: true,
    });
    #[rustfmt::skip]
    assert_eq!(encode(1, &opened).unwrap(), [
        3, 0, 0, 0, 1, 0, 0, 0,
        250,
        252, 0, 0, 0, 4, // 32 bits follow
        4,
        251, 0, 1,
        1,
    ]);
    let error = Reply::Error(Failure { code: ErrorCode::SwapFull, text: "full".into() });
    assert_eq!(encode(2, &error).unwrap(), [1, 0, 0, 0, 2, 0, 0, 0, 5, 4, b'f', b'u', b'l', b'l']);
}

#[test]
fn malformed_frames_are_refused() {
    let ping = encode(9, &Request::Ping(Empty {})).unwrap();
    for len in 0..HEADER {
        assert_eq!(decode::<Request>(&ping[..len]), Err(CodecError::TooShort(len)));
    }
    let with = |place: usize, value: u8| {
        let mut bytes = ping.clone();
        bytes[place] = value;
        bytes
    };
    assert_eq!(decode::<Request>(&with(2, 1)), Err(CodecError::Reserved));
    assert_eq!(decode::<Request>(&with(3, 1)), Err(CodecError::Reserved));
    assert_eq!(decode::<Request>(&with(0, 99)), Err(CodecError::UnknownNumber(99)));
    assert_eq!(decode::<Request>(&with(1, 1)), Err(CodecError::UnknownNumber(267)));
    assert_eq!(decode::<Request>(&[&ping[..], &[0, 0]].concat()), Err(CodecError::Trailing(2)));
    assert_eq!(decode::<Request>(&vec![0; MAX_MESSAGE + 1]), Err(CodecError::TooLong(MAX_MESSAGE + 1)));
}

#[test]
fn every_truncation_is_refused() {
    let mut random = Random(3);
    for message in requests(&mut random) {
        let frame = encode(1, &message).unwrap();
        for len in 0..frame.len() {
            assert!(decode::<Request>(&frame[..len]).is_err(), "{message:?} cut to {len}");
        }
    }
    for message in replies(&mut random) {
        let frame = encode(1, &message).unwrap();
        for len in 0..frame.len() {
            assert!(decode::<Reply>(&frame[..len]).is_err(), "{message:?} cut to {len}");
        }
    }
}

#[test]
fn texts_that_are_not_utf8_and_unknown_codes_are_refused() {
    let error = encode(1, &Reply::Error(Failure { code: ErrorCode::Denied, text: "xx".into() })).unwrap();
    for (place, value) in [(HEADER, 13), (HEADER + 2, 0xff), (HEADER + 3, 0xc3)] {
        let mut bytes = error.clone();
        bytes[place] = value;
        assert!(matches!(decode::<Reply>(&bytes), Err(CodecError::Body(_))), "byte {place} = {value}");
    }
}

#[test]
fn fullest_listing_fits_into_a_message() {
    let stats = replies(&mut Always(u64::MAX)).into_iter().find_map(|reply| match reply {
        Reply::Stats(stats) => Some(stats),
        _ => None,
    });
    let stats: ClientStats = stats.unwrap();
    let row = ClientRow {
        client: u64::MAX,
        pid: u32::MAX,
        uid: u32::MAX,
        name: "n".repeat(MAX_NAME),
        parent: u64::MAX,
        group: u64::MAX,
        condition: "c".repeat(256),
        write_protect: true,
        regions: u32::MAX,
        stats,
    };
    let list = Reply::Clients(ClientList { rows: vec![row; MAX_ROWS], more: true });
    assert!(encode(1, &list).unwrap().len() <= MAX_MESSAGE);
    let error = Reply::Error(Failure { code: ErrorCode::System, text: "t".repeat(MAX_TEXT) });
    assert!(encode(1, &error).is_ok());
}

#[test]
fn message_over_the_limit_is_not_encoded() {
    let error = Reply::Error(Failure { code: ErrorCode::System, text: "t".repeat(MAX_MESSAGE) });
    assert!(matches!(encode(1, &error), Err(CodecError::TooLong(_))));
}

#[test]
fn fd_counts_are_those_of_the_protocol() {
    for request in requests(&mut Always(1)) {
        let count = match request.number() {
            2 => 1,
            20 => 2,
            _ => 0,
        };
        assert_eq!(request.fd_count(), count, "{request:?}");
    }
    for (device, count) in [(0, 3), (1, 4)] {
        for reply in replies(&mut Always(device)) {
            let expected = match reply.number() {
                3 => count,
                9 => count + 1,
                _ => 0,
            };
            assert_eq!(reply.fd_count(), expected, "{reply:?}");
        }
    }
}
