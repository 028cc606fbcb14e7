//! The control plane: one thread with a tokio runtime that accepts, authorises, keeps the books of the RAM pool and
//! answers `fmallocctl`. It touches no client's memory: what could block on that goes to the client's fault thread.
//!
//! - `server`: connections in, signals, the end; `listener`: the socket.
//! - `connection`: messages on one connection; `auth`: who is at its other end.
//! - `session`: the life of a paging client; `clients`: the list of them; `handover`: the fds they get.
//! - `operator`: requests of `fmallocctl`.
//! - `children`: forked children; `family`: clients with one budget.
//! - `pool`: the books of the RAM pool; `cgroup`: what a client's container can bear.

mod auth;
pub(crate) mod cgroup;
mod children;
mod clients;
mod connection;
mod family;
mod handover;
mod listener;
mod operator;
mod pool;
mod server;
mod session;
mod throttle;

use std::cell::{Cell, Ref, RefCell};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use fmalloc_proto::PAGE;
use fmalloc_proto::messages::{ErrorCode, Status};
use fmalloc_proto::num::to_u64;
use fmalloc_proto::size::Size;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::{LocalSet, spawn_local};
use tracing::{error, info, warn};

use crate::config::{Config, Limits, Mode, Service, make_directory_of};
use crate::fault::Birth;
use crate::fault::backing::Writers;
use crate::fault::reactor::Interposer;
use crate::service::reload::{Reloaded, Reloader};
use crate::service::{self, Inherited, memory};
use crate::swap::{Swap, SwapFile};
use auth::{Peer, Policy};
use children::Nursery;
use clients::Clients;
use connection::{Connection, RecvError, failure};
use family::Families;
use listener::Listener;
use pool::Pool;
use server::Owner;
use throttle::Throttle;

/// A peer that has something to say says it by then.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Requests of one connection that may be under way; beyond these no more are read from it.
const MAX_OUTSTANDING: usize = 64;
/// File descriptors that one client may cost the daemon, with some to spare.
const FDS_PER_CLIENT: usize = 12;
/// File descriptors for everything else: files, and peers that are being told why they are refused.
const FDS_BESIDE: usize = 128;

/// What all connections share.
#[derive(Debug)]
struct Daemon {
    config: RefCell<Rc<Config>>,
    policy: RefCell<Policy>,
    reloader: Reloader,
    swap: Arc<Swap>,
    writers: Arc<Writers>,
    pool: Rc<Pool>,
    clients: Clients,
    families: Families,
    nursery: Nursery,
    /// Where fault threads deliver forked children.
    births: UnboundedSender<Birth>,
    throttle: Throttle,
    draining: Cell<bool>,
    started: Instant,
}

/// Runs the daemon until it is told to end, or its private client has ended. SIGHUP has `reloader` read the
/// configuration again.
///
/// # Errors
/// What kept it from starting, with what to do about it.
pub fn run(config: Config, reloader: Reloader) -> anyhow::Result<()> {
    run_interposed(config, reloader, None)
}

/// [`run`] with something between fault threads and the swap file.
///
/// # Errors
/// As [`run`].
pub fn run_interposed(
    mut config: Config,
    reloader: Reloader,
    interposer: Option<Box<dyn Interposer>>,
) -> anyhow::Result<()> {
    raise_fd_limit(&mut config.limits);
    if config.features.io_uring
        && let Err(error) = io_uring::IoUring::new(2)
    {
        warn!("swap I/O goes without io_uring, which the system refuses: {error}");
        config.features.io_uring = false;
    }
    // Both before the swap file, whose creation may take long.
    let mut inherited = None;
    let private_socket = match &mut config.mode {
        Mode::Service(service) => {
            inherited = service::inherited_socket()?;
            prepare_service(service, inherited.as_ref())?;
            None
        }
        Mode::Private(private) => {
            let socket = adopt(private.fd)?;
            private.socket = listening_name(&socket);
            Some(socket)
        }
    };
    let mut swap = Swap::new(open_swap(&config)?)?;
    swap.interposer = interposer;
    let swap = Arc::new(swap);
    let (births, delivered) = unbounded_channel();
    let daemon = Rc::new(Daemon::new(config, reloader, swap, births));
    daemon.log_start();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = LocalSet::new();
    let result = tasks.block_on(&runtime, async {
        spawn_local(children::receive(Rc::clone(&daemon), delivered));
        match (&daemon.config().mode, private_socket) {
            (Mode::Service(service), _) => {
                let listener = match inherited {
                    Some(inherited) => Listener::inherit(inherited)?,
                    None => Listener::bind(service)?,
                };
                server::run(&daemon, listener, None).await
            }
            (Mode::Private(private), Some(socket)) if !private.socket.is_empty() => {
                let owner = private.owner.context("a socket that listens needs a --private-owner")?;
                let owner = auth::open_pidfd(owner).context("--private-owner: no such process")?;
                let listener = Listener::inherit(Inherited { socket, path: (&private.socket).into() })?;
                server::run(&daemon, listener, Some(Owner::new(owner)?)).await
            }
            (Mode::Private(_), Some(socket)) => server::run_private(&daemon, socket).await,
            (Mode::Private(_), None) => Ok(()),
        }
    });
    // The process ends now. A fault thread must not take the end of its session for the end of its client, whose
    // memory may still be needed by a successor.
    std::mem::forget(tasks);
    std::mem::forget(daemon);
    runtime.shutdown_background();
    result
}

fn open_swap(config: &Config) -> anyhow::Result<SwapFile> {
    Ok(match &config.mode {
        Mode::Service(service) => SwapFile::open(&service.swap, service.swap_size)?,
        Mode::Private(private) => SwapFile::temporary(&private.swap_dir, private.swap_size)?,
    })
}

fn prepare_service(service: &mut Service, inherited: Option<&Inherited>) -> anyhow::Result<()> {
    if let Some(inherited) = inherited {
        service.socket.clone_from(&inherited.path);
    }
    for (path, mode) in [(&service.socket, 0o755), (&service.swap, 0o700)] {
        make_directory_of(path, mode).with_context(|| format!("cannot create the directory of {path:?}"))?;
    }
    memory::lower_oom_score();
    memory::lock();
    Ok(())
}

/// Takes over the socket that a private daemon was started with.
fn adopt(fd: RawFd) -> anyhow::Result<OwnedFd> {
    if fd <= 2 {
        bail!("--private-fd {fd}: descriptors 0 to 2 are not for sockets");
    }
    // SAFETY: fcntl with F_GETFD only looks at the number.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        bail!("--private-fd {fd}: no such descriptor was inherited");
    }
    // SAFETY: it is open, and whoever started this process passed it for this use; nothing else here knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if getsockopt(&socket, sockopt::SockType) != Ok(SockType::SeqPacket) {
        bail!("--private-fd {fd}: not a SOCK_SEQPACKET socket");
    }
    fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(socket)
}

/// The abstract name of a socket that listens, with an `@` in front; of any other, nothing.
fn listening_name(socket: &OwnedFd) -> String {
    let address = getsockname::<UnixAddr>(socket.as_raw_fd());
    match (getsockopt(socket, sockopt::AcceptConn), address) {
        (Ok(true), Ok(address)) => address
            .as_abstract()
            .map(|name| format!("@{}", String::from_utf8_lossy(name)))
            .unwrap_or_default(),
        _ => String::new(),
    }
}

/// Takes as many file descriptors as the system allows, and no more clients and connections than those suffice for:
/// beyond that one user's clients would make the others fail.
fn raise_fd_limit(limits: &mut Limits) {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let fds = if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft };
    let fds = usize::try_from(fds).unwrap_or(usize::MAX);
    let tools = limits.connections.saturating_sub(limits.clients);
    let clients = fds.saturating_sub(FDS_BESIDE.saturating_add(tools)) / FDS_PER_CLIENT;
    if clients < limits.clients {
        limits.clients = clients.max(1);
        limits.connections = limits.clients.saturating_add(tools).min(fds / 2);
        let Limits { clients, connections, .. } = limits;
        warn!(
            "{fds} file descriptors suffice for {clients} clients and {connections} connections; raise LimitNOFILE"
        );
    }
}

/// Files that clients may have mapped at once: each takes two descriptors of those that nothing else needs.
fn file_limit(limits: &Limits) -> usize {
    let fds =
        getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX));
    let tools = limits.connections.saturating_sub(limits.clients);
    let others = limits.clients.saturating_mul(FDS_PER_CLIENT).saturating_add(FDS_BESIDE + tools);
    (fds.saturating_sub(others) / 2).max(FDS_BESIDE / 4)
}

fn policy(config: &Config) -> Policy {
    let (uids, gids) = match &config.mode {
        Mode::Service(service) => (&service.allow_uids[..], &service.allow_gids[..]),
        Mode::Private(_) => (&[][..], &[][..]),
    };
    Policy::new(nix::unistd::geteuid().as_raw(), uids, gids)
}

impl Daemon {
    fn new(config: Config, reloader: Reloader, swap: Arc<Swap>, births: UnboundedSender<Birth>) -> Self {
        Self {
            policy: RefCell::new(policy(&config)),
            reloader,
            swap,
            writers: Arc::new(Writers::new(file_limit(&config.limits))),
            pool: Pool::new(config.pool),
            clients: Clients::default(),
            families: Families::default(),
            nursery: Nursery::default(),
            births,
            throttle: Throttle::new(),
            draining: Cell::new(false),
            started: Instant::now(),
            config: RefCell::new(Rc::new(config)),
        }
    }

    /// What is in effect now.
    fn config(&self) -> Rc<Config> {
        Rc::clone(&self.config.borrow())
    }

    fn policy(&self) -> Ref<'_, Policy> {
        self.policy.borrow()
    }

    fn is_service(&self) -> bool {
        matches!(self.config().mode, Mode::Service(_))
    }

    /// Reads the configuration again. Clients that are connected stay, whatever it says.
    fn reload(&self) {
        if !self.is_service() {
            info!("SIGHUP: a private daemon has no configuration to read again");
            return;
        }
        if self.draining.get() {
            info!("SIGHUP: nothing is read any more, since the daemon is ending");
            return;
        }
        service::reloading();
        match self.reloader.reload(&self.config()) {
            Ok(Reloaded { mut config, changed, later }) => {
                raise_fd_limit(&mut config.limits);
                self.policy.replace(policy(&config));
                self.config.replace(Rc::new(config));
                let changed = if changed.is_empty() { "nothing".to_owned() } else { changed.join(", ") };
                info!("SIGHUP: the configuration was read again; changed: {changed}");
                if !later.is_empty() {
                    warn!("changed, but only in effect after a restart of fmallocd: {}", later.join(", "));
                }
            }
            Err(error) => error!("SIGHUP: the configuration stays as it was: {error}"),
        }
        service::ready("serving");
    }

    fn log_start(&self) {
        let config = self.config();
        info!(
            version = env!("CARGO_PKG_VERSION"),
            pid = std::process::id(),
            socket = self.socket_name(),
            swap = self.swap_name(),
            swap_size = %Size(self.swap.file.max_bytes()),
            direct_io = self.swap.file.direct(),
            io_uring = config.features.io_uring,
            ram = %Size(config.pool),
            default_budget = %Size(config.default_budget),
            max_budget = %Size(config.max_budget),
            "fmallocd starts"
        );
        if self.hands_out_device()
            && let Err(error) = handover::open_device()
        {
            warn!(
                "clients need a userfaultfd of their own, since /dev/userfaultfd cannot be opened: {error}"
            );
        }
    }

    fn hands_out_device(&self) -> bool {
        !matches!(&self.config().mode, Mode::Private(private) if private.user_mode_only)
    }

    fn socket_name(&self) -> String {
        match &self.config().mode {
            Mode::Service(service) => service.socket.display().to_string(),
            Mode::Private(private) => private.socket.clone(),
        }
    }

    fn swap_name(&self) -> String {
        self.swap.file.path().map(|path| path.display().to_string()).unwrap_or_default()
    }

    fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            socket: self.socket_name(),
            swap_path: self.swap_name(),
            swap_bytes: self.swap.file.max_bytes(),
            swap_claimed_bytes: self.swap.claimed_pages().saturating_mul(PAGE),
            swap_used_bytes: self.swap.used_slots().saturating_mul(PAGE),
            direct_io: self.swap.file.direct(),
            io_uring: self.config().features.io_uring,
            pool_bytes: self.pool.size(),
            pool_granted_bytes: self.pool.granted(),
            clients: to_u64(self.clients.len()),
            regions: self.clients.all().iter().map(|client| u64::from(client.regions.get())).sum(),
            draining: self.draining.get(),
        }
    }

    /// Ends a connection that has failed: a peer that broke the protocol is told so.
    async fn reject(&self, connection: &Connection, peer: &Peer, error: RecvError) {
        if !matches!(error, RecvError::Closed) && self.throttle.allows() {
            warn!(pid = peer.pid, uid = peer.uid, "connection ended: {error}");
        }
        if let RecvError::Violation { id, text } = error {
            connection.refuse(id, failure(ErrorCode::Protocol, text)).await;
        }
    }
}
