//! `fmallocctl run`: runs a program that knows nothing of fmalloc, and what it starts in turn, within a RAM budget.
//!
//! - [`program`]: finds it, and says if it cannot be paged; [`server`]: the service, or a daemon for this tree alone;
//! - [`supervise`]: waits for it when figures are wanted; [`figures`]: those. Without them it takes this process's place.

mod figures;
mod program;
mod server;
mod supervise;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::str::FromStr;

use fmalloc_proto::size::Size;

use super::places;
use server::Server;

/// Smallest budget: below it a program of several processes would get nowhere.
pub(super) const LEAST: u64 = 8 << 20;

/// What `fmallocctl` itself could not do, as `env` and `timeout` say it.
const FAILED: u8 = 125;
/// The program is there but cannot be run, or not paged.
const NOT_RUNNABLE: u8 = 126;
/// There is no such program.
const NOT_FOUND: u8 = 127;

const LONG_HELP: &str = "\
Examples:
  fmallocctl run --ram 512M -- sort --buffer-size=8G big.txt
  fmallocctl run --ram 25% --stats -- python3 analysis.py

The budget is for the program and everything that it starts. What the processes allocate (malloc and its kin, large \
anonymous mappings) is kept within it and swapped out beyond it; code, stacks and the first 4 MiB of each process are \
not counted.

A running fmallocd is used if it admits this user, else one is started for this program alone, which needs root, or \
access to /dev/userfaultfd and CAP_SYS_PTRACE; `fmallocctl doctor` tells what can be had here.

Swap is claimed when memory is allocated: when the swap file is full, malloc gives NULL with ENOMEM, and fork fails.

Not paged: programs that are linked statically, or that make system calls without the C library (Go). Programs that \
change their user when they start are refused.

Exit codes: that of the program; 125 if fmallocctl fails, 126 if the program cannot be run or not paged, 127 if there \
is no such program.";

/// Run a program, and all that it starts, within a RAM budget
#[derive(Debug, clap::Args)]
#[command(after_long_help = LONG_HELP)]
pub(super) struct Options {
    /// RAM for the program and all that it starts, such as 512M, or 10% of the machine's [default: half of what is
    /// available]
    #[arg(long, value_name = "SIZE|PERCENT%")]
    ram: Option<Ram>,
    /// Page only allocations of this size and above; smaller ones stay with libc, in RAM beyond the budget
    #[arg(long, value_name = "SIZE", default_value = "0")]
    threshold: Size,
    /// Start a daemon for this program alone, even if a service runs
    #[arg(long)]
    private: bool,
    /// Most that may be swapped out; implies --private [default: half of what the disk has left]
    #[arg(long, value_name = "SIZE")]
    swap_size: Option<Size>,
    /// Directory of the swap file, on a real disk; implies --private [default: FMALLOC_SWAP_DIR, then /var/tmp]
    #[arg(long, value_name = "DIR")]
    swap_dir: Option<PathBuf>,
    /// Print what paging has cost when the program has ended, to stderr
    #[arg(long)]
    stats: bool,
    /// Write that as JSON
    #[arg(long, value_name = "FILE")]
    stats_json: Option<PathBuf>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM [ARGS]")]
    program: Vec<OsString>,
}

/// RAM, in bytes or as a share of what the machine has.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ram {
    Bytes(u64),
    Percent(f64),
}

impl FromStr for Ram {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(number) = text.trim().strip_suffix('%') else {
            return text
                .parse()
                .map(|Size(bytes)| Self::Bytes(bytes))
                .map_err(|error: fmalloc_proto::size::SizeError| error.to_string());
        };
        match number.trim().parse::<f64>() {
            Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(Self::Percent(percent)),
            _ => Err(format!("{text:?} is not a share; write 1% to 100%")),
        }
    }
}

/// Why nothing was run.
#[derive(Debug)]
pub(super) struct Failure {
    code: u8,
    text: String,
}

impl Failure {
    fn new(code: u8, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }
}

/// Runs the program; if all is well and no figures are wanted, this does not return.
pub(super) fn run(options: &Options, socket: Option<&std::path::Path>) -> ExitCode {
    match start(options, socket) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("fmallocctl: {}", failure.text);
            ExitCode::from(failure.code)
        }
    }
}

fn start(options: &Options, socket: Option<&std::path::Path>) -> Result<ExitCode, Failure> {
    let (name, arguments) =
        options.program.split_first().ok_or_else(|| Failure::new(FAILED, "no program"))?;
    let budget = budget(options.ram)?;
    let path = program::find(name)?;
    program::check(&path)?;
    let library = library()?;
    let server = Server::choose(options, socket, budget)?;
    let mut command = Command::new(&path);
    command.arg0(name).args(arguments);
    prepare(&mut command, options, &server, library.as_os_str());
    try_out(options, &server, library.as_os_str())?;
    if options.stats || options.stats_json.is_some() {
        return supervise::run(command, server, options);
    }
    let error = command.exec();
    Err(cannot_run(&path, &error))
}

/// What the preloaded library needs to know.
fn prepare(command: &mut Command, options: &Options, server: &Server, library: &OsStr) {
    let mut preload = library.to_owned();
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    command.env("LD_PRELOAD", preload);
    command.env("FMALLOC_SOCKET", &server.socket);
    command.env("FMALLOC_GROUP", server.token.to_string());
    command.env("FMALLOC_THRESHOLD", options.threshold.0.to_string());
    command.env("FMALLOC_RESERVE", server.reserve.to_string());
}

/// Loads the library into a process that does nothing else, and has it begin: what fails there would fail the program in
/// the middle of its work.
fn try_out(options: &Options, server: &Server, library: &OsStr) -> Result<(), Failure> {
    let own = std::env::current_exe()
        .map_err(|error| Failure::new(FAILED, format!("cannot find itself: {error}")))?;
    let mut command = Command::new(own);
    prepare(&mut command, options, server, library);
    command.env("LD_PRELOAD", library).env("FMALLOC_TRIAL", "1").arg("--version");
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| Failure::new(FAILED, format!("cannot run a trial: {error}")))?;
    // Without the library it would print its version.
    if output.status.success() && output.stdout.is_empty() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().last().unwrap_or("it says nothing");
    Err(Failure::new(
        FAILED,
        format!(
            "programs cannot be paged here: {said}\n`fmallocctl doctor` tells what is missing; {}",
            library.display()
        ),
    ))
}

fn library() -> Result<PathBuf, Failure> {
    let library = places::find_library().map_err(|places| {
        let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        Failure::new(
            FAILED,
            format!(
                "the library libfmalloc_preload.so is missing; looked for {}. Install it, or name it in FMALLOC_PRELOAD",
                places.join(", ")
            ),
        )
    })?;
    // The dynamic loader takes these as separators.
    if library.as_os_str().as_bytes().iter().any(|byte| b" :".contains(byte)) {
        let text = format!(
            "{library:?} cannot be preloaded: its path has a space or a colon; move it, or link to it"
        );
        return Err(Failure::new(FAILED, text));
    }
    Ok(library)
}

fn budget(ram: Option<Ram>) -> Result<u64, Failure> {
    let unknown =
        || Failure::new(FAILED, "cannot tell how much RAM there is; say how much to use with --ram");
    let budget = match ram {
        Some(Ram::Bytes(bytes)) => bytes,
        Some(Ram::Percent(percent)) => share(figures::meminfo("MemTotal").ok_or_else(unknown)?, percent),
        None => figures::meminfo("MemAvailable").ok_or_else(unknown)? / 2,
    };
    if budget < LEAST {
        let text = format!("--ram: {} is too little; at least {}", Size(budget), Size(LEAST));
        return Err(Failure::new(2, text));
    }
    Ok(budget)
}

/// Whole pages.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "at most `total`"
)]
fn share(total: u64, percent: f64) -> u64 {
    (total as f64 * percent / 100.0) as u64 / 4096 * 4096
}

fn cannot_run(path: &std::path::Path, error: &std::io::Error) -> Failure {
    let code = if error.kind() == std::io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUNNABLE };
    Failure::new(code, format!("cannot run {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_a_size_or_a_share() {
        assert_eq!("512M".parse(), Ok(Ram::Bytes(512 << 20)));
        assert_eq!("10%".parse(), Ok(Ram::Percent(10.0)));
        for text in ["0%", "101%", "-1%", "x%", "%", "NaN%", "12Q"] {
            assert!(text.parse::<Ram>().is_err(), "{text}");
        }
        assert_eq!(share(100 << 20, 10.0), 10 << 20);
        assert_eq!(budget(Some(Ram::Bytes(LEAST))).unwrap(), LEAST);
        assert_eq!(budget(Some(Ram::Bytes(LEAST - 1))).unwrap_err().code, 2);
    }
}
