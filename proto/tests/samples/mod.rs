//! One sample of every message, and messages made from random numbers. Used by the round-trip tests and the fuzz loop.

use fmalloc_proto::groups::{Adopt, ForkPrepared, GroupStats, GroupToken, Ready, Token};
use fmalloc_proto::messages::{
    Advice, Advise, Attach, Attached, Budget, Changed, ClientId, ClientList, ClientRow, ClientStats, Empty,
    ErrorCode, Evict, Evicted, Failure, FileMode, Flush, FlushUntil, LatencyList, LatencyRow, Limit, Open,
    Opened, Page, RegionId, RegionList, RegionRange, RegionRow, RegionsQuery, Register, RegisterFile,
    RegisterLike, Registered, Reply, Request, Staging, Status,
};

/// Where a sample's fields come from: extremes first, then whatever `next` gives.
pub(crate) trait Source {
    /// Any 64-bit number.
    fn next(&mut self) -> u64;

    /// Any 32-bit number.
    fn word(&mut self) -> u32 {
        u32::try_from(self.next() & u64::from(u32::MAX)).unwrap()
    }

    /// Either.
    fn flag(&mut self) -> bool {
        self.next() & 1 == 1
    }

    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    /// Text of at most 40 characters, of one to four bytes each.
    fn text(&mut self) -> String {
        let len = self.below(41);
        (0..len).map(|_| ['a', 'ä', '€', '🦀', '\0', ' '][self.below(6)]).collect()
    }
}

fn token(s: &mut impl Source) -> Token {
    let (one, two) = (s.next(), s.next());
    Token((u128::from(one) << 64 | u128::from(two)).to_le_bytes())
}

fn opened(s: &mut impl Source) -> Opened {
    Opened {
        client: s.next(),
        budget: s.next(),
        ring_batches: s.word(),
        ring_batch_pages: s.word(),
        device: s.flag(),
    }
}

const CODES: [ErrorCode; 13] = [
    ErrorCode::Protocol,
    ErrorCode::Denied,
    ErrorCode::NotFound,
    ErrorCode::Invalid,
    ErrorCode::PoolFull,
    ErrorCode::SwapFull,
    ErrorCode::Limit,
    ErrorCode::Unsupported,
    ErrorCode::Draining,
    ErrorCode::System,
    ErrorCode::FileFull,
    ErrorCode::FileFailed,
    ErrorCode::FileBusy,
];
const MODES: [FileMode; 3] = [FileMode::ReadOnly, FileMode::Shared, FileMode::Private];
const UNTIL: [FlushUntil; 3] = [FlushUntil::Begun, FlushUntil::Written, FlushUntil::Synced];
const ADVICE: [Advice; 5] =
    [Advice::Normal, Advice::Sequential, Advice::Random, Advice::WillNeed, Advice::Cold];

fn range(s: &mut impl Source) -> RegionRange {
    RegionRange { region: s.word(), offset: s.next(), len: s.next() }
}

fn register(s: &mut impl Source) -> Register {
    Register { addr: s.next(), len: s.next(), commit: s.flag(), label: s.text() }
}

fn stats(s: &mut impl Source) -> ClientStats {
    ClientStats {
        budget_bytes: s.next(),
        resident_pages: s.next(),
        peak_resident_pages: s.next(),
        overhead_bytes: s.next(),
        swapped_pages: s.next(),
        slots: s.next(),
        claimed_pages: s.next(),
        unevictable_pages: s.next(),
        poisoned_pages: s.next(),
        faults: s.next(),
        faults_zero: s.next(),
        faults_read: s.next(),
        faults_rescued: s.next(),
        faults_stalled: s.next(),
        file_pages_in: s.next(),
        file_pages_out: s.next(),
        pages_in: s.next(),
        pages_readahead: s.next(),
        pages_out: s.next(),
        pages_clean: s.next(),
        pages_zero: s.next(),
        io_errors: s.next(),
        packed_pages: s.next(),
        packed_bytes: s.next(),
        faults_packed: s.next(),
        pages_spilled: s.next(),
        pages_readahead_unused: s.next(),
        peak_held_bytes: s.next(),
    }
}

fn client_row(s: &mut impl Source) -> ClientRow {
    ClientRow {
        client: s.next(),
        pid: s.word(),
        uid: s.word(),
        name: s.text(),
        parent: s.next(),
        group: s.next(),
        condition: s.text(),
        write_protect: s.flag(),
        regions: s.word(),
        stats: stats(s),
    }
}

fn region_row(s: &mut impl Source) -> RegionRow {
    RegionRow {
        client: s.next(),
        region: s.word(),
        label: s.text(),
        addr: s.next(),
        len: s.next(),
        claimed_bytes: s.next(),
        resident_pages: s.next(),
        swapped_pages: s.next(),
        poisoned_pages: s.next(),
    }
}

/// A request of each number.
pub(crate) fn requests(s: &mut impl Source) -> Vec<Request> {
    vec![
        Request::Open(Open {
            name: s.text(),
            budget: s.next(),
            user_mode_only: s.flag(),
            group: s.flag().then(|| token(s)),
        }),
        Request::Attach(Attach {
            agent_tid: s.word(),
            staging: s.flag().then(|| Staging { addr: s.next(), len: s.next() }),
            inherit: s.flag(),
        }),
        Request::Register(register(s)),
        Request::RegisterFile(RegisterFile {
            region: register(s),
            offset: s.next(),
            mode: MODES[s.below(MODES.len())],
        }),
        Request::Flush(Flush { range: range(s), until: UNTIL[s.below(UNTIL.len())] }),
        Request::MakeWritable(RegionId { region: s.word() }),
        Request::Changed(range(s)),
        Request::Prefetch(range(s)),
        Request::RegisterLike(RegisterLike { region: register(s), of: s.word() }),
        Request::Commit(range(s)),
        Request::Decommit(range(s)),
        Request::Unregister(RegionId { region: s.word() }),
        Request::Advise(Advise { range: range(s), advice: ADVICE[s.below(ADVICE.len())] }),
        Request::Stats(Empty {}),
        Request::SetBudget(Budget { bytes: s.next() }),
        Request::Goodbye(Empty {}),
        Request::Ping(Empty {}),
        Request::PrepareFork(Empty {}),
        Request::EndFork(Empty {}),
        Request::Adopt(Adopt { token: token(s) }),
        Request::Ready(Ready { agent_tid: s.word() }),
        Request::Status(Empty {}),
        Request::Clients(Page { after: s.next() }),
        Request::Regions(RegionsQuery { client: s.next(), from: s.word() }),
        Request::Limit(Limit { client: s.next(), bytes: s.next() }),
        Request::Evict(Evict {
            client: s.next(),
            region: s.flag().then(|| s.word()),
            bytes: s.flag().then(|| s.next()),
        }),
        Request::NewGroup(Budget { bytes: s.next() }),
        Request::GroupStats(GroupToken { token: token(s) }),
        Request::Latency(ClientId { client: s.next() }),
    ]
}

/// A reply of each number.
pub(crate) fn replies(s: &mut impl Source) -> Vec<Reply> {
    vec![
        Reply::Error(Failure { code: CODES[s.below(CODES.len())], text: s.text() }),
        Reply::Done(Empty {}),
        Reply::Opened(opened(s)),
        Reply::Attached(Attached { poison: s.flag() }),
        Reply::Registered(Registered { region: s.word() }),
        Reply::Stats(stats(s)),
        Reply::Changed(Changed {
            runs: (0..s.below(4)).map(|_| (s.next(), s.next())).collect(),
            next: s.flag().then(|| s.next()),
        }),
        Reply::Budget(Budget { bytes: s.next() }),
        Reply::ForkPrepared(ForkPrepared { token: token(s) }),
        Reply::Adopted(opened(s)),
        Reply::Status(Box::new(Status {
            version: s.text(),
            pid: s.word(),
            uptime_seconds: s.next(),
            socket: s.text(),
            swap_path: s.text(),
            swap_bytes: s.next(),
            swap_claimed_bytes: s.next(),
            swap_used_bytes: s.next(),
            direct_io: s.flag(),
            io_uring: s.flag(),
            pool_bytes: s.next(),
            pool_granted_bytes: s.next(),
            clients: s.next(),
            regions: s.next(),
            draining: s.flag(),
        })),
        Reply::Clients(ClientList { rows: (0..s.below(4)).map(|_| client_row(s)).collect(), more: s.flag() }),
        Reply::Regions(RegionList { rows: (0..s.below(4)).map(|_| region_row(s)).collect(), more: s.flag() }),
        Reply::Evicted(Evicted { bytes: s.next() }),
        Reply::Group(GroupToken { token: token(s) }),
        Reply::GroupStats(Box::new(GroupStats {
            members: s.next(),
            members_ever: s.next(),
            stats: stats(s),
        })),
        Reply::Latency(LatencyList {
            rows: vec![LatencyRow {
                step: s.text(),
                samples: s.next(),
                p50_ns: s.next(),
                p90_ns: s.next(),
                p99_ns: s.next(),
                p999_ns: s.next(),
                max_ns: s.next(),
            }],
        }),
    ]
}

/// A small generator (xorshift64*): the same seed gives the same run on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Source for Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        // Half of the numbers are small, so that every width of the encoding occurs.
        if mixed & 1 == 0 { mixed >> 1 } else { (mixed >> 1) >> ((mixed >> 58) % 63) }
    }
}
