//! Clients that share one budget, and so one grant of the pool: at first one client, then its forked children, and whoever
//! joins with the token. The fault threads divide it among themselves: see [`crate::fault::group`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use fmalloc_proto::PAGE;
use fmalloc_proto::groups::{GroupStats, Token};
use fmalloc_proto::messages::{Budget, ClientStats, ErrorCode, Failure, Reply};
use fmalloc_proto::size::Size;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::task::spawn_local;

use super::auth::{self, Peer};
use super::clients::{Client, answer};
use super::connection::{Connection, failure, watch};
use super::pool::{Grant, PoolFull};
use super::{Daemon, Limits};
use crate::fault::{Command, Group};

/// Groups that one process may make: more than one are of a `fmallocctl run` that another one has run.
const GROUPS_OF_PROCESS: usize = 8;

/// Families that somebody can join.
#[derive(Debug, Default)]
pub(crate) struct Families(RefCell<HashMap<Token, Rc<Family>>>);

#[derive(Debug, Clone, Copy)]
struct Maker {
    pid: i32,
    uid: u32,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Family {
    /// Number of the first member, 0 before there is one.
    number: Cell<u64>,
    grant: Grant,
    pub(crate) shared: Arc<Group>,
    members: RefCell<Vec<Weak<Client>>>,
    /// By which others join, if they can.
    token: Option<Token>,
    /// Process and user of whoever made it to be joined, while that lives.
    maker: Cell<Option<Maker>>,
    /// Held while the budget changes, so that the books and the fault threads never disagree on the order.
    change: Mutex<()>,
}

impl Family {
    /// A family for one client.
    pub(crate) fn new(grant: Grant) -> Rc<Self> {
        Self::with(grant, None)
    }

    fn with(grant: Grant, made: Option<(Token, Maker)>) -> Rc<Self> {
        let (token, maker) = made.unzip();
        Rc::new(Self {
            number: Cell::new(0),
            shared: Group::new(grant.bytes()),
            grant,
            members: RefCell::new(Vec::new()),
            token,
            maker: Cell::new(maker),
            change: Mutex::new(()),
        })
    }

    /// Number of its first member.
    pub(crate) fn number(&self) -> u64 {
        self.number.get()
    }

    /// Granted bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.grant.bytes()
    }

    /// Takes a client in.
    pub(crate) fn enter(&self, client: &Rc<Client>) {
        if self.number.get() == 0 {
            self.number.set(client.number);
        }
        self.members.borrow_mut().push(Rc::downgrade(client));
    }

    /// A client has ended. With the last one the grant goes back to the pool.
    pub(crate) fn leave(&self, daemon: &Daemon, client: &Client) {
        self.members
            .borrow_mut()
            .retain(|member| member.upgrade().is_some_and(|member| member.number != client.number));
        self.end_if_empty(daemon);
    }

    fn end_if_empty(&self, daemon: &Daemon) {
        if self.members.borrow().is_empty() && self.maker.get().is_none() {
            self.grant.end();
            if let Some(token) = &self.token {
                daemon.families.0.borrow_mut().remove(token);
            }
        }
    }

    fn clients(&self) -> Vec<Rc<Client>> {
        self.members.borrow().iter().filter_map(Weak::upgrade).collect()
    }

    /// Sums over all who ever were members.
    fn stats(&self) -> GroupStats {
        let (members, members_ever, mut stats) = self.shared.totals();
        for client in self.clients() {
            client.add_to(&mut stats);
        }
        stats.budget_bytes = self.grant.bytes();
        GroupStats { members, members_ever, stats }
    }

    /// Changes the budget: the pool's books go first when it grows and last when it shrinks, so that the sum of what
    /// clients hold never exceeds the pool. Members that cannot get within a smaller budget keep the one they had.
    pub(crate) async fn set_budget(&self, bytes: u64) -> Result<(), Failure> {
        let _changing = self.change.lock().await;
        let before = self.grant.bytes();
        let pool_full = |error: PoolFull| failure(ErrorCode::PoolFull, error);
        if bytes > before {
            self.grant.set(bytes).map_err(pool_full)?;
        }
        let result = self.move_to_budget(bytes).await;
        if result.is_err() {
            self.shared.set_budget(before);
            // Whoever hears of the failure shall find the old figures.
            for client in self.clients() {
                let _ = answer(client.ask(|answer| Command::SetBudget { answer })).await;
            }
        }
        let agreed = if result.is_ok() { bytes } else { before };
        let booked = self.grant.set(agreed).map_err(pool_full);
        result.and(booked)
    }

    /// Has the fault threads work towards a budget for as long as they make progress.
    async fn move_to_budget(&self, bytes: u64) -> Result<(), Failure> {
        self.shared.set_budget(bytes);
        let mut last = u64::MAX;
        loop {
            let clients = self.clients();
            for client in &clients {
                let set = answer(client.ask(|answer| Command::SetBudget { answer })).await;
                // Of several members one may have ended, or not begun.
                if clients.len() == 1 {
                    set?;
                }
            }
            let (mut held, mut stuck) = (0_u64, 0_u64);
            for stats in clients.iter().map(|client| client.stats()) {
                held += stats.resident_pages.saturating_mul(PAGE).saturating_add(stats.overhead_bytes);
                stuck += stats.unevictable_pages.saturating_mul(PAGE);
            }
            if held <= bytes {
                return Ok(());
            }
            if held >= last {
                let text = format!(
                    "client {} holds {} and cannot get down to {} for now ({} of it cannot be evicted); \
                     its budget stays",
                    self.number.get(),
                    Size(held),
                    Size(bytes),
                    Size(stuck)
                );
                return Err(failure(ErrorCode::System, text));
            }
            last = held;
        }
    }

    /// Tells the members about a budget that somebody else has set.
    pub(crate) fn notify_budget(&self) {
        for client in self.clients() {
            client.notice(&Reply::Budget(Budget { bytes: self.grant.bytes() }));
        }
    }
}

impl Families {
    /// The family that a token belongs to. Who has the token may join, whoever he is.
    pub(crate) fn find(&self, token: Token) -> Result<Rc<Family>, Failure> {
        self.0
            .borrow()
            .get(&token)
            .cloned()
            .ok_or_else(|| failure(ErrorCode::NotFound, "there is no such group of clients (any more)"))
    }

    /// What a family has done.
    pub(crate) fn stats(&self, token: Token) -> Result<GroupStats, Failure> {
        self.find(token).map(|family| family.stats())
    }

    /// A grant without a client is bounded as clients are, and one process needs few.
    fn admit(&self, peer: &Peer, limits: Limits) -> Result<(), Failure> {
        let families = self.0.borrow();
        let refuse = |text| Err(failure(ErrorCode::Limit, text));
        if families.len() >= limits.clients {
            return refuse("there are as many groups as there may be clients (max_clients)");
        }
        let makers = || families.values().filter_map(|family| family.maker.get());
        if makers().filter(|maker| maker.uid == peer.uid).count() >= limits.clients_per_uid {
            return refuse("there are as many groups of yours as you may have clients (max_clients_per_uid)");
        }
        // Of one that this daemon does not see, it knows no number.
        if peer.pid != 0 && makers().filter(|maker| maker.pid == peer.pid).count() >= GROUPS_OF_PROCESS {
            return refuse("this process has made groups enough already, which live as long as it does");
        }
        Ok(())
    }

    /// Makes a family that others can join, for as long as the peer's process lives or there are members.
    pub(crate) fn make(
        daemon: &Rc<Daemon>,
        connection: &Connection,
        peer: &Peer,
        bytes: u64,
    ) -> Result<Token, Failure> {
        let system = |error: std::io::Error| {
            failure(ErrorCode::System, format!("the daemon cannot make a group: {error}"))
        };
        let families = &daemon.families;
        families.admit(peer, daemon.config().limits)?;
        super::session::check_budget(bytes, daemon.config().max_budget)?;
        let exit = auth::pidfd(connection.as_fd(), peer, daemon.config().features.peer_pidfd)
            .map_err(|error| system(error.into()))?;
        let exit = watch(exit).map_err(system)?;
        let token = new_token().map_err(system)?;
        let grant = daemon.pool.grant(bytes).map_err(|error| failure(ErrorCode::PoolFull, error))?;
        let family = Family::with(grant, Some((token, Maker { pid: peer.pid, uid: peer.uid })));
        families.0.borrow_mut().insert(token, Rc::clone(&family));
        spawn_local(hold(Rc::clone(daemon), family, exit));
        Ok(token)
    }
}

/// Holds a family until the process that made it has ended.
async fn hold(daemon: Rc<Daemon>, family: Rc<Family>, exit: AsyncFd<OwnedFd>) {
    let _ = exit.readable().await;
    family.maker.set(None);
    family.end_if_empty(&daemon);
}

/// A secret that cannot be guessed.
pub(crate) fn new_token() -> std::io::Result<Token> {
    let mut token = Token([0; 16]);
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { libc::getrandom(token.0.as_mut_ptr().cast(), token.0.len(), 0) };
    if usize::try_from(got) == Ok(token.0.len()) { Ok(token) } else { Err(std::io::Error::last_os_error()) }
}

/// What is counted, of the members that live; gauges are summed too.
pub(crate) fn add(sum: &mut ClientStats, more: &ClientStats) {
    sum.resident_pages += more.resident_pages;
    sum.overhead_bytes += more.overhead_bytes;
    sum.swapped_pages += more.swapped_pages;
    sum.packed_pages += more.packed_pages;
    sum.packed_bytes += more.packed_bytes;
    sum.slots += more.slots;
    sum.claimed_pages += more.claimed_pages;
    sum.unevictable_pages += more.unevictable_pages;
    sum.poisoned_pages += more.poisoned_pages;
    crate::fault::group::add(sum, more);
}
