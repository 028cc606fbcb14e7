//! The service; see [`fmallocd::control`]. Ends 0 after an orderly end, 1 if it cannot serve, 2 if its configuration
//! cannot be used.

use std::process::ExitCode;

use clap::Parser;
use fmallocd::config::{Cli, Config};
use fmallocd::control;
use fmallocd::service::{log, reload::Reloader};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = match Config::load(&cli) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("fmallocd: {error}");
            return ExitCode::from(2);
        }
    };
    if cli.check {
        print!("{config}");
        return ExitCode::SUCCESS;
    }
    let level = log::start(config.log_level);
    match control::run(config, Reloader { cli, level }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whatever the log level: this is why nothing runs.
            eprintln!("fmallocd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
