//! The library behind `fmallocd` and `fmallocctl`.
//!
//! - [`control`]: the tokio side: accepts, authorises, keeps the books of the RAM pool, answers `fmallocctl`.
//! - [`fault`]: one thread per client that serves its page faults; system calls live here.
//! - [`pager`]: the pure core that decides; no system call, no clock.
//! - [`swap`]: the swap file, its slots and what is claimed of it.
//! - [`service`]: what a service manager is told and asked; the log.
//! - [`ctl`]: the command line tool.

pub mod arena;
pub mod config;
pub mod control;
pub mod ctl;
pub mod fault;
pub mod hash;
pub mod pager;
pub mod service;
pub mod swap;
