//! The handle to a daemon, and the life of the two threads behind it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use fmalloc_proto::groups::Token;
use fmalloc_proto::messages::{Budget, ClientStats, Empty, Reply, Request};
use nix::sys::signal::{SigSet, SigmaskHow};

use crate::agent::{self, Begin, mailbox::Slot};
use crate::connect::{self, Route, Wanted};
use crate::error::Error;
use crate::health::Health;
use crate::herald::Herald;
use crate::link::Link;
use crate::options::{ConnectOptions, PrivateOptions, client_name, disabled};
use crate::own;
use crate::spawn::Launch;

/// A connection to a daemon that pages this process's regions within one budget. Clones are the same pager; all of it
/// may be used from any thread. The connection ends when the last clone and the last region are dropped.
///
/// Behind it run two threads with all signals blocked: `fmalloc-agent`, which evicts pages when the daemon asks, and
/// `fmalloc-herald`, which writes one line to stderr if the daemon is lost; before Linux 6.8 also `fmalloc-aide`, which
/// evicts in the agent's place. In a forked child none exists, and every call gives [`Error::Forked`].
#[derive(Debug, Clone)]
pub struct Pager(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) link: Arc<Link>,
    /// Locked while a thread forks.
    pub(crate) threads: Mutex<Option<Threads>>,
    /// How the daemon is reached, by a forked child too.
    route: Arc<Route>,
    pub(crate) wanted: Arc<Wanted>,
}

/// The threads behind a pager.
#[derive(Debug)]
pub(crate) struct Threads {
    pub(crate) agent: JoinHandle<()>,
    pub(crate) herald: Herald,
}

impl Pager {
    /// Connects to a daemon: at FMALLOC_SOCKET, else the system's, else the user's own. The budget is the daemon's
    /// default.
    ///
    /// # Errors
    /// [`Error::NoDaemon`], [`Error::Denied`], [`Error::PoolFull`], [`Error::NoUserfaultfd`],
    /// [`Error::Unsupported`], or a failure of the system.
    pub fn connect() -> Result<Self, Error> {
        Self::connect_with(&ConnectOptions::default())
    }

    /// Connects to a daemon with options.
    ///
    /// # Errors
    /// As [`Pager::connect`].
    pub fn connect_with(options: &ConnectOptions) -> Result<Self, Error> {
        let wanted = Wanted {
            name: client_name(options.name.as_deref()),
            budget: options.budget.unwrap_or(0),
            user_mode_only: options.user_mode_only,
            inherit: options.inherit,
            group: options.group,
            disabled: disabled()?,
        };
        Self::start(Route::Sockets(connect::sockets(options.socket.as_deref())), wanted)
    }

    /// Starts a daemon for this process alone, with a temporary swap file that has no name. The daemon is not a child
    /// of this process: `wait` does not see it. It ends when this process has. FMALLOC_DAEMON_LOG names a file for its
    /// log, which otherwise goes nowhere.
    ///
    /// # Errors
    /// [`Error::NoDaemonBinary`], [`Error::NoUserfaultfd`] where this user may not have a full userfaultfd,
    /// [`Error::Unsupported`], or a failure of the system.
    pub fn private(options: &PrivateOptions) -> Result<Self, Error> {
        let wanted = Wanted {
            name: client_name(options.name.as_deref()),
            budget: options.budget,
            user_mode_only: options.user_mode_only,
            inherit: options.inherit,
            group: None,
            disabled: disabled()?,
        };
        Self::start(Route::Private(Box::new(Launch::new(options)?)), wanted)
    }

    /// Granted budget in bytes; the daemon's administrator may change it at any time.
    #[must_use]
    pub fn budget(&self) -> u64 {
        self.0.link.budget.load(Ordering::Relaxed)
    }

    /// Asks for another budget in bytes and gives what was granted. Returns when the client is within it, or cannot
    /// get there for now because too many pages refuse eviction.
    ///
    /// # Errors
    /// [`Error::PoolFull`], [`Error::Invalid`] below the minimum, [`Error::Refused`], or a lost daemon.
    pub fn set_budget(&self, bytes: u64) -> Result<u64, Error> {
        match self.0.link.call(&Request::SetBudget(Budget { bytes }))? {
            Reply::Budget(granted) => Ok(granted.bytes),
            other => Err(Link::unexpected(&other)),
        }
    }

    /// Figures of this client.
    ///
    /// # Errors
    /// A lost daemon.
    pub fn stats(&self) -> Result<ClientStats, Error> {
        match self.0.link.call(&Request::Stats(Empty {}))? {
            Reply::Stats(stats) => Ok(stats),
            other => Err(Link::unexpected(&other)),
        }
    }

    /// Whether paging works. Asks nobody; costs a load.
    #[must_use]
    pub fn health(&self) -> Health {
        self.0.link.health()
    }

    /// This client's number, as `fmallocctl clients` shows it.
    #[must_use]
    pub fn client_id(&self) -> u64 {
        self.0.link.client.load(Ordering::Relaxed)
    }

    pub(crate) fn link(&self) -> &Link {
        &self.0.link
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    /// Whether forked children have the regions.
    pub(crate) fn inherits(&self) -> bool {
        self.0.wanted.inherit
    }

    fn start(route: Route, wanted: Wanted) -> Result<Self, Error> {
        let _inside = own::enter();
        let inner = Inner {
            link: Arc::new(Link::new()),
            threads: Mutex::new(None),
            route: Arc::new(route),
            wanted: Arc::new(wanted),
        };
        let threads = inner.start_threads(None)?;
        *inner.threads.lock().unwrap_or_else(PoisonError::into_inner) = Some(threads);
        Ok(Self(Arc::new(inner)))
    }
}

impl Inner {
    /// Starts the threads, in a forked child with the token of the fork. The agent holds this process's userfaultfd then.
    pub(crate) fn start_threads(&self, child: Option<Token>) -> Result<Threads, Error> {
        let _inside = own::enter();
        let blocked = BlockedSignals::new()?;
        let failed = |error: std::io::Error| Error::System {
            what: "starting a thread of fmalloc".to_owned(),
            errno: error.raw_os_error().unwrap_or(0),
        };
        let herald = Herald::start().map_err(failed)?;
        let (link, route, wanted) = (&self.link, &self.route, &self.wanted);
        let begin = Begin { route: Arc::clone(route), wanted: Arc::clone(wanted), child };
        let started = agent::start(Arc::clone(link), herald.voice(), begin);
        drop(blocked);
        match started.map_err(failed).and_then(agent::Starting::wait) {
            Ok(agent) => Ok(Threads { agent, herald }),
            Err(error) => {
                herald.dismiss();
                Err(error)
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let threads = self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Threads { agent, herald }) = threads else { return };
        if !self.link.is_owner() {
            // Neither thread exists in a forked child: their handles must not be touched.
            std::mem::forget(agent);
            herald.forget();
        } else if !self.link.has_leaked() {
            let _inside = own::enter();
            let (slot, waiter) = Slot::new();
            self.link.mailbox.put_end(waiter);
            slot.wait(|| self.link.wake());
            let _ = agent.join();
            herald.dismiss();
        }
    }
}

/// All signals blocked in the calling thread, and so in the threads that it starts meanwhile. Libc leaves out those
/// that it needs itself.
struct BlockedSignals(SigSet);

impl BlockedSignals {
    fn new() -> Result<Self, Error> {
        SigSet::all()
            .thread_swap_mask(SigmaskHow::SIG_SETMASK)
            .map(Self)
            .map_err(|errno| Error::system("blocking signals", errno))
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        let _ = self.0.thread_set_mask();
    }
}
