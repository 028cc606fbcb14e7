//! The effective configuration: flags over file over defaults, checked as a whole before anything is touched. Read
//! once at start, on the main thread; constant after that. [`settings`] and [`ids`] hold the forms in which it is written.

pub mod ids;
pub mod settings;

use std::fmt;
use std::os::fd::RawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::size::Size;
use fmalloc_proto::switches::{DISABLE, Disabled, UnknownWord};
use nix::sys::socket::UnixAddr;
use thiserror::Error;

use crate::fault::Features;
use crate::swap::file;
pub use settings::{Cli, LogLevel, Settings, SocketMode};

/// Read if it exists and no other is named.
pub const CONFIG_FILE: &str = "/etc/fmalloc/fmallocd.toml";
/// Where the system's daemon listens.
pub const SYSTEM_SOCKET: &str = "/run/fmalloc/fmallocd.sock";
/// Where swap is unless said otherwise.
pub const SWAP_FILE: &str = "/var/lib/fmalloc/swap";

/// Why a configuration cannot be used. The text names the file or flag, the key and the remedy.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot read it: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is no TOML, has a key that does not exist, or a value of the wrong kind.
    #[error("{}: {source}", file.display())]
    Parse {
        /// The file.
        file: PathBuf,
        /// Line, column, and what is wrong there.
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense, by itself or beside another.
    #[error("{place}: {problem}")]
    Value {
        /// The flag, or file and key.
        place: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

/// What the daemon does, sizes in bytes.
#[derive(Debug, Clone)]
pub struct Config {
    /// Whom it serves and where swap is.
    pub mode: Mode,
    /// Sum of all budgets at most.
    pub pool: u64,
    /// Budget of a client that asks for none.
    pub default_budget: u64,
    /// Largest budget that a client may ask for.
    pub max_budget: u64,
    /// Bounds on what clients can make the daemon hold.
    pub limits: Limits,
    /// Least severe lines to log.
    pub log_level: LogLevel,
    /// Optional features of the system.
    pub features: Features,
    /// What was set, for comparison when it is read again.
    pub written: Settings,
}

/// Whom the daemon serves.
#[derive(Debug, Clone)]
pub enum Mode {
    /// All authorised processes, over a socket with a name.
    Service(Service),
    /// One process over an inherited socket, or those who connect to it if it listens.
    Private(Private),
}

/// Settings of a daemon with a socket.
#[derive(Debug, Clone)]
pub struct Service {
    /// Where to listen.
    pub socket: PathBuf,
    /// Mode of the socket.
    pub socket_mode: SocketMode,
    /// Swap file or block device.
    pub swap: PathBuf,
    /// Its size; none means all of a device.
    pub swap_size: Option<u64>,
    /// Users who may connect, besides root and the daemon's own.
    pub allow_uids: Vec<u32>,
    /// Groups whose members may connect.
    pub allow_gids: Vec<u32>,
}

/// Settings of a private daemon.
#[derive(Debug, Clone)]
pub struct Private {
    /// The inherited socket.
    pub fd: RawFd,
    /// Its name in the abstract name space, with an `@` in front, if it listens. Known when the socket was looked at.
    pub socket: String,
    /// Process that may still bring clients.
    pub owner: Option<i32>,
    /// Directory of the swap file.
    pub swap_dir: PathBuf,
    /// Largest size of the swap file.
    pub swap_size: u64,
    /// Hand over no `/dev/userfaultfd`.
    pub user_mode_only: bool,
}

/// Bounds on what clients can make the daemon hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Clients at once.
    pub clients: usize,
    /// Clients of one user at once.
    pub clients_per_uid: usize,
    /// Regions of one client.
    pub regions: u32,
    /// Connections at once.
    pub connections: usize,
}

impl Config {
    /// Reads the file, lets flags win, fills in defaults and checks the whole.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(cli: &Cli) -> Result<Self, ConfigError> {
        let sources = Sources { flags: &cli.settings, file: read_file(cli)? };
        match cli.private_fd {
            Some(fd) if cli.private => private(cli, &sources, fd),
            _ => service(&sources),
        }
    }
}

fn read_file(cli: &Cli) -> Result<Option<Written>, ConfigError> {
    if cli.private {
        return Ok(None);
    }
    let file = cli.config.clone().unwrap_or_else(|| CONFIG_FILE.into());
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if cli.config.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(source) => return Err(ConfigError::Read { file, source }),
    };
    match toml::from_str(&text) {
        Ok(settings) => Ok(Some(Written { file, text, settings })),
        Err(source) => Err(ConfigError::Parse { file, source: Box::new(source) }),
    }
}

fn service(sources: &Sources<'_>) -> Result<Config, ConfigError> {
    let (pool, place) = sources.pick("ram", |s| s.ram);
    let pool = pool.map_or_else(|| total_ram(&place).map(|total| total / 2), |size| Ok(size.0))?;

    let (socket, place) = sources.pick("socket", |s| s.socket.clone());
    let socket = socket.map_or_else(|| default_socket(&place), Ok)?;
    if UnixAddr::new(&socket).is_err() {
        return Err(value(&place, format!("{socket:?} is too long for a socket; the limit is 107 bytes")));
    }
    check_directory(&socket, &place)?;

    let (swap, place) = sources.pick("swap", |s| s.swap.clone());
    let swap = swap.unwrap_or_else(|| SWAP_FILE.into());
    check_directory(&swap, &place)?;
    let swap_size = swap_size(sources, &swap, pool)?;

    let allow_uids = sources.pick("allow_uid", |s| s.allow_uid.clone()).0.unwrap_or_default();
    let allow_uids: Vec<u32> = allow_uids.iter().map(|uid| uid.0).collect();
    let allow_gids = sources.pick("allow_gid", |s| s.allow_gid.clone()).0.unwrap_or_default();
    let allow_gids: Vec<u32> = allow_gids.iter().map(|gid| gid.0).collect();
    let open = !allow_uids.is_empty() || allow_gids.len() > 1;
    let socket_mode = sources.pick("socket_mode", |s| s.socket_mode).0;
    let socket_mode = socket_mode.unwrap_or(SocketMode(if open { 0o666 } else { 0o660 }));
    let mode = Mode::Service(Service { socket, socket_mode, swap, swap_size, allow_uids, allow_gids });
    common(sources, mode, pool, LogLevel::Info)
}

fn private(cli: &Cli, sources: &Sources<'_>, fd: RawFd) -> Result<Config, ConfigError> {
    let (pool, place) = sources.pick("ram", |s| s.ram);
    // The only client is the one who started it: nothing to share the machine with.
    let pool = pool.map_or_else(|| total_ram(&place), |size| Ok(size.0))?;
    let swap_dir = cli.swap_dir.clone();
    if !swap_dir.is_dir() {
        return Err(value("--swap-dir", format!("{swap_dir:?} is not a directory; name one on a disk")));
    }
    // A cap, not a reservation: the file grows as memory is claimed.
    let (size, place) = sources.pick("swap_size", |s| s.swap_size);
    let swap_size = match size {
        Some(size) => size.0,
        None => room(&swap_dir, &place)? / 2,
    };
    let mode = Mode::Private(Private {
        fd,
        socket: String::new(),
        owner: cli.private_owner,
        swap_dir,
        swap_size,
        user_mode_only: cli.user_mode_only,
    });
    common(sources, mode, pool, LogLevel::Warn)
}

fn common(sources: &Sources<'_>, mode: Mode, pool: u64, level: LogLevel) -> Result<Config, ConfigError> {
    let (max_budget, place) = sources.pick("max_budget", |s| s.max_budget);
    let max_budget = max_budget.map_or(pool, |size| size.0);
    if pool < MIN_BUDGET {
        let place = sources.pick("ram", |s| s.ram).1;
        return Err(value(
            &place,
            format!("{} is less than one client needs ({})", Size(pool), Size(MIN_BUDGET)),
        ));
    }
    if max_budget > pool {
        let problem = format!("{} is more than the RAM pool; at most {}", Size(max_budget), Size(pool));
        return Err(value(&place, problem));
    }
    let (default_budget, default_place) = sources.pick("default_budget", |s| s.default_budget);
    let default_budget = default_budget.map_or((pool / 4).max(MIN_BUDGET).min(max_budget), |size| size.0);
    if max_budget < MIN_BUDGET {
        let problem =
            format!("{} is less than a client needs; at least {}", Size(max_budget), Size(MIN_BUDGET));
        return Err(value(&place, problem));
    }
    if !(MIN_BUDGET..=max_budget).contains(&default_budget) {
        let (low, high) = (Size(MIN_BUDGET), Size(max_budget));
        let problem = format!("{} must be from {low} to the largest budget, {high}", Size(default_budget));
        return Err(value(&default_place, problem));
    }
    let disabled = disabled()?;
    Ok(Config {
        mode,
        pool,
        default_budget,
        max_budget,
        limits: limits(sources)?,
        log_level: sources.pick("log_level", |s| s.log_level).0.unwrap_or(level),
        features: Features {
            io_uring: !sources.any(|s| s.no_io_uring) && !disabled.io_uring,
            poison: !sources.any(|s| s.no_poison) && !disabled.poison,
            peer_pidfd: !disabled.peer_pidfd,
        },
        written: sources.merged(),
    })
}

/// What the environment switches off, for tests and diagnosis.
fn disabled() -> Result<Disabled, ConfigError> {
    let words = std::env::var_os(DISABLE).unwrap_or_default();
    words.to_string_lossy().parse().map_err(|error: UnknownWord| value(DISABLE, error.to_string()))
}

fn limits(sources: &Sources<'_>) -> Result<Limits, ConfigError> {
    let (clients, clients_place) = sources.pick("max_clients", |s| s.max_clients);
    let clients = clients.unwrap_or(1024);
    let (per_uid, per_uid_place) = sources.pick("max_clients_per_uid", |s| s.max_clients_per_uid);
    let (regions, regions_place) = sources.pick("max_regions", |s| s.max_regions);
    let (connections, connections_place) = sources.pick("max_connections", |s| s.max_connections);
    let limits = Limits {
        clients,
        clients_per_uid: per_uid.unwrap_or(clients.div_ceil(2)),
        regions: regions.unwrap_or(4096),
        connections: connections.unwrap_or(clients.saturating_add(64)),
    };
    for (zero, place) in [
        (limits.clients == 0, &clients_place),
        (limits.clients_per_uid == 0, &per_uid_place),
        (limits.regions == 0, &regions_place),
    ] {
        if zero {
            return Err(value(place, "0 would let nobody in; write 1 or more".to_owned()));
        }
    }
    if limits.connections <= limits.clients {
        let problem = format!("must be more than max_clients ({clients}), or fmallocctl could be locked out");
        return Err(value(&connections_place, problem));
    }
    Ok(limits)
}

fn swap_size(sources: &Sources<'_>, path: &Path, pool: u64) -> Result<Option<u64>, ConfigError> {
    let (size, place) = sources.pick("swap_size", |s| s.swap_size);
    if let Some(Size(0)) = size {
        return Err(value(&place, "0 leaves no swap; write a size such as 64GiB".to_owned()));
    }
    let device = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    if device {
        return Ok(size.map(|size| size.0));
    }
    let room = room(path, &place)?;
    match size {
        Some(Size(size)) if size > room => {
            let problem =
                format!("{} is more than the disk of {path:?} has left, {}", Size(size), Size(room));
            Err(value(&place, format!("{problem}; free some, or write less")))
        }
        Some(Size(size)) => Ok(Some(size)),
        None => Ok(Some(pool.saturating_mul(4).min(room / 2))),
    }
}

fn room(path: &Path, place: &str) -> Result<u64, ConfigError> {
    file::room(path)
        .map_err(|error| value(place, format!("no figures of the disk of {path:?}: {error}; set it")))
}

/// Where settings come from, the first one that has a key wins.
struct Sources<'a> {
    flags: &'a Settings,
    file: Option<Written>,
}

/// The file, and what it sets.
struct Written {
    file: PathBuf,
    text: String,
    settings: Settings,
}

impl Written {
    /// Where the key is set: file, line, key.
    fn place(&self, key: &str) -> String {
        let sets = |line: &str| {
            line.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
        };
        let line = self.text.lines().position(sets).map(|line| format!("line {}: ", line + 1));
        format!("{}: {}{key}", self.file.display(), line.unwrap_or_default())
    }
}

impl Sources<'_> {
    /// The value, if set, and what to call the place where it is or could be set.
    fn pick<T>(&self, key: &str, get: impl Fn(&Settings) -> Option<T>) -> (Option<T>, String) {
        let flag = format!("--{}", key.replace('_', "-"));
        if let Some(found) = get(self.flags) {
            return (Some(found), flag);
        }
        match self.file.as_ref().and_then(|written| get(&written.settings).map(|found| (written, found))) {
            Some((written, found)) => (Some(found), written.place(key)),
            None => (None, format!("{flag} (not set)")),
        }
    }

    /// All that is set, wherever.
    fn merged(&self) -> Settings {
        let mut all = self.file.as_ref().map(|written| written.settings.clone()).unwrap_or_default();
        let flags = self.flags.clone();
        macro_rules! prefer_flags {
            ($($key:ident)*) => { $(all.$key = flags.$key.or(all.$key);)* };
        }
        prefer_flags!(socket socket_mode swap swap_size ram default_budget max_budget allow_uid allow_gid max_clients
            max_clients_per_uid max_regions max_connections log_level);
        all.no_io_uring |= flags.no_io_uring;
        all.no_poison |= flags.no_poison;
        all
    }

    fn any(&self, get: impl Fn(&Settings) -> bool) -> bool {
        get(self.flags) || self.file.as_ref().is_some_and(|written| get(&written.settings))
    }
}

fn value(place: &str, problem: String) -> ConfigError {
    ConfigError::Value { place: place.to_owned(), problem }
}

fn total_ram(place: &str) -> Result<u64, ConfigError> {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib =
        line.and_then(|rest| rest.trim().strip_suffix(" kB")).and_then(|number| number.parse::<u64>().ok());
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| value(place, "cannot tell how much RAM there is; set it".to_owned()))
}

fn default_socket(place: &str) -> Result<PathBuf, ConfigError> {
    // systemd has made it, and says so to a service that need not be root.
    if let Some(dirs) = std::env::var_os("RUNTIME_DIRECTORY")
        && let Some(dir) = std::env::split_paths(&dirs).next().filter(|dir| dir.is_absolute())
    {
        return Ok(dir.join("fmallocd.sock"));
    }
    if nix::unistd::geteuid().is_root() {
        return Ok(SYSTEM_SOCKET.into());
    }
    user_socket().ok_or_else(|| value(place, "XDG_RUNTIME_DIR is not set either; name a socket".to_owned()))
}

/// Where a user's own daemon listens, if this environment says.
#[must_use]
pub fn user_socket() -> Option<PathBuf> {
    let dir = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())?;
    Some(Path::new(&dir).join("fmalloc/fmallocd.sock"))
}

/// A missing directory is made at start, its parent is not.
fn check_directory(path: &Path, place: &str) -> Result<(), ConfigError> {
    let problem = match path.parent() {
        _ if !path.is_absolute() => format!("{path:?} must be an absolute path"),
        Some(dir) if dir.is_dir() || (!dir.exists() && dir.parent().is_some_and(Path::is_dir)) => {
            return Ok(());
        }
        Some(dir) => format!("{dir:?} is not a directory; create it, or name another place"),
        None => format!("{path:?} is a directory; name a file in it"),
    };
    Err(value(place, problem))
}

/// Makes the directory of `path` if it is missing.
///
/// # Errors
/// What the system says.
pub fn make_directory_of(path: &Path, mode: u32) -> std::io::Result<()> {
    match path.parent() {
        Some(dir) if !dir.exists() => std::fs::DirBuilder::new().mode(mode).create(dir),
        _ => Ok(()),
    }
}

/// As a TOML file that has the same effect.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut size = |key: &str, bytes: u64| writeln!(f, "{key} = {bytes} # {}", Size(bytes));
        size("ram", self.pool)?;
        size("default_budget", self.default_budget)?;
        size("max_budget", self.max_budget)?;
        match &self.mode {
            Mode::Service(service) => {
                if let Some(bytes) = service.swap_size {
                    size("swap_size", bytes)?;
                }
                writeln!(f, "swap = {}", quoted(&service.swap))?;
                writeln!(f, "socket = {}", quoted(&service.socket))?;
                writeln!(f, "socket_mode = \"{}\"", service.socket_mode)?;
                writeln!(f, "allow_uid = {:?}", service.allow_uids)?;
                writeln!(f, "allow_gid = {:?}", service.allow_gids)?;
            }
            Mode::Private(private) => {
                size("swap_size", private.swap_size)?;
                writeln!(f, "# private, swap in {}", quoted(&private.swap_dir))?;
            }
        }
        writeln!(f, "max_clients = {}", self.limits.clients)?;
        writeln!(f, "max_clients_per_uid = {}", self.limits.clients_per_uid)?;
        writeln!(f, "max_regions = {}", self.limits.regions)?;
        writeln!(f, "max_connections = {}", self.limits.connections)?;
        writeln!(f, "log_level = \"{}\"", self.log_level)?;
        writeln!(f, "no_io_uring = {}", !self.features.io_uring)?;
        writeln!(f, "no_poison = {}", !self.features.poison)
    }
}

fn quoted(path: &Path) -> toml::Value {
    toml::Value::String(path.display().to_string())
}
