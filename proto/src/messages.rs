//! The messages, numbered. A number is never used again for something else.
//!
//! Requests go from a client (or `fmallocctl`) to the daemon, each with an id that the reply repeats.
//! Replies with id 0 are notices that nobody asked for.

use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError, Message};
use crate::groups::{Adopt, ForkPrepared, GroupStats, GroupToken, Ready, Token};

/// Declares a numbered message enum: encoding, decoding and the number come from one table.
macro_rules! numbered {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $number:literal $variant:ident($body:ty),)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub enum $name { $($(#[$vmeta])* $variant($body),)* }

        impl $name {
            /// Every number of this enum, in order.
            pub const NUMBERS: &[u16] = &[$($number),*];
        }

        impl Message for $name {
            fn number(&self) -> u16 {
                match self { $(Self::$variant(_) => $number,)* }
            }
            fn encode_body(&self, out: &mut Vec<u8>) -> Result<(), CodecError> {
                match self { $(Self::$variant(body) => codec::encode_body(body, out),)* }
            }
            fn decode_body(number: u16, bytes: &[u8]) -> Result<Self, CodecError> {
                match number {
                    $($number => codec::decode_body::<$body>(bytes).map(Self::$variant),)*
                    other => Err(CodecError::UnknownNumber(other)),
                }
            }
        }
    };
}

numbered! {
    /// What a peer may ask of the daemon. 1–31: paging clients. 32–63: control.
    Request {
        /// First request of a paging client: name, budget. Answered by [`Reply::Opened`].
        1 Open(Open),
        /// Hands over the userfaultfd (one fd). Answered by [`Reply::Attached`].
        2 Attach(Attach),
        /// Puts a mapped range under paging. Answered by [`Reply::Registered`].
        3 Register(Register),
        /// Claims swap for a part of a sparse region. Answered by [`Reply::Done`].
        4 Commit(RegionRange),
        /// Gives the claim of a part back; its pages must have been discarded by the caller.
        5 Decommit(RegionRange),
        /// Ends paging of a region; its pages are gone. Answered by [`Reply::Done`] when no eviction touches it.
        6 Unregister(RegionId),
        /// A hint about a range. Answered by [`Reply::Done`] at once; the work goes on behind it.
        7 Advise(Advise),
        /// Statistics of this client. Answered by [`Reply::Stats`].
        8 Stats(Empty),
        /// Changes this client's own budget, within what the daemon allows. Answered by [`Reply::Budget`].
        9 SetBudget(Budget),
        /// Orderly end; refused while regions are registered. Answered by [`Reply::Done`].
        10 Goodbye(Empty),
        /// Answered by [`Reply::Done`]: shows that the control plane lives.
        11 Ping(Empty),
        /// This process is about to fork: claims swap for what the child inherits. Answered by [`Reply::ForkPrepared`].
        12 PrepareFork(Empty),
        /// The fork is over, or failed: then the claim goes back. Answered by [`Reply::Done`].
        13 EndFork(Empty),
        /// First request of a forked child, in the place of [`Request::Open`]. Answered by [`Reply::Adopted`].
        14 Adopt(Adopt),
        /// The child's agent can evict, in the place of [`Request::Attach`]. Answered by [`Reply::Done`].
        15 Ready(Ready),

        /// Puts a mapped range under paging whose content is that of a file (two fds). Answered by [`Reply::Registered`].
        20 RegisterFile(RegisterFile),
        /// Has changed pages written to the region's file. Answered by [`Reply::Done`].
        21 Flush(Flush),
        /// Lets a region that was registered read-only change its file. Answered by [`Reply::Done`].
        22 MakeWritable(RegionId),
        /// Which pages of a private region differ from the file. Answered by [`Reply::Changed`].
        23 Changed(RegionRange),
        /// Reads a range in as far as the budget allows. Answered by [`Reply::Done`] when it is there.
        24 Prefetch(RegionRange),
        /// Puts another range under paging over the file of a region, from the same place on and in the same mode. Answered
        /// by [`Reply::Registered`].
        25 RegisterLike(RegisterLike),

        /// The daemon's state. Answered by [`Reply::Status`].
        32 Status(Empty),
        /// A page of the list of clients. Answered by [`Reply::Clients`].
        33 Clients(Page),
        /// A page of the list of regions. Answered by [`Reply::Regions`].
        34 Regions(RegionsQuery),
        /// Changes a client's budget. Answered by [`Reply::Budget`].
        35 Limit(Limit),
        /// Evicts from a client or region. Answered by [`Reply::Evicted`] when that much is out.
        36 Evict(Evict),
        /// Makes a group with a budget for this process and whoever it gives the token to; the group lasts until the
        /// process and all members have ended. Answered by [`Reply::Group`].
        37 NewGroup(Budget),
        /// What a group has done. Answered by [`Reply::GroupStats`].
        38 GroupStats(GroupToken),
        /// Where the time of a client's faults goes. Answered by [`Reply::Latency`].
        48 Latency(ClientId),
    }
}

numbered! {
    /// What the daemon answers.
    Reply {
        /// The request was refused; nothing has changed.
        1 Error(Failure),
        /// Done, nothing to add.
        2 Done(Empty),
        /// Answer to [`Request::Open`]; carries fds, see [`Opened`].
        3 Opened(Opened),
        /// Answer to [`Request::Attach`].
        4 Attached(Attached),
        /// Answer to [`Request::Register`].
        5 Registered(Registered),
        /// Answer to [`Request::Stats`].
        6 Stats(ClientStats),
        /// Answer to [`Request::SetBudget`] and [`Request::Limit`]; also a notice when another changed it.
        7 Budget(Budget),
        /// Answer to [`Request::PrepareFork`].
        8 ForkPrepared(ForkPrepared),
        /// Answer to [`Request::Adopt`]; carries fds: those of [`Reply::Opened`], with the child's userfaultfd in front.
        9 Adopted(Opened),
        /// Answer to [`Request::Changed`].
        20 Changed(Changed),
        /// Answer to [`Request::Status`].
        32 Status(Box<Status>),
        /// Answer to [`Request::Clients`].
        33 Clients(ClientList),
        /// Answer to [`Request::Regions`].
        34 Regions(RegionList),
        /// Answer to [`Request::Evict`].
        35 Evicted(Evicted),
        /// Answer to [`Request::NewGroup`].
        36 Group(GroupToken),
        /// Answer to [`Request::GroupStats`].
        37 GroupStats(Box<GroupStats>),
        /// Answer to [`Request::Latency`].
        48 Latency(LatencyList),
    }
}

impl Request {
    /// File descriptors that must come with this message, neither more nor fewer.
    #[must_use]
    pub fn fd_count(&self) -> usize {
        match self {
            Self::Attach(_) => 1,
            Self::RegisterFile(_) => 2,
            _ => 0,
        }
    }
}

impl Reply {
    /// File descriptors that must come with this message, neither more nor fewer.
    #[must_use]
    pub fn fd_count(&self) -> usize {
        match self {
            Self::Opened(opened) => 3 + usize::from(opened.device),
            Self::Adopted(opened) => 4 + usize::from(opened.device),
            _ => 0,
        }
    }
}

/// No fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// Body of [`Request::Open`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Shown by `fmallocctl`; at most [`crate::limits::MAX_NAME`] bytes, no control characters.
    pub name: String,
    /// Wanted budget in bytes; 0 asks for the daemon's default.
    pub budget: u64,
    /// The client accepts a userfaultfd that cannot serve system calls.
    pub user_mode_only: bool,
    /// Joins this group, whose budget it shares: then `budget` means nothing.
    pub group: Option<Token>,
}

/// Body of [`Reply::Opened`]. Fds, in this order: the ring's memfd, the eventfd that wakes the agent, the eventfd
/// that wakes the daemon, and, if `device` is set, an open `/dev/userfaultfd`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The client's number in this daemon's life.
    pub client: u64,
    /// Granted budget in bytes.
    pub budget: u64,
    /// Batches in the ring.
    pub ring_batches: u32,
    /// Pages in a batch of the ring.
    pub ring_batch_pages: u32,
    /// A `/dev/userfaultfd` comes along; otherwise the client uses the system call.
    pub device: bool,
}

/// Body of [`Request::Attach`]. Fd: the client's userfaultfd, API handshake not yet done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// Thread id of the agent in the client's pid namespace, as `gettid` gives it.
    pub agent_tid: u32,
    /// The agent cannot move pages: it protects them against writes and remaps them to here. Its own remapping raises
    /// events, which the daemon knows by their target.
    pub staging: Option<Staging>,
    /// Forked children shall have the regions too. Each fork is announced by [`Request::PrepareFork`].
    pub inherit: bool,
}

/// Addresses that only the agent uses, in bytes; whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staging {
    /// Start in the client.
    pub addr: u64,
    /// Length.
    pub len: u64,
}

/// Body of [`Reply::Attached`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The daemon can poison pages; otherwise it asks the agent to take access away.
    pub poison: bool,
}

/// Body of [`Request::Register`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    /// Start of the mapping in the client; page aligned.
    pub addr: u64,
    /// Length in bytes; whole pages.
    pub len: u64,
    /// Claims swap for the whole region now; otherwise ranges are claimed by [`Request::Commit`].
    pub commit: bool,
    /// Shown by `fmallocctl`; at most [`crate::limits::MAX_NAME`] bytes.
    pub label: String,
}

/// How a region treats its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileMode {
    /// Only reads it.
    ReadOnly,
    /// Writes what was changed back to it.
    Shared,
    /// Leaves it as it is: pages that were changed go to the swap file.
    Private,
}

/// Body of [`Request::RegisterFile`]. Fds, in this order: the file, and the same file once more, by a description of its
/// own with O_DIRECT where the file system has that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterFile {
    /// The range; swap is claimed only for a private region.
    pub region: Register,
    /// Where in the file the region starts, in bytes; page aligned.
    pub offset: u64,
    /// What becomes of changes.
    pub mode: FileMode,
}

/// Body of [`Request::RegisterLike`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterLike {
    /// The range; swap is claimed only for a private region.
    pub region: Register,
    /// The region whose file it is.
    pub of: u32,
}

/// Body of [`Request::Flush`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flush {
    /// Which pages.
    pub range: RegionRange,
    /// How far to go before the answer.
    pub until: FlushUntil,
}

/// What a [`Flush`] waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FlushUntil {
    /// Nothing.
    Begun,
    /// The file has the changes: whoever reads it sees them.
    Written,
    /// The disk has them.
    Synced,
}

/// Body of [`Reply::Changed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Index of a page in the region, and pages from there on; ascending, at most [`crate::limits::MAX_RUNS`].
    pub runs: Vec<(u64, u64)>,
    /// Index of the page from which to ask again; none at the end of the range.
    pub next: Option<u64>,
}

/// Body of [`Reply::Registered`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// The region's number within this client.
    pub region: u32,
}

/// A region by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionId {
    /// The region's number within its client.
    pub region: u32,
}

/// A part of a region, in bytes; whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionRange {
    /// The region's number within this client.
    pub region: u32,
    /// Bytes from the region's start.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Hints that a client gives about a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Advice {
    /// No special pattern.
    Normal,
    /// Will be read from front to back.
    Sequential,
    /// Will be read at random: no readahead.
    Random,
    /// Will be needed soon: read it in.
    WillNeed,
    /// Will not be needed soon: evict it; its content stays.
    Cold,
}

/// Body of [`Request::Advise`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advise {
    /// Where.
    pub range: RegionRange,
    /// What.
    pub advice: Advice,
}

/// A budget in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Bytes.
    pub bytes: u64,
}

/// Asks for rows after the one with this number; 0 starts at the first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// The last row already seen.
    pub after: u64,
}

/// Body of [`Request::Regions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionsQuery {
    /// The client whose regions are meant.
    pub client: u64,
    /// The last region already seen, plus one; 0 starts at the first.
    pub from: u32,
}

/// Body of [`Request::Limit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// The client.
    pub client: u64,
    /// New budget in bytes.
    pub bytes: u64,
}

/// Body of [`Request::Evict`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evict {
    /// The client.
    pub client: u64,
    /// Only this region of it.
    pub region: Option<u32>,
    /// At most so many bytes; none means all.
    pub bytes: Option<u64>,
}

/// Body of [`Reply::Evicted`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evicted {
    /// Bytes that left RAM.
    pub bytes: u64,
}

/// A client by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientId {
    /// Its number.
    pub client: u64,
}

/// How long a step of serving a client takes, from samples since it attached. Quantiles are at most a quarter too high.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencyRow {
    /// The step.
    pub step: String,
    /// How often it was timed: one in seventeen.
    pub samples: u64,
    /// Half of them took no longer, in nanoseconds.
    pub p50_ns: u64,
    /// The same for 90 of 100.
    pub p90_ns: u64,
    /// The same for 99 of 100.
    pub p99_ns: u64,
    /// The same for 999 of 1000.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// Body of [`Reply::Latency`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencyList {
    /// A row for each step.
    pub rows: Vec<LatencyRow>,
}

/// Why a request was refused, as a program can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorCode {
    /// The message broke the protocol.
    Protocol,
    /// The peer may not do this.
    Denied,
    /// No such client or region.
    NotFound,
    /// Arguments that make no sense: unaligned, empty, overlapping, too large.
    Invalid,
    /// The RAM pool has not that much left.
    PoolFull,
    /// The swap file has not that much left.
    SwapFull,
    /// A limit on clients, regions or connections is reached.
    Limit,
    /// The kernel lacks something that is needed.
    Unsupported,
    /// The daemon is shutting down and takes nothing new.
    Draining,
    /// An operation of the system failed.
    System,
    /// The disk of a mapped file is full, or its owner's quota is used up; the changes are kept in memory.
    FileFull,
    /// A mapped file could not be written or brought to the disk.
    FileFailed,
    /// Another region writes to the same part of the file.
    FileBusy,
}

/// Body of [`Reply::Error`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs.
    pub code: ErrorCode,
    /// For people: what happened and what to do; at most [`crate::limits::MAX_TEXT`] bytes.
    pub text: String,
}

/// Counters and gauges of one client. Counts of pages unless named otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientStats {
    /// Budget in bytes.
    pub budget_bytes: u64,
    /// Frames that the client holds now, zero mappings included.
    pub resident_pages: u64,
    /// Highest value of `resident_pages` so far.
    pub peak_resident_pages: u64,
    /// Bytes that the daemon holds for this client: ring, I/O buffers, page tables, packed pages. Part of the budget.
    pub overhead_bytes: u64,
    /// Pages that only the daemon has: in the swap file, or packed in RAM.
    pub swapped_pages: u64,
    /// Slots taken, clean copies of resident pages included.
    pub slots: u64,
    /// Pages of swap claimed.
    pub claimed_pages: u64,
    /// Pages that refuse eviction at present (pinned, locked, protected).
    pub unevictable_pages: u64,
    /// Pages lost to I/O errors or failed checks; an access gives SIGBUS.
    pub poisoned_pages: u64,
    /// Fault messages served.
    pub faults: u64,
    /// Of these, first touches.
    pub faults_zero: u64,
    /// Of these, answered by reading the swap file.
    pub faults_read: u64,
    /// Of these, answered without I/O: the page was on its way out or read ahead.
    pub faults_rescued: u64,
    /// Faults that had to wait because no frame was free.
    pub faults_stalled: u64,
    /// Pages read from mapped files.
    pub file_pages_in: u64,
    /// Pages written to mapped files.
    pub file_pages_out: u64,
    /// Pages read from the swap file.
    pub pages_in: u64,
    /// Of these, read ahead of a fault.
    pub pages_readahead: u64,
    /// Pages written to the swap file.
    pub pages_out: u64,
    /// Evicted pages that were not written because the slot held the same bytes.
    pub pages_clean: u64,
    /// Evicted pages that were all zeros, or the same eight bytes throughout.
    pub pages_zero: u64,
    /// Read and write errors of the swap file, and failed checks.
    pub io_errors: u64,
    /// Of the swapped pages, those that are packed in RAM.
    pub packed_pages: u64,
    /// Bytes of RAM that packed pages take; part of `overhead_bytes`.
    pub packed_bytes: u64,
    /// Of the faults, those answered by unpacking.
    pub faults_packed: u64,
    /// Pages that left the packed pool for the swap file.
    pub pages_spilled: u64,
    /// Of the pages read ahead, those of streams that broke off before they came to them, at most.
    pub pages_readahead_unused: u64,
    /// Highest value so far of resident memory and `overhead_bytes` together, in bytes.
    pub peak_held_bytes: u64,
}

/// Body of [`Reply::Status`]: the daemon as a whole. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Seconds since start.
    pub uptime_seconds: u64,
    /// Path of the socket; empty for a private daemon.
    pub socket: String,
    /// Path of the swap file or device; empty if it has no name.
    pub swap_path: String,
    /// Size of the swap file.
    pub swap_bytes: u64,
    /// Claimed by committed memory.
    pub swap_claimed_bytes: u64,
    /// Held by slots.
    pub swap_used_bytes: u64,
    /// Swap I/O bypasses the page cache.
    pub direct_io: bool,
    /// Swap I/O goes through io_uring.
    pub io_uring: bool,
    /// RAM that may be granted in all.
    pub pool_bytes: u64,
    /// RAM granted to clients.
    pub pool_granted_bytes: u64,
    /// Clients connected.
    pub clients: u64,
    /// Regions registered.
    pub regions: u64,
    /// SIGTERM was received; no new client is taken.
    pub draining: bool,
}

/// A row of [`Reply::Clients`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientRow {
    /// The client's number.
    pub client: u64,
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// Name that the client gave.
    pub name: String,
    /// The client that it was forked from, 0 if none.
    pub parent: u64,
    /// The group whose budget it shares: the number of the first member.
    pub group: u64,
    /// What hinders it, empty if nothing does: for people.
    pub condition: String,
    /// Its kernel cannot move pages: they are evicted by write-protection, which is not safe against DMA in flight.
    pub write_protect: bool,
    /// Regions registered.
    pub regions: u32,
    /// Figures.
    pub stats: ClientStats,
}

/// Body of [`Reply::Clients`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientList {
    /// At most [`crate::limits::MAX_ROWS`], ascending.
    pub rows: Vec<ClientRow>,
    /// Ask again after the last row for more.
    pub more: bool,
}

/// A row of [`Reply::Regions`]. Counts are pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionRow {
    /// The client's number.
    pub client: u64,
    /// The region's number within it.
    pub region: u32,
    /// Label that the client gave.
    pub label: String,
    /// Address in the client.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Claimed in swap, in bytes.
    pub claimed_bytes: u64,
    /// Resident.
    pub resident_pages: u64,
    /// In the swap file only.
    pub swapped_pages: u64,
    /// Lost.
    pub poisoned_pages: u64,
}

/// Body of [`Reply::Regions`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionList {
    /// At most [`crate::limits::MAX_ROWS`], ascending.
    pub rows: Vec<RegionRow>,
    /// Ask again after the last row for more.
    pub more: bool,
}
