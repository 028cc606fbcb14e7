//! The daemon's outer parts against the real binaries: configuration, swap file, control plane, `fmallocctl`. Clients
//! here speak the raw protocol, so that they can also break it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod authorisation;
mod configuration;
mod ctl;
mod ending;
mod fuzz;
mod hostile;
mod limits;
mod memory;
#[path = "../../../proto/tests/samples/mod.rs"]
mod samples;
mod support;
mod swap_file;
