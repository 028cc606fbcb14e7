//! The transport over real sockets: what arrives is what was sent, whole and with its file descriptors, or an error.
//! In one file because descriptors are counted: the tests that count take turns.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fmalloc_proto::limits::{MAX_FDS, MAX_MESSAGE};
use fmalloc_proto::transport::{TransportError, connect, listen_abstract, pair, recv, send};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen,
    sendmsg, socket,
};

/// Descriptors belong to the process, which `cargo test` shares between the tests of a file.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn buffer() -> Vec<u8> {
    vec![0; MAX_MESSAGE]
}

fn nonblocking(fd: BorrowedFd<'_>) {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
}

/// Sends what [`send`] would refuse to.
fn send_raw(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::empty(), None).unwrap();
}

#[test]
fn packets_keep_their_bounds_and_order() {
    let _turn = alone();
    let (near, far) = pair().unwrap();
    let packets = [vec![1], vec![2; 4096], vec![3; MAX_MESSAGE], vec![4, 5]];
    let mut bytes = buffer();
    for packet in &packets {
        send(near.as_fd(), packet, &[]).unwrap();
    }
    for packet in &packets {
        let (len, fds) = recv(far.as_fd(), &mut bytes).unwrap();
        assert_eq!(&bytes[..len], &packet[..]);
        assert!(fds.is_empty());
    }
}

#[test]
fn fds_arrive_open_in_order_and_close_on_exec() {
    let _turn = alone();
    let (near, far) = pair().unwrap();
    let mut bytes = buffer();
    for count in 0..=MAX_FDS {
        let pipes: Vec<(UnixStream, UnixStream)> = (0..count).map(|_| UnixStream::pair().unwrap()).collect();
        let sent: Vec<BorrowedFd<'_>> = pipes.iter().map(|(_, end)| end.as_fd()).collect();
        send(near.as_fd(), b"x", &sent).unwrap();
        let (len, fds) = recv(far.as_fd(), &mut bytes).unwrap();
        assert_eq!((len, fds.len()), (1, count));
        for ((mut pipe, _), fd) in pipes.into_iter().zip(fds) {
            let flags = FdFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFD).unwrap());
            assert!(flags.contains(FdFlag::FD_CLOEXEC));
            UnixStream::from(fd).write_all(b"!").unwrap();
            let mut answer = [0];
            pipe.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"!");
        }
    }
}

#[test]
fn sender_refuses_what_the_receiver_would_cut() {
    let _turn = alone();
    let (near, far) = pair().unwrap();
    let five = [near.as_fd(); MAX_FDS + 1];
    for (bytes, fds) in [(0, 0), (MAX_MESSAGE + 1, 0), (1, MAX_FDS + 1)] {
        let result = send(near.as_fd(), &vec![0; bytes], &five[..fds]);
        assert_eq!(result, Err(TransportError::TooLarge { bytes, fds }));
    }
    nonblocking(far.as_fd());
    assert_eq!(recv(far.as_fd(), &mut buffer()).unwrap_err(), TransportError::WouldBlock, "nothing was sent");
}

#[test]
fn cut_packet_is_an_error_and_the_next_one_arrives() {
    let _turn = alone();
    let (near, far) = pair().unwrap();
    send_raw(near.as_fd(), &vec![7; MAX_MESSAGE + 1], &[]);
    send(near.as_fd(), b"next", &[]).unwrap();
    let mut bytes = buffer();
    assert_eq!(recv(far.as_fd(), &mut bytes).unwrap_err(), TransportError::Truncated);
    let (len, _) = recv(far.as_fd(), &mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"next");
}

#[test]
fn cut_or_refused_packets_leave_no_fd_open() {
    let _turn = alone();
    let (near, far) = pair().unwrap();
    let mut bytes = buffer();
    let before = open_fds();
    for count in [MAX_FDS + 1, 2 * MAX_FDS, 200] {
        send_raw(near.as_fd(), b"x", &vec![near.as_raw_fd(); count]);
        assert_eq!(recv(far.as_fd(), &mut bytes).unwrap_err(), TransportError::Truncated, "{count} fds");
        assert_eq!(open_fds(), before, "{count} fds");
    }
    send_raw(near.as_fd(), &vec![7; MAX_MESSAGE + 1], &[near.as_raw_fd()]);
    assert_eq!(recv(far.as_fd(), &mut bytes).unwrap_err(), TransportError::Truncated);
    send_raw(near.as_fd(), b"", &[near.as_raw_fd()]);
    assert_eq!(recv(far.as_fd(), &mut bytes).unwrap_err(), TransportError::Closed);
    assert_eq!(open_fds(), before);
}

#[test]
fn closed_peer_is_told_from_silence() {
    let _turn = alone();
    let (near, far) = pair().unwrap();
    nonblocking(near.as_fd());
    assert_eq!(recv(near.as_fd(), &mut buffer()).unwrap_err(), TransportError::WouldBlock);
    drop(far);
    assert_eq!(recv(near.as_fd(), &mut buffer()).unwrap_err(), TransportError::Closed);
    assert_eq!(send(near.as_fd(), b"x", &[]), Err(TransportError::Closed), "and no SIGPIPE");
}

#[test]
fn full_socket_would_block() {
    let _turn = alone();
    let (near, _far) = pair().unwrap();
    nonblocking(near.as_fd());
    let sent = (0..10_000).map(|_| send(near.as_fd(), &[0; 1024], &[])).find(Result::is_err);
    assert_eq!(sent, Some(Err(TransportError::WouldBlock)));
}

#[test]
fn pair_is_close_on_exec() {
    let _turn = alone();
    let (near, far) = pair().unwrap();
    for fd in [&near, &far] {
        assert_eq!(fcntl(fd, FcntlArg::F_GETFD), Ok(FdFlag::FD_CLOEXEC.bits()));
    }
}

#[test]
fn connect_reaches_a_listener_and_says_when_there_is_none() {
    let _turn = alone();
    let dir = std::env::temp_dir().join(format!("fmalloc-transport-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let path = dir.join("socket");
    assert_eq!(connect(&path).unwrap_err(), Errno::ENOENT);

    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    assert_eq!(connect(&path).unwrap_err(), Errno::ECONNREFUSED);
    listen(&listener, Backlog::new(1).unwrap()).unwrap();
    let near = connect(&path).unwrap();
    let far = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
    // SAFETY: accept4 has just made this descriptor; nobody else owns it.
    let far: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(far) };
    send(near.as_fd(), b"hello", &[]).unwrap();
    let mut bytes = buffer();
    let (len, _) = recv(far.as_fd(), &mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"hello");
    assert_eq!(fcntl(&near, FcntlArg::F_GETFD), Ok(FdFlag::FD_CLOEXEC.bits()));

    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn an_abstract_name_is_reached_while_its_socket_is_open() {
    let _turn = alone();
    let name = std::path::PathBuf::from(format!("@fmalloc-transport-test-{}", std::process::id()));
    let listener = listen_abstract(&name).unwrap();
    assert_eq!(listen_abstract(&name).unwrap_err(), Errno::EADDRINUSE);
    let client = connect(&name).unwrap();
    drop(client);
    drop(listener);
    assert_eq!(connect(&name).unwrap_err(), Errno::ECONNREFUSED);
}
