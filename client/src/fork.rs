//! Forked children that go on with the regions.
//!
//! Before a fork the daemon is asked for the child's swap space, and the agent is told to do nothing but move pages: the C
//! library holds its allocator's locks while it forks, the fork waits for the daemon, and the daemon for pages that are on
//! their way out, so an agent that allocated would wait for itself. After the fork the child starts an agent of its own,
//! and does not go on before that holds the child's userfaultfd: were the daemon to die first, the child would read zeros.

use std::mem::ManuallyDrop;
use std::sync::{Arc, MutexGuard, PoisonError};

use fmalloc_proto::groups::Token;
use fmalloc_proto::messages::{Empty, Reply, Request};
use nix::errno::Errno;

use crate::agent::mailbox::Held;
use crate::error::Error;
use crate::link::Link;
use crate::pager::{Inner, Pager, Threads};

/// A fork that the daemon is prepared for. Other threads' calls on the pager wait until it is over.
///
/// For a program's own handlers around `fork`; [`fork`] does all of it. Dropped unused, the fork has not happened.
#[derive(Debug)]
pub struct PreparedFork {
    token: Token,
    // Both borrow from `inner`, and go before it.
    mail: ManuallyDrop<Held<'static>>,
    threads: ManuallyDrop<MutexGuard<'static, Option<Threads>>>,
    inner: Arc<Inner>,
    over: bool,
}

impl Pager {
    /// Prepares for a fork of this process by the calling thread, so that the child can go on with the regions: claims the
    /// child's swap space. Needs a pager that was made with the option `inherit`. Follow it by `fork` and
    /// [`PreparedFork::in_parent`] and [`PreparedFork::in_child`]. In between, call nothing of this pager.
    ///
    /// # Errors
    /// [`Error::SwapFull`]; [`Error::Refused`] where the daemon takes no more clients, or where the budget is too small for
    /// another process; [`Error::Invalid`] without the option; a lost daemon. [`Error::errno`] is what a `fork` shall
    /// give to its caller then.
    pub fn prepare_fork(&self) -> Result<PreparedFork, Error> {
        let inner = Arc::clone(self.inner());
        // SAFETY: what is borrowed lives as long as `inner`, which is dropped last.
        let stay: &'static Inner = unsafe { &*Arc::as_ptr(&inner) };
        if !stay.wanted.inherit {
            return Err(Error::invalid("the pager was made without the option `inherit`"));
        }
        let threads = stay.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let token = match stay.link.call(&Request::PrepareFork(Empty {}))? {
            Reply::ForkPrepared(prepared) => prepared.token,
            other => return Err(Link::unexpected(&other)),
        };
        // The agent may want the mailbox until it is silent.
        let silent = stay.link.silence();
        let mail = stay.link.mailbox.hold();
        let prepared = PreparedFork {
            token,
            mail: ManuallyDrop::new(mail),
            threads: ManuallyDrop::new(threads),
            inner,
            over: false,
        };
        if silent { Ok(prepared) } else { Err(Error::AgentFailed) }
    }
}

impl PreparedFork {
    /// To be called in the parent when `fork` has returned, whether a child came of it or not.
    pub fn in_parent(self) {}

    /// To be called in the child before anything else. When it returns, pager and regions are the child's own; what was
    /// written since the fork is seen by neither of both. If the child cannot have its memory, it is ended by SIGABRT,
    /// with a line on stderr.
    ///
    /// # Safety
    /// The calling process must have been forked since, by the thread that prepared the fork.
    pub unsafe fn in_child(mut self) {
        self.over = true;
        let inner = &self.inner;
        inner.link.renew();
        self.mail.clear();
        let old = self.threads.take();
        // SAFETY: neither is used any more, nor dropped again.
        unsafe { ManuallyDrop::drop(&mut self.mail) };
        if let Some(Threads { agent, herald }) = old {
            // These threads do not exist here: their handles must not be touched.
            std::mem::forget(agent);
            herald.forget();
        }
        match inner.start_threads(Some(self.token)) {
            Ok(threads) => **self.threads = Some(threads),
            Err(error) => give_up(&error),
        }
        // SAFETY: as above.
        unsafe { ManuallyDrop::drop(&mut self.threads) };
    }
}

impl Drop for PreparedFork {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let link = &self.inner.link;
        link.resume();
        // SAFETY: not used any more, nor dropped again.
        unsafe { ManuallyDrop::drop(&mut self.mail) };
        // Nobody needs the answer, and the next request is read after it.
        link.post(&Request::EndFork(Empty {}));
        // SAFETY: as above.
        unsafe { ManuallyDrop::drop(&mut self.threads) };
    }
}

/// Says why this child cannot live, and ends it.
fn give_up(error: &Error) -> ! {
    let line = format!("fmalloc: a forked child cannot get its memory and ends: {error}\n");
    // SAFETY: the buffer is valid; the descriptor may be anything or closed, which the kernel checks.
    unsafe { libc::write(2, line.as_ptr().cast(), line.len()) };
    std::process::abort()
}

/// Forks this process. The child goes on with the regions of `pagers`, which were made with the option `inherit`: both
/// sides see what was there at the fork, and then each its own writes. Gives the child's process id, and none in the
/// child. Regions of other pagers do not exist in the child.
///
/// Parent and child, and their further children, share the parent's budget. The child's copy of committed memory is
/// claimed in swap here, or an error. Right after the fork both count what is resident, of which there is one copy until one
/// of both writes: what is too much then is evicted as from a client whose budget was lowered.
///
/// # Errors
/// As [`Pager::prepare_fork`], or what `fork` says. There is no child then.
///
/// # Safety
/// As for `fork` of the C library: in a process with several threads the child must not rely on what those were doing.
pub unsafe fn fork(pagers: &[&Pager]) -> Result<Option<u32>, Error> {
    let mut prepared = Vec::with_capacity(pagers.len());
    for pager in pagers {
        prepared.push(pager.prepare_fork()?);
    }
    // SAFETY: the caller's.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: this is the child, and this thread has prepared.
            prepared.into_iter().for_each(|prepared| unsafe { prepared.in_child() });
            Ok(None)
        }
        pid => {
            let errno = Errno::last();
            prepared.into_iter().for_each(PreparedFork::in_parent);
            u32::try_from(pid).map(Some).map_err(|_| Error::system("fork", errno))
        }
    }
}
