//! A bounded fuzz loop over the decoder, the same on every run: no bytes make it panic or take much memory, and what
//! it accepts it encodes to something that means the same.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

mod samples;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Debug;

use fmalloc_proto::codec::{HEADER, Message, decode, encode};
use fmalloc_proto::hello::{HELLO_LEN, Hello, HelloReply};
use fmalloc_proto::limits::MAX_MESSAGE;
use fmalloc_proto::messages::{Reply, Request};
use fmalloc_proto::validate;
use samples::{Random, Source, replies, requests};

/// Messages decoded, unless FMALLOC_FUZZ_MESSAGES says otherwise; `make fuzz` does.
const DECODES: u64 = 1_000_000;
/// Most bytes that decoding one message may take at any moment: a length that lies is believed up to 1 MiB (serde's
/// bound for a first allocation), besides what really came.
const MOST_MEMORY: usize = (1 << 20) + 4 * MAX_MESSAGE;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, with the calling thread's live and peak bytes counted.
struct Counting;

// SAFETY: everything is passed on to the system's allocator; the counters are plain cells of the thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.get().wrapping_add(layout.size());
        LIVE.set(live);
        if live.cast_signed() > PEAK.get().cast_signed() {
            PEAK.set(live);
        }
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().wrapping_sub(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Decodes `bytes`; if they are a message, it must survive another round.
fn probe<M: Message + Clone + PartialEq + Debug>(bytes: &[u8]) -> Option<M> {
    let before = LIVE.get();
    PEAK.set(before);
    let decoded = decode::<M>(bytes);
    let took = PEAK.get().wrapping_sub(before);
    assert!(took <= MOST_MEMORY, "{took} bytes of memory for {bytes:?}");
    let (id, message) = decoded.ok()?;
    let frame = encode(id, &message).unwrap();
    assert!(frame.len() <= bytes.len(), "{message:?} grew");
    assert_eq!(decode(&frame), Ok((id, message.clone())), "{bytes:?}");
    Some(message)
}

/// Damages a frame in one to four places: a byte, a run, its length, or a number that claims far too much.
fn mutate(random: &mut Random, frame: &mut Vec<u8>) {
    for _ in 0..=random.below(4) {
        let place = random.below(frame.len() + 1);
        match random.below(8) {
            0 | 1 if place < frame.len() => frame[place] = random.next().to_le_bytes()[0],
            2 if place < frame.len() => frame[place] ^= 1 << random.below(8),
            3 => frame.truncate(place),
            4 => {
                let run = random.next().to_le_bytes();
                frame.splice(place..place, run);
            }
            5 => {
                // 16, 32, 64 or 128 bits of a huge number.
                let mark = 251 + u8::try_from(random.below(4)).unwrap();
                let end = (place + 1).min(frame.len());
                frame.splice(place..end, [mark, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0]);
            }
            6 => frame.extend(std::iter::repeat_n(0xff, random.below(40))),
            _ => frame.drain(place..).for_each(drop),
        }
    }
}

#[test]
fn no_bytes_break_the_decoder() {
    let mut random = Random(0x66_6d61_6c6c_6f63);
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let text = std::env::var("FMALLOC_FUZZ_MESSAGES").unwrap_or_default();
    let (decodes, mut accepted) = (text.parse().unwrap_or(DECODES), 0_u64);
    for round in 0..decodes / 2 {
        // Fresh samples now and then; in between the old ones are damaged again and again.
        if round % 4096 == 0 {
            let id = u32::try_from(round & 0xffff_ffff).unwrap();
            frames.clear();
            frames.extend(requests(&mut random).iter().map(|message| encode(id, message).unwrap()));
            frames.extend(replies(&mut random).iter().map(|message| encode(id, message).unwrap()));
        }
        let mut frame = if random.below(4) == 0 {
            // Noise behind a header that is right.
            let numbers = [Request::NUMBERS, Reply::NUMBERS][random.below(2)];
            let number = numbers[random.below(numbers.len())];
            let mut frame = vec![0; HEADER];
            frame[..2].copy_from_slice(&number.to_le_bytes());
            frame.extend((0..random.below(300)).map(|_| random.next().to_le_bytes()[0]));
            frame
        } else {
            frames[random.below(frames.len())].clone()
        };
        if random.below(8) != 0 {
            mutate(&mut random, &mut frame);
        }
        if let Some(request) = probe::<Request>(&frame) {
            accepted += 1;
            let _ = validate::request(&request);
        }
        accepted += u64::from(probe::<Reply>(&frame).is_some());
    }
    println!("{decodes} messages, {accepted} of them valid");
    assert!(accepted > decodes / 20, "only {accepted} of {decodes} were messages: the loop tests little");
}

#[test]
fn lying_lengths_take_no_memory() {
    for number in Reply::NUMBERS.iter().chain(Request::NUMBERS) {
        for count in [1_u64 << 16, 1 << 20, 1 << 32, 1 << 47, u64::MAX] {
            for padding in [0, 8, MAX_MESSAGE - 4096] {
                // The length first, for lists, and after one field, for texts behind a code.
                for before in [vec![], vec![1]] {
                    let mut frame = vec![0; HEADER];
                    frame[..2].copy_from_slice(&number.to_le_bytes());
                    frame.extend(before);
                    frame.push(253);
                    frame.extend(count.to_le_bytes());
                    frame.resize(frame.len() + padding, 0);
                    assert!(probe::<Reply>(&frame).is_none_or(|reply| !is_listing(&reply)));
                    let _ = probe::<Request>(&frame);
                }
            }
        }
    }
}

fn is_listing(reply: &Reply) -> bool {
    matches!(reply, Reply::Clients(_) | Reply::Regions(_))
}

#[test]
fn no_bytes_break_the_hello() {
    let mut random = Random(7);
    let good = HelloReply { version: Some(1), min: 1, max: 1 }.encode();
    for _ in 0..100_000 {
        let mut bytes = good.to_vec();
        mutate(&mut random, &mut bytes);
        if let Ok(hello) = Hello::decode(&bytes) {
            assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
            assert!(
                bytes.len() == HELLO_LEN && HelloReply::to(&hello).version.is_none_or(|v| v <= hello.max)
            );
        }
        if let Ok(reply) = HelloReply::decode(&bytes) {
            assert_eq!(reply.encode(), bytes[..]);
        }
    }
}
