//! What `fmallocctl run` tells this library, by the environment. Read once, when the library is loaded: later the
//! environment is the program's to change.

use std::env;
use std::path::PathBuf;
use std::sync::OnceLock;

use fmalloc_client::GroupToken;

/// Smallest allocation that is paged, in bytes.
const THRESHOLD: &str = "FMALLOC_THRESHOLD";
/// Addresses to reserve for each of the heap and the mappings, in bytes.
const RESERVE: &str = "FMALLOC_RESERVE";
/// Name of the group whose budget this process shares, in hexadecimal.
const GROUP: &str = "FMALLOC_GROUP";
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
    /// Whose budget this process shares.
    pub(crate) group: Option<GroupToken>,
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
        group: text(GROUP).and_then(|text| text.parse().ok()),
        socket: env::var_os(SOCKET).filter(|path| !path.is_empty()).map(PathBuf::from),
        trial: env::var_os(TRIAL).is_some(),
    })
}

/// The configuration; none before the constructor has run.
pub(crate) fn get() -> Option<&'static Config> {
    CONFIG.get()
}

fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|text| !text.is_empty())
}

fn number(name: &str) -> Option<usize> {
    text(name)?.parse().ok()
}
