//! The fault threads: one per client process, each with its own reactor, so that no client can delay another.

pub mod backing;
mod commands;
mod files;
pub mod forks;
pub mod group;
pub mod handle;
pub mod latency;
pub mod memory;
pub mod pack;
pub mod placement;
pub mod processor;
pub mod reactor;
pub mod remaps;
pub mod requests;
mod start;
pub mod stats;
mod thread;
mod trouble;
pub mod uffd;

pub use forks::Birth;
pub use group::Group;
pub use handle::{Command, Features, Handle, Setup};
pub use start::{ring_layout, spawn, spawn_child};
