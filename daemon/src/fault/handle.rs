//! How the control plane talks to a client's fault thread: commands through a queue, an eventfd that wakes the
//! thread, answers through one-shot channels.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use fmalloc_proto::groups::Token;
use fmalloc_proto::messages::{
    Advice, Changed, Failure, FileMode, RegionRange, RegionRow, Register, Staging,
};
use fmalloc_proto::ring::Layout;
use nix::sys::eventfd::EventFd;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::backing::{Backing, Writers};
use super::forks::Birth;
use super::group::Group;
use super::stats::SharedStats;
use crate::swap::Swap;

/// An answer that the control plane awaits.
pub type Answer<T> = oneshot::Sender<Result<T, Failure>>;

/// What a fault thread is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Registers a range with the client's userfaultfd and puts it under paging. Answers with the region's number.
    Register {
        /// Address in the client.
        addr: u64,
        /// Length in bytes.
        len: u64,
        /// Claim swap for all of it now.
        commit: bool,
        /// Shown by `fmallocctl`.
        label: String,
        /// Region number.
        answer: Answer<u32>,
    },
    /// [`Command::Register`] for memory over a file.
    RegisterFile {
        /// As there.
        region: Register,
        /// What becomes of changes.
        mode: FileMode,
        /// The file.
        file: Box<Backing>,
        /// Region number.
        answer: Answer<u32>,
    },
    /// [`Command::Register`] for more memory over the file of a region.
    RegisterLike {
        /// As there.
        region: Register,
        /// The region whose file it is.
        of: u32,
        /// Region number.
        answer: Answer<u32>,
    },
    /// Has what was changed written to the file. Answers when that is done, with the file, to be synced.
    Flush {
        /// The part.
        range: RegionRange,
        /// Done.
        answer: Answer<Arc<Backing>>,
    },
    /// Lets a region that only read its file change it.
    MakeWritable {
        /// The region.
        region: u32,
        /// Done.
        answer: Answer<()>,
    },
    /// Which pages of a private region differ from the file.
    Changed {
        /// The part.
        range: RegionRange,
        /// Runs.
        answer: Answer<Changed>,
    },
    /// Reads a part in.
    Prefetch {
        /// The part.
        range: RegionRange,
        /// Sent when it is there, as far as frames allow.
        answer: Answer<()>,
    },
    /// Claims swap for a part.
    Commit {
        /// The part.
        range: RegionRange,
        /// Done.
        answer: Answer<()>,
    },
    /// Gives the claim of a part back.
    Decommit {
        /// The part.
        range: RegionRange,
        /// Done.
        answer: Answer<()>,
    },
    /// Ends paging of a region.
    Unregister {
        /// The region.
        region: u32,
        /// Sent when no eviction or I/O touches it any more.
        answer: Answer<()>,
    },
    /// A hint.
    Advise {
        /// The part.
        range: RegionRange,
        /// The hint.
        advice: Advice,
        /// Taken note of.
        answer: Answer<()>,
    },
    /// The group's budget has changed; the pool's books are the control plane's.
    SetBudget {
        /// Sent when the client is within it, or when it cannot get there for now.
        answer: Answer<()>,
    },
    /// Evicts; answers with the bytes that left RAM.
    Evict {
        /// Only this region.
        region: Option<u32>,
        /// At most so many pages.
        pages: u64,
        /// Bytes evicted.
        answer: Answer<u64>,
    },
    /// Rows for `fmallocctl regions`, at most [`fmalloc_proto::limits::MAX_ROWS`], and whether there are more.
    Regions {
        /// First region number of interest.
        from: u32,
        /// Rows.
        answer: Answer<(Vec<RegionRow>, bool)>,
    },
    /// The client is about to fork: claims swap for the child. Answers when the fork may happen.
    PrepareFork {
        /// By which the child will say who it is.
        token: Token,
        /// Its number.
        child: u64,
        /// Layout of its ring.
        layout: Layout,
        /// Claimed.
        answer: Answer<()>,
    },
    /// The fork is over. Answers when all that came of it has been handed over.
    EndFork {
        /// Children.
        answer: Answer<u64>,
    },
    /// A forked child's agent is there.
    AgentReady {
        /// Its thread id as the client's namespace sees it.
        agent_tid: u32,
        /// Process id as the daemon sees it.
        pid: u32,
    },
    /// The agent's socket has closed. Slots are kept until the process is known to be gone.
    AgentGone,
    /// The process has ended: finish I/O in flight, give back slots and claims, end the thread.
    Stop,
}

/// What a fault thread starts with.
#[derive(Debug)]
pub struct Setup {
    /// The client's number, for logs.
    pub client: u64,
    /// Process id, for logs.
    pub pid: u32,
    /// The agent's thread id as the client's namespace sees it.
    pub agent_tid: u32,
    /// The group whose budget it shares.
    pub group: Arc<Group>,
    /// The group was there before.
    pub joins: bool,
    /// Forked children are to have the regions; where they go.
    pub inherit: bool,
    /// See `inherit`.
    pub births: UnboundedSender<Birth>,
    /// The client's userfaultfd, checked to be one, API handshake not yet done.
    pub uffd: OwnedFd,
    /// The ring's memfd.
    pub ring: OwnedFd,
    /// Layout of the ring.
    pub layout: Layout,
    /// Where the agent remaps pages to that it evicts by write-protection. None if it moves pages.
    pub staging: Option<Staging>,
    /// Wakes the agent.
    pub agent_doorbell: EventFd,
    /// The agent wakes this thread.
    pub daemon_doorbell: EventFd,
    /// The swap file.
    pub swap: Arc<Swap>,
    /// Who writes to which files.
    pub writers: Arc<Writers>,
    /// Which optional features of the system may be used.
    pub features: Features,
}

/// What the fault thread of a forked child starts with.
#[derive(Debug)]
pub struct ChildSetup {
    /// The client's number, for logs.
    pub client: u64,
    /// What its parent's thread made.
    pub birth: Birth,
    /// The parent's group.
    pub group: Arc<Group>,
    /// Where its own children go.
    pub births: UnboundedSender<Birth>,
    /// The ring's memfd.
    pub ring: OwnedFd,
    /// Wakes the agent.
    pub agent_doorbell: EventFd,
    /// The agent wakes this thread.
    pub daemon_doorbell: EventFd,
    /// The swap file.
    pub swap: Arc<Swap>,
    /// Who may write to which file.
    pub writers: Arc<Writers>,
    /// Which optional features of the system may be used.
    pub features: Features,
}

/// Optional features of the system; each can be switched off for tests and diagnosis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// io_uring for swap I/O.
    pub io_uring: bool,
    /// UFFDIO_POISON.
    pub poison: bool,
    /// SO_PEERPIDFD.
    pub peer_pidfd: bool,
}

/// The control plane's end of a fault thread.
#[derive(Debug)]
pub struct Handle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    /// Figures, readable at any time.
    pub stats: Arc<SharedStats>,
    /// Ends after [`Command::Stop`], or by itself when the client's address space is gone.
    pub thread: Option<JoinHandle<()>>,
    /// The kernel lets the daemon poison this client's pages.
    pub poison: bool,
    /// The agent evicts by write-protection.
    pub write_protect: bool,
}

impl Handle {
    /// Wires up a handle; used by the fault thread's `spawn`.
    pub(super) fn new(
        stats: Arc<SharedStats>,
        poison: bool,
        write_protect: bool,
    ) -> nix::Result<(Self, Receiver<Command>, Arc<EventFd>)> {
        use nix::sys::eventfd::EfdFlags;
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (commands, receiver) = channel();
        let handle = Self { commands, wake: Arc::clone(&wake), stats, thread: None, poison, write_protect };
        Ok((handle, receiver, wake))
    }

    /// Queues a command. If the thread has ended the command is dropped, and with it its answer's sender: the receiver
    /// of the answer sees that at once.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            // A full eventfd counter is a wake-up too.
            let _ = nix::unistd::write(self.wake.as_fd(), &1_u64.to_ne_bytes());
        }
    }
}
