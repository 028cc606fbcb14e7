//! Peers that break the protocol: each loses its own connection with an explanation, nobody else notices, and the
//! daemon keeps nothing of what they sent.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use fmalloc_proto::codec;
use fmalloc_proto::hello::{Hello, HelloReply, Role};
use fmalloc_proto::limits::MAX_MESSAGE;
use fmalloc_proto::messages::{Attach, Empty, ErrorCode, Open, Page, RegionId, Register, Reply, Request};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::support::{Daemon, MIB, Peer, userfaultfd, wait_until};

/// Runs `work` against a daemon, which must live on and hold as many descriptors as before.
fn unharmed(work: impl FnOnce(&Daemon)) {
    let daemon = Daemon::start(&[]);
    daemon.assert_alive();
    // The connection just used takes a moment to go.
    std::thread::sleep(Duration::from_millis(200));
    let before = daemon.fds();
    work(&daemon);
    daemon.assert_alive();
    wait_until("all descriptors are given back", || daemon.fds() == before);
}

/// Sends raw bytes with any number of descriptors, past the checks of the library.
fn send_with(peer: &Peer, bytes: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg::<()>(peer.socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
        .unwrap();
}

fn frame(request: &Request) -> Vec<u8> {
    codec::encode(1, request).unwrap()
}

fn open() -> Request {
    Request::Open(Open { name: "hostile".to_owned(), budget: 8 * MIB, user_mode_only: false, group: None })
}

#[test]
fn wrong_hello_ends_the_connection() {
    unharmed(|daemon| {
        let mut magic = Hello::new(Role::Pager).encode();
        magic[0] = b'X';
        let mut role = Hello::new(Role::Pager).encode();
        role[12] = 9;
        let long = [&Hello::new(Role::Pager).encode()[..], &[0]].concat();
        for bytes in [&magic[..], &role, &long, b"GET / HTTP/1.1\r\n", &[0]] {
            let peer = Peer::silent(&daemon.place.socket());
            peer.send_raw(bytes, &[]);
            peer.assert_ended(ErrorCode::Protocol);
        }
        let peer = Peer::silent(&daemon.place.socket());
        send_with(&peer, &Hello::new(Role::Pager).encode(), &[0]);
        peer.assert_ended(ErrorCode::Protocol);
    });
}

#[test]
fn hello_of_another_version_is_answered_with_the_versions_spoken() {
    unharmed(|daemon| {
        let peer = Peer::silent(&daemon.place.socket());
        peer.send_raw(&Hello { min: 900, max: 901, role: Role::Pager }.encode(), &[]);
        let reply = HelloReply::decode(&peer.recv().unwrap().0).unwrap();
        assert_eq!((reply.version, reply.min), (None, 1));
        peer.assert_closed();
    });
}

#[test]
fn malformed_frames_end_the_connection() {
    let mut reserved = frame(&Request::Ping(Empty {}));
    reserved[2] = 1;
    let trailing = [frame(&Request::Ping(Empty {})), vec![0]].concat();
    let mut unknown = frame(&Request::Ping(Empty {}));
    unknown[0] = 31;
    let mut cut = frame(&open());
    cut.truncate(cut.len() - 1);
    let mut huge_length = frame(&Request::Unregister(RegionId { region: 1 }))[..8].to_vec();
    huge_length[0] = 1;
    huge_length.extend([0xfd; 9]);
    unharmed(|daemon| {
        for role in [Role::Pager, Role::Control] {
            for bytes in [&reserved[..], &trailing, &unknown, &cut, &huge_length, &[7], &[0xff; 4096]] {
                let peer = daemon.connect(role);
                peer.send_raw(bytes, &[]);
                peer.assert_ended(ErrorCode::Protocol);
            }
            let peer = daemon.connect(role);
            send_with(&peer, &vec![0; MAX_MESSAGE + 1], &[]);
            peer.assert_ended(ErrorCode::Protocol);
            let peer = daemon.connect(role);
            send_with(&peer, &[], &[]);
            peer.assert_closed();
        }
    });
}

#[test]
fn random_bytes_end_the_connection_only() {
    unharmed(|daemon| {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..500_usize {
            let bytes: Vec<u8> = (0..=round % 97)
                .map(|_| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed.to_le_bytes()[0]
                })
                .collect();
            let peer = if round % 2 == 0 {
                daemon.connect(Role::Control)
            } else {
                Peer::silent(&daemon.place.socket())
            };
            send_with(&peer, &bytes, &[]);
        }
    });
}

#[test]
fn wrong_number_of_descriptors_ends_the_connection() {
    unharmed(|daemon| {
        let ping = frame(&Request::Ping(Empty {}));
        let attach = frame(&Request::Attach(Attach { agent_tid: 1, staging: None, inherit: false }));
        // Five are more than a message may have, 200 more than any sane receiver takes.
        for (bytes, count) in [(&ping, 1), (&ping, 4), (&ping, 5), (&ping, 200), (&attach, 0), (&attach, 2)] {
            let peer = daemon.connect(Role::Control);
            send_with(&peer, bytes, &vec![0; count]);
            peer.assert_ended(ErrorCode::Protocol);
            let peer = daemon.connect(Role::Pager);
            send_with(&peer, bytes, &vec![0; count]);
            peer.assert_ended(ErrorCode::Protocol);
        }
    });
}

#[test]
fn descriptor_that_is_no_userfaultfd_is_refused() {
    unharmed(|daemon| {
        let (pipe, _writer) = nix::unistd::pipe().unwrap();
        let peer = daemon.connect(Role::Pager);
        peer.open(8 * MIB).unwrap();
        peer.send(
            2,
            &Request::Attach(Attach { agent_tid: 1, staging: None, inherit: false }),
            &[pipe.as_fd()],
        );
        let failure = peer.assert_ended(ErrorCode::Protocol);
        assert!(failure.text.contains("userfaultfd"), "{}", failure.text);
    });
}

#[test]
fn requests_out_of_order_end_the_connection() {
    let register = Request::Register(Register { addr: 4096, len: 4096, commit: true, label: String::new() });
    unharmed(|daemon| {
        let peer = daemon.connect(Role::Pager);
        peer.send(1, &register, &[]);
        peer.assert_ended(ErrorCode::Protocol);

        let peer = daemon.connect(Role::Pager);
        peer.open(8 * MIB).unwrap();
        peer.send(2, &register, &[]);
        peer.assert_ended(ErrorCode::Protocol);

        let peer = daemon.connect(Role::Pager);
        peer.send(1, &Request::Clients(Page { after: 0 }), &[]);
        peer.assert_ended(ErrorCode::Protocol);

        let peer = daemon.connect(Role::Control);
        peer.send(1, &open(), &[]);
        peer.assert_ended(ErrorCode::Protocol);
    });
}

#[test]
fn pipelined_refusal_reaches_the_peer() {
    unharmed(|daemon| {
        // What follows the offence is unread when the daemon hangs up; the explanation must arrive all the same.
        let peer = daemon.connect(Role::Control);
        let (bad, ping) = (frame(&open()), frame(&Request::Ping(Empty {})));
        send_with(&peer, &bad, &[]);
        for _ in 0..5 {
            let _ = fmalloc_proto::transport::send(peer.socket.as_fd(), &ping, &[]);
        }
        peer.assert_ended(ErrorCode::Protocol);
    });
}

#[test]
fn peer_that_does_not_read_holds_up_itself_only() {
    const PINGS: u32 = 5000;
    unharmed(|daemon| {
        let peer = daemon.connect(Role::Control);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for id in 1..=PINGS {
                    peer.send(id, &Request::Status(Empty {}), &[]);
                }
            });
            // By now the daemon cannot send more answers, and should have stopped to read.
            std::thread::sleep(Duration::from_millis(300));
            daemon.assert_alive();
            let mut ids: Vec<u32> = (0..PINGS)
                .map(|_| match peer.reply() {
                    (id, Reply::Status(_)) => id,
                    other => panic!("unexpected {other:?}"),
                })
                .collect();
            ids.sort_unstable();
            assert!(ids.into_iter().eq(1..=PINGS));
        });
    });
}

#[test]
fn clients_that_vanish_half_way_leave_nothing() {
    unharmed(|daemon| {
        for _ in 0..50 {
            drop(daemon.connect(Role::Pager));
            let peer = daemon.connect(Role::Pager);
            peer.send(1, &open(), &[]);
            drop(peer);
            let peer = daemon.connect(Role::Pager);
            peer.open(8 * MIB).unwrap();
            if let Some(uffd) = userfaultfd() {
                peer.send(
                    2,
                    &Request::Attach(Attach { agent_tid: 1, staging: None, inherit: false }),
                    &[uffd.as_fd()],
                );
            }
        }
        let peer = daemon.connect(Role::Control);
        wait_until("the pool is whole again", || {
            let Reply::Status(status) = peer.ask(&Request::Status(Empty {})) else { panic!() };
            (status.clients, status.pool_granted_bytes) == (0, 0)
        });
    });
}
