//! fmallocd as a service: its unit files, what it says to a service manager, its installation and package; and
//! `fmallocctl doctor`. systemd need not run here: its tools and a socket of the test's own stand in for it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod doctor;
mod files;
mod manager;
mod support;
