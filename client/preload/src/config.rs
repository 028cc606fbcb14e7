//! What `fmallocctl run` tells this library, by the environment. Read once, when the library is loaded: later the
//! environment is the program's to change.

use std::env;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Smallest allocation that is paged, in bytes.
const THRESHOLD: &str = "FMALLOC_THRESHOLD";
/// Addresses to reserve for each of the heap and the mappings, in bytes.
const RESERVE: &str = "FMALLOC_RESERVE";
/// The daemon's socket.
const SOCKET: &str = "FMALLOC_SOCKET";
/// Start paging at once, say whether that worked, and end.
const TRIAL: &str = "FMALLOC_TRIAL";

/// Enough for most, and cheap: addresses that are never used cost the daemon four bytes a MiB.
const DEFAULT_RESERVE: usize = 64 << 30;

/// See the module.
#[derive(Debug)]
pub(crate) struct Config {
    /// Smallest allocation that is paged, in bytes.
    pub(crate) threshold: usize,
    /// Addresses to reserve for each of the heap and the mappings, in bytes.
    pub(crate) reserve: usize,
    /// The daemon's socket; without it the usual places.
    pub(crate) socket: Option<PathBuf>,
    /// Only try.
    pub(crate) trial: bool,
}

static CONFIG: OnceLock<Config> = OnceLock::new();

/// Reads the environment. For the library's constructor.
pub(crate) fn load() -> &'static Config {
    CONFIG.get_or_init(|| Config {
        threshold: number(THRESHOLD).unwrap_or(0),
        reserve: number(RESERVE).filter(|size| *size > 0).unwrap_or(DEFAULT_RESERVE),
        socket: env::var_os(SOCKET).filter(|path| !path.is_empty()).map(PathBuf::from),
        trial: env::var_os(TRIAL).is_some(),
    })
}

/// The configuration; none before the constructor has run.
pub(crate) fn get() -> Option<&'static Config> {
    CONFIG.get()
}

fn number(name: &str) -> Option<usize> {
    env::var(name).ok()?.parse().ok()
}
