//! A paging client's life on the control thread: Open, Attach, requests, and an end that gives back its grant only
//! when its fault thread has given back everything else. Requests are pipelined: commands reach the fault thread in
//! the order in which they came, answers go out as they are ready.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::messages::{
    Attach, Attached, Budget, Empty, ErrorCode, Failure, Flush, FlushUntil, Open, Opened, Register,
    RegisterFile, RegisterLike, Registered, Reply, Request,
};
use fmalloc_proto::ring::Layout;
use fmalloc_proto::size::Size;
use fmalloc_proto::validate;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_local;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{error, info, warn};

use super::auth::{self, Peer};
use super::children;
use super::clients::{Client, answer};
use super::connection::{Connection, Incoming, RecvError, failure, watch};
use super::family::Family;
use super::handover::{self, Handover};
use super::{Daemon, HANDSHAKE, MAX_OUTSTANDING, cgroup};
use crate::fault::backing::{Backing, file_failure};
use crate::fault::handle::Answer;
use crate::fault::{self, Command, Setup, ring_layout};
use crate::pager::Sizes;

/// Between Open and Attach a client only makes a userfaultfd, on a machine that may be busy; meanwhile it holds a
/// grant.
const ATTACH_TIME: Duration = Duration::from_secs(30);
/// How often a connected client's fault thread is looked after; it ends by itself only if something broke.
const WATCH: Duration = Duration::from_secs(1);
/// The same once the agent has gone: an exec shows in no other way.
const WATCH_GONE: Duration = Duration::from_millis(50);
/// First and longest pause while a fault thread is to end.
const ENDING: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(250));

/// How long a new client waits for what others that have ended are about to give back.
const ENDING_TIME: Duration = Duration::from_secs(2);

/// A reply that is still to come.
pub(crate) type Pending = Pin<Box<dyn Future<Output = Reply>>>;

/// How a client's service ends.
pub(crate) enum End {
    /// The process has ended.
    Exited,
    /// The connection has ended; the process may live on.
    Disconnected,
    /// The fault thread has ended by itself.
    ThreadEnded,
    /// The client has said goodbye, in this request.
    Goodbye(u32),
}

/// Serves a paging client from its first request until nothing of it is left.
pub(crate) async fn run(daemon: Rc<Daemon>, connection: Rc<Connection>, peer: Peer) {
    let first = match timeout(HANDSHAKE, connection.request()).await {
        Ok(Ok(first)) => first,
        Ok(Err(error)) => return daemon.reject(&connection, &peer, error).await,
        Err(_) => return,
    };
    begin(daemon, connection, peer, first).await;
}

/// Whether a first request shows a token that the daemon has given out.
pub(crate) fn is_invited(daemon: &Daemon, first: &Request) -> bool {
    match first {
        Request::Open(Open { group: Some(token), .. }) => daemon.families.find(*token).is_ok(),
        Request::Adopt(adopt) => daemon.nursery.expects(adopt.token),
        _ => false,
    }
}

/// [`run`] from the first request on.
pub(crate) async fn begin(daemon: Rc<Daemon>, connection: Rc<Connection>, peer: Peer, first: Incoming) {
    let open = match first.request {
        Request::Open(open) => open,
        Request::Adopt(adopt) => {
            return children::adopt(&daemon, &connection, peer, first.id, adopt.token).await;
        }
        _ => {
            let error = RecvError::violation(first.id, "the first request must be Open or Adopt");
            return daemon.reject(&connection, &peer, error).await;
        }
    };
    let since = Instant::now();
    let admitted = loop {
        match admit(&daemon, &connection, &peer, &open) {
            // A program that follows upon another should not be refused for what that one is about to give back.
            Err(Failure { code: ErrorCode::PoolFull | ErrorCode::Limit, .. })
                if since.elapsed() < ENDING_TIME && daemon.clients.any_ending() =>
            {
                sleep(ENDING.0).await;
            }
            admitted => break admitted,
        }
    };
    let opened = match admitted {
        Ok(opened) => opened,
        Err(failure) => {
            if daemon.throttle.allows() {
                warn!(pid = peer.pid, uid = peer.uid, name = open.name, "client refused: {}", failure.text);
            }
            return connection.refuse(first.id, failure).await;
        }
    };
    let client = Rc::clone(&opened.client);
    let (end, exit) = serve(&daemon, &connection, first.id, opened).await;
    finish(&daemon, &client, &end, Some(&exit)).await;
    if let End::Goodbye(id) = end {
        let _ = timeout(HANDSHAKE, connection.reply(id, &Reply::Done(Empty {}), &[])).await;
    }
    connection.end();
}

/// What a granted Open has brought about.
struct Admitted {
    client: Rc<Client>,
    exit: AsyncFd<OwnedFd>,
    handover: Handover,
    layout: Layout,
    device: Option<File>,
    /// Its family was there before.
    joins: bool,
}

fn admit(
    daemon: &Rc<Daemon>,
    connection: &Rc<Connection>,
    peer: &Peer,
    open: &Open,
) -> Result<Admitted, Failure> {
    let system = |what: &str, error: std::io::Error| {
        failure(ErrorCode::System, format!("the daemon cannot {what}: {error}"))
    };
    validate::request(&Request::Open(open.clone())).map_err(|error| failure(ErrorCode::Invalid, error))?;
    if daemon.draining.get() {
        return Err(draining());
    }
    let limits = daemon.config().limits;
    if daemon.clients.len() >= limits.clients {
        let text = format!("{} clients are the most that fmallocd takes (max_clients)", limits.clients);
        return Err(failure(ErrorCode::Limit, text));
    }
    if daemon.clients.of_uid(peer.uid) >= limits.clients_per_uid {
        let (most, uid) = (limits.clients_per_uid, peer.uid);
        let text = format!("{most} clients are the most that uid {uid} may have (max_clients_per_uid)");
        return Err(failure(ErrorCode::Limit, text));
    }
    let exit = auth::pidfd(connection.as_fd(), peer, daemon.config().features.peer_pidfd)
        .map_err(|error| system("watch your process", error.into()))?;
    let exit = watch(exit).map_err(|error| system("watch your process", error))?;
    let family = match open.group {
        Some(token) => daemon.families.find(token)?,
        None => {
            let budget = if open.budget == 0 { default_budget(daemon, peer) } else { open.budget };
            check_budget(budget, daemon.config().max_budget)?;
            let grant = daemon.pool.grant(budget).map_err(|error| failure(ErrorCode::PoolFull, error))?;
            Family::new(grant)
        }
    };
    let layout = match open.group {
        Some(_) => ring_layout((family.bytes() / 16).max(MIN_BUDGET)),
        None => ring_layout(family.bytes()),
    };
    if open.group.is_some() && !family.shared.has_room(Sizes::for_budget(0, layout).overhead()) {
        let text = format!("the group's budget of {} is too small for another process", Size(family.bytes()));
        return Err(failure(ErrorCode::Limit, text));
    }
    let budget = family.bytes();
    let handover = Handover::new(layout).map_err(|error| system("make a ring", error))?;
    // Without it the client makes its userfaultfd by the system call, or says what it lacks.
    let device = if daemon.hands_out_device() { handover::open_device().ok() } else { None };
    let client = daemon.clients.enter(peer.clone(), open.name.clone(), family, Rc::clone(connection));
    if daemon.throttle.allows() {
        let budget = Size(budget);
        info!(client = client.number, pid = peer.pid, uid = peer.uid, name = open.name, %budget, "client opened");
    }
    Ok(Admitted { client, exit, handover, layout, device, joins: open.group.is_some() })
}

/// What a client gets that asks for no certain budget: no more than its control group can bear.
fn default_budget(daemon: &Daemon, peer: &Peer) -> u64 {
    let bearable = cgroup::memory_limit(peer.pid).map_or(u64::MAX, |limit| limit / 4 * 3);
    daemon.config().default_budget.min(bearable.max(MIN_BUDGET))
}

pub(crate) fn check_budget(bytes: u64, most: u64) -> Result<(), Failure> {
    if bytes <= most {
        return Ok(());
    }
    let text =
        format!("a budget of {} is more than a client may have, {} (max_budget)", Size(bytes), Size(most));
    Err(failure(ErrorCode::Limit, text))
}

fn draining() -> Failure {
    failure(
        ErrorCode::Draining,
        "fmallocd is shutting down and takes no new clients; connect to its successor",
    )
}

/// From the answer to Open until the client's service must end.
async fn serve(
    daemon: &Rc<Daemon>,
    connection: &Rc<Connection>,
    open_id: u32,
    opened: Admitted,
) -> (End, AsyncFd<OwnedFd>) {
    let Admitted { client, exit, handover, layout, device, joins } = opened;
    let reply = Reply::Opened(Opened {
        client: client.number,
        budget: client.family.bytes(),
        ring_batches: layout.batches(),
        ring_batch_pages: layout.batch_pages(),
        device: device.is_some(),
    });
    let until_attach = async {
        if connection.reply(open_id, &reply, &handover.fds(device.as_ref())).await.is_err() {
            return Err(End::Disconnected);
        }
        drop(device);
        receive_attach(daemon, connection, &client).await
    };
    let received = tokio::select! {
        received = timeout(ATTACH_TIME, until_attach) => received.unwrap_or(Err(End::Disconnected)),
        _ = exit.readable() => Err(End::Exited),
    };
    // From here on nothing is cancelled: a fault thread that was started must be known.
    let attached = match received {
        Ok(received) => attach(daemon, connection, &client, received, (handover, layout), joins).await,
        Err(end) => Err(end),
    };
    let end = match attached {
        Ok(()) => requests(daemon, connection, &client, &exit).await,
        Err(end) => end,
    };
    (end, exit)
}

/// A client's Attach, with a descriptor that is a userfaultfd.
struct Received {
    id: u32,
    attach: Attach,
    uffd: OwnedFd,
}

async fn receive_attach(
    daemon: &Rc<Daemon>,
    connection: &Rc<Connection>,
    client: &Client,
) -> Result<Received, End> {
    let error = match connection.request().await {
        Ok(Incoming { id, request: Request::Goodbye(_), .. }) => return Err(End::Goodbye(id)),
        Ok(Incoming { id, request: request @ Request::Attach(attach), mut fds }) => {
            match (validate::request(&request), fds.pop()) {
                (Err(error), _) => RecvError::violation(id, error.to_string()),
                (Ok(()), Some(uffd)) if handover::is_userfaultfd(uffd.as_fd()) => {
                    return Ok(Received { id, attach, uffd });
                }
                _ => RecvError::violation(id, "what came with Attach is not a userfaultfd"),
            }
        }
        Ok(Incoming { id, .. }) => RecvError::violation(id, "the second request must be Attach"),
        Err(error) => error,
    };
    daemon.reject(connection, &client.peer(), error).await;
    Err(End::Disconnected)
}

/// Starts the client's fault thread.
async fn attach(
    daemon: &Rc<Daemon>,
    connection: &Rc<Connection>,
    client: &Client,
    received: Received,
    (handover, layout): (Handover, Layout),
    joins: bool,
) -> Result<(), End> {
    let Received { id, attach, uffd } = received;
    let pid = client.pid();
    let setup = Setup {
        client: client.number,
        pid: u32::try_from(pid).unwrap_or(0),
        agent_tid: attach.agent_tid,
        group: Arc::clone(&client.family.shared),
        joins,
        inherit: attach.inherit,
        births: daemon.births.clone(),
        uffd,
        ring: handover.ring,
        layout,
        staging: attach.staging,
        agent_doorbell: handover.agent_doorbell,
        daemon_doorbell: handover.daemon_doorbell,
        swap: Arc::clone(&daemon.swap),
        writers: Arc::clone(&daemon.writers),
        features: daemon.config().features,
    };
    // The handshake with the kernel may take its time: not on this thread.
    let spawned = tokio::task::spawn_blocking(|| fault::spawn(setup)).await;
    let handle = match spawned.map_err(anyhow::Error::from).and_then(|handle| handle) {
        Ok(handle) => handle,
        Err(error) => {
            let text = format!("fmallocd cannot page this process: {error:#}");
            if daemon.throttle.allows() {
                warn!(client = client.number, pid, "{text}");
            }
            connection.refuse(id, failure(ErrorCode::Unsupported, text)).await;
            return Err(End::Disconnected);
        }
    };
    let reply = Reply::Attached(Attached { poison: handle.poison });
    client.attach(handle);
    connection.reply(id, &reply, &[]).await.map_err(|_| End::Disconnected)
}

/// Serves requests until the client's service must end.
pub(crate) async fn requests(
    daemon: &Rc<Daemon>,
    connection: &Rc<Connection>,
    client: &Rc<Client>,
    exit: &AsyncFd<OwnedFd>,
) -> End {
    let outstanding = Arc::new(Semaphore::new(MAX_OUTSTANDING));
    let mut watch = interval(WATCH);
    watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let incoming = tokio::select! {
            _ = exit.readable() => return End::Exited,
            _ = watch.tick() => {
                if client.has_ended() {
                    return End::ThreadEnded;
                }
                continue;
            }
            incoming = next(connection, &outstanding) => incoming,
        };
        let (id, request, fds, permit) = match incoming {
            Ok((incoming, permit)) => (incoming.id, incoming.request, incoming.fds, permit),
            Err(error) => {
                daemon.reject(connection, &client.peer(), error).await;
                return End::Disconnected;
            }
        };
        if matches!(request, Request::Goodbye(_)) && !client.holds_memory() {
            return End::Goodbye(id);
        }
        match dispatch(daemon, client, request, fds) {
            Ok(pending) => answer_later(connection, id, pending, permit),
            Err(text) => {
                daemon.reject(connection, &client.peer(), RecvError::violation(id, text)).await;
                return End::Disconnected;
            }
        }
    }
}

/// The next request, once there are few enough outstanding.
pub(crate) async fn next(
    connection: &Connection,
    outstanding: &Arc<Semaphore>,
) -> Result<(Incoming, OwnedSemaphorePermit), RecvError> {
    let permit = Arc::clone(outstanding).acquire_owned().await.map_err(|_| RecvError::Closed)?;
    Ok((connection.request().await?, permit))
}

/// Sends a reply when it is ready; the permit is held until then.
pub(crate) fn answer_later(
    connection: &Rc<Connection>,
    id: u32,
    pending: Pending,
    permit: OwnedSemaphorePermit,
) {
    let connection = Rc::clone(connection);
    spawn_local(async move {
        let reply = pending.await;
        // A peer that has gone is noticed where requests are read.
        let _ = connection.reply(id, &reply, &[]).await;
        drop(permit);
    });
}

/// A reply that is ready.
pub(crate) fn now(reply: Reply) -> Pending {
    Box::pin(std::future::ready(reply))
}

/// Starts on a request; an error is a breach of the protocol.
fn dispatch(
    daemon: &Rc<Daemon>,
    client: &Rc<Client>,
    request: Request,
    fds: Vec<OwnedFd>,
) -> Result<Pending, &'static str> {
    if let Err(error) = validate::request(&request) {
        return Ok(now(Reply::Error(failure(ErrorCode::Invalid, error))));
    }
    Ok(match request {
        Request::Register(Register { addr, len, commit, label }) => {
            start_register(daemon, client, |answer| Command::Register { addr, len, commit, label, answer })
        }
        Request::RegisterFile(RegisterFile { region, offset, mode }) => {
            let [plain, direct] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| "two descriptors make a file")?;
            let accepted =
                daemon.writers.seat().and_then(|seat| Backing::accept(seat, plain, direct, offset, mode));
            match accepted {
                Ok(file) => {
                    let file = Box::new(file);
                    start_register(daemon, client, |answer| Command::RegisterFile {
                        region,
                        mode,
                        file,
                        answer,
                    })
                }
                Err(failure) => now(Reply::Error(failure)),
            }
        }
        Request::RegisterLike(RegisterLike { region, of }) => {
            start_register(daemon, client, |answer| Command::RegisterLike { region, of, answer })
        }
        Request::Flush(flush) => start_flush(client, flush),
        Request::MakeWritable(which) => {
            let region = which.region;
            done(client.ask(|answer| Command::MakeWritable { region, answer }))
        }
        Request::Changed(range) => {
            let awaited = client.ask(|answer| Command::Changed { range, answer });
            Box::pin(async move { answer(awaited).await.map_or_else(Reply::Error, Reply::Changed) })
        }
        Request::Prefetch(range) => done(client.ask(|answer| Command::Prefetch { range, answer })),
        Request::Commit(range) => done(client.ask(|answer| Command::Commit { range, answer })),
        Request::Decommit(range) => done(client.ask(|answer| Command::Decommit { range, answer })),
        Request::Unregister(which) => start_unregister(client, which.region),
        Request::Advise(advise) => {
            let (range, advice) = (advise.range, advise.advice);
            done(client.ask(|answer| Command::Advise { range, advice, answer }))
        }
        Request::Stats(_) => now(Reply::Stats(client.stats())),
        Request::SetBudget(Budget { bytes }) => {
            let (client, most) = (Rc::clone(client), daemon.config().max_budget);
            Box::pin(async move {
                if let Err(failure) = check_budget(bytes, most) {
                    return Reply::Error(failure);
                }
                match client.set_budget(bytes).await {
                    Ok(()) => Reply::Budget(Budget { bytes }),
                    Err(failure) => Reply::Error(failure),
                }
            })
        }
        Request::PrepareFork(_) => children::prepare(daemon, client),
        Request::EndFork(_) => children::end(daemon, client),
        Request::Ping(_) => now(Reply::Done(Empty {})),
        Request::Goodbye(_) => {
            let text =
                format!("{} regions are still registered; unregister them first", client.regions.get());
            now(Reply::Error(failure(ErrorCode::Invalid, text)))
        }
        Request::Open(_) | Request::Attach(_) | Request::Adopt(_) | Request::Ready(_) => {
            return Err("a client opens and attaches once");
        }
        Request::Status(_)
        | Request::Clients(_)
        | Request::Regions(_)
        | Request::Limit(_)
        | Request::NewGroup(_)
        | Request::GroupStats(_)
        | Request::Evict(_)
        | Request::Latency(_) => return Err("requests of fmallocctl need a connection of their own"),
    })
}

fn start_register(
    daemon: &Daemon,
    client: &Rc<Client>,
    command: impl FnOnce(Answer<u32>) -> Command,
) -> Pending {
    let most = daemon.config().limits.regions;
    if client.regions.get() >= most {
        let text = format!("{most} regions are the most that a client may have (max_regions)");
        return now(Reply::Error(failure(ErrorCode::Limit, text)));
    }
    client.regions.update(|regions| regions + 1);
    let awaited = client.ask(command);
    let client = Rc::clone(client);
    Box::pin(async move {
        match answer(awaited).await {
            Ok(region) => Reply::Registered(Registered { region }),
            Err(failure) => {
                client.regions.update(|regions| regions - 1);
                Reply::Error(failure)
            }
        }
    })
}

fn start_flush(client: &Client, flush: Flush) -> Pending {
    let awaited = client.ask(|answer| Command::Flush { range: flush.range, answer });
    if flush.until == FlushUntil::Begun {
        return now(Reply::Done(Empty {}));
    }
    Box::pin(async move {
        let file = match answer(awaited).await {
            Ok(file) => file,
            Err(failure) => return Reply::Error(failure),
        };
        if flush.until == FlushUntil::Written {
            return Reply::Done(Empty {});
        }
        // May take as long as the disk likes: not on this thread.
        let synced = tokio::task::spawn_blocking(move || file.sync()).await;
        match synced.map_err(std::io::Error::from).flatten() {
            Ok(()) => Reply::Done(Empty {}),
            Err(error) => Reply::Error(file_failure(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    })
}

fn start_unregister(client: &Rc<Client>, region: u32) -> Pending {
    let awaited = client.ask(|answer| Command::Unregister { region, answer });
    let client = Rc::clone(client);
    Box::pin(async move {
        match answer(awaited).await {
            Ok(()) => {
                client.regions.update(|regions| regions.saturating_sub(1));
                Reply::Done(Empty {})
            }
            Err(failure) => Reply::Error(failure),
        }
    })
}

fn done(awaited: super::clients::Awaited<()>) -> Pending {
    Box::pin(async move {
        match answer(awaited).await {
            Ok(()) => Reply::Done(Empty {}),
            Err(failure) => Reply::Error(failure),
        }
    })
}

/// Sees a client off: the fault thread gives slots and claims back, then the grant goes back to the pool.
pub(crate) async fn finish(daemon: &Rc<Daemon>, client: &Client, end: &End, exit: Option<&AsyncFd<OwnedFd>>) {
    let exited = || async {
        match exit {
            Some(exit) => drop(exit.readable().await),
            None => std::future::pending().await,
        }
    };
    match end {
        End::Exited | End::Goodbye(_) => client.send(Command::Stop),
        End::ThreadEnded => {}
        End::Disconnected => {
            client.hang_up();
            client.send(Command::AgentGone);
            // Its memory is still in use: by a process that lost its agent, or that runs on without the socket. Slots
            // are given back when the process has ended, or now if there are none.
            while client.holds_memory() && !client.has_ended() {
                tokio::select! {
                    () = exited() => break,
                    () = sleep(WATCH_GONE) => {}
                }
            }
            client.send(Command::Stop);
        }
    }
    client.ending.set(true);
    let (mut pause, longest) = ENDING;
    while !client.has_ended() {
        sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
    let attached = client.is_attached();
    if !client.join() {
        error!(client = client.number, pid = client.pid(), "the fault thread panicked: please report this");
    }
    children::abandon(daemon, client);
    daemon.clients.remove(daemon, client);
    if daemon.throttle.allows() {
        let how = match end {
            End::Exited => "its process ended",
            End::Disconnected if !attached => "it never attached",
            End::Disconnected => "it disconnected",
            End::ThreadEnded => "its fault thread ended",
            End::Goodbye(_) => "it said goodbye",
        };
        info!(client = client.number, pid = client.pid(), name = client.name, "client left: {how}");
    }
}
