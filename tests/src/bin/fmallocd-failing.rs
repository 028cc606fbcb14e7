//! `fmallocd` whose swap I/O fails as the plan in FMALLOC_TEST_PLAN says. For tests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is a failed test")]

use std::path::Path;
use std::sync::Arc;

use clap::Parser;
use fmalloc_tests::failing::{PLAN, Plan, Sabotage};
use fmallocd::config::{Cli, Config};
use fmallocd::control;
use fmallocd::service::{log, reload::Reloader};

fn main() -> anyhow::Result<()> {
    let plan = std::env::var_os(PLAN).expect("FMALLOC_TEST_PLAN names the plan");
    let plan = Arc::new(Plan::open(Path::new(&plan)));
    let cli = Cli::parse();
    let config = Config::load(&cli)?;
    let level = log::start(config.log_level);
    control::run_interposed(config, Reloader { cli, level }, Some(Box::new(Sabotage(plan))))
}
