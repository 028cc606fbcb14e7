//! The agent: one thread per pager that holds every descriptor, speaks to the daemon, and evicts pages when the daemon
//! asks. Its file descriptor table is its own, so that a program that closes descriptors which it does not know, or
//! forks, does not get at them; other threads reach it through memory and wake it with SIGURG, which it keeps blocked
//! and reads from a signalfd.
//!
//! The thread never ends while a region exists: it would take the userfaultfd along, and later faults would read zeros.

mod aide;
pub(crate) mod control;
pub(crate) mod evict;
pub(crate) mod lent;
pub(crate) mod mailbox;
#[cfg(test)]
mod move_tests;
pub(crate) mod mover;
pub(crate) mod remapper;
mod sight;
pub(crate) mod staging;

use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{io, mem};

use fmalloc_proto::groups::Token;
use fmalloc_proto::limits::PAGE;
use fmalloc_proto::messages::Staging;
use fmalloc_proto::num::to_u64;
use fmalloc_proto::ring::{Layout, Ring};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::unistd::getpid;

use self::aide::Aide;
use self::control::{Control, Gone};
use self::evict::{Evictor, Method};
use self::mailbox::{Empty, Waiter};
use self::mover::Mover;
use self::remapper::Remapper;
use crate::connect::{self, Route, Wanted};
use crate::error::Error;
use crate::health::Health;
use crate::herald::Voice;
use crate::link::Link;
use crate::own;
use crate::sys::{self, Uffd};

const STACK: usize = 256 * 1024;
/// When to look again into a mailbox that was in use.
const SOON: Duration = Duration::from_millis(1);
/// How long to do nothing but move pages before looking whether that is still wanted.
const QUIET: Duration = Duration::from_millis(10);
/// How long to leave a signal alone that was meant for the application.
const ASIDE: Duration = Duration::from_millis(10);

/// An agent on its way.
#[derive(Debug)]
pub(crate) struct Starting {
    thread: JoinHandle<()>,
    outcome: Receiver<Result<(), Error>>,
}

impl Starting {
    /// Waits until the agent is connected, or has failed and ended.
    pub(crate) fn wait(self) -> Result<JoinHandle<()>, Error> {
        self.outcome.recv().unwrap_or(Err(Error::AgentFailed)).map(|()| self.thread)
    }
}

/// What an agent begins with.
#[derive(Debug)]
pub(crate) struct Begin {
    /// Where the daemon is.
    pub(crate) route: Arc<Route>,
    /// What to ask it for.
    pub(crate) wanted: Arc<Wanted>,
    /// In a forked child: what the parent was given for it.
    pub(crate) child: Option<Token>,
}

/// Starts the thread; the caller has all signals blocked.
pub(crate) fn start(link: Arc<Link>, voice: Voice, begin: Begin) -> io::Result<Starting> {
    let (sender, outcome) = channel();
    let thread = thread::Builder::new()
        .name("fmalloc-agent".to_owned())
        .stack_size(STACK)
        .spawn(move || live(link, voice, &begin, &sender))?;
    Ok(Starting { thread, outcome })
}

/// The whole life of the thread.
fn live(link: Arc<Link>, voice: Voice, begin: &Begin, started: &Sender<Result<(), Error>>) {
    own::on_own_thread();
    let mut inherited = None;
    let mut agent = match Agent::connect(&link, voice, begin, &mut inherited, started) {
        Ok(agent) => agent,
        Err(error) => {
            let Some(uffd) = inherited else {
                let _ = started.send(Err(error));
                return;
            };
            // A forked child that runs already: faults are served, and nothing is evicted.
            link.health.fail(Health::AgentFailed);
            link.mailbox.close();
            mem::forget(uffd);
            loop {
                thread::park();
            }
        }
    };
    let _ = started.send(Ok(()));
    // A panic must not unwind out of here: the descriptors would be closed while regions exist.
    let end = catch_unwind(AssertUnwindSafe(|| agent.run()))
        .or_else(|_| catch_unwind(AssertUnwindSafe(|| agent.run_failed())));
    match end {
        Ok(end) => {
            drop(agent);
            drop(end);
        }
        Err(panic) => {
            mem::forget(panic);
            loop {
                thread::park();
            }
        }
    }
}

#[derive(Debug)]
struct Agent {
    link: Arc<Link>,
    voice: Voice,
    /// None once the daemon is gone.
    control: Option<Control>,
    evictions: Evictions,
    signal: SignalFd,
    /// The last signal was the application's: leave it the next one.
    aside: bool,
}

/// Who evicts.
#[derive(Debug)]
enum Evictions {
    /// The agent, when the first of these bells rings; then it rings the other.
    Own(Box<Evictor>, OwnedFd, OwnedFd),
    /// A thread for that alone, and the userfaultfd, to be held here too.
    Aide(Option<Aide>, #[allow(dead_code, reason = "held, for what it keeps open")] Uffd),
}

impl Agent {
    /// In a forked child the parent's memory goes on as soon as its userfaultfd is `inherited`, which is `started`.
    fn connect(
        link: &Arc<Link>,
        voice: Voice,
        begin: &Begin,
        inherited: &mut Option<Uffd>,
        started: &Sender<Result<(), Error>>,
    ) -> Result<Self, Error> {
        let Begin { route, wanted, child } = begin;
        own_fd_table()?;
        link.agent.store(sys::thread_id(), Ordering::Release);
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGURG);
        let signal = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|errno| Error::system("making a signalfd", errno))?;

        let socket = connect::reach(route, child.is_some())?;
        connect::greet(socket.as_fd())?;
        let (opening, uffd) = match child {
            None => (connect::open(socket.as_fd(), wanted)?, None),
            Some(token) => {
                let (opening, uffd) = connect::adopt(socket.as_fd(), *token)?;
                (opening, Some(uffd))
            }
        };
        link.client.store(opening.opened.client, Ordering::Relaxed);
        link.budget.store(opening.opened.budget, Ordering::Relaxed);
        let duplicate =
            |uffd: &Uffd| uffd.try_clone().map_err(|errno| Error::system("duplicating a descriptor", errno));
        if let Some(uffd) = &uffd {
            *inherited = Some(duplicate(uffd)?);
            let _ = started.send(Ok(()));
        }
        keep_from_children(&opening.ring);
        let make_uffd = || connect::make_uffd(opening.device.as_ref(), wanted.user_mode_only);
        let (uffd, is_child) = match uffd {
            Some(uffd) => (uffd, true),
            None => (make_uffd()?, false),
        };
        let method = choose_method(make_uffd, opening.ring.layout(), wanted.disabled.move_pages)?;
        let staging = match &method {
            Method::Move(_) => None,
            Method::Remap(remapper) => Some(remapper.span()).map(|(addr, len)| Staging { addr, len }),
        };
        if is_child {
            connect::ready(socket.as_fd())?;
        } else {
            connect::attach(socket.as_fd(), &uffd, staging, wanted.inherit)?;
        }
        let control = Control::new(socket).map_err(|errno| Error::system("setting up the socket", errno))?;
        let held = duplicate(&uffd)?;
        let evictor = Evictor::new(opening.ring, method, uffd);
        let evictions = if staging.is_none() {
            Evictions::Own(Box::new(evictor), opening.agent_bell, opening.daemon_bell)
        } else {
            let bells = (opening.agent_bell, opening.daemon_bell);
            let aide = Aide::start(Arc::clone(link), evictor, bells).map_err(|error| Error::System {
                what: "starting a thread of fmalloc".to_owned(),
                errno: error.raw_os_error().unwrap_or(0),
            })?;
            Evictions::Aide(Some(aide), held)
        };
        let link = Arc::clone(link);
        Ok(Self { link, voice, control: Some(control), evictions, signal, aside: false })
    }

    /// Works until the pager is dropped; gives whoever waits for the end.
    fn run(&mut self) -> Waiter {
        let mut again = false;
        loop {
            while self.link.is_silenced() {
                self.serve_silently();
            }
            let control = self.control.as_ref();
            let blocked = control.is_some_and(Control::is_blocked);
            let events = if blocked { libc::POLLIN | libc::POLLOUT } else { libc::POLLIN };
            let bell = match &self.evictions {
                Evictions::Own(_, bell, _) => Some(bell.as_fd()),
                Evictions::Aide(..) => None,
            };
            let mut fds = [
                // The ring is left alone when nobody would take the bytes out of it: resident pages still work.
                sys::watch(control.and(bell), libc::POLLIN),
                sys::watch(control.map(Control::fd), events),
                sys::watch((!self.aside).then(|| self.signal.as_fd()), libc::POLLIN),
            ];
            let timeout = match (again, mem::take(&mut self.aside)) {
                (true, _) => Some(SOON),
                (false, true) => Some(ASIDE),
                (false, false) => None,
            };
            // Fails only for want of kernel memory: then look at everything and come back.
            if sys::poll(&mut fds, timeout).is_err() {
                thread::yield_now();
            }
            let [bell, control, signal] = fds.map(|fd| fd.revents != 0);
            if bell {
                self.serve_ring();
            }
            if signal {
                self.read_signal();
            }
            if control && self.with_control(|control, link| control.receive(link)).is_err() {
                self.daemon_gone();
            }
            again = match self.read_mail() {
                Ok(Some(end)) => return self.farewell(end),
                Ok(None) => false,
                Err(()) => true,
            };
            if self.with_control(|control, _| control.send()).is_err() {
                self.daemon_gone();
            }
        }
    }

    /// After a panic: everything is refused, and the descriptors are held.
    fn run_failed(&mut self) -> Waiter {
        self.link.health.fail(Health::AgentFailed);
        self.link.mailbox.close();
        if let Some(control) = self.control.take() {
            // The socket stays open, or the daemon would take this client for dead.
            mem::forget(control.abandon());
        }
        loop {
            let mut fds = [sys::watch(Some(self.signal.as_fd()), libc::POLLIN)];
            let _ = sys::poll(&mut fds, None);
            self.read_signal();
            if mem::take(&mut self.aside) {
                thread::sleep(ASIDE);
            }
            if let Ok(end) = self.link.mailbox.take_end() {
                return end;
            }
        }
    }

    /// A thread forks, and holds the allocator's locks: nothing but what moves pages, which allocates nothing.
    fn serve_silently(&mut self) {
        let bell = match (&self.evictions, &self.control) {
            (Evictions::Own(_, bell, _), Some(_)) => Some(bell.as_fd()),
            _ => None,
        };
        let control = self.control.as_ref().filter(|_| self.link.health.get() == Health::Ok);
        let mut fds = [
            sys::watch(bell, libc::POLLIN),
            sys::watch((!self.aside).then(|| self.signal.as_fd()), libc::POLLIN),
            // Tells of its end without being asked.
            sys::watch(control.map(Control::fd), 0),
        ];
        let timeout = if mem::take(&mut self.aside) { ASIDE } else { QUIET };
        let _ = sys::poll(&mut fds, Some(timeout));
        let [bell, signal, gone] = fds.map(|fd| fd.revents != 0);
        if gone {
            // The fork waits for ever. The rest is seen to if it should end.
            self.link.health.fail(Health::DaemonGone);
            self.voice.daemon_gone();
        }
        if bell {
            self.serve_ring();
        }
        if signal {
            self.read_signal();
        }
    }

    fn serve_ring(&mut self) {
        if let Evictions::Own(evictor, bell, daemon_bell) = &mut self.evictions {
            evictor.serve_all(bell, daemon_bell);
        }
    }

    /// Takes one SIGURG off. A signalfd gives those for the whole process too, which are the application's: they go
    /// back, and the agent looks away for a moment so that it does not get the same one again.
    fn read_signal(&mut self) {
        if let Ok(Some(info)) = self.signal.read_signal()
            && info.ssi_code != libc::SI_TKILL
        {
            let _ = kill(getpid(), Signal::SIGURG);
            self.aside = true;
        }
    }

    /// Queues all requests in the mailbox. Gives the waiter if the end is asked for, an error to be called again soon.
    fn read_mail(&mut self) -> Result<Option<Waiter>, ()> {
        loop {
            match (self.link.mailbox.take(), self.control.as_mut()) {
                (Ok(job), Some(control)) => control.post(job),
                (Ok(job), None) => drop(job),
                (Err(Empty::InUse), _) => return Err(()),
                (Err(Empty::Nothing), _) => break,
            }
        }
        match self.link.mailbox.take_end() {
            Ok(end) => Ok(Some(end)),
            Err(Empty::Nothing) => Ok(None),
            Err(Empty::InUse) => Err(()),
        }
    }

    fn with_control(
        &mut self,
        work: impl FnOnce(&mut Control, &Link) -> Result<(), Gone>,
    ) -> Result<(), Gone> {
        self.control.as_mut().map_or(Ok(()), |control| work(control, &self.link))
    }

    /// All requests fail from now on. The userfaultfd stays open: faults wait instead of reading zeros.
    fn daemon_gone(&mut self) {
        self.link.health.fail(Health::DaemonGone);
        self.link.mailbox.close();
        self.control = None;
        if let Evictions::Aide(Some(aide), _) = &self.evictions {
            aide.tell();
        }
        self.voice.daemon_gone();
    }

    fn farewell(&mut self, end: Waiter) -> Waiter {
        let _ = self.with_control(|control, link| {
            control.farewell(link);
            Ok(())
        });
        if self.control.is_some()
            && let Evictions::Aide(aide, _) = &mut self.evictions
            && let Some(aide) = aide.take()
        {
            aide.end();
        }
        end
    }
}

/// How pages shall leave regions: moved where the kernel can, else remapped.
fn choose_method(
    make_uffd: impl Fn() -> Result<Uffd, Error>,
    layout: Layout,
    move_disabled: bool,
) -> Result<Method, Error> {
    if !move_disabled {
        match Mover::new(make_uffd()?, layout) {
            Ok(mover) => return Ok(Method::Move(mover)),
            Err(Error::Unsupported { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Remapper::new(&make_uffd()?, layout).map(Method::Remap)
}

/// Leaves the application's descriptors behind. The numbers of the standard streams are taken, so that nothing that
/// writes to one of them ever reaches a descriptor of the protocol.
fn own_fd_table() -> Result<(), Error> {
    sys::leave_fd_table()
        .map_err(|errno| Error::system("giving the agent a file descriptor table of its own", errno))?;
    for number in 0..3 {
        let null = open("/dev/null", OFlag::O_RDWR, Mode::empty())
            .map_err(|errno| Error::system("opening /dev/null", errno))?;
        let got = null.into_raw_fd();
        debug_assert_eq!(got, number, "the table was empty");
    }
    Ok(())
}

/// Keeps the ring's pages out of forked children.
fn keep_from_children(ring: &Ring) {
    let layout = ring.layout();
    let start = to_u64(ring.page(0, 0).as_ptr().expose_provenance());
    let len = u64::from(layout.batches()) * u64::from(layout.batch_pages()) * PAGE;
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: changes no content; the pages are the ring's. Only tidiness is lost if it fails.
        let _: Result<(), Errno> = unsafe { sys::madvise(start, len, advice) };
    }
}
