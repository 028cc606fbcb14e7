//! A thread that exists to write one line to stderr if the daemon is lost. The agent must not: it has no share in the
//! application's file descriptors, and whoever writes to a pipe or terminal may wait for ever. Nothing waits for this
//! thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, JoinHandle, Thread};

use crate::own;

const IDLE: u8 = 0;
const SPEAK: u8 = 1;
const LEAVE: u8 = 2;

const LINE: &[u8] =
    b"fmalloc: the paging daemon is gone; threads that need memory which is not resident wait for \
ever. Restart the program.\n";

/// The thread's owner.
#[derive(Debug)]
pub(crate) struct Herald {
    voice: Voice,
    thread: JoinHandle<()>,
}

/// Makes the herald speak; for the agent. Never blocks.
#[derive(Debug, Clone)]
pub(crate) struct Voice {
    order: Arc<AtomicU8>,
    thread: Thread,
}

impl Herald {
    /// Starts the thread. The caller's signal mask and file descriptors become the thread's.
    pub(crate) fn start() -> io::Result<Self> {
        let order = Arc::new(AtomicU8::new(IDLE));
        let heard = Arc::clone(&order);
        let thread = thread::Builder::new()
            .name("fmalloc-herald".to_owned())
            .stack_size(128 * 1024)
            .spawn(move || listen(&heard))?;
        Ok(Self { voice: Voice { order, thread: thread.thread().clone() }, thread })
    }

    /// What the agent gets.
    pub(crate) fn voice(&self) -> Voice {
        self.voice.clone()
    }

    /// Ends the thread if it has nothing to say; otherwise lets it.
    pub(crate) fn dismiss(self) {
        if self.voice.give(LEAVE) {
            let _ = self.thread.join();
        }
    }

    /// For a forked child, in which the thread does not exist: its handle must not be touched.
    pub(crate) fn forget(self) {
        std::mem::forget(self.thread);
    }
}

impl Voice {
    /// Has the line written.
    pub(crate) fn daemon_gone(&self) {
        self.give(SPEAK);
    }

    fn give(&self, order: u8) -> bool {
        let given = self.order.compare_exchange(IDLE, order, Ordering::AcqRel, Ordering::Acquire).is_ok();
        self.thread.unpark();
        given
    }
}

fn listen(order: &AtomicU8) {
    own::on_own_thread();
    loop {
        match order.load(Ordering::Acquire) {
            IDLE => thread::park(),
            SPEAK => {
                // SAFETY: the buffer is valid; the descriptor may be anything or closed, which the kernel checks.
                unsafe { libc::write(2, LINE.as_ptr().cast(), LINE.len()) };
                return;
            }
            _ => return,
        }
    }
}
