//! What can be set, in the two forms in which it is written: command line flags and the TOML file. Keys of the file
//! are the flags with `_` for `-`. Says nothing about what makes sense together: see [`super::Config`].

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;
use fmalloc_proto::size::Size;
use serde::{Deserialize, Deserializer, Serialize, de};

use super::ids::{Gid, Uid};

/// The service that pages the memory of many processes, each within its RAM budget.
///
/// Without --private it listens on a socket; flags win over the file. It logs to stderr, one line "ready" when
/// clients may connect. SIGTERM lets clients that hold memory finish; a second one ends at once. SIGHUP reads the file
/// again and changes what can change.
#[derive(Debug, Clone, Default, clap::Parser)]
#[command(name = "fmallocd", version, args_override_self = true)]
pub struct Cli {
    /// TOML file with the same settings [default: /etc/fmalloc/fmallocd.toml if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What the file can hold too.
    #[command(flatten)]
    pub settings: Settings,
    /// Check the configuration, print what is in effect, and end: 0 if it is sound, 2 if not
    #[arg(long)]
    pub check: bool,
    /// Serve one process over an inherited socket and end with it, or with --private-owner and all its clients if the
    /// socket listens; reads no file
    #[arg(long, requires = "private_fd", conflicts_with_all = ["config", "socket", "swap", "check"])]
    pub private: bool,
    /// The inherited socket
    #[arg(long, value_name = "N", requires = "private")]
    pub private_fd: Option<i32>,
    /// Process that may still bring clients, as long as it lives
    #[arg(long, value_name = "PID", requires = "private")]
    pub private_owner: Option<i32>,
    /// Directory of the private, unlinked swap file
    #[arg(long, value_name = "DIR", requires = "private", default_value = "/var/tmp")]
    pub swap_dir: PathBuf,
    /// Hand no /dev/userfaultfd to the client, whose system calls then fail on swapped memory
    #[arg(long, requires = "private")]
    pub user_mode_only: bool,
}

/// Settings of the command line or of the file; none means not set there.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Socket to listen on [default: /run/fmalloc/fmallocd.sock, or fmalloc/fmallocd.sock in XDG_RUNTIME_DIR]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Mode of the socket; every peer is checked besides [default: 0660, or 0666 if uids or several gids are allowed]
    #[arg(long, value_name = "OCTAL")]
    pub socket_mode: Option<SocketMode>,
    /// Swap file or block device; what it holds is lost [default: /var/lib/fmalloc/swap]
    #[arg(long, value_name = "PATH")]
    pub swap: Option<PathBuf>,
    /// Size of the swap file [default: four times the RAM pool, at most half of what the disk has left]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "size")]
    pub swap_size: Option<Size>,
    /// RAM pool: the budgets granted never add up to more [default: half of the machine's RAM]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "size")]
    pub ram: Option<Size>,
    /// Budget of a client that asks for none [default: a quarter of the pool]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "size")]
    pub default_budget: Option<Size>,
    /// Largest budget that a client may ask for [default: the pool]
    #[arg(long, value_name = "SIZE")]
    #[serde(deserialize_with = "size")]
    pub max_budget: Option<Size>,
    /// User who may connect, by name or number, besides root and the daemon's own; may be repeated
    #[arg(long, value_name = "UID")]
    pub allow_uid: Option<Vec<Uid>>,
    /// Group whose members may connect, by name or number; may be repeated. The socket goes to the first
    #[arg(long, value_name = "GID")]
    pub allow_gid: Option<Vec<Gid>>,
    /// Most clients at once [default: 1024]
    #[arg(long, value_name = "N")]
    pub max_clients: Option<usize>,
    /// Most clients of one user at once [default: half of --max-clients]
    #[arg(long, value_name = "N")]
    pub max_clients_per_uid: Option<usize>,
    /// Most regions of one client [default: 4096]
    #[arg(long, value_name = "N")]
    pub max_regions: Option<u32>,
    /// Most connections at once, fmallocctl's included [default: --max-clients and 64]
    #[arg(long, value_name = "N")]
    pub max_connections: Option<usize>,
    /// Least severe lines to log [default: info, private: warn]
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// Do swap I/O without io_uring
    #[arg(long)]
    pub no_io_uring: bool,
    /// Lost pages: take access away in the client instead of poisoning them
    #[arg(long)]
    pub no_poison: bool,
}

/// Permission bits of the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketMode(pub u32);

impl FromStr for SocketMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match u32::from_str_radix(text.trim_start_matches("0o"), 8) {
            Ok(mode) if mode <= 0o777 => Ok(Self(mode)),
            _ => Err(format!("{text:?} is not a file mode; write it in octal, such as 0660")),
        }
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl<'de> Deserialize<'de> for SocketMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A bare number would be read as decimal by TOML and mean another mode than it says.
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Severity of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// What needs attention.
    Warn,
    /// Clients that come and go.
    Info,
    /// Single requests.
    Debug,
    /// Everything.
    Trace,
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        })
    }
}

/// A size as the file has it: `"64GiB"` or a number of bytes.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Size>, D::Error> {
    struct Visitor;

    impl de::Visitor<'_> for Visitor {
        type Value = Size;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a size such as \"64GiB\" or a number of bytes")
        }

        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
            u64::try_from(bytes).map(Size).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
        }

        fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
            Ok(Size(bytes))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
            text.parse().map_err(E::custom)
        }
    }

    deserializer.deserialize_any(Visitor).map(Some)
}
