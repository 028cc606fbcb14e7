//! stub
use super::handle::{Handle, Setup};
/// Starts the thread of one client: API handshake on its userfaultfd, then the loop.
///
/// # Errors
/// What the handshake or the system refused; nothing is left behind.
pub fn spawn(setup: Setup) -> anyhow::Result<Handle> { let _ = setup; anyhow::bail!("stub") }

/// The ring that suits a budget: a sixteenth of it, within 32 and 256 pages, in four batches.
pub fn ring_layout(budget: u64) -> fmalloc_proto::ring::Layout { let _ = budget; unimplemented!() }
