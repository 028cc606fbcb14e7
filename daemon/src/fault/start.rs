//! Starts fault threads: the handshake with the kernel, what a thread begins with, and its way of doing I/O.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use fmalloc_proto::PAGE;
use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::ring::Layout;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::files::Files;
use super::forks::{Birth, Forks};
use super::group::{Group, LEAST_FRAMES, Membership};
use super::handle::{ChildSetup, Command, Features, Handle, Setup};
use super::latency::Sampler;
use super::memory::Memory;
use super::placement::Placement;
use super::processor::Processor;
use super::reactor::{Psync, Reactor, Uring, Watched};
use super::remaps::Remaps;
use super::requests::AgentRing;
use super::stats::SharedStats;
use super::thread::{FaultThread, Rows};
use super::trouble::Trouble;
use super::uffd::{BATCH, ClientUffd};
use crate::arena::Arena;
use crate::pager::{Pager, Sizes};
use crate::swap::{ClientSlots, Swap};

/// The ring that suits a budget: a sixteenth of it, within 32 and 256 pages, in four batches.
#[must_use]
pub fn ring_layout(budget: u64) -> Layout {
    let pages = (budget.max(MIN_BUDGET) / PAGE / 16).clamp(32, 256);
    let batch = u32::try_from(pages / 4).unwrap_or(8);
    Layout::new(4, batch).unwrap_or_else(|| unreachable!("within the limits of a ring"))
}

/// Starts the thread of one client: API handshake on its userfaultfd, then the loop.
///
/// # Errors
/// What the handshake or the system refused; nothing is left behind.
pub fn spawn(setup: Setup) -> anyhow::Result<Handle> {
    use anyhow::Context;
    let write_protect = setup.staging.is_some();
    if setup.inherit && write_protect {
        anyhow::bail!("forked children can have paged memory from Linux 6.8 on only");
    }
    let uffd = ClientUffd::handshake(setup.uffd, setup.features.poison, write_protect, setup.inherit)
        .map_err(|errno| match errno {
            Errno::EPERM if setup.inherit => anyhow::anyhow!(
                "for forked children to have paged memory fmallocd needs CAP_SYS_PTRACE: run it as root"
            ),
            _ => anyhow::Error::from(errno)
                .context("the userfaultfd was refused: the API handshake failed or was done before"),
        })?;
    let agent = AgentRing::new(&setup.ring, setup.layout, setup.agent_doorbell, setup.daemon_doorbell)
        .context("mapping the ring")?;
    // Another's budget: a member that comes later begins with the least.
    let budget = if setup.joins { 0 } else { setup.group.budget() };
    let sizes = Sizes::for_budget(budget, setup.layout);
    let memory = Memory::new(usize::from(sizes.read_buffers) + usize::from(sizes.write_buffers))
        .context("memory for I/O buffers")?;
    let arena = Arena::new().context("the arena for page tables")?;
    let slots = ClientSlots::new(Arc::clone(&setup.swap), setup.client);
    let parts = Parts {
        client: setup.client,
        pid: setup.pid,
        agent_tid: setup.agent_tid,
        inherits: setup.inherit,
        pager: Pager::new(slots, arena, sizes),
        uffd,
        agent,
        memory,
        swap: setup.swap,
        remaps: setup.staging.map(Remaps::new),
        files: Files::new(setup.writers),
        group: setup.group,
        forks: Forks::new(setup.births),
        credit: None,
    };
    parts.start(setup.features)
}

/// Starts the thread of a forked child, whose agent comes later.
///
/// # Errors
/// What the system refused. The caller has a descriptor of the child's userfaultfd, which must outlive the child.
pub fn spawn_child(setup: ChildSetup) -> anyhow::Result<Handle> {
    use anyhow::Context;
    let Birth { mut pager, memory, uffd, layout, .. } = setup.birth;
    let agent = AgentRing::new(&setup.ring, layout, setup.agent_doorbell, setup.daemon_doorbell)
        .context("mapping the ring")?;
    // No eviction before it is clear that the child goes on with this memory.
    pager.set_budget(pager.overhead() + (pager.stats().resident_pages * 2 + LEAST_FRAMES) * PAGE);
    let parts = Parts {
        client: setup.client,
        pid: 0,
        agent_tid: 0,
        inherits: true,
        pager: *pager,
        uffd,
        agent,
        memory,
        swap: setup.swap,
        remaps: None,
        files: Files::new(setup.writers),
        group: setup.group,
        forks: Forks::new(setup.births),
        credit: Some(Instant::now()),
    };
    parts.start(setup.features)
}

/// What a fault thread begins with.
struct Parts {
    client: u64,
    pid: u32,
    agent_tid: u32,
    inherits: bool,
    pager: Pager<ClientSlots>,
    uffd: ClientUffd,
    agent: AgentRing,
    memory: Memory,
    swap: Arc<Swap>,
    remaps: Option<Remaps>,
    files: Files,
    group: Arc<Group>,
    forks: Forks,
    credit: Option<Instant>,
}

impl Parts {
    fn start(self, features: Features) -> anyhow::Result<Handle> {
        use anyhow::Context;
        let stats = Arc::new(SharedStats::default());
        let write_protect = self.remaps.is_some();
        let (mut handle, commands, wake) = Handle::new(Arc::clone(&stats), self.uffd.poison, write_protect)?;
        stats.publish(&self.pager.stats());
        let name = format!("fault-{}", self.client);
        // At once, so that the group's room is known to whoever comes next.
        let membership = self.group.join(&wake, self.pager.least_overhead());
        let run = move || self.run(features, commands, wake, stats, membership);
        let thread =
            std::thread::Builder::new().name(name).spawn(run).context("starting the fault thread")?;
        handle.thread = Some(thread);
        Ok(handle)
    }

    /// The life of the thread.
    fn run(
        self,
        features: Features,
        commands: Receiver<Command>,
        wake: Arc<EventFd>,
        stats: Arc<SharedStats>,
        membership: Membership,
    ) {
        // The ring of io_uring must be made by the thread that uses it.
        let watched = Watched {
            uffd: self.uffd.raw(),
            agent: self.agent.doorbell(),
            commands: wake.as_fd().as_raw_fd(),
        };
        let file = self.swap.file.fd().as_raw_fd();
        let uring = if features.io_uring {
            Uring::new(watched, file)
        } else {
            Err(std::io::ErrorKind::Unsupported.into())
        };
        let reactor: Box<dyn Reactor> = match uring {
            Ok(uring) => Box::new(uring),
            Err(error) => {
                if features.io_uring {
                    tracing::warn!(client = self.client, %error, "no io_uring: swap I/O is done one by one");
                }
                Box::new(Psync::new(watched, file))
            }
        };
        let reactor = match &self.swap.interposer {
            Some(interposer) => interposer.interpose(self.client, reactor),
            None => reactor,
        };
        let thread = FaultThread {
            client: self.client,
            pid: self.pid,
            agent_tid: self.agent_tid,
            inherits: self.inherits,
            pager: self.pager,
            uffd: self.uffd,
            agent: self.agent,
            reactor,
            memory: self.memory,
            swap: self.swap,
            files: self.files,
            commands,
            wake,
            stats,
            remaps: self.remaps,
            forks: self.forks,
            membership,
            credit: self.credit,
            due: true,
            started: Instant::now(),
            messages: Vec::with_capacity(BATCH),
            done: Vec::with_capacity(256),
            rows: Rows::default(),
            unread: false,
            agent_waits: false,
            agent_gone: false,
            stopping: false,
            retry_after: None,
            next_token: 0,
            sampler: Sampler::default(),
            placement: Placement::default(),
            processor: Processor::default(),
            woken: Instant::now(),
            trouble: Trouble::default(),
        };
        thread.run();
    }
}
