//! Who pages the program: the service, or a daemon that is started for this program alone. Either gives a group, whose
//! budget all processes of the program share.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fmalloc_proto::groups::Token;
use fmalloc_proto::messages::{Budget, Empty, Reply, Request, Status};
use fmalloc_proto::transport;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{ForkResult, fork, setsid};

use super::super::link::Link;
use super::super::{CtlError, places};
use super::{FAILED, Failure, Options};

/// Addresses that a process reserves for its heap, and as many for its mappings: twice what it could fill, since both
/// become fragmented, within these.
const RESERVE: (u64, u64) = (1 << 30, 4 << 40);

/// A daemon, and the group that was made there.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) link: Link,
    /// For FMALLOC_SOCKET.
    pub(super) socket: PathBuf,
    pub(super) token: Token,
    pub(super) reserve: u64,
    /// The daemon's process, if it serves this program alone: its memory counts as the program's.
    pub(super) own: Option<u32>,
}

impl Server {
    /// The service if it runs and nothing is wanted that it cannot give; else a daemon of our own.
    pub(super) fn choose(options: &Options, socket: Option<&Path>, budget: u64) -> Result<Self, Failure> {
        let private = options.private || options.swap_size.is_some() || options.swap_dir.is_some();
        if !private {
            match Link::open(socket) {
                Ok(link) => {
                    return Self::join(link, budget, false).map_err(|failure| Failure {
                        text: format!("{}; --private starts a daemon for this program alone", failure.text),
                        ..failure
                    });
                }
                Err(CtlError::NoDaemon(_)) if socket.is_none() => {}
                Err(error) => return Err(Failure::new(FAILED, error.to_string())),
            }
        }
        start(options, budget)
    }

    fn join(mut link: Link, budget: u64, own: bool) -> Result<Self, Failure> {
        let failed = |error: CtlError| Failure::new(FAILED, error.to_string());
        let unexpected = |reply| failed(super::super::unexpected(&reply));
        let Status { swap_bytes, pid, .. } = match link.ask(&Request::Status(Empty {})).map_err(failed)? {
            Reply::Status(status) => *status,
            other => return Err(unexpected(other)),
        };
        let token = match link.ask(&Request::NewGroup(Budget { bytes: budget })).map_err(failed)? {
            Reply::Group(group) => group.token,
            other => return Err(unexpected(other)),
        };
        let (least, most) = RESERVE;
        let reserve = swap_bytes.saturating_mul(2).clamp(least, most) / 4096 * 4096;
        let socket = link.path().to_owned();
        Ok(Self { link, socket, token, reserve, own: own.then_some(pid) })
    }
}

/// Starts a daemon that ends when this process, or the program that takes its place, and all that it started have ended.
fn start(options: &Options, budget: u64) -> Result<Server, Failure> {
    let failed = |what: &str, error: std::io::Error| Failure::new(FAILED, format!("{what}: {error}"));
    let program = places::find_daemon().ok_or_else(|| {
        let text = "fmallocd is missing: not beside this program, in PATH or in /usr/libexec/fmalloc; install it, or \
                    name it in FMALLOC_DAEMON";
        Failure::new(FAILED, text)
    })?;
    let (name, listener) = listen().map_err(|error| failed("cannot make a socket", error))?;
    let mut said = File::from(
        memfd_create("fmallocd-log", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| failed("cannot make a file for the daemon's messages", errno.into()))?,
    );
    let (log, other) = match std::env::var_os("FMALLOC_DAEMON_LOG").filter(|path| !path.is_empty()) {
        Some(path) => {
            let file = File::options().append(true).create(true).open(&path);
            let file =
                file.map_err(|error| failed(&format!("FMALLOC_DAEMON_LOG {}", path.display()), error))?;
            (file.try_clone(), file.try_clone())
        }
        None => (said.try_clone(), said.try_clone()),
    };
    let number = listener.as_raw_fd();
    let mut command = Command::new(&program);
    command.args(["--private", "--private-fd", &number.to_string()]);
    command.args(["--private-owner", &std::process::id().to_string()]);
    command.args(["--ram", &budget.to_string()]);
    if let Some(size) = options.swap_size {
        command.args(["--swap-size", &size.0.to_string()]);
    }
    let dir = options
        .swap_dir
        .clone()
        .or_else(|| std::env::var_os("FMALLOC_SWAP_DIR").filter(|dir| !dir.is_empty()).map(PathBuf::from));
    if let Some(dir) = dir {
        let dir = std::path::absolute(&dir).map_err(|error| failed("--swap-dir", error))?;
        command.arg("--swap-dir").arg(dir);
    }
    command.current_dir("/").env_remove("LD_PRELOAD").env_remove("LD_AUDIT").stdin(Stdio::null());
    command.stdout(log.map_err(|error| failed("a descriptor", error))?);
    command.stderr(other.map_err(|error| failed("a descriptor", error))?);
    // SAFETY: only system calls, in a child of a process with one thread; the descriptor is open in the child as it is
    // here.
    unsafe { command.pre_exec(move || detach(number)) };
    let mut child =
        command.spawn().map_err(|error| failed(&format!("cannot start {}", program.display()), error))?;
    // This is the child between us and the daemon.
    let _ = child.wait();
    drop(listener);
    let opened = Link::open(Some(&name)).map_err(|error| Failure::new(FAILED, error.to_string()));
    opened.and_then(|link| Server::join(link, budget, true)).map_err(|failure| {
        let mut text = String::new();
        let _ = said.rewind().and_then(|()| said.read_to_string(&mut text));
        match text.trim() {
            "" => failure,
            said => Failure::new(FAILED, format!("the daemon cannot start: {said}")),
        }
    })
}

/// A socket that listens at a name nobody else has, in no file system: nothing is left of it whatever happens.
fn listen() -> std::io::Result<(PathBuf, OwnedFd)> {
    loop {
        let mut random = [0; 8];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let name =
            PathBuf::from(format!("@fmalloc-run-{}-{:016x}", std::process::id(), u64::from_ne_bytes(random)));
        match transport::listen_abstract(&name) {
            Ok(socket) => return Ok((name, socket)),
            Err(Errno::EADDRINUSE) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// In the child: leaves the session, and has a child of its own go on, which is nobody's here. The program's `wait` does
/// not see it, and what the terminal sends does not reach it.
fn detach(socket: i32) -> std::io::Result<()> {
    setsid()?;
    // SAFETY: the descriptor is open; this process has one thread.
    unsafe {
        fcntl(BorrowedFd::borrow_raw(socket), FcntlArg::F_SETFD(FdFlag::empty()))?;
        match fork()? {
            ForkResult::Child => {}
            ForkResult::Parent { .. } => libc::_exit(0),
        }
        // Signals that the caller ignores or blocks are not the daemon's to ignore or block.
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
    Ok(())
}
