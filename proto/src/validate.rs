//! Whether a well-formed message makes sense by itself: alignment, ranges, lengths of texts. What depends on
//! state (who may, what exists, what is left) is decided where the state is.

use thiserror::Error;

use crate::limits::{MAX_ADDRESS, MAX_FILE, MAX_NAME, MAX_REGION, MIN_BUDGET, PAGE};
use crate::messages::{Attach, RegionRange, Register, Request};

/// A field that makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Invalid {
    /// Too long, or with control characters.
    #[error("name must have at most {MAX_NAME} bytes and no control characters")]
    Name,
    /// An address or length that is not whole pages, empty, or out of bounds.
    #[error("range {start:#x}+{len:#x} must be whole pages, not empty, and within bounds")]
    Range {
        /// Start, as sent.
        start: u64,
        /// Length, as sent.
        len: u64,
    },
    /// Below the minimum.
    #[error("budget of {0} bytes is below the minimum of {MIN_BUDGET}")]
    Budget(u64),
}

/// Checks `request`.
///
/// # Errors
/// The first field that makes no sense.
pub fn request(request: &Request) -> Result<(), Invalid> {
    match request {
        Request::Open(open) => {
            name(&open.name)?;
            if open.budget == 0 || open.group.is_some() { Ok(()) } else { budget(open.budget) }
        }
        Request::Register(register) => region(register),
        Request::RegisterFile(file) => {
            region(&file.region)?;
            range(file.offset, file.region.len, MAX_FILE)
        }
        Request::RegisterLike(like) => region(&like.region),
        Request::Commit(part)
        | Request::Decommit(part)
        | Request::Changed(part)
        | Request::Prefetch(part) => region_range(part),
        Request::Flush(flush) => region_range(&flush.range),
        Request::Advise(advise) => region_range(&advise.range),
        Request::Attach(Attach { staging: Some(staging), .. }) => {
            range(staging.addr, staging.len, MAX_ADDRESS)
        }
        Request::SetBudget(wanted) | Request::NewGroup(wanted) => budget(wanted.bytes),
        Request::Limit(limit) => budget(limit.bytes),
        Request::Attach(_)
        | Request::Unregister(_)
        | Request::MakeWritable(_)
        | Request::Stats(_)
        | Request::Goodbye(_)
        | Request::Ping(_)
        | Request::PrepareFork(_)
        | Request::EndFork(_)
        | Request::Adopt(_)
        | Request::Ready(_)
        | Request::GroupStats(_)
        | Request::Status(_)
        | Request::Clients(_)
        | Request::Regions(_)
        | Request::Evict(_)
        | Request::Latency(_) => Ok(()),
    }
}

fn region(register: &Register) -> Result<(), Invalid> {
    name(&register.label)?;
    range(register.addr, register.len, MAX_ADDRESS)?;
    if register.len <= MAX_REGION {
        Ok(())
    } else {
        Err(Invalid::Range { start: register.addr, len: register.len })
    }
}

fn name(text: &str) -> Result<(), Invalid> {
    if text.len() <= MAX_NAME && !text.chars().any(char::is_control) { Ok(()) } else { Err(Invalid::Name) }
}

fn budget(bytes: u64) -> Result<(), Invalid> {
    if bytes >= MIN_BUDGET { Ok(()) } else { Err(Invalid::Budget(bytes)) }
}

fn region_range(part: &RegionRange) -> Result<(), Invalid> {
    range(part.offset, part.len, MAX_REGION)
}

fn range(start: u64, len: u64, end: u64) -> Result<(), Invalid> {
    let whole = start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0;
    let inside = start.checked_add(len).is_some_and(|last| last <= end);
    if whole && inside { Ok(()) } else { Err(Invalid::Range { start, len }) }
}
