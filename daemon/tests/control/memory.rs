//! Clients that have memory under paging, as far as the control plane is concerned: attach, regions, budgets, and what
//! must come back when they end, however that happens. They stay within their budgets, so they need no agent.

use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::time::Duration;

use fmalloc_proto::hello::Role;
use fmalloc_proto::messages::{
    Attach, Budget, Empty, ErrorCode, Limit, Page, RegionId, RegionsQuery, Register, Registered, Reply,
    Request, Status,
};
use fmalloc_proto::num::to_usize;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::Signal;

use super::support::{Daemon, MIB, Peer, Place, userfaultfd, wait_until};

/// An attached client in this process.
struct Client {
    peer: Peer,
    number: u64,
    /// As real clients do: without it, the end of the daemon would turn faults into zeros.
    _uffd: OwnedFd,
}

impl Client {
    /// None where this process may not have a userfaultfd.
    fn attach(daemon: &Daemon, budget: u64) -> Option<Self> {
        Self::attach_over(daemon.connect(Role::Pager), budget)
    }

    fn attach_over(peer: Peer, budget: u64) -> Option<Self> {
        let Some(uffd) = userfaultfd() else {
            eprintln!("skipped: no userfaultfd");
            return None;
        };
        let (opened, _) = peer.open(budget).unwrap();
        peer.send(
            2,
            &Request::Attach(Attach { agent_tid: 1, staging: None, inherit: false }),
            &[uffd.as_fd()],
        );
        assert!(matches!(peer.reply(), (2, Reply::Attached(_))));
        Some(Self { peer, number: opened.client, _uffd: uffd })
    }

    fn register(&self, memory: &Memory) -> Reply {
        self.peer.ask(&memory.register())
    }

    fn region(&self, memory: &Memory) -> u32 {
        match self.register(memory) {
            Reply::Registered(Registered { region }) => region,
            other => panic!("unexpected {other:?}"),
        }
    }

    fn unregister(&self, region: u32) {
        assert_eq!(self.peer.ask(&Request::Unregister(RegionId { region })), Reply::Done(Empty {}));
    }
}

/// A private anonymous mapping; lives as long as the process.
struct Memory {
    start: NonNull<u8>,
    len: u64,
}

impl Memory {
    fn new(len: u64) -> Self {
        let size = NonZeroUsize::new(to_usize(len)).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { mmap_anonymous(None, size, protection, flags) }.unwrap();
        Self { start: start.cast(), len }
    }

    fn register(&self) -> Request {
        let addr = u64::try_from(self.start.as_ptr().addr()).unwrap();
        Request::Register(Register { addr, len: self.len, commit: true, label: "memory".to_owned() })
    }

    /// Writes to each page and reads it again.
    fn use_all(&self) {
        for offset in (0..to_usize(self.len)).step_by(4096) {
            // SAFETY: the offset lies inside the mapping, which only this value reaches.
            unsafe {
                let place = self.start.add(offset).cast::<usize>();
                assert_eq!(place.read_volatile(), 0);
                place.write_volatile(offset + 1);
                assert_eq!(place.read_volatile(), offset + 1);
            }
        }
    }
}

fn status(daemon: &Daemon) -> Status {
    match daemon.connect(Role::Control).ask(&Request::Status(Empty {})) {
        Reply::Status(status) => *status,
        other => panic!("unexpected {other:?}"),
    }
}

fn assert_all_given_back(daemon: &Daemon) {
    wait_until("everything is given back", || {
        let status = status(daemon);
        let held = (status.pool_granted_bytes, status.swap_claimed_bytes, status.swap_used_bytes);
        (status.clients, status.regions, held) == (0, 0, (0, 0, 0))
    });
}

#[test]
fn attached_client_is_paged_until_it_says_goodbye() {
    let daemon = Daemon::start(&[]);
    let Some(client) = Client::attach(&daemon, 32 * MIB) else { return };
    let memory = Memory::new(4 * MIB);
    let region = client.region(&memory);
    memory.use_all();
    let Reply::Stats(stats) = client.peer.ask(&Request::Stats(Empty {})) else { panic!() };
    assert!(stats.faults > 0 && stats.budget_bytes == 32 * MIB, "{stats:?}");
    wait_until(
        "all pages are counted",
        || matches!(client.peer.ask(&Request::Stats(Empty {})), Reply::Stats(stats) if stats.resident_pages == 1024),
    );
    assert_eq!(status(&daemon).swap_claimed_bytes, 4 * MIB);

    let tool = daemon.connect(Role::Control);
    let Reply::Regions(list) = tool.ask(&Request::Regions(RegionsQuery { client: client.number, from: 0 }))
    else {
        panic!()
    };
    assert_eq!((list.rows.len(), list.more), (1, false));
    let row = &list.rows[0];
    assert_eq!((row.label.as_str(), row.len, row.claimed_bytes), ("memory", 4 * MIB, 4 * MIB));
    let Reply::Clients(list) = tool.ask(&Request::Clients(Page { after: 0 })) else { panic!() };
    assert_eq!((list.rows[0].regions, list.rows[0].condition.as_str()), (1, ""));

    let refused = client.peer.ask(&Request::Goodbye(Empty {}));
    assert!(matches!(refused, Reply::Error(failure) if failure.code == ErrorCode::Invalid));
    client.unregister(region);
    assert_eq!(client.peer.ask(&Request::Goodbye(Empty {})), Reply::Done(Empty {}));
    // The answer says that all is back already.
    assert_eq!(status(&daemon).pool_granted_bytes, 0);
    assert_all_given_back(&daemon);
}

#[test]
fn requests_may_be_pipelined() {
    let daemon = Daemon::start(&[]);
    let Some(client) = Client::attach(&daemon, 32 * MIB) else { return };
    let memories: Vec<Memory> = (0..40).map(|_| Memory::new(MIB)).collect();
    for (id, memory) in (100..).zip(&memories) {
        client.peer.send(id, &memory.register(), &[]);
    }
    client.peer.send(999, &Request::Ping(Empty {}), &[]);
    let mut ids: Vec<u32> = (0..41).map(|_| client.peer.reply().0).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq((100..140).chain([999])));
    memories.iter().for_each(|memory| {
        // A page of each will do.
        // SAFETY: the start of a mapping that lives.
        unsafe { memory.start.write_volatile(1) }
    });
    assert_eq!(status(&daemon).regions, 40);
}

#[test]
fn regions_beyond_the_limit_are_refused() {
    let daemon = Daemon::start(&["--max-regions", "2"]);
    let Some(client) = Client::attach(&daemon, 8 * MIB) else { return };
    let memories: Vec<Memory> = (0..3).map(|_| Memory::new(MIB)).collect();
    let first = client.region(&memories[0]);
    client.region(&memories[1]);
    assert!(
        matches!(client.register(&memories[2]), Reply::Error(failure) if failure.code == ErrorCode::Limit)
    );
    client.unregister(first);
    client.region(&memories[2]);
    // A range that is refused by the fault thread does not count.
    client.unregister(first + 1);
    assert!(
        matches!(client.register(&memories[2]), Reply::Error(failure) if failure.code == ErrorCode::Invalid)
    );
    client.region(&memories[0]);
}

#[test]
fn userfaultfd_that_was_used_before_is_refused() {
    let daemon = Daemon::start(&[]);
    let Some(uffd) = userfaultfd() else { return };
    let mut api: [u64; 3] = [0xaa, 0, 0];
    // SAFETY: UFFDIO_API reads and writes three words.
    assert_eq!(unsafe { libc::ioctl(uffd.as_raw_fd(), 0xc018_aa3f, &raw mut api) }, 0);
    let peer = daemon.connect(Role::Pager);
    peer.open(8 * MIB).unwrap();
    peer.send(2, &Request::Attach(Attach { agent_tid: 1, staging: None, inherit: false }), &[uffd.as_fd()]);
    let failure = peer.assert_ended(ErrorCode::Unsupported);
    assert!(failure.text.contains("handshake"), "{}", failure.text);
    assert_all_given_back(&daemon);
}

#[test]
fn client_attaches_once() {
    let daemon = Daemon::start(&[]);
    let Some(client) = Client::attach(&daemon, 8 * MIB) else { return };
    let uffd = userfaultfd().unwrap();
    client.peer.send(
        3,
        &Request::Attach(Attach { agent_tid: 1, staging: None, inherit: false }),
        &[uffd.as_fd()],
    );
    client.peer.assert_ended(ErrorCode::Protocol);
    assert_all_given_back(&daemon);
}

#[test]
fn budget_changes_live_and_the_client_hears_of_it() {
    let daemon = Daemon::start(&["--max-budget", "64M"]);
    let Some(client) = Client::attach(&daemon, 32 * MIB) else { return };
    let tool = daemon.connect(Role::Control);
    let limit = |bytes| tool.ask(&Request::Limit(Limit { client: client.number, bytes }));
    for bytes in [48 * MIB, 8 * MIB, 128 * MIB] {
        assert_eq!(limit(bytes), Reply::Budget(Budget { bytes }));
        assert_eq!(client.peer.reply(), (0, Reply::Budget(Budget { bytes })));
        assert_eq!(status(&daemon).pool_granted_bytes, bytes);
    }
    assert!(matches!(limit(257 * MIB), Reply::Error(failure) if failure.code == ErrorCode::PoolFull));
    assert_eq!(status(&daemon).pool_granted_bytes, 128 * MIB);
    // The client itself has a bound of its own.
    let own = |bytes| client.peer.ask(&Request::SetBudget(Budget { bytes }));
    assert!(matches!(own(65 * MIB), Reply::Error(failure) if failure.code == ErrorCode::Limit));
    assert!(matches!(own(MIB), Reply::Error(failure) if failure.code == ErrorCode::Invalid));
    assert_eq!(own(64 * MIB), Reply::Budget(Budget { bytes: 64 * MIB }));
    assert_eq!(status(&daemon).pool_granted_bytes, 64 * MIB);
}

#[test]
fn budget_that_a_client_cannot_get_down_to_is_refused_and_stays() {
    let daemon = Daemon::start(&[]);
    let Some(client) = Client::attach(&daemon, 64 * MIB) else { return };
    let memory = Memory::new(32 * MIB);
    client.region(&memory);
    memory.use_all();
    // Nobody answers its evictions.
    let Reply::Error(failure) = client.peer.ask(&Request::SetBudget(Budget { bytes: 8 * MIB })) else {
        panic!()
    };
    assert!(failure.text.contains("its budget stays"), "{}", failure.text);
    let Reply::Stats(stats) = client.peer.ask(&Request::Stats(Empty {})) else { panic!() };
    assert_eq!((stats.budget_bytes, status(&daemon).pool_granted_bytes), (64 * MIB, 64 * MIB));
}

#[test]
fn sigterm_waits_for_clients_that_hold_memory() {
    let mut daemon = Daemon::start(&[]);
    let Some(client) = Client::attach(&daemon, 8 * MIB) else { return };
    let memory = Memory::new(MIB);
    let region = client.region(&memory);
    let tool = daemon.connect(Role::Control);
    daemon.signal(Signal::SIGTERM);
    wait_until(
        "it drains",
        || matches!(tool.ask(&Request::Status(Empty {})), Reply::Status(status) if status.draining),
    );
    assert!(daemon.place.log().contains("waiting for client"), "{}", daemon.place.log());
    assert_eq!(daemon.connect(Role::Pager).open(8 * MIB).unwrap_err().code, ErrorCode::Draining);
    memory.use_all();
    client.unregister(region);
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn second_sigterm_ends_at_once() {
    let mut daemon = Daemon::start(&[]);
    let Some(client) = Client::attach(&daemon, 8 * MIB) else { return };
    client.region(&Memory::new(MIB));
    daemon.signal(Signal::SIGTERM);
    wait_until("it drains", || daemon.place.log().contains("waiting for client"));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(!daemon.place.socket().exists());
}

/// A client in a process of its own: holds 16 MiB, and does on request what the variable says.
#[test]
#[ignore = "run by other tests, in a process of its own"]
fn client_process() {
    let Some(socket) = std::env::var_os("FMALLOC_TEST_SOCKET") else { return };
    let client = Client::attach_over(Peer::connect(socket.as_ref(), Role::Pager), 64 * MIB);
    let memory = Memory::new(16 * MIB);
    if let Some(client) = &client {
        client.region(&memory);
        memory.use_all();
    }
    println!("holding {}", client.is_some());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    match line.trim() {
        "exec" => panic!("exec failed: {}", Command::new("sleep").arg("1000").exec()),
        "disconnect" => drop(client.map(|client| client.peer)),
        // A child that keeps the socket open must not hide the end of its parent.
        "fork" => drop(Command::new("sleep").arg("5").spawn().unwrap()),
        _ => {}
    }
    println!("done");
    std::thread::sleep(Duration::from_secs(1000));
}

struct Process {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Process {
    /// None where it may not have a userfaultfd.
    fn start(place: &Place) -> Option<Self> {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "memory::client_process", "--ignored", "--nocapture"])
            .env("FMALLOC_TEST_SOCKET", place.socket())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut process = Self { child, out };
        process.wait_for_line("holding").contains("true").then_some(process)
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{what}").unwrap();
    }

    fn wait_for_line(&mut self, start: &str) -> String {
        let mut line = String::new();
        while !line.contains(start) {
            line.clear();
            assert!(self.out.read_line(&mut line).unwrap() > 0, "it ended before it said {start:?}");
        }
        line
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn killed_client_gives_everything_back() {
    let daemon = Daemon::start(&[]);
    for _ in 0..5 {
        let Some(process) = Process::start(&daemon.place) else { return };
        assert_eq!(status(&daemon).swap_claimed_bytes, 16 * MIB);
        drop(process);
        assert_all_given_back(&daemon);
    }
}

#[test]
fn killed_client_gives_everything_back_although_a_child_keeps_its_socket() {
    let daemon = Daemon::start(&[]);
    let Some(mut process) = Process::start(&daemon.place) else { return };
    process.tell("fork");
    process.wait_for_line("done");
    drop(process);
    assert_all_given_back(&daemon);
}

#[test]
fn exec_gives_everything_back() {
    let daemon = Daemon::start(&[]);
    let Some(mut process) = Process::start(&daemon.place) else { return };
    process.tell("exec");
    assert_all_given_back(&daemon);
    assert!(process.child.try_wait().unwrap().is_none(), "it should run on as another program");
}

#[test]
fn process_that_lost_its_socket_keeps_its_slots_until_it_ends() {
    let daemon = Daemon::start(&[]);
    let Some(mut process) = Process::start(&daemon.place) else { return };
    process.tell("disconnect");
    process.wait_for_line("done");
    let tool = daemon.connect(Role::Control);
    wait_until("the daemon sees that the agent has gone", || {
        let Reply::Clients(list) = tool.ask(&Request::Clients(Page { after: 0 })) else { panic!() };
        list.rows[0].condition.contains("gone")
    });
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(status(&daemon).swap_claimed_bytes, 16 * MIB);
    drop(process);
    assert_all_given_back(&daemon);
}
