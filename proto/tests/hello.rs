//! The bytes of the first packets, written out: they may never change.

use fmalloc_proto::hello::{HELLO_LEN, Hello, HelloError, HelloReply, MAGIC, Role};
use fmalloc_proto::limits::{VERSION_MAX, VERSION_MIN};

const PAGER: [u8; 16] = [b'F', b'M', b'A', b'L', b'L', b'O', b'C', 0, 1, 0, 1, 0, 1, 0, 0, 0];
const CONTROL: [u8; 16] = [b'F', b'M', b'A', b'L', b'L', b'O', b'C', 0, 1, 0, 2, 1, 2, 0, 0, 0];
const AGREED: [u8; 16] = [b'F', b'M', b'A', b'L', b'L', b'O', b'C', 0, 2, 0, 1, 0, 3, 0, 0, 0];
const REFUSED: [u8; 16] = [b'F', b'M', b'A', b'L', b'L', b'O', b'C', 0, 0, 0, 1, 0, 1, 0, 0, 0];

#[test]
fn hello_has_golden_bytes() {
    for (hello, bytes) in [
        (Hello { min: 1, max: 1, role: Role::Pager }, PAGER),
        (Hello { min: 1, max: 0x102, role: Role::Control }, CONTROL),
    ] {
        assert_eq!(hello.encode(), bytes);
        assert_eq!(Hello::decode(&bytes), Ok(hello));
    }
}

#[test]
fn reply_has_golden_bytes() {
    for (reply, bytes) in [
        (HelloReply { version: Some(2), min: 1, max: 3 }, AGREED),
        (HelloReply { version: None, min: 1, max: 1 }, REFUSED),
    ] {
        assert_eq!(reply.encode(), bytes);
        assert_eq!(HelloReply::decode(&bytes), Ok(reply));
    }
}

#[test]
fn own_hello_is_accepted_with_highest_version() {
    let reply = HelloReply::to(&Hello::new(Role::Pager));
    assert_eq!(reply, HelloReply { version: Some(VERSION_MAX), min: VERSION_MIN, max: VERSION_MAX });
}

#[test]
fn versions_negotiate_to_highest_common() {
    let answer = |min, max| HelloReply::to(&Hello { min, max, role: Role::Control }).version;
    assert_eq!(answer(VERSION_MIN, VERSION_MAX + 5), Some(VERSION_MAX));
    assert_eq!(answer(VERSION_MIN, VERSION_MIN), Some(VERSION_MIN));
    assert_eq!(answer(VERSION_MAX + 1, VERSION_MAX + 5), None, "a peer that is too new is refused");
}

#[test]
fn every_changed_byte_that_matters_is_noticed() {
    for place in 0..MAGIC.len() {
        let mut bytes = PAGER;
        bytes[place] ^= 0x20;
        assert_eq!(Hello::decode(&bytes), Err(HelloError::Magic), "byte {place}");
        assert_eq!(HelloReply::decode(&bytes), Err(HelloError::Magic), "byte {place}");
    }
    for len in (0..40).filter(|len| *len != HELLO_LEN) {
        assert_eq!(Hello::decode(&[PAGER, PAGER, PAGER].concat()[..len]), Err(HelloError::Length(len)));
    }
    // (place, value): version 0, lowest above highest, unknown roles, reserved field in use.
    for (place, value) in [(8, 0), (8, 9), (12, 0), (12, 3), (13, 1), (14, 1), (15, 1)] {
        let mut bytes = PAGER;
        bytes[place] = value;
        assert_eq!(Hello::decode(&bytes), Err(HelloError::Field), "byte {place} = {value}");
    }
    // Chosen version outside the range, no range, range upside down, reserved field in use.
    for (place, value) in [(8, 9), (10, 0), (10, 4), (14, 1), (15, 1)] {
        let mut bytes = AGREED;
        bytes[place] = value;
        assert_eq!(HelloReply::decode(&bytes), Err(HelloError::Field), "byte {place} = {value}");
    }
}
