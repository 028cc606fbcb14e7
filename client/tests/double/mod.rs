//! A stand-in for the control side of the daemon: one thread, one connection, answers as the test wants. It pages
//! nothing: registered memory stays ordinary memory. Its descriptors are in a table of its own, so that a test may close
//! everything that it does not know.

#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fmalloc_client::{ConnectOptions, Error, Pager};
use fmalloc_proto::codec;
use fmalloc_proto::hello::{Hello, HelloReply, Role};
use fmalloc_proto::limits::MAX_MESSAGE;
use fmalloc_proto::messages::{Attached, Budget, ClientStats, Empty, Opened, Registered, Reply, Request};
use fmalloc_proto::ring::{BatchKind, Layout, Ring, STATE_DONE, STATE_FREE, STATE_REQUESTED};
use fmalloc_proto::transport;
use nix::sched::{CloneFlags, unshare};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::unistd::{ftruncate, read, write};

/// The client's number.
pub(crate) const CLIENT: u64 = 77;
/// The budget granted at first.
pub(crate) const BUDGET: u64 = 8 << 20;

/// Tests of one binary look at the whole process, so only one runs at a time.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The daemon's end of the connection, in the hands of a test's behaviour.
pub(crate) struct Peer {
    socket: OwnedFd,
    ring: Ring,
    agent_bell: EventFd,
    daemon_bell: EventFd,
    /// Of the client; handshake not done.
    pub(crate) uffd: OwnedFd,
    /// Registered ranges by region: address, length.
    pub(crate) regions: BTreeMap<u32, (u64, u64)>,
}

impl Peer {
    pub(crate) fn reply(&self, id: u32, reply: &Reply) {
        transport::send(self.socket.as_fd(), &codec::encode(id, reply).unwrap(), &[]).unwrap();
    }

    /// The next request; none at the end of the connection.
    pub(crate) fn next(&self) -> Option<(u32, Request)> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let (len, fds) = transport::recv(self.socket.as_fd(), &mut buffer).ok()?;
        assert!(fds.is_empty());
        Some(codec::decode(&buffer[..len]).unwrap())
    }

    /// What a friendly daemon says.
    pub(crate) fn usual(&mut self, request: &Request) -> Reply {
        match request {
            Request::Register(register) => {
                let region = self.regions.last_key_value().map_or(1, |(last, _)| last + 1);
                self.regions.insert(region, (register.addr, register.len));
                Reply::Registered(Registered { region })
            }
            Request::Unregister(id) => {
                assert!(self.regions.remove(&id.region).is_some());
                Reply::Done(Empty {})
            }
            Request::Stats(_) => Reply::Stats(ClientStats { budget_bytes: BUDGET, ..Default::default() }),
            Request::SetBudget(budget) => Reply::Budget(Budget { bytes: budget.bytes }),
            _ => Reply::Done(Empty {}),
        }
    }

    /// Has the agent look at some addresses; gives their results.
    pub(crate) fn probe(&self, addrs: &[u64]) -> Vec<u32> {
        for (index, addr) in (0..).zip(addrs) {
            self.ring.set_addr(0, index, *addr);
        }
        let count = u32::try_from(addrs.len()).unwrap();
        self.ring.set_request(0, BatchKind::Probe, count);
        self.ring.set_state(0, STATE_REQUESTED);
        self.agent_bell.write(1).unwrap();
        self.daemon_bell.read().unwrap();
        assert_eq!(self.ring.state(0), STATE_DONE);
        self.ring.set_state(0, STATE_FREE);
        (0..count).map(|index| self.ring.result(0, index)).collect()
    }
}

/// A running double.
pub(crate) struct Double {
    path: PathBuf,
    thread: JoinHandle<()>,
}

impl Double {
    /// Starts one that treats each request as `behaviour` says; the connection is closed when that gives false.
    pub(crate) fn start(mut behaviour: impl FnMut(&mut Peer, u32, Request) -> bool + Send + 'static) -> Self {
        static COUNT: Mutex<u32> = Mutex::new(0);
        let number = {
            let mut count = COUNT.lock().unwrap();
            *count += 1;
            *count
        };
        let path = std::env::temp_dir().join(format!("fmalloc-double-{}-{number}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let (ready, is_ready) = channel();
        let own = path.clone();
        let thread = thread::spawn(move || {
            unshare(CloneFlags::CLONE_FILES).unwrap();
            let kind = SockFlag::SOCK_CLOEXEC;
            let listener = socket::socket(AddressFamily::Unix, SockType::SeqPacket, kind, None).unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
            socket::bind(fd, &UnixAddr::new(&own).unwrap()).unwrap();
            socket::listen(&listener, Backlog::new(4).unwrap()).unwrap();
            ready.send(()).unwrap();
            let socket = socket::accept4(fd, kind).unwrap();
            // SAFETY: just made for us.
            let socket = unsafe { std::os::fd::FromRawFd::from_raw_fd(socket) };
            std::fs::remove_file(&own).unwrap();
            let Some(mut peer) = shake_hands(socket) else { return };
            while let Some((id, request)) = peer.next() {
                if !behaviour(&mut peer, id, request) {
                    break;
                }
            }
        });
        is_ready.recv().unwrap();
        Self { path, thread }
    }

    /// One that is friendly throughout.
    pub(crate) fn friendly() -> Self {
        Self::start(|peer, id, request| {
            let reply = peer.usual(&request);
            peer.reply(id, &reply);
            true
        })
    }

    pub(crate) fn connect(&self) -> Result<Pager, Error> {
        Pager::connect_with(&self.options(true))
    }

    pub(crate) fn options(&self, user_mode_only: bool) -> ConnectOptions {
        ConnectOptions {
            socket: Some(self.path.clone()),
            budget: Some(BUDGET),
            name: Some("test".to_owned()),
            user_mode_only,
            ..ConnectOptions::default()
        }
    }

    /// Lets any user connect.
    pub(crate) fn admit_everybody(&self) {
        std::fs::set_permissions(&self.path, std::fs::Permissions::from_mode(0o666)).unwrap();
    }

    /// Waits until the connection has ended.
    pub(crate) fn join(self) {
        self.thread.join().unwrap();
    }
}

fn shake_hands(socket: OwnedFd) -> Option<Peer> {
    let mut buffer = vec![0; MAX_MESSAGE];
    let (len, _) = transport::recv(socket.as_fd(), &mut buffer).ok()?;
    let hello = Hello::decode(&buffer[..len]).unwrap();
    assert_eq!(hello.role, Role::Pager);
    transport::send(socket.as_fd(), &HelloReply::to(&hello).encode(), &[]).unwrap();

    let (len, fds) = transport::recv(socket.as_fd(), &mut buffer).ok()?;
    let (id, request) = codec::decode::<Request>(&buffer[..len]).unwrap();
    let Request::Open(open) = request else { panic!("{request:?}") };
    assert!(fds.is_empty() && open.name == "test");
    let layout = Layout::new(2, 16).unwrap();
    let memory = memfd_create(c"ring", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&memory, i64::try_from(layout.len()).unwrap()).unwrap();
    let ring = Ring::map(memory.as_fd(), layout).unwrap();
    ring.initialise();
    let (agent_bell, daemon_bell) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let opened = Opened {
        client: CLIENT,
        budget: open.budget,
        ring_batches: layout.batches(),
        ring_batch_pages: layout.batch_pages(),
        device: false,
    };
    // A notice may come before the answer.
    let notice = codec::encode(0, &Reply::Budget(Budget { bytes: 1 })).unwrap();
    transport::send(socket.as_fd(), &notice, &[]).unwrap();
    let frame = codec::encode(id, &Reply::Opened(opened)).unwrap();
    let fds = [memory.as_fd(), agent_bell.as_fd(), daemon_bell.as_fd()];
    transport::send(socket.as_fd(), &frame, &fds).unwrap();

    let (len, mut fds) = transport::recv(socket.as_fd(), &mut buffer).ok()?;
    let (id, request) = codec::decode::<Request>(&buffer[..len]).unwrap();
    let Request::Attach(attach) = request else { panic!("{request:?}") };
    assert!(attach.agent_tid > 0 && fds.len() == 1);
    let uffd = fds.remove(0);
    let link = std::fs::read_link(format!("/proc/thread-self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&uffd)))
        .unwrap();
    assert_eq!(link.to_str(), Some("anon_inode:[userfaultfd]"));
    let frame = codec::encode(id, &Reply::Attached(Attached { poison: true })).unwrap();
    transport::send(socket.as_fd(), &frame, &[]).unwrap();
    Some(Peer { socket, ring, agent_bell, daemon_bell, uffd, regions: BTreeMap::new() })
}

/// Ids of this process's threads with this name.
pub(crate) fn threads_named(name: &str) -> Vec<u32> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter_map(|task| {
            let task = task.ok()?;
            let comm = std::fs::read_to_string(task.path().join("comm")).ok()?;
            (comm.trim() == name).then(|| task.file_name().to_str().unwrap().parse().unwrap())
        })
        .collect()
}

/// Waits until something holds, for a few seconds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Runs `work` in a forked child and asserts that it ends well within some seconds.
pub(crate) fn in_child(work: impl FnOnce()) {
    // SAFETY: the child uses what glibc keeps usable after fork, and ends without unwinding.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: kills a child that hangs.
        unsafe { libc::alarm(10) };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(outcome.is_err())) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child's wait status");
}

/// One byte through a descriptor, to see that it works.
pub(crate) fn passes_a_byte(reader: &OwnedFd, writer: &OwnedFd) -> bool {
    let mut byte = [0];
    write(writer, &[7]) == Ok(1) && read(reader, &mut byte) == Ok(1) && byte == [7]
}
