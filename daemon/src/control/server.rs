//! Takes connections in, within the limits, finds out what each is for, and ends the daemon in an orderly way.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use fmalloc_proto::PAGE;
use fmalloc_proto::hello::Role;
use fmalloc_proto::messages::{ErrorCode, Failure};
use fmalloc_proto::size::Size;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{info, warn};

use super::auth::Peer;
use super::connection::{Connection, Incoming, failure, watch};
use super::listener::Listener;
use super::{Daemon, HANDSHAKE, operator, session};
use crate::service;

/// Pause after `accept` has failed: for want of descriptors or memory it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often a draining daemon looks whether it may end.
const DRAIN_WATCH: Duration = Duration::from_millis(50);
/// Places that only administrators get, so that others cannot lock them out.
const RESERVED: usize = 8;
/// Places of one user beyond those of its clients: for fmallocctl.
const BESIDE_CLIENTS: usize = 16;
/// The one signal that does not end the daemon.
const HANGUP: &str = "SIGHUP";
/// Peers at once that are told why they are refused; beyond these they are just dropped.
const REFUSALS: usize = 64;

/// Serves until a signal ends it, or, if it is private, until its owner and all clients have ended.
pub(crate) async fn run(daemon: &Rc<Daemon>, listener: Listener, owner: Option<Owner>) -> anyhow::Result<()> {
    let seats = Rc::new(Seats::default());
    let mut signals = Signals::new()?;
    let mut drain = Drain::new(daemon);
    if daemon.is_service() {
        spawn_local(service::watchdog());
        service::ready("serving");
    }
    info!("ready");
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(socket) => receive(daemon, &seats, socket),
                Err(error) => {
                    if daemon.throttle.allows() {
                        warn!("cannot accept connections for now: {error}");
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            },
            name = signals.next() => if name == HANGUP {
                daemon.reload();
            } else if drain.signalled(name) {
                break;
            },
            () = drain.finished() => break,
            () = left_alone(daemon, owner.as_ref()) => break,
        }
    }
    info!("ended");
    Ok(())
}

/// Who may still bring clients to a private daemon that listens.
#[derive(Debug)]
pub(crate) struct Owner(AsyncFd<OwnedFd>);

impl Owner {
    /// By its pidfd. Must be called on the runtime.
    pub(crate) fn new(pidfd: OwnedFd) -> std::io::Result<Self> {
        watch(pidfd).map(Self)
    }
}

/// Waits until the owner has ended and no client is left; for ever if there is no owner.
async fn left_alone(daemon: &Daemon, owner: Option<&Owner>) {
    let Some(Owner(pidfd)) = owner else { return std::future::pending().await };
    let _ = pidfd.readable().await;
    while daemon.clients.len() > 0 {
        sleep(DRAIN_WATCH).await;
    }
}

/// Serves the one client of a private daemon until it has ended, or a signal ends the daemon.
pub(crate) async fn run_private(daemon: &Rc<Daemon>, socket: OwnedFd) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let mut drain = Drain::new(daemon);
    let peer = Peer::of(socket.as_fd())?;
    let connection = Rc::new(Connection::new(socket)?);
    let mut session: JoinHandle<()> = spawn_local(greet_private(Rc::clone(daemon), connection, peer));
    info!("ready");
    loop {
        tokio::select! {
            _ = &mut session => break,
            name = signals.next() => if name == HANGUP {
                daemon.reload();
            } else if drain.signalled(name) {
                break;
            },
            () = drain.finished() => break,
        }
    }
    info!("ended");
    Ok(())
}

async fn greet_private(daemon: Rc<Daemon>, connection: Rc<Connection>, peer: Peer) {
    match timeout(HANDSHAKE, connection.hello()).await {
        Ok(Ok(Some(Role::Pager))) => session::run(daemon, connection, peer).await,
        Ok(Ok(_)) | Err(_) => {}
        Ok(Err(error)) => daemon.reject(&connection, &peer, error).await,
    }
}

/// Finds out who has connected and gives the connection a task.
fn receive(daemon: &Rc<Daemon>, seats: &Rc<Seats>, socket: OwnedFd) {
    let Ok(peer) = Peer::of(socket.as_fd()) else { return };
    let Ok(connection) = Connection::new(socket).map(Rc::new) else { return };
    let daemon = Rc::clone(daemon);
    let seat = if daemon.policy().admits(&peer) {
        take_seats(&daemon, seats, &peer)
    } else {
        let text = format!(
            "uid {} may not use this fmallocd; its administrator can allow that with --allow-uid or --allow-gid",
            peer.uid
        );
        Err(failure(ErrorCode::Denied, text))
    };
    match seat {
        Ok(seat) => {
            spawn_local(async move {
                greet(daemon, connection, peer).await;
                drop(seat);
            });
        }
        Err(reason) => {
            if let Some(seat) = seats.take(Place::Refusal, REFUSALS) {
                let seats = Rc::clone(seats);
                spawn_local(async move {
                    let invited = hear_out(&daemon, &connection, &peer, reason).await;
                    drop(seat);
                    if let Some(first) = invited
                        && let Ok(seat) = take_seats(&daemon, &seats, &peer)
                    {
                        session::begin(daemon, connection, peer, first).await;
                        drop(seat);
                    }
                });
            }
        }
    }
}

/// Hears what a peer wants that is not admitted. Who shows a token is: it is a process of somebody who was, and has
/// changed its user since. The others are told why not, as the answer to their first request, where they look for it.
async fn hear_out(
    daemon: &Rc<Daemon>,
    connection: &Rc<Connection>,
    peer: &Peer,
    reason: Failure,
) -> Option<Incoming> {
    let heard = timeout(HANDSHAKE, async {
        let role = connection.hello().await.ok()??;
        connection.request().await.ok().map(|first| (role, first))
    });
    let first = match heard.await {
        Ok(Some((Role::Pager, first)))
            if reason.code == ErrorCode::Denied && session::is_invited(daemon, &first.request) =>
        {
            return Some(first);
        }
        Ok(Some((_, first))) => Some(first.id),
        _ => None,
    };
    if daemon.throttle.allows() {
        warn!(pid = peer.pid, uid = peer.uid, "connection refused: {}", reason.text);
    }
    if let Some(id) = first {
        let _ = timeout(HANDSHAKE, connection.refuse(id, reason)).await;
    }
    None
}

/// A place among all connections and among those of the user, if there is one.
fn take_seats(daemon: &Daemon, seats: &Rc<Seats>, peer: &Peer) -> Result<[Seat; 2], Failure> {
    let limits = daemon.config().limits;
    let (of_all, of_uid) = if daemon.policy().is_administrator(peer) {
        (limits.connections, usize::MAX)
    } else {
        (
            limits.connections.saturating_sub(RESERVED).max(1),
            limits.clients_per_uid.saturating_add(BESIDE_CLIENTS),
        )
    };
    let full = |most: usize, whose: &str| {
        failure(
            ErrorCode::Limit,
            format!("{most} connections are the most {whose}; close some and try again"),
        )
    };
    let one = seats
        .take(Place::Any, of_all)
        .ok_or_else(|| full(of_all, "that fmallocd takes (max_connections)"))?;
    let other =
        seats.take(Place::Uid(peer.uid), of_uid).ok_or_else(|| full(of_uid, "that one user may have"))?;
    Ok([one, other])
}

async fn greet(daemon: Rc<Daemon>, connection: Rc<Connection>, peer: Peer) {
    match timeout(HANDSHAKE, connection.hello()).await {
        Ok(Ok(Some(Role::Pager))) => session::run(daemon, connection, peer).await,
        Ok(Ok(Some(Role::Control))) => operator::run(daemon, connection, peer).await,
        // No common version; the peer has been told.
        Ok(Ok(None)) => {}
        Ok(Err(error)) => daemon.reject(&connection, &peer, error).await,
        Err(_) => {
            if daemon.throttle.allows() {
                warn!(pid = peer.pid, uid = peer.uid, "connection dropped: it said nothing");
            }
        }
    }
}

/// What connections are counted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    Any,
    Uid(u32),
    Refusal,
}

#[derive(Debug, Default)]
struct Seats(RefCell<HashMap<Place, usize>>);

impl Seats {
    /// One more of this kind, unless there are `most` already.
    fn take(self: &Rc<Self>, place: Place, most: usize) -> Option<Seat> {
        let mut counts = self.0.borrow_mut();
        let count = counts.entry(place).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Seat { seats: Rc::clone(self), place })
    }
}

/// A counted connection.
#[derive(Debug)]
struct Seat {
    seats: Rc<Seats>,
    place: Place,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut counts = self.seats.0.borrow_mut();
        if let Some(count) = counts.get_mut(&self.place) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.place);
            }
        }
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let terminate = signal(SignalKind::terminate())?;
        let hangup = signal(SignalKind::hangup())?;
        Ok(Self { terminate, interrupt: signal(SignalKind::interrupt())?, hangup })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => HANGUP,
        }
    }
}

/// The way to an end: the first signal keeps new clients out, and the daemon ends when no client holds memory; the
/// second ends it at once.
struct Drain<'a> {
    daemon: &'a Daemon,
    watch: tokio::time::Interval,
}

impl<'a> Drain<'a> {
    fn new(daemon: &'a Daemon) -> Self {
        let mut watch = interval(DRAIN_WATCH);
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { daemon, watch }
    }

    /// Whether to end now.
    fn signalled(&self, name: &str) -> bool {
        let holders: Vec<_> =
            self.daemon.clients.all().into_iter().filter(|client| client.holds_memory()).collect();
        if self.daemon.draining.replace(true) {
            warn!("{name} again: ending; {} clients are left waiting for their memory", holders.len());
            return true;
        }
        if self.daemon.is_service() {
            service::stopping(&format!("ending when {} clients have ended", holders.len()));
        }
        info!("{name}: no new clients; {} clients hold memory, a second signal ends at once", holders.len());
        for client in &holders {
            let swapped = Size(client.stats().swapped_pages.saturating_mul(PAGE));
            info!(client = client.number, pid = client.pid(), name = client.name, %swapped, "waiting for client");
        }
        holders.is_empty()
    }

    /// Waits until a drain has finished; for ever while there is none.
    async fn finished(&mut self) {
        loop {
            self.watch.tick().await;
            if self.daemon.draining.get()
                && !self.daemon.clients.all().iter().any(|client| client.holds_memory())
            {
                return;
            }
        }
    }
}
