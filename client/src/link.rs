//! What application threads and the agent share: the mailbox, the health, and how to wake the agent. Holds no file
//! descriptor: a program may close those that it does not know.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use fmalloc_proto::codec;
use fmalloc_proto::messages::{Reply, Request};
use fmalloc_proto::validate;
use nix::errno::Errno;

use crate::agent::lent::Lent;
use crate::agent::mailbox::{Job, Mailbox, Slot};
use crate::error::Error;
use crate::health::{Health, HealthCell};
use crate::own;
use crate::sys;

/// How often a thread that forks looks whether the agent is ready.
const LOOK: Duration = Duration::from_micros(20);
/// First id of a request after the handshake.
pub(crate) const FIRST_ID: u32 = 16;

/// The bond between a process's threads and one agent.
#[derive(Debug)]
pub(crate) struct Link {
    /// The process, 0 while a forked child takes over.
    owner: AtomicU32,
    /// A thread forks: the agent shall only move pages.
    forking: AtomicBool,
    /// And so it does.
    silent: AtomicBool,
    /// The agent's thread id, once it runs.
    pub(crate) agent: AtomicI32,
    /// Set by the agent.
    pub(crate) health: HealthCell,
    /// Granted budget in bytes.
    pub(crate) budget: AtomicU64,
    /// The client's number.
    pub(crate) client: AtomicU64,
    /// To the agent.
    pub(crate) mailbox: Mailbox,
    next_id: AtomicU32,
    leaked: AtomicBool,
}

/// A request whose reply nobody waits for yet.
#[derive(Debug)]
pub(crate) struct Begun(Slot);

impl Begun {
    /// Whether there is a reply, or none to come.
    pub(crate) fn is_done(&self) -> bool {
        self.0.is_done()
    }
}

impl Link {
    /// A link owned by this process.
    pub(crate) fn new() -> Self {
        Self {
            owner: AtomicU32::new(std::process::id()),
            forking: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            agent: AtomicI32::new(0),
            health: HealthCell::default(),
            budget: AtomicU64::new(0),
            client: AtomicU64::new(0),
            mailbox: Mailbox::new(),
            next_id: AtomicU32::new(FIRST_ID),
            leaked: AtomicBool::new(false),
        }
    }

    /// Whether this process made the pager, and is not a forked child of it.
    pub(crate) fn is_owner(&self) -> bool {
        std::process::id() == self.owner.load(Ordering::Relaxed)
    }

    /// In a forked child: the link is this process's from now on, and has no agent yet.
    pub(crate) fn renew(&self) {
        self.owner.store(std::process::id(), Ordering::Relaxed);
        self.agent.store(0, Ordering::Release);
        self.silent.store(false, Ordering::Relaxed);
        self.forking.store(false, Ordering::Relaxed);
    }

    /// Waits until the agent does nothing but move pages. False if there is none.
    pub(crate) fn silence(&self) -> bool {
        self.forking.store(true, Ordering::SeqCst);
        let mut looks = 0_u32;
        while !self.silent.load(Ordering::SeqCst) {
            // A signal can get lost: see `agent::mailbox`.
            if looks.is_multiple_of(1000) && !self.wake() {
                return false;
            }
            looks += 1;
            std::thread::sleep(LOOK);
        }
        true
    }

    /// The agent may do everything again.
    pub(crate) fn resume(&self) {
        self.silent.store(false, Ordering::SeqCst);
        self.forking.store(false, Ordering::SeqCst);
        self.wake();
    }

    /// For the agent: whether it shall only move pages. If so, takes note that it does.
    pub(crate) fn is_silenced(&self) -> bool {
        let forking = self.forking.load(Ordering::SeqCst);
        if forking {
            self.silent.store(true, Ordering::SeqCst);
        }
        forking
    }

    /// The pager's health as this process sees it.
    pub(crate) fn health(&self) -> Health {
        if self.is_owner() { self.health.get() } else { Health::Forked }
    }

    /// An error unless all is well.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.health() {
            Health::Ok => Ok(()),
            _ => Err(self.trouble()),
        }
    }

    /// Notes that a mapping stays for ever: then the agent must too, since it holds the userfaultfd.
    pub(crate) fn leak(&self) {
        self.leaked.store(true, Ordering::Release);
    }

    /// Whether any mapping was left behind.
    pub(crate) fn has_leaked(&self) -> bool {
        self.leaked.load(Ordering::Acquire)
    }

    /// Sends a request and waits for its reply, which takes as long as the daemon does; ends when the daemon is gone.
    ///
    /// # Errors
    /// The daemon's refusal, or why there was no answer ([`Error::is_uncertain`]).
    pub(crate) fn call(&self, request: &Request) -> Result<Reply, Error> {
        self.call_with(request, None)
    }

    /// [`Link::call`] with a file of the calling thread's, which must stay open meanwhile.
    pub(crate) fn call_with(&self, request: &Request, file: Option<Lent>) -> Result<Reply, Error> {
        let begun = self.start(request, file)?;
        self.finish(begun)
    }

    fn start(&self, request: &Request, file: Option<Lent>) -> Result<Begun, Error> {
        self.check()?;
        let _inside = own::enter();
        validate::request(request).map_err(|invalid| Error::invalid(invalid.to_string()))?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed).max(FIRST_ID);
        let frame = codec::encode(id, request).map_err(|error| Error::invalid(error.to_string()))?;
        let (slot, waiter) = Slot::new();
        if !self.mailbox.put(Job { id, frame, file, waiter }) {
            return Err(self.trouble());
        }
        Ok(Begun(slot))
    }

    /// Waits for the reply to what was begun.
    ///
    /// # Errors
    /// As [`Link::call`].
    pub(crate) fn finish(&self, begun: Begun) -> Result<Reply, Error> {
        match begun.0.wait(|| self.wake()) {
            Some(Reply::Error(failure)) => Err(failure.into()),
            Some(reply) => Ok(reply),
            None => Err(self.trouble()),
        }
    }

    /// Sends a request whose reply nobody needs.
    pub(crate) fn post(&self, request: &Request) {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed).max(FIRST_ID);
        let (_slot, waiter) = Slot::new();
        if let Ok(frame) = codec::encode(id, request)
            && self.mailbox.put(Job { id, frame, file: None, waiter })
        {
            self.wake();
        }
    }

    /// Sends a request and does not wait.
    ///
    /// # Errors
    /// [`Link::call`]'s, as far as they are known already.
    pub(crate) fn begin(&self, request: &Request) -> Result<Begun, Error> {
        let begun = self.start(request, None)?;
        self.wake();
        Ok(begun)
    }

    /// [`Link::call`] for requests whose reply says nothing more.
    pub(crate) fn order(&self, request: &Request) -> Result<(), Error> {
        match self.call(request)? {
            Reply::Done(_) => Ok(()),
            other => Err(Self::unexpected(&other)),
        }
    }

    /// A reply that does not belong to its request.
    pub(crate) fn unexpected(reply: &Reply) -> Error {
        Error::conversation(format!("unexpected reply {reply:?}"))
    }

    /// Wakes the agent to look into the mailbox; gives false if the agent's thread does not exist any more, which only
    /// something outside (a seccomp filter that kills threads) can cause.
    pub(crate) fn wake(&self) -> bool {
        let alive = sys::nudge(self.owner.load(Ordering::Relaxed), self.agent.load(Ordering::Acquire))
            != Err(Errno::ESRCH);
        if !alive {
            self.health.fail(Health::AgentFailed);
        }
        alive
    }

    fn trouble(&self) -> Error {
        match self.health() {
            Health::Forked => Error::Forked,
            Health::AgentFailed => Error::AgentFailed,
            Health::DaemonGone | Health::DiskFailed | Health::Ok => Error::DaemonGone,
        }
    }
}
