//! `fmallocctl`: one request or listing per run, as tables for people or as JSON for programs. Blocking code on one
//! thread; knows nothing of the daemon but the protocol.
//!
//! - `link`: finds a daemon and asks it; `tables` and [`json`]: what is printed;
//! - `run`: runs programs that know nothing of fmalloc; `places`: where its parts are;
//! - `doctor`: whether fmalloc can run here, with or without a daemon.

mod doctor;
pub mod json;
mod link;
mod places;
mod run;
mod tables;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use clap::{Parser, Subcommand};
use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::messages::{
    Budget, ClientId, ClientRow, Empty, Evict, Failure, Limit, Page, RegionRow, RegionsQuery, Reply, Request,
};
use fmalloc_proto::size::Size;
use thiserror::Error;

use link::Link;

/// The daemon refused.
const REFUSED: u8 = 1;
/// The command line makes no sense; clap's own code for that.
const USAGE: u8 = 2;
/// No daemon answers.
const NO_DAEMON: u8 = 3;
/// The doctor's verdict.
const NOT_HERE: u8 = 4;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the daemon refused, or the output could not be written
  2  the command line makes no sense
  3  no daemon answers
  4  doctor: fmalloc cannot run here";

/// Inspects and controls fmallocd.
///
/// Root and the daemon's own user see and change every client, others their own.
#[derive(Debug, Parser)]
#[command(name = "fmallocctl", version, after_help = EXIT_CODES, after_long_help = long_help())]
pub struct Cli {
    /// The daemon's socket [default: the system's daemon, then the user's own]
    #[arg(long, global = true, value_name = "PATH", env = "FMALLOC_SOCKET")]
    socket: Option<PathBuf>,
    /// Print JSON, sizes in bytes; `fmallocctl --help` describes the fields
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The daemon: RAM pool, swap, how it does I/O
    Status,
    /// The clients and what each holds in RAM and in swap
    Clients,
    /// The regions of a client, or of all
    Regions {
        /// Number of the client
        client: Option<u64>,
    },
    /// Change a client's RAM budget while it runs
    Limit {
        /// Number of the client
        client: u64,
        /// New budget, such as 512M
        size: Size,
    },
    /// Evict a client's memory to swap, all of it or some
    Evict {
        /// Number of the client, or client and region such as 3:1
        #[arg(value_name = "CLIENT[:REGION]")]
        target: Target,
        /// At most so much, such as 64M
        size: Option<Size>,
    },
    /// Where the time of a client's page faults goes, step by step
    Latency {
        /// Number of the client
        client: u64,
    },
    /// Try whether fmalloc can run here, and say what would mend it if not
    Doctor(doctor::Options),
    Run(Box<run::Options>),
}

/// A client, or one region of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    client: u64,
    region: Option<u32>,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (client, region) = match text.split_once(':') {
            Some((client, region)) => (client, Some(region.parse::<u32>())),
            None => (text, None),
        };
        match (client.parse(), region.transpose()) {
            (Ok(client), Ok(region)) => Ok(Self { client, region }),
            _ => Err("write the number of a client, or client:region such as 3:1".to_owned()),
        }
    }
}

fn long_help() -> String {
    format!("{EXIT_CODES}\n\n{}", json::fields_help())
}

/// Why a run failed.
#[derive(Debug, Error)]
enum CtlError {
    #[error("refused: {}", .0.text)]
    Refused(Failure),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    NoDaemon(String),
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
    #[error("fmalloc cannot run here")]
    NotHere,
}

/// Runs one command and gives the process's exit code: see the long help.
#[must_use]
pub fn run(cli: &Cli) -> ExitCode {
    if let Command::Run(options) = &cli.command {
        return run::run(options, named_socket(cli));
    }
    let error = match execute(cli) {
        Ok(()) => return ExitCode::SUCCESS,
        // Whoever reads has seen enough.
        Err(CtlError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            return ExitCode::SUCCESS;
        }
        Err(error) => error,
    };
    eprintln!("fmallocctl: {error}");
    ExitCode::from(match error {
        CtlError::Refused(_) | CtlError::Output(_) => REFUSED,
        CtlError::Usage(_) => USAGE,
        CtlError::NoDaemon(_) => NO_DAEMON,
        CtlError::NotHere => NOT_HERE,
    })
}

fn named_socket(cli: &Cli) -> Option<&std::path::Path> {
    cli.socket.as_deref().filter(|path| !path.as_os_str().is_empty())
}

fn execute(cli: &Cli) -> Result<(), CtlError> {
    if let Command::Limit { size, .. } = cli.command
        && size.0 < MIN_BUDGET
    {
        let text = format!("a budget of {size} is less than a client needs; at least {}", Size(MIN_BUDGET));
        return Err(CtlError::Usage(text));
    }
    let socket = named_socket(cli);
    if let Command::Doctor(options) = &cli.command {
        return doctor(&doctor::examine(options, socket), cli.json);
    }
    let mut link = Link::open(socket)?;
    let mut out = io::stdout().lock();
    match cli.command {
        Command::Doctor(_) | Command::Run(_) => Ok(()),
        Command::Status => match link.ask(&Request::Status(Empty {}))? {
            Reply::Status(status) => {
                let status = json::Status::new(&status, &clients(&mut link)?);
                if cli.json {
                    json::print(&mut out, &status)
                } else {
                    writeln!(out, "{}", tables::status(&status))
                }
            }
            other => return Err(unexpected(&other)),
        },
        Command::Clients => {
            let rows = clients(&mut link)?;
            if cli.json {
                json::print(&mut out, &rows.iter().map(json::Client::from).collect::<Vec<_>>())
            } else {
                writeln!(out, "{}", tables::clients(&rows))
            }
        }
        Command::Regions { client } => {
            let rows = regions(&mut link, client)?;
            if cli.json {
                json::print(&mut out, &rows.iter().map(json::Region::from).collect::<Vec<_>>())
            } else {
                writeln!(out, "{}", tables::regions(&rows))
            }
        }
        Command::Latency { client } => match link.ask(&Request::Latency(ClientId { client }))? {
            Reply::Latency(list) if cli.json => {
                json::print(&mut out, &list.rows.iter().map(json::Latency::from).collect::<Vec<_>>())
            }
            Reply::Latency(list) => writeln!(out, "{}", tables::latency(&list.rows)),
            other => return Err(unexpected(&other)),
        },
        Command::Limit { client, size } => {
            match link.ask_patiently(&Request::Limit(Limit { client, bytes: size.0 }))? {
                Reply::Budget(Budget { bytes }) if cli.json => {
                    json::print(&mut out, &json::Limit { client, budget_bytes: bytes })
                }
                Reply::Budget(Budget { bytes }) => {
                    writeln!(out, "client {client} has a budget of {} now", Size(bytes))
                }
                other => return Err(unexpected(&other)),
            }
        }
        Command::Evict { target: Target { client, region }, size } => {
            let evict = Evict { client, region, bytes: size.map(|size| size.0) };
            match link.ask_patiently(&Request::Evict(evict))? {
                Reply::Evicted(evicted) if cli.json => {
                    json::print(&mut out, &json::Evict { client, evicted_bytes: evicted.bytes })
                }
                Reply::Evicted(evicted) => writeln!(out, "{} left RAM", Size(evicted.bytes)),
                other => return Err(unexpected(&other)),
            }
        }
    }
    .map_err(CtlError::Output)
}

fn doctor(report: &doctor::Report, json: bool) -> Result<(), CtlError> {
    let mut out = io::stdout().lock();
    if json {
        json::print(&mut out, &report.json())?;
    } else {
        writeln!(out, "{}", report.text())?;
    }
    if report.usable() { Ok(()) } else { Err(CtlError::NotHere) }
}

fn clients(link: &mut Link) -> Result<Vec<ClientRow>, CtlError> {
    let mut rows: Vec<ClientRow> = Vec::new();
    loop {
        let after = rows.last().map_or(0, |row| row.client);
        match link.ask(&Request::Clients(Page { after }))? {
            Reply::Clients(mut list) => {
                let more = list.more && !list.rows.is_empty();
                rows.append(&mut list.rows);
                if !more {
                    return Ok(rows);
                }
            }
            other => return Err(unexpected(&other)),
        }
    }
}

fn regions(link: &mut Link, client: Option<u64>) -> Result<Vec<RegionRow>, CtlError> {
    if let Some(client) = client {
        return regions_of(link, client);
    }
    let mut rows = Vec::new();
    for client in clients(link)? {
        match regions_of(link, client.client) {
            Ok(mut more) => rows.append(&mut more),
            // It has ended since it was listed.
            Err(CtlError::Refused(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(rows)
}

fn regions_of(link: &mut Link, client: u64) -> Result<Vec<RegionRow>, CtlError> {
    let mut rows: Vec<RegionRow> = Vec::new();
    loop {
        let from = rows.last().map_or(0, |row| row.region.saturating_add(1));
        match link.ask(&Request::Regions(RegionsQuery { client, from }))? {
            Reply::Regions(mut list) => {
                let more = list.more && !list.rows.is_empty();
                rows.append(&mut list.rows);
                if !more {
                    return Ok(rows);
                }
            }
            other => return Err(unexpected(&other)),
        }
    }
}

fn unexpected(reply: &Reply) -> CtlError {
    CtlError::NoDaemon(format!("the daemon answered something else: {reply:?}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn targets_parse() {
        assert_eq!("3".parse(), Ok(Target { client: 3, region: None }));
        assert_eq!("3:1".parse(), Ok(Target { client: 3, region: Some(1) }));
        for text in ["", "x", "3:", ":1", "3:1:2", "-1"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
