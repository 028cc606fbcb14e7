//! Reaching a daemon and the handshake with it, up to the point where the daemon serves this process's faults. All of
//! it runs on the agent's thread, so that every descriptor lands in the agent's own table.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fmalloc_proto::codec;
use fmalloc_proto::groups::{Adopt, Ready, Token};
use fmalloc_proto::hello::{Hello, HelloReply, Role};
use fmalloc_proto::limits::MAX_MESSAGE;
use fmalloc_proto::messages::{Attach, Open, Opened, Reply, Request, Staging};
use fmalloc_proto::ring::{Layout, Ring, has_len};
use fmalloc_proto::switches::Disabled;
use fmalloc_proto::transport::{self, TransportError};
use nix::errno::Errno;

use crate::error::Error;
use crate::options::variable;
use crate::spawn::Launch;
use crate::sys::{self, Uffd};

/// Longest wait for one answer of the handshake. A daemon that takes longer is stuck, and nothing is lost yet.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the daemon is.
#[derive(Debug)]
pub(crate) enum Route {
    /// Behind one of these sockets.
    Sockets(Vec<PathBuf>),
    /// Not running yet.
    Private(Box<Launch>),
}

/// What to ask the daemon for.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// For `fmallocctl`.
    pub(crate) name: String,
    /// Bytes; 0 for the default.
    pub(crate) budget: u64,
    /// A userfaultfd that cannot serve system calls will do.
    pub(crate) user_mode_only: bool,
    /// Forked children shall have the regions.
    pub(crate) inherit: bool,
    /// The group whose budget this client shares.
    pub(crate) group: Option<Token>,
    /// Features of the kernel that are not to be used.
    pub(crate) disabled: Disabled,
}

/// What the daemon gave.
#[derive(Debug)]
pub(crate) struct Opening {
    /// Number, budget, ring.
    pub(crate) opened: Opened,
    /// The eviction ring.
    pub(crate) ring: Ring,
    /// Wakes the agent.
    pub(crate) agent_bell: OwnedFd,
    /// Wakes the daemon.
    pub(crate) daemon_bell: OwnedFd,
    /// An open `/dev/userfaultfd`.
    pub(crate) device: Option<OwnedFd>,
}

/// The sockets to try, in order.
pub(crate) fn sockets(chosen: Option<&Path>) -> Vec<PathBuf> {
    if let Some(path) = chosen {
        return vec![path.to_owned()];
    }
    let named = variable("FMALLOC_SOCKET").map(PathBuf::from);
    let system = PathBuf::from("/run/fmalloc/fmallocd.sock");
    let own = variable("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("fmalloc/fmallocd.sock"));
    named.into_iter().chain([system]).chain(own).collect()
}

/// A socket to the daemon, the hello not yet said. `again`: it runs already, for the parent of this process.
///
/// # Errors
/// [`Error::NoDaemon`], [`Error::Denied`], or those of starting a private daemon.
pub(crate) fn reach(route: &Route, again: bool) -> Result<OwnedFd, Error> {
    let paths = match route {
        Route::Private(launch) if again => return launch.reach_again(),
        Route::Private(launch) => return launch.start(),
        Route::Sockets(paths) => paths,
    };
    let mut tried = Vec::new();
    let mut denied = None;
    for path in paths {
        match transport::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(errno) => {
                if errno == Errno::EACCES {
                    denied.get_or_insert(path);
                }
                tried.push((path.clone(), errno.desc().to_owned()));
            }
        }
    }
    let Some(path) = denied else { return Err(Error::NoDaemon { tried }) };
    let text =
        format!("no permission for {}; the user must be in its group (usually fmalloc)", path.display());
    Err(Error::Denied { text })
}

/// Agrees on a protocol version.
///
/// # Errors
/// [`Error::Conversation`].
pub(crate) fn greet(socket: BorrowedFd<'_>) -> Result<(), Error> {
    transport::send(socket, &Hello::new(Role::Pager).encode(), &[]).map_err(|error| lost(&error))?;
    let mut buffer = [0; 64];
    let (len, _) = receive(socket, &mut buffer, Instant::now() + PATIENCE)?;
    let reply = buffer.get(..len).unwrap_or_default();
    let reply = HelloReply::decode(reply).map_err(|error| Error::conversation(error.to_string()))?;
    let ours = Hello::new(Role::Pager);
    match reply.version {
        Some(version) if (ours.min..=ours.max).contains(&version) => Ok(()),
        _ => Err(Error::conversation(format!(
            "the daemon speaks protocol versions {} to {}, this library {} to {}; update the older one",
            reply.min, reply.max, ours.min, ours.max
        ))),
    }
}

/// Opens this process's account with the daemon.
///
/// # Errors
/// The daemon's refusal, or [`Error::Conversation`].
pub(crate) fn open(socket: BorrowedFd<'_>, wanted: &Wanted) -> Result<Opening, Error> {
    let request = Request::Open(Open {
        name: wanted.name.clone(),
        budget: wanted.budget,
        user_mode_only: wanted.user_mode_only,
        group: wanted.group,
    });
    let (reply, fds) = ask(socket, 1, &request, &[])?;
    let Reply::Opened(opened) = reply else { return Err(unexpected(&reply)) };
    receive_opening(opened, fds)
}

/// Tells the daemon whose child this process is, and gets its userfaultfd.
///
/// # Errors
/// The daemon's refusal, or [`Error::Conversation`].
pub(crate) fn adopt(socket: BorrowedFd<'_>, token: Token) -> Result<(Opening, Uffd), Error> {
    let (reply, mut fds) = ask(socket, 1, &Request::Adopt(Adopt { token }), &[])?;
    let Reply::Adopted(opened) = reply else { return Err(unexpected(&reply)) };
    // As many as the reply says, which is one at least.
    let uffd = Uffd::received(fds.remove(0));
    Ok((receive_opening(opened, fds)?, uffd))
}

/// The child's agent can move pages.
///
/// # Errors
/// The daemon's refusal, or [`Error::Conversation`].
pub(crate) fn ready(socket: BorrowedFd<'_>) -> Result<(), Error> {
    let agent_tid = u32::try_from(sys::thread_id()).unwrap_or(0);
    match ask(socket, 2, &Request::Ready(Ready { agent_tid }), &[])? {
        (Reply::Done(_), _) => Ok(()),
        (other, _) => Err(unexpected(&other)),
    }
}

fn receive_opening(opened: Opened, fds: Vec<OwnedFd>) -> Result<Opening, Error> {
    let mut fds = fds.into_iter();
    let (Some(memory), Some(agent_bell), Some(daemon_bell), device) =
        (fds.next(), fds.next(), fds.next(), fds.next())
    else {
        return Err(Error::conversation("the daemon sent too few file descriptors"));
    };
    let layout = Layout::new(opened.ring_batches, opened.ring_batch_pages)
        .ok_or_else(|| Error::conversation("the daemon's ring has an impossible size"))?;
    let map = || {
        if has_len(memory.as_fd(), layout)? { Ring::map(memory.as_fd(), layout).map(Some) } else { Ok(None) }
    };
    let ring = map()
        .map_err(|error| Error::System {
            what: "mapping the eviction ring".to_owned(),
            errno: error.raw_os_error().unwrap_or(0),
        })?
        .filter(Ring::is_valid)
        .ok_or_else(|| Error::conversation("the daemon's ring is not one of this version"))?;
    Ok(Opening { opened, ring, agent_bell, daemon_bell, device })
}

/// Makes a userfaultfd for this process.
///
/// # Errors
/// [`Error::NoUserfaultfd`], [`Error::Unsupported`], or a failure of the system.
pub(crate) fn make_uffd(device: Option<&OwnedFd>, user_mode_only: bool) -> Result<Uffd, Error> {
    Uffd::create(device.map(AsFd::as_fd), user_mode_only).map_err(|errno| match errno {
        Errno::EPERM | Errno::EACCES => Error::NoUserfaultfd { reason: errno.desc().to_owned() },
        Errno::ENOSYS => Error::Unsupported { what: "userfaultfd".to_owned() },
        _ => Error::system("creating a userfaultfd", errno),
    })
}

/// Hands the userfaultfd over; from here on the daemon may ask the agent to evict.
///
/// # Errors
/// The daemon's refusal, or [`Error::Conversation`].
pub(crate) fn attach(
    socket: BorrowedFd<'_>,
    uffd: &Uffd,
    staging: Option<Staging>,
    inherit: bool,
) -> Result<(), Error> {
    let agent_tid = u32::try_from(sys::thread_id()).unwrap_or(0);
    match ask(socket, 2, &Request::Attach(Attach { agent_tid, staging, inherit }), &[uffd.as_fd()])? {
        (Reply::Attached(_), _) => Ok(()),
        (other, _) => Err(unexpected(&other)),
    }
}

fn ask(
    socket: BorrowedFd<'_>,
    id: u32,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<(Reply, Vec<OwnedFd>), Error> {
    let frame = codec::encode(id, request).map_err(|error| Error::invalid(error.to_string()))?;
    transport::send(socket, &frame, fds).map_err(|error| lost(&error))?;
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let (len, fds) = receive(socket, &mut buffer, deadline)?;
        let bytes = buffer.get(..len).unwrap_or_default();
        let (answered, reply) =
            codec::decode::<Reply>(bytes).map_err(|error| Error::conversation(error.to_string()))?;
        match reply {
            // A notice that nobody asked for.
            _ if answered == 0 => {}
            _ if answered != id => return Err(unexpected(&reply)),
            Reply::Error(failure) => return Err(failure.into()),
            _ if fds.len() != reply.fd_count() => {
                return Err(Error::conversation("a reply came with the wrong number of file descriptors"));
            }
            _ => return Ok((reply, fds)),
        }
    }
}

fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    deadline: Instant,
) -> Result<(usize, Vec<OwnedFd>), Error> {
    let left = deadline.saturating_duration_since(Instant::now());
    let ready = sys::poll(&mut [sys::watch(Some(socket), libc::POLLIN)], Some(left))
        .map_err(|errno| Error::system("waiting for the daemon", errno))?;
    if !ready {
        let seconds = PATIENCE.as_secs();
        return Err(Error::conversation(format!("the daemon has not answered for {seconds} seconds")));
    }
    transport::recv(socket, buffer).map_err(|error| lost(&error))
}

fn lost(error: &TransportError) -> Error {
    Error::conversation(match error {
        TransportError::Closed => "it closed the connection before it was ready; its log says why \
             (that of a private daemon goes to the file named in FMALLOC_DAEMON_LOG)"
            .to_owned(),
        other => other.to_string(),
    })
}

fn unexpected(reply: &Reply) -> Error {
    Error::conversation(format!("unexpected reply {reply:?}"))
}
