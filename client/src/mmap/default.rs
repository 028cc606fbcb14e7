//! The pager of mappings that name none: one per process, made when it is first needed.

use std::sync::{Mutex, PoisonError};

use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::size::Size;

use crate::error::Error;
use crate::health::Health;
use crate::options::{ConnectOptions, PrivateOptions, variable};
use crate::pager::Pager;

static DEFAULT: Mutex<Option<Pager>> = Mutex::new(None);

/// Sets the pager of mappings that name none from now on. Existing mappings keep theirs.
pub fn set_default_pager(pager: Pager) {
    let before = DEFAULT.lock().unwrap_or_else(PoisonError::into_inner).replace(pager);
    // Ends it if nothing uses it; not under the lock.
    drop(before);
}

/// The pager of mappings that name none: the one that was set, else a connection to the service, else a daemon for this
/// process alone. The budget is FMALLOC_RAM (such as `512M`), without it the service's default, or half of the memory that
/// is available.
///
/// # Errors
/// Why neither is to be had.
pub fn default_pager() -> Result<Pager, Error> {
    let mut default = DEFAULT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pager) = default.as_ref()
        && pager.health() == Health::Ok
    {
        return Ok(pager.clone());
    }
    let pager = make(wanted_budget()?)?;
    *default = Some(pager.clone());
    Ok(pager)
}

/// A pager with a budget of its own.
pub(super) fn make(budget: Option<u64>) -> Result<Pager, Error> {
    let options = ConnectOptions { budget, ..ConnectOptions::default() };
    match Pager::connect_with(&options) {
        Err(Error::NoDaemon { .. }) => {
            Pager::private(&PrivateOptions::new(budget.unwrap_or_else(half_of_available)))
        }
        other => other,
    }
}

fn wanted_budget() -> Result<Option<u64>, Error> {
    let Some(text) = variable("FMALLOC_RAM") else { return Ok(None) };
    let text = text.to_string_lossy();
    let size: Size = text.parse().map_err(|error| Error::invalid(format!("FMALLOC_RAM={text}: {error}")))?;
    Ok(Some(size.0))
}

fn half_of_available() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0);
    (kib * 1024 / 2).max(MIN_BUDGET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_available_memory_is_more_than_the_least_budget() {
        assert!(half_of_available() > MIN_BUDGET);
    }
}
