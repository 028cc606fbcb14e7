//! Generated and mutated messages against a live daemon, from many connections in every state that one can be in. The
//! daemon must live on, answer others, and keep nothing. FMALLOC_FUZZ_MESSAGES says how many; `make fuzz` sends ten million.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use fmalloc_proto::codec::{HEADER, decode, encode};
use fmalloc_proto::hello::{Hello, HelloReply, Role};
use fmalloc_proto::limits::{MAX_MESSAGE, MIN_BUDGET};
use fmalloc_proto::messages::{Attach, Budget, Empty, Reply, Request, Status};
use fmalloc_proto::transport::{self, TransportError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{Shutdown, shutdown};

use super::samples::{Random, Source, replies, requests};
use super::support::{Daemon, MIB, Peer, userfaultfd, wait_until};

const THREADS: u64 = 2;
/// Most messages of one connection.
const MOST: u64 = 64;
/// A daemon that does not read from us for so long hangs.
const PATIENCE: Duration = Duration::from_secs(20);

fn wanted() -> u64 {
    let text = std::env::var("FMALLOC_FUZZ_MESSAGES").unwrap_or_default();
    text.parse().unwrap_or(100_000)
}

/// One sender of nonsense.
struct Fuzzer<'a> {
    socket: &'a Path,
    random: Random,
    frames: Vec<Vec<u8>>,
    file: OwnedFd,
    sent: u64,
    answers: u64,
    connections: u64,
    attached: u64,
}

impl<'a> Fuzzer<'a> {
    fn new(socket: &'a Path, seed: u64) -> Self {
        Self {
            socket,
            random: Random(seed),
            frames: Vec::new(),
            file: memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).unwrap(),
            sent: 0,
            answers: 0,
            connections: 0,
            attached: 0,
        }
    }

    fn run(mut self, messages: u64) -> Self {
        while self.sent < messages {
            if self.connections.is_multiple_of(256) {
                self.frames.clear();
                for id in 0..4 {
                    let (requests, replies) = (requests(&mut self.random), replies(&mut self.random));
                    self.frames.extend(requests.iter().map(|message| encode(id, message).unwrap()));
                    self.frames.extend(replies.iter().map(|message| encode(id, message).unwrap()));
                }
            }
            self.connections += 1;
            self.connection();
        }
        self
    }

    /// One connection, up to its end or ours.
    fn connection(&mut self) {
        let Ok(socket) = transport::connect(self.socket) else { return };
        let peer = Peer::over(socket);
        // Kept to the end: what was attached is about our memory.
        let mut uffd = None;
        if self.random.below(8) == 0 {
            let mut hello = Hello::new(Role::Pager).encode().to_vec();
            self.mutate(&mut hello);
            self.shoot(&peer, &hello, 0);
        } else {
            let role = if self.random.flag() { Role::Control } else { Role::Pager };
            peer.hello(role);
            if role == Role::Pager && self.random.flag() && peer.open(4 * MIB).is_ok() && self.random.flag() {
                uffd = userfaultfd();
            }
        }
        if let Some(uffd) = &uffd {
            let attach = Request::Attach(Attach { agent_tid: 1, staging: None, inherit: false });
            peer.send(2, &attach, &[uffd.as_fd()]);
            self.attached += u64::from(matches!(peer.reply().1, Reply::Attached(_)));
        }
        fcntl(&peer.socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        for _ in 0..1 + self.random.next() % MOST {
            let mut frame = self.frame();
            if self.random.below(3) == 0 {
                self.mutate(&mut frame);
            }
            let fds = if self.random.below(16) == 0 { self.random.below(5) } else { 0 };
            if !self.shoot(&peer, &frame, fds) {
                break;
            }
        }
        // Most hear all that the daemon has to say, the others hang up in the middle.
        if uffd.is_none() && self.random.below(4) > 0 {
            shutdown(peer.socket.as_raw_fd(), Shutdown::Write).unwrap();
            fcntl(&peer.socket, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        }
        self.drain(&peer);
    }

    fn frame(&mut self) -> Vec<u8> {
        if self.random.below(8) > 0 {
            let place = self.random.below(self.frames.len());
            return self.frames[place].clone();
        }
        // Noise behind a header that is right.
        let mut frame = vec![0; HEADER];
        let number = Request::NUMBERS[self.random.below(Request::NUMBERS.len())];
        frame[..2].copy_from_slice(&number.to_le_bytes());
        let len = self.random.below(300);
        frame.extend((0..len).map(|_| self.random.next().to_le_bytes()[0]));
        frame
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let place = self.random.below(bytes.len() + 1);
        match self.random.below(6) {
            0 if place < bytes.len() => bytes[place] = self.random.next().to_le_bytes()[0],
            1 if place < bytes.len() => bytes[place] ^= 1 << self.random.below(8),
            2 => bytes.truncate(place.max(1)),
            3 => bytes.extend(std::iter::repeat_n(0xff, 1 + self.random.below(60))),
            4 => drop(bytes.splice(place..place, self.random.next().to_le_bytes())),
            _ => bytes.resize(1 + self.random.below(MAX_MESSAGE), 0),
        }
    }

    /// Sends one message. False if the daemon has hung up.
    fn shoot(&mut self, peer: &Peer, bytes: &[u8], fds: usize) -> bool {
        let fds: Vec<BorrowedFd<'_>> = vec![self.file.as_fd(); fds.min(4)];
        let begin = Instant::now();
        loop {
            match transport::send(peer.socket.as_fd(), bytes, &fds) {
                Ok(()) => {
                    self.sent += 1;
                    return true;
                }
                Err(TransportError::WouldBlock) => {
                    assert!(begin.elapsed() < PATIENCE, "the daemon reads nothing");
                    let mut buffer = [0; 1024];
                    while transport::recv(peer.socket.as_fd(), &mut buffer).is_ok() {
                        self.answers += 1;
                    }
                    std::thread::yield_now();
                }
                Err(TransportError::Closed) => return false,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn drain(&mut self, peer: &Peer) {
        let mut buffer = vec![0; MAX_MESSAGE];
        // A daemon that hangs up with messages of ours unread is told of once, before the answers that it gave.
        let mut told = false;
        loop {
            let length = match transport::recv(peer.socket.as_fd(), &mut buffer) {
                Ok((length, _)) => length,
                Err(TransportError::Closed) if !told => {
                    told = true;
                    continue;
                }
                Err(_) => break,
            };
            let bytes = &buffer[..length];
            assert!(
                decode::<Reply>(bytes).is_ok() || HelloReply::decode(bytes).is_ok(),
                "no reply: {bytes:?}"
            );
            self.answers += 1;
        }
    }
}

fn status(daemon: &Daemon) -> Status {
    match daemon.connect(Role::Control).ask(&Request::Status(Empty {})) {
        Reply::Status(status) => *status,
        other => panic!("unexpected {other:?}"),
    }
}

fn peak_resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn no_messages_bring_the_daemon_down() {
    let daemon = Daemon::start(&[]);
    // The groups that a process may make, and keeps for as long as it lives.
    let mut kept = 0;
    while let Reply::Group(_) =
        daemon.connect(Role::Control).ask(&Request::NewGroup(Budget { bytes: MIN_BUDGET }))
    {
        kept += MIN_BUDGET;
    }
    assert!(kept > 0 && kept < 64 * MIB, "{kept}");
    daemon.assert_alive();
    std::thread::sleep(Duration::from_millis(200));
    let (fds, memory) = (daemon.fds(), peak_resident(daemon.pid()));
    let (messages, begin) = (wanted(), Instant::now());
    let socket = daemon.place.socket();
    let fuzzers: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..THREADS)
            .map(|n| {
                let fuzzer = Fuzzer::new(&socket, 0x66_7a7a + n);
                scope.spawn(move || fuzzer.run(messages / THREADS))
            })
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let sum = |count: fn(&Fuzzer<'_>) -> u64| fuzzers.iter().map(count).sum::<u64>();
    let grown = peak_resident(daemon.pid()).saturating_sub(memory);
    println!(
        "{} messages on {} connections, {} of them attached, {} answers, {:.0} s; {} KiB more at the peak",
        sum(|fuzzer| fuzzer.sent),
        sum(|fuzzer| fuzzer.connections),
        sum(|fuzzer| fuzzer.attached),
        sum(|fuzzer| fuzzer.answers),
        begin.elapsed().as_secs_f64(),
        grown >> 10
    );
    assert!(sum(|fuzzer| fuzzer.answers) > messages / 100, "next to nothing was answered");
    daemon.assert_alive();
    wait_until("all is given back", || {
        let status = status(&daemon);
        (status.clients, status.regions, status.pool_granted_bytes, status.swap_claimed_bytes)
            == (0, 0, kept, 0)
    });
    wait_until("all descriptors are given back", || daemon.fds() == fds);
    assert!(!daemon.place.log().contains("panicked"), "{}", daemon.place.log());
    assert!(grown < 64 * MIB, "{grown} bytes more at the peak");
}
