//! Paging on Windows: within the process, without a service.
//!
//! The swap file is a section, and each region a view of a part of it without access. The first touch of a page raises an
//! exception; the [`handler`] gives access, for reading or writing as the thread wants, and so knows what is dirty. A page
//! leaves RAM when its access is taken away, its content written out if it is dirty, and the page taken out of the
//! working set. Its bytes are in the file or in the system's cache of it at any time: nothing is ever copied.
//!
//! [`frames`], [`pages`], [`paging`] and [`space`] decide, without system calls; they are tested on Linux too.

#![cfg_attr(not(windows), allow(dead_code, reason = "only what decides is built here, for its tests"))]

mod frames;
mod pages;
mod paging;
#[cfg(test)]
mod paging_tests;
mod space;
mod table;

#[cfg(windows)]
mod engine;
#[cfg(windows)]
mod handler;
#[cfg(windows)]
mod lock;
#[cfg(windows)]
mod pager;
#[cfg(windows)]
mod region;
#[cfg(windows)]
mod swap;
#[cfg(windows)]
mod sys;

#[cfg(windows)]
pub use pager::Pager;
#[cfg(windows)]
pub use region::Region;
