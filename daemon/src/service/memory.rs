//! The daemon's own memory: locked in RAM, and the last to be taken when RAM runs out.

use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use tracing::{debug, warn};

/// Number of the capability to lock any amount of memory.
const CAP_IPC_LOCK: u32 = 14;

/// Keeps all memory of this process in RAM from the moment it is first touched: were a page of the daemon swapped out,
/// every client's faults would wait for it. Does nothing but warn where that is not permitted.
pub(crate) fn lock() {
    // With a limit, locking would succeed now and make allocations fail later.
    if !may_lock_any_amount() {
        warn!(
            "fmallocd's memory is not locked: it may be swapped out, and all clients then wait for it; allow it by \
             LimitMEMLOCK=infinity in the unit, `ulimit -l unlimited`, or CAP_IPC_LOCK"
        );
        return;
    }
    let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    if let Err(errno) = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault) {
        warn!("fmallocd's memory cannot be locked, so it may be swapped out: {errno}");
    }
}

/// Has the kernel look elsewhere first when memory runs out: were the daemon killed, all its clients would wait for
/// theirs.
pub(crate) fn lower_oom_score() {
    const FILE: &str = "/proc/self/oom_score_adj";
    const SCORE: i32 = -900;
    let now = std::fs::read_to_string(FILE).ok().and_then(|text| text.trim().parse::<i32>().ok());
    if now.is_none_or(|now| now > SCORE)
        && let Err(error) = std::fs::write(FILE, SCORE.to_string())
    {
        debug!("the OOM score stays as it is: {error}");
    }
}

fn may_lock_any_amount() -> bool {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) else { return false };
    soft == RLIM_INFINITY
        || has_capability(CAP_IPC_LOCK)
        || (hard == RLIM_INFINITY && setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard).is_ok())
}

/// Whether this thread has a capability in effect.
pub(crate) fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|set| set >> number & 1 == 1)
}
