//! What application threads hand to the agent, and how they wait for the answer. The agent never waits for a lock that
//! an application thread may hold for long: that thread may itself be waiting for memory that only the agent can free.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, Thread};
use std::time::Duration;

use fmalloc_proto::messages::Reply;

use super::lent::Lent;

/// How long a thread waits for its answer before it wakes the agent once more: SIGURG is lost if the application
/// changes how it is handled between sending and receiving.
const WAKE_AGAIN: Duration = Duration::from_millis(250);

/// A request, ready to be sent.
#[derive(Debug)]
pub(crate) struct Job {
    /// The id that the reply will carry.
    pub(crate) id: u32,
    /// The encoded request.
    pub(crate) frame: Vec<u8>,
    /// The file that goes with it.
    pub(crate) file: Option<Lent>,
    /// Who waits for the reply.
    pub(crate) waiter: Waiter,
}

/// Why the mailbox gave nothing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Empty {
    /// There is nothing.
    Nothing,
    /// Somebody is putting something in at this moment: look again soon.
    InUse,
}

#[derive(Debug)]
struct Content {
    jobs: VecDeque<Job>,
    end: Option<Waiter>,
    open: bool,
}

/// The mailbox of one agent.
#[derive(Debug)]
pub(crate) struct Mailbox(Mutex<Content>);

/// The mailbox in one thread's hands: nobody puts anything in meanwhile.
#[derive(Debug)]
pub(crate) struct Held<'a>(MutexGuard<'a, Content>);

impl Held<'_> {
    /// Throws away what is inside, whose senders do not exist in this process.
    pub(crate) fn clear(&mut self) {
        std::mem::forget(std::mem::take(&mut self.0.jobs));
        std::mem::forget(self.0.end.take());
    }
}

impl Mailbox {
    /// Takes it for the time of a fork, so that the child does not find it in the middle of something.
    pub(crate) fn hold(&self) -> Held<'_> {
        Held(self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn new() -> Self {
        Self(Mutex::new(Content { jobs: VecDeque::new(), end: None, open: true }))
    }

    /// Puts a job in; gives false if the mailbox is closed.
    pub(crate) fn put(&self, job: Job) -> bool {
        let mut content = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if content.open {
            content.jobs.push_back(job);
        }
        content.open
    }

    /// Asks the agent to end.
    pub(crate) fn put_end(&self, waiter: Waiter) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).end = Some(waiter);
    }

    /// The oldest job, without waiting.
    pub(crate) fn take(&self) -> Result<Job, Empty> {
        self.look(|content| content.jobs.pop_front())
    }

    /// The request to end, without waiting.
    pub(crate) fn take_end(&self) -> Result<Waiter, Empty> {
        self.look(|content| content.end.take())
    }

    /// Takes no more jobs; those inside get no reply. A request to end is still taken.
    pub(crate) fn close(&self) {
        let mut content = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        content.open = false;
        content.jobs.clear();
    }

    fn look<T>(&self, take: impl FnOnce(&mut Content) -> Option<T>) -> Result<T, Empty> {
        let mut content = match self.0.try_lock() {
            Ok(content) => content,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Empty::InUse),
        };
        take(&mut content).ok_or(Empty::Nothing)
    }
}

#[derive(Debug)]
struct Shared {
    thread: Thread,
    done: AtomicBool,
    reply: Mutex<Option<Reply>>,
}

/// The place where one thread waits for one answer.
#[derive(Debug)]
pub(crate) struct Slot(Arc<Shared>);

/// The agent's end of a [`Slot`]. Dropped unanswered it tells the waiting thread that no reply will come.
#[derive(Debug)]
pub(crate) struct Waiter(Arc<Shared>);

impl Slot {
    /// A slot for the calling thread.
    pub(crate) fn new() -> (Self, Waiter) {
        let thread = thread::current();
        let shared = Arc::new(Shared { thread, done: AtomicBool::new(false), reply: Mutex::new(None) });
        (Self(Arc::clone(&shared)), Waiter(shared))
    }

    /// Whether the agent has answered or given up.
    pub(crate) fn is_done(&self) -> bool {
        self.0.done.load(Ordering::Acquire)
    }

    /// Waits until the agent has answered or given up; none is the latter. `wake` wakes the agent and says whether
    /// there still is one.
    pub(crate) fn wait(self, mut wake: impl FnMut() -> bool) -> Option<Reply> {
        while !self.0.done.load(Ordering::Acquire) {
            if !wake() {
                return None;
            }
            thread::park_timeout(WAKE_AGAIN);
        }
        self.0.reply.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Waiter {
    /// Hands the reply over.
    pub(crate) fn answer(self, reply: Reply) {
        // The other side locks only after `done`.
        *self.0.reply.lock().unwrap_or_else(PoisonError::into_inner) = Some(reply);
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.0.done.store(true, Ordering::Release);
        self.0.thread.unpark();
    }
}

#[cfg(test)]
mod tests {
    use fmalloc_proto::messages::Empty as NoFields;

    use super::*;

    fn job(id: u32) -> (Slot, Job) {
        let (slot, waiter) = Slot::new();
        (slot, Job { id, frame: vec![1], file: None, waiter })
    }

    #[test]
    fn jobs_come_out_in_order_and_answers_arrive_in_any() {
        let mailbox = Arc::new(Mailbox::new());
        let (first, job_one) = job(1);
        let (second, job_two) = job(2);
        assert!(mailbox.put(job_one) && mailbox.put(job_two));
        let agent = {
            let mailbox = Arc::clone(&mailbox);
            thread::spawn(move || {
                let one = mailbox.take().unwrap();
                let two = mailbox.take().unwrap();
                assert_eq!((one.id, two.id), (1, 2));
                two.waiter.answer(Reply::Done(NoFields {}));
                drop(one.waiter);
            })
        };
        assert_eq!(first.wait(|| true), None, "dropped unanswered");
        assert_eq!(second.wait(|| true), Some(Reply::Done(NoFields {})));
        agent.join().unwrap();
        assert_eq!(mailbox.take().unwrap_err(), Empty::Nothing);
    }

    #[test]
    fn a_closed_mailbox_fails_what_it_holds_and_takes_only_the_end() {
        let mailbox = Mailbox::new();
        let (slot, waiting) = job(1);
        mailbox.put(waiting);
        mailbox.close();
        assert_eq!(slot.wait(|| true), None);
        let (_, late) = job(2);
        assert!(!mailbox.put(late));
        let (_slot, end) = Slot::new();
        mailbox.put_end(end);
        assert!(mailbox.take_end().is_ok());
    }

    #[test]
    fn a_locked_mailbox_does_not_hold_up_the_agent() {
        let mailbox = Mailbox::new();
        let _held = mailbox.0.lock().unwrap();
        assert_eq!(mailbox.take().unwrap_err(), Empty::InUse);
    }

    #[test]
    fn a_thread_without_an_agent_stops_waiting() {
        let (slot, _waiter) = Slot::new();
        assert_eq!(slot.wait(|| false), None);
    }
}
