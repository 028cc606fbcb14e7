//! stub
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
/// The swap file.
#[derive(Debug)]
pub struct SwapFile { fd: OwnedFd }
impl SwapFile {
    /// For I/O.
    #[must_use] pub fn fd(&self) -> BorrowedFd<'_> { self.fd.as_fd() }
    /// Bytes at most.
    #[must_use] pub fn max_bytes(&self) -> u64 { 0 }
    /// Bytes at present.
    #[must_use] pub fn bytes(&self) -> u64 { 0 }
    /// O_DIRECT.
    #[must_use] pub fn direct(&self) -> bool { false }
    /// Grows to at least this size.
    ///
    /// # Errors
    /// ENOSPC and others of the system.
    pub fn grow(&self, bytes: u64) -> std::io::Result<()> { let _ = bytes; Ok(()) }
}
