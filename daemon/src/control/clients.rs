//! The clients: one entry each from its granted Open until its fault thread has given everything back. Control
//! thread only. [`super::session`] drives an entry's life; [`super::operator`] and signals look at them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::{Budget, ClientRow, ClientStats, ErrorCode, Failure, LatencyList, Reply};
use fmalloc_proto::size::Size;
use tokio::sync::{Mutex, oneshot};

use super::auth::Peer;
use super::connection::{Connection, failure};
use super::pool::Grant;
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
    pub(crate) peer: Peer,
    pub(crate) name: String,
    pub(crate) grant: Grant,
    pub(crate) connection: Rc<Connection>,
    /// Regions that it has, or will have if a request under way succeeds. Counted here, as the figures of the fault
    /// thread may be a moment old.
    pub(crate) regions: Cell<u32>,
    /// Its fault thread has been told to give everything back, or was never there.
    pub(crate) ending: Cell<bool>,
    /// None until it is attached.
    handle: RefCell<Option<Handle>>,
    /// Held while the budget changes, so that the books and the fault thread never disagree on the order.
    budget_change: Mutex<()>,
}

impl Client {
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
            Some(handle) => handle.stats.snapshot(),
            None => ClientStats { budget_bytes: self.grant.bytes(), ..ClientStats::default() },
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
            pid: u32::try_from(self.peer.pid).unwrap_or(0),
            uid: self.peer.uid,
            name: self.name.clone(),
            condition: condition.to_owned(),
            write_protect: handle.as_ref().is_some_and(|handle| handle.write_protect),
            regions: self.regions.get(),
            stats: self.stats(),
        }
    }

    /// Changes the budget: the pool's books go first when it grows and last when it shrinks, so that the sum of what
    /// clients hold never exceeds the pool. A client that cannot get within a smaller budget keeps the one it had.
    pub(crate) async fn set_budget(&self, bytes: u64) -> Result<(), Failure> {
        let _changing = self.budget_change.lock().await;
        let before = self.grant.bytes();
        let pool_full = |error: super::pool::PoolFull| failure(ErrorCode::PoolFull, error);
        if bytes > before {
            self.grant.set(bytes).map_err(pool_full)?;
        }
        let result = self.move_to_budget(bytes).await;
        if result.is_err() {
            // No answer means that it has ended; nothing is left to put right then.
            let _ = answer(self.ask(|answer| Command::SetBudget { bytes: before, answer })).await;
        }
        let agreed = if result.is_ok() { bytes } else { before };
        let booked = self.grant.set(agreed).map_err(pool_full);
        result.and(booked)
    }

    /// Has the fault thread work towards a budget for as long as it makes progress.
    async fn move_to_budget(&self, bytes: u64) -> Result<(), Failure> {
        let mut last = u64::MAX;
        loop {
            answer(self.ask(|answer| Command::SetBudget { bytes, answer })).await?;
            let stats = self.stats();
            let held = stats.resident_pages.saturating_mul(PAGE).saturating_add(stats.overhead_bytes);
            if held <= bytes {
                return Ok(());
            }
            if held >= last {
                let stuck = Size(stats.unevictable_pages.saturating_mul(PAGE));
                let text = format!(
                    "client {} holds {} and cannot get down to {} for now ({stuck} of it cannot be evicted); \
                     its budget stays",
                    self.number,
                    Size(held),
                    Size(bytes)
                );
                return Err(failure(ErrorCode::System, text));
            }
            last = held;
        }
    }

    /// Tells the client about a budget that another has set.
    pub(crate) fn notify_budget(&self) {
        self.connection.notice(&Reply::Budget(Budget { bytes: self.grant.bytes() }));
    }
}

/// All clients.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    entries: RefCell<BTreeMap<u64, Rc<Client>>>,
    last: Cell<u64>,
}

impl Clients {
    /// Enters a client under the next number.
    pub(crate) fn enter(
        &self,
        peer: Peer,
        name: String,
        grant: Grant,
        connection: Rc<Connection>,
    ) -> Rc<Client> {
        let number = self.last.get() + 1;
        self.last.set(number);
        let client = Rc::new(Client {
            number,
            peer,
            name,
            grant,
            connection,
            regions: Cell::new(0),
            ending: Cell::new(false),
            handle: RefCell::new(None),
            budget_change: Mutex::new(()),
        });
        self.entries.borrow_mut().insert(number, Rc::clone(&client));
        client
    }

    /// Takes a client off the list and gives its grant back.
    pub(crate) fn remove(&self, client: &Client) {
        client.grant.end();
        self.entries.borrow_mut().remove(&client.number);
    }

    pub(crate) fn get(&self, number: u64) -> Option<Rc<Client>> {
        self.entries.borrow().get(&number).cloned()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    pub(crate) fn of_uid(&self, uid: u32) -> usize {
        self.entries.borrow().values().filter(|client| client.peer.uid == uid).count()
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
