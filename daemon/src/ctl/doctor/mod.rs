//! `fmallocctl doctor`: tries, as this user and on this machine, everything that fmalloc needs, and says of each thing
//! that is missing what that costs and which command mends it. Real calls wherever there is a call to make; nothing is
//! concluded from version numbers. Changes nothing and leaves nothing behind.
//!
//! - [`report`]: what was found, as text and as JSON;
//! - [`kernel`] with [`uffd`]: the kernel's features; [`rights`]: what this user and this container may do;
//! - [`memory`]: RAM and limits on it; [`disk`]: room and speed where swap goes;
//! - [`ways`] with [`talk`]: the service and a private daemon, each asked as a program would ask.

mod disk;
mod kernel;
mod memory;
mod report;
mod rights;
mod talk;
mod uffd;
mod ways;

use std::path::{Path, PathBuf};

use fmalloc_proto::messages::Status;

pub(super) use report::Report;
use uffd::Access;

/// What `fmallocctl doctor` can be told.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Directory of a private daemon's swap file
    #[arg(long, value_name = "DIR", env = "FMALLOC_SWAP_DIR", default_value = "/var/tmp")]
    swap_dir: PathBuf,
    /// Leave out what takes longer than a moment: the speed of the disk
    #[arg(long)]
    quick: bool,
}

/// Looks at everything. `socket` is the one that was named, if any.
pub(super) fn examine(options: &Options, socket: Option<&Path>) -> Report {
    let mut report = Report::default();
    let service = ways::service(&mut report, socket);
    let access = Access::new(service.device);
    ways::judge_service(&mut report, service.opened, &access);
    ways::private(&mut report, &options.swap_dir, &access);
    rights::examine(&mut report, &access);
    kernel::examine(&mut report, &access);
    memory::examine(&mut report);
    disk::examine(&mut report, &swap_places(&options.swap_dir, service.status.as_ref()), !options.quick);
    report.conclude();
    report
}

/// Where swap is or would be: for what, and the directory.
fn swap_places(private: &Path, status: Option<&Status>) -> Vec<(&'static str, PathBuf)> {
    let swap = status.map(|status| PathBuf::from(&status.swap_path));
    let swap = swap.unwrap_or_else(|| crate::config::SWAP_FILE.into());
    let service = swap.parent().filter(|dir| dir.is_dir()).map(|dir| ("service", dir.to_owned()));
    service.into_iter().chain([("private", private.to_owned())]).collect()
}
