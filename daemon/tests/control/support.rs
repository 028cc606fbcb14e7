//! A daemon of its own for each test, and peers that speak the protocol packet by packet.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use fmalloc_proto::codec;
use fmalloc_proto::hello::{Hello, HelloReply, Role};
use fmalloc_proto::limits::MAX_MESSAGE;
use fmalloc_proto::messages::{Empty, ErrorCode, Failure, Open, Opened, Reply, Request};
use fmalloc_proto::transport::{self, TransportError};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;

/// Where a daemon under test has its socket, swap and log; removed at the end.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        // On a disk: many systems have /tmp in RAM, where no private swap file may lie.
        let dir = tempfile::Builder::new().prefix("fmallocd-test-").tempdir_in("/var/tmp").unwrap();
        // Other users must reach the socket.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self(dir)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

/// A running fmallocd.
pub(crate) struct Daemon {
    pub(crate) place: Place,
    child: Child,
}

impl Daemon {
    /// Starts one with 64 MiB of swap and a RAM pool of 256 MiB, and waits until it is ready.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::start_in(Place::new(), args)
    }

    pub(crate) fn start_in(place: Place, args: &[&str]) -> Self {
        let command = command(&place, args);
        Self::run(command, place)
    }

    pub(crate) fn run(mut command: Command, place: Place) -> Self {
        let mut daemon = Self { child: command.spawn().unwrap(), place };
        wait_until("the daemon is ready", || {
            assert!(daemon.child.try_wait().unwrap().is_none(), "it ended: {}", daemon.place.log());
            daemon.place.log().contains("ready")
        });
        daemon
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_for(&mut self.child)
    }

    /// Kills it and gives its place to a successor.
    pub(crate) fn kill(self) -> Place {
        let mut daemon = std::mem::ManuallyDrop::new(self);
        daemon.child.kill().unwrap();
        daemon.child.wait().unwrap();
        // SAFETY: the value is never used again, nor dropped.
        unsafe { std::ptr::read(&raw const daemon.place) }
    }

    /// Descriptors that the daemon holds.
    pub(crate) fn fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// CPU time that the daemon has used.
    pub(crate) fn cpu_ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_ascii_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// A connection after its hello.
    pub(crate) fn connect(&self, role: Role) -> Peer {
        Peer::connect(&self.place.socket(), role)
    }

    /// The daemon answers others, whatever somebody has just done to it.
    pub(crate) fn assert_alive(&self) {
        let peer = self.connect(Role::Control);
        peer.send(1, &Request::Ping(Empty {}), &[]);
        assert_eq!(peer.reply(), (1, Reply::Done(Empty {})));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An fmallocd for this place, not yet started; a later argument wins over these.
pub(crate) fn command(place: &Place, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fmallocd"));
    command.arg("--socket").arg(place.socket());
    if !args.contains(&"--swap") {
        command.arg("--swap").arg(place.path("swap"));
    }
    command.args(["--swap-size", "64M", "--ram", "256M"]).args(args);
    command.stderr(File::options().create(true).append(true).open(place.path("log")).unwrap());
    command
}

pub(crate) fn wait_for(child: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_until("the process ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// One end of a connection.
pub(crate) struct Peer {
    pub(crate) socket: OwnedFd,
}

impl Peer {
    /// Connects and says nothing.
    pub(crate) fn silent(path: &Path) -> Self {
        Self::over(transport::connect(path).unwrap())
    }

    pub(crate) fn over(socket: OwnedFd) -> Self {
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(60, 0)).unwrap();
        Self { socket }
    }

    pub(crate) fn connect(path: &Path, role: Role) -> Self {
        let peer = Self::silent(path);
        peer.hello(role);
        peer
    }

    pub(crate) fn hello(&self, role: Role) {
        self.send_raw(&Hello::new(role).encode(), &[]);
        let (reply, _) = self.recv().unwrap();
        assert_eq!(HelloReply::decode(&reply).unwrap().version, Some(1));
    }

    pub(crate) fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        transport::send(self.socket.as_fd(), bytes, fds).unwrap();
    }

    pub(crate) fn send(&self, id: u32, request: &Request, fds: &[BorrowedFd<'_>]) {
        self.send_raw(&codec::encode(id, request).unwrap(), fds);
    }

    pub(crate) fn recv(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), TransportError> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let (length, fds) = transport::recv(self.socket.as_fd(), &mut buffer)?;
        buffer.truncate(length);
        Ok((buffer, fds))
    }

    pub(crate) fn reply(&self) -> (u32, Reply) {
        codec::decode(&self.recv().unwrap().0).unwrap()
    }

    pub(crate) fn ask(&self, request: &Request) -> Reply {
        self.send(7, request, &[]);
        let (id, reply) = self.reply();
        assert_eq!(id, 7);
        reply
    }

    pub(crate) fn open(&self, budget: u64) -> Result<(Opened, Vec<OwnedFd>), Failure> {
        let open = Open { name: "test".to_owned(), budget, user_mode_only: false, group: None };
        self.send(1, &Request::Open(open), &[]);
        let (bytes, fds) = self.recv().unwrap();
        match codec::decode(&bytes).unwrap() {
            (1, Reply::Opened(opened)) => Ok((opened, fds)),
            (1, Reply::Error(failure)) => Err(failure),
            other => panic!("unexpected {other:?}"),
        }
    }

    /// The daemon refuses with this code and hangs up.
    pub(crate) fn assert_ended(&self, code: ErrorCode) -> Failure {
        let (_, reply) = self.reply();
        let Reply::Error(failure) = reply else { panic!("unexpected {reply:?}") };
        assert_eq!(failure.code, code, "{}", failure.text);
        self.assert_closed();
        failure
    }

    pub(crate) fn assert_closed(&self) {
        match self.recv() {
            Err(TransportError::Closed) => {}
            other => panic!("expected the end of the connection, got {other:?}"),
        }
    }
}

pub(crate) fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// Runs `work` on a thread that has another user's credentials. The raw calls change those of one thread only.
pub(crate) fn as_user<T: Send>(uid: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: plain numbers, and a list of `groups.len()` group ids.
            let results = unsafe {
                [
                    libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()),
                    libc::syscall(libc::SYS_setresgid, uid, uid, uid),
                    libc::syscall(libc::SYS_setresuid, uid, uid, uid),
                ]
            };
            assert_eq!(results, [0, 0, 0]);
            work()
        });
        thread.join().unwrap()
    })
}

/// A userfaultfd whose handshake has not been done, if this process may have one.
pub(crate) fn userfaultfd() -> Option<OwnedFd> {
    use std::os::fd::FromRawFd;
    let device = File::options().read(true).write(true).open("/dev/userfaultfd").ok()?;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags and gives a new descriptor that nobody else owns.
    unsafe {
        let fd = libc::ioctl(device.as_raw_fd(), 0xaa00, libc::O_CLOEXEC | libc::O_NONBLOCK);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
    }
}
