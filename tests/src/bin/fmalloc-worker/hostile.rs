//! A client that speaks the protocol by itself and breaks its rules. `hostile CASE`; each case gives what the daemon
//! answered to each step.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use fmalloc_client::PAGE_SIZE;
use fmalloc_proto::codec;
use fmalloc_proto::hello::{Hello, HelloReply, Role};
use fmalloc_proto::limits::MAX_MESSAGE;
use fmalloc_proto::messages::{Attach, Empty, Open, Opened, RegionRange, Register, Reply, Request};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::ring::{Layout, PageResult, Ring, STATE_DONE, STATE_REQUESTED};
use fmalloc_proto::transport;
use fmalloc_tests::rng::Rng;
use nix::errno::Errno;
use serde_json::{Value, json};

use crate::Outcome;
use crate::state::Args;

/// Budget of a hostile client.
const BUDGET: u64 = 8 << 20;

#[allow(unreachable_pub, missing_docs, reason = "nix's macros make public functions; the module is private")]
mod raw {
    #[repr(C)]
    pub struct Handshake {
        pub api: u64,
        pub features: u64,
        pub ioctls: u64,
    }
    nix::ioctl_readwrite!(handshake, 0xAA, 0x3F, Handshake);
    nix::ioctl_write_int_bad!(new_from_device, nix::request_code_none!(0xAA, 0x00));
}

pub(crate) fn run(args: &mut Args<'_>) -> Outcome {
    match args.text()? {
        "attach-pipe" => attach_pipe(),
        "attach-used" => attach_used(),
        "attach-staged" => attach_staged(),
        "ranges" => ranges(),
        "silent" => silent(),
        "tamper" => tamper(args.number()?),
        "blocking" => blocking(),
        "no-sense" => no_sense(args.number()?),
        "abandon" => abandon(),
        "attach-foreign" => attach_foreign(),
        "crowd" => crowd(args.number()?),
        "hoard" => hoard(args.number()?),
        other => bail!("no case {other:?}"),
    }
}

/// A connection of our own.
struct Peer {
    socket: OwnedFd,
    opened: Opened,
    ring: OwnedFd,
    doorbell: OwnedFd,
    device: Option<OwnedFd>,
    last: u32,
}

impl Peer {
    fn open() -> anyhow::Result<Self> {
        let socket = connect()?;
        greet(socket.as_fd())?;
        let open = Open { name: "hostile".to_owned(), budget: BUDGET, user_mode_only: false, group: None };
        let (reply, fds) = ask(socket.as_fd(), 1, &Request::Open(open), &[])?;
        let Reply::Opened(opened) = reply else { bail!("not opened: {reply:?}") };
        let mut fds = fds.into_iter();
        let (Some(ring), Some(_), Some(doorbell)) = (fds.next(), fds.next(), fds.next()) else {
            bail!("too few descriptors");
        };
        Ok(Self { socket, opened, ring, doorbell, device: fds.next(), last: 1 })
    }

    fn attached() -> anyhow::Result<(Self, OwnedFd)> {
        let mut peer = Self::open()?;
        let uffd = peer.uffd()?;
        match peer.attach(uffd.as_fd())? {
            Reply::Attached(_) => Ok((peer, uffd)),
            other => bail!("not attached: {other:?}"),
        }
    }

    fn uffd(&self) -> anyhow::Result<OwnedFd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let device = self.device.as_ref().context("no device")?;
        // SAFETY: the request takes flags by value, and the kernel makes a new descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(raw::new_from_device(device.as_raw_fd(), flags)?) })
    }

    fn ask(&mut self, request: &Request) -> anyhow::Result<Reply> {
        self.last += 1;
        Ok(ask(self.socket.as_fd(), self.last, request, &[])?.0)
    }

    fn attach(&mut self, fd: BorrowedFd<'_>) -> anyhow::Result<Reply> {
        self.last += 1;
        let agent_tid = u32::try_from(nix::unistd::gettid().as_raw())?;
        Ok(ask(
            self.socket.as_fd(),
            self.last,
            &Request::Attach(Attach { agent_tid, staging: None, inherit: false }),
            &[fd],
        )?
        .0)
    }

    fn register(&mut self, addr: u64, len: u64) -> anyhow::Result<Reply> {
        self.ask(&Request::Register(Register { addr, len, commit: true, label: String::new() }))
    }
}

fn connect() -> anyhow::Result<OwnedFd> {
    let path = std::env::var_os("FMALLOC_SOCKET").context("no FMALLOC_SOCKET")?;
    Ok(transport::connect(&PathBuf::from(path))?)
}

fn greet(socket: BorrowedFd<'_>) -> anyhow::Result<()> {
    transport::send(socket, &Hello::new(Role::Pager).encode(), &[])?;
    let mut buffer = [0; 64];
    let (len, _) = transport::recv(socket, &mut buffer)?;
    HelloReply::decode(&buffer[..len])?.version.context("no common version").map(drop)
}

fn ask(
    socket: BorrowedFd<'_>,
    id: u32,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> anyhow::Result<(Reply, Vec<OwnedFd>)> {
    transport::send(socket, &codec::encode(id, request)?, fds)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let (len, fds) = transport::recv(socket, &mut buffer)?;
        let (answered, reply) = codec::decode::<Reply>(&buffer[..len])?;
        if answered == id || matches!(reply, Reply::Error(_)) {
            return Ok((reply, fds));
        }
    }
}

/// How a reply looks to a test.
fn shown(reply: &Reply) -> Value {
    match reply {
        Reply::Error(failure) => json!({ "code": format!("{:?}", failure.code), "text": failure.text }),
        other => format!("{other:?}").into(),
    }
}

fn attach_pipe() -> Outcome {
    let mut peer = Peer::open()?;
    let (reader, _writer) = nix::unistd::pipe()?;
    Ok(shown(&peer.attach(reader.as_fd())?))
}

/// A userfaultfd whose handshake was done, so that somebody else has a say in what it reports.
fn attach_used() -> Outcome {
    let mut peer = Peer::open()?;
    let uffd = peer.uffd()?;
    let mut request = raw::Handshake { api: 0xAA, features: 0, ioctls: 0 };
    // SAFETY: the structure has the kernel's layout and outlives the call.
    unsafe { raw::handshake(uffd.as_raw_fd(), &raw mut request) }?;
    Ok(shown(&peer.attach(uffd.as_fd())?))
}

/// Requests before Attach, and a second Attach.
fn attach_staged() -> Outcome {
    let mut early = Peer::open()?;
    let first = shown(&early.ask(&Request::Stats(Empty {}))?);
    let (mut twice, uffd) = Peer::attached()?;
    let second = shown(&twice.attach(uffd.as_fd())?);
    Ok(json!({ "early": first, "twice": second }))
}

/// Ranges that are not to be paged.
fn ranges() -> Outcome {
    let (mut peer, _uffd) = Peer::attached()?;
    let good = map(64, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    let foreign = map(4, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    let file = File::open(std::env::current_exe()?)?;
    let mapped = map(4, libc::MAP_PRIVATE, Some(&file))?;
    let page = to_u64(PAGE_SIZE);
    unmap(foreign, 4);
    let mut answers = serde_json::Map::new();
    let mut note = |what: &str, reply: anyhow::Result<Reply>| -> anyhow::Result<()> {
        answers.insert(what.to_owned(), shown(&reply?));
        Ok(())
    };
    note("good", peer.register(good, 64 * page))?;
    note("same", peer.register(good, 64 * page))?;
    note("overlapping", peer.register(good + 32 * page, 64 * page))?;
    note("inside", peer.register(good + 8 * page, page))?;
    note("unmapped", peer.register(foreign, 4 * page))?;
    note("file", peer.register(mapped, 4 * page))?;
    note("unaligned", peer.register(good + 1, page))?;
    note("empty", peer.register(good, 0))?;
    note("kernel", peer.register(1 << 63, page))?;
    note("wrapping", peer.register(u64::MAX - page + 1, 2 * page))?;
    note("more than there is", peer.register(page, 1 << 45))?;
    note("no region", peer.ask(&Request::Commit(RegionRange { region: 77, offset: 0, len: page })))?;
    note(
        "beyond",
        peer.ask(&Request::Decommit(RegionRange { region: 0, offset: 63 * page, len: 2 * page })),
    )?;
    Ok(Value::Object(answers))
}

/// Takes memory and never answers when asked to give any back. Gives how many pages it got in three seconds.
fn silent() -> Outcome {
    let (mut peer, _uffd) = Peer::attached()?;
    let pages = 16 * to_usize(BUDGET) / PAGE_SIZE;
    let touched = touch_registered(&mut peer, pages)?;
    thread::sleep(Duration::from_secs(3));
    Ok(touched.load(Ordering::Relaxed).into())
}

/// Answers evictions with nonsense and scribbles over the whole ring for two seconds.
fn tamper(seed: u64) -> Outcome {
    let (mut peer, _uffd) = Peer::attached()?;
    let touched = touch_registered(&mut peer, 16 * to_usize(BUDGET) / PAGE_SIZE)?;
    let layout = Layout::new(peer.opened.ring_batches, peer.opened.ring_batch_pages).context("a layout")?;
    let ring = Ring::map(peer.ring.as_fd(), layout)?;
    let bytes = map(layout.len().div_ceil(PAGE_SIZE), libc::MAP_SHARED, Some(&peer.ring))?;
    let (mut rng, begin) = (Rng::new(seed), Instant::now());
    for len in [0, PAGE_SIZE, 4 * layout.len()] {
        let outcome = nix::unistd::ftruncate(&peer.ring, i64::try_from(len)?);
        ensure!(outcome == Err(Errno::EPERM), "the ring got another length: {outcome:?}");
    }
    while begin.elapsed() < Duration::from_secs(2) {
        for batch in 0..layout.batches() {
            if ring.state(batch) == STATE_REQUESTED && rng.below(2) == 0 {
                for index in 0..layout.batch_pages() {
                    let results = [
                        PageResult::Moved,
                        PageResult::Absent,
                        PageResult::Busy,
                        PageResult::Refused,
                        PageResult::Present,
                        PageResult::Failed,
                    ];
                    ring.set_result(batch, index, results[rng.index(results.len())]);
                }
                ring.set_state(batch, STATE_DONE);
            }
        }
        for _ in 0..16 {
            let at = bytes + 8 * rng.below(to_u64(layout.len() / 8));
            let word = if rng.below(2) == 0 { rng.word() } else { rng.below(8) };
            // SAFETY: inside our mapping of the ring.
            unsafe { std::ptr::with_exposed_provenance_mut::<u64>(to_usize(at)).write_volatile(word) };
        }
        nix::unistd::write(&peer.doorbell, &1_u64.to_ne_bytes())?;
        thread::sleep(Duration::from_micros(rng.below(300)));
    }
    Ok(touched.load(Ordering::Relaxed).into())
}

/// Makes the userfaultfd that it shares with the daemon a blocking one, again and again.
fn blocking() -> Outcome {
    let (mut peer, uffd) = Peer::attached()?;
    let touched = touch_registered(&mut peer, to_usize(BUDGET) / PAGE_SIZE / 4)?;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        // SAFETY: plain numbers.
        Errno::result(unsafe { libc::fcntl(uffd.as_raw_fd(), libc::F_SETFL, 0) })?;
        thread::sleep(Duration::from_micros(100));
    }
    Ok(touched.load(Ordering::Relaxed).into())
}

/// Packets without sense: before the hello, after it, and as requests.
fn no_sense(seed: u64) -> Outcome {
    let mut rng = Rng::new(seed);
    let (reader, _writer) = nix::unistd::pipe()?;
    for round in 0..200 {
        let Ok(socket) = connect() else { continue };
        if round % 3 > 0 && greet(socket.as_fd()).is_err() {
            continue;
        }
        for _ in 0..rng.below(4) {
            let mut bytes: Vec<u8> = (0..1 + rng.index(2000)).map(|_| rng.word().to_le_bytes()[0]).collect();
            if round % 3 == 2 {
                bytes[0] = rng.word().to_le_bytes()[0] % 40;
                bytes.iter_mut().take(8).skip(1).for_each(|byte| *byte = 0);
            }
            let fds = vec![reader.as_fd(); rng.index(5)];
            if transport::send(socket.as_fd(), &bytes, &fds).is_err() {
                break;
            }
        }
    }
    Ok(Value::Null)
}

/// Gives its connection up with memory registered, and lives on.
fn abandon() -> Outcome {
    let (mut peer, uffd) = Peer::attached()?;
    let touched = touch_registered(&mut peer, 256)?;
    while touched.load(Ordering::Relaxed) < 256 {
        thread::sleep(Duration::from_millis(1));
    }
    std::mem::forget(uffd);
    drop(peer);
    Ok(Value::Null)
}

/// Attaches a userfaultfd that is about another process's memory, and has that paged. The other process touches it, and
/// is killed.
fn attach_foreign() -> Outcome {
    let mut peer = Peer::open()?;
    let device = peer.device.as_ref().context("no device")?.as_raw_fd();
    let base = map(64, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    let (ours, theirs) = transport::pair()?;
    // SAFETY: the child makes system calls and touches its own memory.
    let child = Errno::result(unsafe { libc::fork() })?;
    if child == 0 {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes numbers by value.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        // SAFETY: as in `Peer::uffd`.
        let sent = unsafe { raw::new_from_device(device, flags) }
            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
            .map(|uffd| transport::send(theirs.as_fd(), &[1], &[uffd.as_fd()]));
        // The parent says when its memory is registered.
        let _ = sent.map(|_| transport::recv(theirs.as_fd(), &mut [0; 8]));
        for page in 0..64 {
            let place = std::ptr::with_exposed_provenance_mut::<u64>(to_usize(base) + page * PAGE_SIZE);
            // SAFETY: memory of this process.
            unsafe { place.write_volatile(1) };
        }
        loop {
            // SAFETY: waits to be killed.
            unsafe { libc::pause() };
        }
    }
    let (_, mut fds) = transport::recv(ours.as_fd(), &mut [0; 8])?;
    let uffd = fds.pop().context("no userfaultfd from the child")?;
    let attached = shown(&peer.attach(uffd.as_fd())?);
    let registered = peer.register(base, 64 * to_u64(PAGE_SIZE)).map(|reply| shown(&reply));
    transport::send(ours.as_fd(), &[1], &[])?;
    thread::sleep(Duration::from_millis(300));
    // SAFETY: ends our own child and waits for it.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    thread::sleep(Duration::from_millis(300));
    Ok(
        json!({ "attached": attached, "registered": registered.unwrap_or_else(|error| format!("{error:#}").into()) }),
    )
}

/// Holds as many connections as it gets, of those that it asks for, for two seconds. Gives how many were greeted.
fn crowd(count: usize) -> Outcome {
    let mut peers = Vec::new();
    for n in 0..count {
        let Ok(socket) = connect() else { break };
        // Every other one says nothing.
        if n % 2 == 0 && greet(socket.as_fd()).is_err() {
            continue;
        }
        peers.push(socket);
    }
    let held = peers.len();
    thread::sleep(Duration::from_secs(2));
    Ok(held.into())
}

/// Registers regions of a page until it is refused or has so many, touches each, and sends all the requests that one may
/// have outstanding at once. Gives how many it got, and the refusal.
fn hoard(most: usize) -> Outcome {
    let (mut peer, _uffd) = Peer::attached()?;
    let page = to_u64(PAGE_SIZE);
    let base = map(2 * most, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None)?;
    let (mut count, mut refusal) = (0, Value::Null);
    while count < most {
        // With a page between them, so that no two are one mapping to the kernel.
        let reply = peer.register(base + 2 * page * to_u64(count), page)?;
        if !matches!(reply, Reply::Registered(_)) {
            refusal = shown(&reply);
            break;
        }
        count += 1;
    }
    Ok(json!({ "regions": count, "refusal": refusal }))
}

/// Registers fresh memory and writes to it page by page on another thread; gives the count of pages written.
fn touch_registered(peer: &mut Peer, pages: usize) -> anyhow::Result<Arc<AtomicU64>> {
    let base = map(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None)?;
    match peer.register(base, to_u64(pages * PAGE_SIZE))? {
        Reply::Registered(_) => {}
        other => bail!("not registered: {other:?}"),
    }
    let touched = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&touched);
    thread::spawn(move || {
        for page in 0..pages {
            let place = std::ptr::with_exposed_provenance_mut::<u64>(to_usize(base) + page * PAGE_SIZE);
            // SAFETY: our own mapping, used by nothing else.
            unsafe { place.write_volatile(to_u64(page) + 1) };
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    Ok(touched)
}

fn map(pages: usize, flags: i32, file: Option<&dyn AsRawFd>) -> anyhow::Result<u64> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE_SIZE, access, flags, fd, 0) };
    if base == libc::MAP_FAILED {
        bail!("mmap: {}", Errno::last());
    }
    Ok(to_u64(base.expose_provenance()))
}

fn unmap(base: u64, pages: usize) {
    // SAFETY: a mapping of this file that nothing refers to.
    unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(to_usize(base)), pages * PAGE_SIZE) };
}
