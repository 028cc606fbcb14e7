//! A second thread of the agent, which evicts where that waits for the daemon (`remapper`): the agent itself must notice
//! when the daemon has gone, whatever the aide waits for then. Both share the agent's table of descriptors.

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::{io, mem};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::evict::Evictor;
use crate::health::Health;
use crate::link::Link;
use crate::own;
use crate::sys;

const STACK: usize = 128 * 1024;

/// The running thread, as the agent sees it.
#[derive(Debug)]
pub(super) struct Aide {
    thread: JoinHandle<()>,
    stop: Arc<EventFd>,
    quit: Arc<AtomicBool>,
}

impl Aide {
    /// Starts the thread, with the signal mask and the descriptors of the caller, the agent.
    pub(super) fn start(link: Arc<Link>, evictor: Evictor, bells: (OwnedFd, OwnedFd)) -> io::Result<Self> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (theirs, quit) = (Arc::clone(&stop), evictor.quit_flag());
        let thread = thread::Builder::new()
            .name("fmalloc-aide".to_owned())
            .stack_size(STACK)
            .spawn(move || live(&link, evictor, &bells, &theirs))?;
        Ok(Self { thread, stop, quit })
    }

    /// Tells it to end as soon as it waits for nobody.
    pub(super) fn tell(&self) {
        self.quit.store(true, Ordering::Relaxed);
        let _ = self.stop.write(1);
    }

    /// Ends it. Only while a daemon is there: without one it may wait for ever.
    pub(super) fn end(self) {
        self.tell();
        let _ = self.thread.join();
    }
}

fn live(link: &Link, mut evictor: Evictor, bells: &(OwnedFd, OwnedFd), stop: &EventFd) {
    own::on_own_thread();
    // A panic must not unwind out of here, as in the agent.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| serve(&mut evictor, bells, stop))) {
        mem::forget(panic);
        link.health.fail(Health::AgentFailed);
        link.mailbox.close();
        loop {
            thread::park();
        }
    }
}

fn serve(evictor: &mut Evictor, (bell, daemon_bell): &(OwnedFd, OwnedFd), stop: &EventFd) {
    loop {
        let mut fds =
            [sys::watch(Some(bell.as_fd()), libc::POLLIN), sys::watch(Some(stop.as_fd()), libc::POLLIN)];
        match sys::poll(&mut fds, None) {
            Ok(_) if fds[1].revents != 0 => return,
            Ok(_) => evictor.serve_all(bell, daemon_bell),
            // For want of kernel memory: come back.
            Err(Errno::ENOMEM) => thread::yield_now(),
            Err(_) => return,
        }
    }
}
