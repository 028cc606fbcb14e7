//! The clients: one entry each from its granted Open until its fault thread has given everything back. Control
//! thread only. [`super::session`] drives an entry's life; [`super::operator`] and signals look at them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use fmalloc_proto::groups::Token;
use fmalloc_proto::messages::{ClientRow, ClientStats, ErrorCode, Failure, LatencyList, Reply};
use tokio::sync::oneshot;

use super::Daemon;
use super::auth::Peer;
use super::connection::{Connection, failure};
use super::family::{self, Family};
use crate::fault::handle::Answer;
use crate::fault::{Command, Handle};

/// An answer of a fault thread that is still to come.
pub(crate) type Awaited<T> = oneshot::Receiver<Result<T, Failure>>;

/// The answer, or that there is no fault thread to give it.
pub(crate) async fn answer<T>(awaited: Awaited<T>) -> Result<T, Failure> {
    awaited.await.unwrap_or_else(|_| {
        Err(failure(ErrorCode::NotFound, "the client has ended, or has not attached its memory yet"))
    })
}

/// One client.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) number: u64,
    /// The client that it was forked from, 0 if none.
    pub(crate) parent: u64,
    pub(crate) name: String,
    /// Those with whom it shares its budget.
    pub(crate) family: Rc<Family>,
    /// A fork that it has announced.
    pub(crate) fork: Cell<Option<Token>>,
    /// For a forked child that has not connected yet: its parent, with no process id.
    peer: RefCell<Peer>,
    connection: RefCell<Option<Rc<Connection>>>,
    /// Regions that it has, or will have if a request under way succeeds. Counted here, as the figures of the fault
    /// thread may be a moment old.
    pub(crate) regions: Cell<u32>,
    /// Its fault thread has been told to give everything back, or was never there.
    pub(crate) ending: Cell<bool>,
    /// None until it is attached.
    handle: RefCell<Option<Handle>>,
}

impl Client {
    /// Who it is.
    pub(crate) fn peer(&self) -> Peer {
        self.peer.borrow().clone()
    }

    /// Process id, 0 if it is not known.
    pub(crate) fn pid(&self) -> i32 {
        self.peer.borrow().pid
    }

    /// User id.
    pub(crate) fn uid(&self) -> u32 {
        self.peer.borrow().uid
    }

    /// A forked child has connected.
    pub(crate) fn connect(&self, peer: Peer, connection: Rc<Connection>) {
        self.peer.replace(peer);
        self.connection.replace(Some(connection));
    }

    /// Adds its figures to a sum, unless they are in there because it has ended.
    pub(crate) fn add_to(&self, sum: &mut ClientStats) {
        if let Some(handle) = self.handle.borrow().as_ref().filter(|handle| !handle.stats.ended()) {
            family::add(sum, &handle.stats.snapshot());
        }
    }

    pub(crate) fn attach(&self, handle: Handle) {
        *self.handle.borrow_mut() = Some(handle);
    }

    pub(crate) fn is_attached(&self) -> bool {
        self.handle.borrow().is_some()
    }

    /// Queues a command of no answer.
    pub(crate) fn send(&self, command: Command) {
        if let Some(handle) = self.handle.borrow().as_ref() {
            handle.send(command);
        }
    }

    /// Queues a command now; its answer is awaited by [`answer`].
    pub(crate) fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Awaited<T> {
        let (answer, awaited) = oneshot::channel();
        self.send(command(answer));
        awaited
    }

    /// Whether the fault thread has ended; so says a thread that was never there.
    pub(crate) fn has_ended(&self) -> bool {
        self.handle.borrow().as_ref().is_none_or(|handle| {
            handle.stats.ended() || handle.thread.as_ref().is_none_or(std::thread::JoinHandle::is_finished)
        })
    }

    /// Waits for the end of a fault thread that [`Client::has_ended`]; says whether it ended well.
    pub(crate) fn join(&self) -> bool {
        let thread = self.handle.borrow_mut().as_mut().and_then(|handle| handle.thread.take());
        thread.is_none_or(|thread| thread.join().is_ok())
    }

    pub(crate) fn stats(&self) -> ClientStats {
        match self.handle.borrow().as_ref() {
            // Of a shared budget a client has more or less at any moment.
            Some(handle) if self.family.shared.is_shared() => {
                ClientStats { budget_bytes: self.family.bytes(), ..handle.stats.snapshot() }
            }
            Some(handle) => handle.stats.snapshot(),
            None => ClientStats { budget_bytes: self.family.bytes(), ..ClientStats::default() },
        }
    }

    pub(crate) fn latency(&self) -> LatencyList {
        let handle = self.handle.borrow();
        LatencyList { rows: handle.as_ref().map(|handle| handle.stats.latency.rows()).unwrap_or_default() }
    }

    /// Has memory under paging, or is about to.
    pub(crate) fn holds_memory(&self) -> bool {
        self.regions.get() > 0
    }

    pub(crate) fn row(&self) -> ClientRow {
        let handle = self.handle.borrow();
        let condition = match handle.as_ref() {
            Some(handle) => handle.stats.condition().text(),
            None => "not attached yet",
        };
        ClientRow {
            client: self.number,
            pid: u32::try_from(self.pid()).unwrap_or(0),
            uid: self.uid(),
            parent: self.parent,
            group: self.family.number(),
            name: self.name.clone(),
            condition: condition.to_owned(),
            write_protect: handle.as_ref().is_some_and(|handle| handle.write_protect),
            regions: self.regions.get(),
            stats: self.stats(),
        }
    }

    /// Changes the budget of the client's family.
    pub(crate) async fn set_budget(&self, bytes: u64) -> Result<(), Failure> {
        self.family.set_budget(bytes).await
    }

    /// Sends what nobody asked for, if the client has a connection.
    pub(crate) fn notice(&self, reply: &Reply) {
        if let Some(connection) = self.connection.borrow().as_ref() {
            connection.notice(reply);
        }
    }

    /// Ends the client's connection.
    pub(crate) fn hang_up(&self) {
        if let Some(connection) = self.connection.borrow().as_ref() {
            connection.end();
        }
    }
}

/// All clients.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    entries: RefCell<BTreeMap<u64, Rc<Client>>>,
    last: Cell<u64>,
}

impl Clients {
    /// A number that no client has had.
    pub(crate) fn next_number(&self) -> u64 {
        let number = self.last.get() + 1;
        self.last.set(number);
        number
    }

    /// Enters a client under the next number.
    pub(crate) fn enter(
        &self,
        peer: Peer,
        name: String,
        family: Rc<Family>,
        connection: Rc<Connection>,
    ) -> Rc<Client> {
        let client = Client {
            number: self.next_number(),
            parent: 0,
            name,
            family,
            fork: Cell::new(None),
            peer: RefCell::new(peer),
            connection: RefCell::new(Some(connection)),
            regions: Cell::new(0),
            ending: Cell::new(false),
            handle: RefCell::new(None),
        };
        self.add(client)
    }

    /// Enters a forked child.
    pub(crate) fn enter_child(&self, number: u64, parent: &Client) -> Rc<Client> {
        self.add(Client {
            number,
            parent: parent.number,
            name: parent.name.clone(),
            family: Rc::clone(&parent.family),
            fork: Cell::new(None),
            peer: RefCell::new(Peer { pid: 0, ..parent.peer() }),
            connection: RefCell::new(None),
            regions: Cell::new(0),
            ending: Cell::new(false),
            handle: RefCell::new(None),
        })
    }

    fn add(&self, client: Client) -> Rc<Client> {
        let client = Rc::new(client);
        client.family.enter(&client);
        self.entries.borrow_mut().insert(client.number, Rc::clone(&client));
        client
    }

    /// Takes a client off the list and out of its family.
    pub(crate) fn remove(&self, daemon: &Daemon, client: &Client) {
        client.family.leave(daemon, client);
        self.entries.borrow_mut().remove(&client.number);
    }

    pub(crate) fn get(&self, number: u64) -> Option<Rc<Client>> {
        self.entries.borrow().get(&number).cloned()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    pub(crate) fn of_uid(&self, uid: u32) -> usize {
        self.entries.borrow().values().filter(|client| client.uid() == uid).count()
    }

    pub(crate) fn any_ending(&self) -> bool {
        self.entries.borrow().values().any(|client| client.ending.get())
    }

    /// Those with higher numbers than `number`, ascending.
    pub(crate) fn after(&self, number: u64) -> Vec<Rc<Client>> {
        let Some(first) = number.checked_add(1) else { return Vec::new() };
        self.entries.borrow().range(first..).map(|(_, client)| Rc::clone(client)).collect()
    }

    pub(crate) fn all(&self) -> Vec<Rc<Client>> {
        self.after(0)
    }
}
