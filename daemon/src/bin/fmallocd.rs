//! The service; see [`fmallocd::control`]. Ends 0 after an orderly end, 1 if it cannot serve, 2 if its configuration
//! cannot be used.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use fmallocd::config::{Cli, Config};
use fmallocd::control;
use tracing_subscriber::EnvFilter;

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
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(config.log_level.to_string()))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match control::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whatever the log level: this is why nothing runs.
            eprintln!("fmallocd: {error:#}");
            ExitCode::FAILURE
        }
    }
}
