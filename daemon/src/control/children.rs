//! Forked children: announced by the parent, delivered by its fault thread, and taken over by their own connection.
//!
//! ```text
//! parent   PrepareFork ─► claim, token          fork()                              EndFork
//! fault thread                                  event read ─► pager ─► Birth
//! child                                              runs ─► connects, Adopt(token) ─► its userfaultfd ─► Ready
//! ```
//!
//! A child that is born has a fault thread at once, and nobody who watches its process before it connects: that it has
//! ended the kernel says when its memory is asked for (ESRCH). A child that was never to run (fork began anew after a
//! signal) goes the same way, so a token may have several births, and the last one that lives is the child.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use fmalloc_proto::groups::{ForkPrepared, Token};
use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::messages::{Empty, ErrorCode, Failure, Opened, Reply, Request};
use fmalloc_proto::ring::Layout;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::auth::{self, Peer};
use super::clients::{Client, answer};
use super::connection::{Connection, Incoming, RecvError, failure, watch};
use super::family::new_token;
use super::handover::{self, Handover};
use super::session::{End, Pending, finish, now, requests};
use super::{Daemon, HANDSHAKE};
use crate::fault::handle::ChildSetup;
use crate::fault::{self, Birth, Command, ring_layout};

/// How long a child that has connected may have to wait for its birth.
const LABOUR: Duration = Duration::from_secs(20);
/// How long a token outlives a parent that has ended, whose fault thread may just be delivering.
const ORPHANED: Duration = Duration::from_secs(30);
/// How often an unclaimed child is looked after.
const WATCH: Duration = Duration::from_millis(50);

/// Children that are expected, or born and not claimed.
#[derive(Debug, Default)]
pub(crate) struct Nursery(RefCell<HashMap<Token, Rc<Cradle>>>);

/// What is known about a token.
#[derive(Debug)]
struct Cradle {
    parent: Rc<Client>,
    /// The number that the first child gets.
    number: Cell<u64>,
    born: RefCell<Vec<Rc<Born>>>,
    change: Notify,
}

/// A child with a fault thread and without a connection.
#[derive(Debug)]
struct Born {
    client: Rc<Client>,
    /// For the child to hold.
    uffd: OwnedFd,
    handover: Handover,
    layout: Layout,
    claimed: Cell<bool>,
}

impl Nursery {
    /// Whether a child was announced by this token.
    pub(crate) fn expects(&self, token: Token) -> bool {
        self.0.borrow().contains_key(&token)
    }

    fn find(&self, token: Token) -> Option<Rc<Cradle>> {
        self.0.borrow().get(&token).cloned()
    }

    fn forget(&self, token: Token) {
        if let Some(cradle) = self.0.borrow_mut().remove(&token) {
            cradle.change.notify_waiters();
        }
    }

    /// Children that are to come: they count as clients.
    pub(crate) fn expected(&self) -> usize {
        self.0.borrow().values().filter(|cradle| cradle.born.borrow().is_empty()).count()
    }
}

/// A client is about to fork.
pub(crate) fn prepare(daemon: &Rc<Daemon>, parent: &Rc<Client>) -> Pending {
    let token = match announce(daemon, parent) {
        Ok(token) => token,
        Err(failure) => return now(Reply::Error(failure)),
    };
    let number = daemon.clients.next_number();
    let cradle = Cradle {
        parent: Rc::clone(parent),
        number: Cell::new(number),
        born: RefCell::default(),
        change: Notify::new(),
    };
    daemon.nursery.0.borrow_mut().insert(token, Rc::new(cradle));
    parent.fork.set(Some(token));
    let layout = ring_layout((parent.family.bytes() / 16).max(MIN_BUDGET));
    let prepared = parent.ask(|answer| Command::PrepareFork { token, child: number, layout, answer });
    let (daemon, parent) = (Rc::clone(daemon), Rc::clone(parent));
    Box::pin(async move {
        match answer(prepared).await {
            Ok(()) => Reply::ForkPrepared(ForkPrepared { token }),
            Err(failure) => {
                parent.fork.set(None);
                daemon.nursery.forget(token);
                Reply::Error(failure)
            }
        }
    })
}

fn announce(daemon: &Daemon, parent: &Client) -> Result<Token, Failure> {
    if parent.fork.get().is_some() {
        return Err(failure(ErrorCode::Invalid, "one fork at a time: end the one that was prepared before"));
    }
    let limits = daemon.config().limits;
    let expected = daemon.nursery.expected();
    if daemon.clients.len() + expected >= limits.clients {
        let text = format!("{} clients are the most that fmallocd takes (max_clients)", limits.clients);
        return Err(failure(ErrorCode::Limit, text));
    }
    let uid = parent.uid();
    if daemon.clients.of_uid(uid) + expected >= limits.clients_per_uid {
        let most = limits.clients_per_uid;
        let text = format!("{most} clients are the most that uid {uid} may have (max_clients_per_uid)");
        return Err(failure(ErrorCode::Limit, text));
    }
    new_token().map_err(|error| failure(ErrorCode::System, format!("the daemon has no secrets: {error}")))
}

/// The fork that a client announced is over.
pub(crate) fn end(daemon: &Rc<Daemon>, parent: &Client) -> Pending {
    let Some(token) = parent.fork.take() else { return now(Reply::Done(Empty {})) };
    let ended = parent.ask(|answer| Command::EndFork { answer });
    let daemon = Rc::clone(daemon);
    Box::pin(async move {
        match answer(ended).await {
            // All that were born have been delivered. Those go by themselves.
            Ok(births) => {
                if births == 0 {
                    daemon.nursery.forget(token);
                }
                Reply::Done(Empty {})
            }
            Err(failure) => Reply::Error(failure),
        }
    })
}

/// A client has ended that may have announced a fork.
pub(crate) fn abandon(daemon: &Rc<Daemon>, parent: &Client) {
    if let Some(token) = parent.fork.take() {
        let daemon = Rc::clone(daemon);
        spawn_local(async move {
            sleep(ORPHANED).await;
            let born = daemon.nursery.find(token).is_some_and(|cradle| !cradle.born.borrow().is_empty());
            if !born {
                daemon.nursery.forget(token);
            }
        });
    }
}

/// Takes what fault threads deliver, for as long as the daemon lives.
pub(crate) async fn receive(daemon: Rc<Daemon>, mut births: UnboundedReceiver<Birth>) {
    while let Some(birth) = births.recv().await {
        spawn_local(raise(Rc::clone(&daemon), birth));
    }
}

/// The life of a child until somebody claims it or it has ended.
async fn raise(daemon: Rc<Daemon>, birth: Birth) {
    let token = birth.token;
    let Some(cradle) = daemon.nursery.find(token) else {
        error!("a forked child was delivered whom nobody expects: it waits for its memory");
        return std::mem::forget(birth);
    };
    let born = match deliver(&daemon, &cradle, birth).await {
        Ok(born) => born,
        Err(error) => return error!("a forked child cannot be served, and waits for its memory: {error:#}"),
    };
    cradle.born.borrow_mut().push(Rc::clone(&born));
    cradle.change.notify_waiters();
    while !born.client.has_ended() {
        sleep(WATCH).await;
        if born.claimed.get() {
            return;
        }
    }
    // It may have been claimed at its last moment.
    if born.claimed.get() {
        return;
    }
    cradle.born.borrow_mut().retain(|other| !Rc::ptr_eq(other, &born));
    if cradle.born.borrow().is_empty() && cradle.parent.fork.get() != Some(token) {
        daemon.nursery.forget(token);
    }
    finish(&daemon, &born.client, &End::ThreadEnded, None).await;
}

/// Makes a client of a birth. If that fails the child's userfaultfd stays open here: it waits, and never reads zeros.
async fn deliver(daemon: &Rc<Daemon>, cradle: &Cradle, birth: Birth) -> anyhow::Result<Rc<Born>> {
    let layout = birth.layout;
    let made = birth.uffd.share().map_err(anyhow::Error::from).and_then(|uffd| {
        let handover = Handover::new(layout)?;
        let ring = handover.ring.try_clone()?;
        let bells = handover.bells()?;
        Ok((uffd, handover, ring, bells))
    });
    let (uffd, handover, ring, (agent_doorbell, daemon_doorbell)) = match made {
        Ok(made) => made,
        Err(error) => {
            std::mem::forget(birth);
            return Err(error);
        }
    };
    let number = match cradle.number.take() {
        0 => daemon.clients.next_number(),
        number => number,
    };
    let regions = birth.pager.regions().iter().count();
    let client = daemon.clients.enter_child(number, &cradle.parent);
    client.regions.set(u32::try_from(regions).unwrap_or(u32::MAX));
    let setup = ChildSetup {
        client: number,
        birth,
        group: Arc::clone(&client.family.shared),
        births: daemon.births.clone(),
        ring,
        agent_doorbell,
        daemon_doorbell,
        swap: Arc::clone(&daemon.swap),
        writers: Arc::clone(&daemon.writers),
        features: daemon.config().features,
    };
    // Making mappings may take its time: not on this thread.
    let spawned = tokio::task::spawn_blocking(|| fault::spawn_child(setup)).await;
    match spawned.map_err(anyhow::Error::from).and_then(|handle| handle) {
        Ok(handle) => {
            client.attach(handle);
            if daemon.throttle.allows() {
                info!(client = number, parent = cradle.parent.number, name = client.name, "client forked");
            }
            Ok(Rc::new(Born { client, uffd, handover, layout, claimed: Cell::new(false) }))
        }
        Err(error) => {
            daemon.clients.remove(daemon, &client);
            std::mem::forget(uffd);
            Err(error)
        }
    }
}

/// A forked child has connected: serves it until nothing of it is left.
pub(crate) async fn adopt(
    daemon: &Rc<Daemon>,
    connection: &Rc<Connection>,
    peer: Peer,
    id: u32,
    token: Token,
) {
    let claimed = timeout(LABOUR, claim(daemon, token)).await.unwrap_or(None);
    let Some(born) = claimed else {
        if daemon.throttle.allows() {
            warn!(pid = peer.pid, uid = peer.uid, "a child was refused: no fork was announced for it");
        }
        let text = "no child is expected for this token: the fork failed, or its swap space ran short";
        return connection.refuse(id, failure(ErrorCode::NotFound, text)).await;
    };
    daemon.nursery.forget(token);
    let client = Rc::clone(&born.client);
    let exit = auth::pidfd(connection.as_fd(), &peer, daemon.config().features.peer_pidfd);
    let exit = exit.map_err(std::io::Error::from).and_then(watch);
    client.connect(peer, Rc::clone(connection));
    let (end, exit) = match exit {
        Ok(exit) => {
            let end = serve(daemon, connection, id, &born, &exit).await;
            (end, Some(exit))
        }
        // It is known to have ended when its memory has.
        Err(error) => {
            warn!(client = client.number, "a child's process cannot be watched: {error}");
            (End::Disconnected, None)
        }
    };
    drop(born);
    finish(daemon, &client, &end, exit.as_ref()).await;
    if let End::Goodbye(id) = end {
        let _ = timeout(HANDSHAKE, connection.reply(id, &Reply::Done(Empty {}), &[])).await;
    }
    connection.end();
}

/// The child of a token, as soon as it is born.
async fn claim(daemon: &Daemon, token: Token) -> Option<Rc<Born>> {
    loop {
        let cradle = daemon.nursery.find(token)?;
        let changed = cradle.change.notified();
        let living = |born: &&Rc<Born>| !fault::uffd::is_gone(&born.uffd);
        let found = cradle.born.borrow().iter().rev().find(living).cloned();
        if let Some(born) = found {
            born.claimed.set(true);
            return Some(born);
        }
        changed.await;
    }
}

/// From the answer to Adopt until the child's service must end.
async fn serve(
    daemon: &Rc<Daemon>,
    connection: &Rc<Connection>,
    id: u32,
    born: &Born,
    exit: &AsyncFd<OwnedFd>,
) -> End {
    let device = if daemon.hands_out_device() { handover::open_device().ok() } else { None };
    let reply = Reply::Adopted(Opened {
        client: born.client.number,
        budget: born.client.family.bytes(),
        ring_batches: born.layout.batches(),
        ring_batch_pages: born.layout.batch_pages(),
        device: device.is_some(),
    });
    let mut fds = vec![born.uffd.as_fd()];
    fds.extend(born.handover.fds(device.as_ref()));
    if connection.reply(id, &reply, &fds).await.is_err() {
        return End::Disconnected;
    }
    drop(fds);
    drop(device);
    let ready = tokio::select! {
        ready = connection.request() => ready,
        _ = exit.readable() => return End::Exited,
    };
    match ready {
        Ok(Incoming { id, request: Request::Ready(ready), .. }) => {
            let pid = u32::try_from(born.client.pid()).unwrap_or(0);
            born.client.send(Command::AgentReady { agent_tid: ready.agent_tid, pid });
            if connection.reply(id, &Reply::Done(Empty {}), &[]).await.is_err() {
                return End::Disconnected;
            }
            requests(daemon, connection, &born.client, exit).await
        }
        Ok(Incoming { id, .. }) => {
            let error = RecvError::violation(id, "a child's second request must be Ready");
            daemon.reject(connection, &born.client.peer(), error).await;
            End::Disconnected
        }
        Err(error) => {
            daemon.reject(connection, &born.client.peer(), error).await;
            End::Disconnected
        }
    }
}
