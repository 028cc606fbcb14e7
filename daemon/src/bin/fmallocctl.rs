//! Inspects and controls `fmallocd`; see [`fmallocd::ctl`].

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    fmallocd::ctl::run(&fmallocd::ctl::Cli::parse())
}
