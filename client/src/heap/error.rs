//! What can be wrong with a call of the allocator.

use thiserror::Error;

use super::backing::Unavailable;

/// Why a pointer cannot be freed, resized or measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{}", self.text())]
#[non_exhaustive]
pub enum BadPointer {
    /// It is not in the heap's range of addresses.
    Foreign,
    /// No block begins there.
    NoBlock,
    /// The block is free already, or was never handed out.
    NotInUse,
}

impl BadPointer {
    /// The same as its `Display`, for who must not allocate.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Foreign => "the pointer does not belong to this heap",
            Self::NoBlock => {
                "no block of this heap begins at the pointer; free what was allocated, not a part of it"
            }
            Self::NotInUse => {
                "the block at the pointer is not in use; it was freed before, or never allocated"
            }
        }
    }
}

/// Why a block keeps its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ReallocError {
    /// There is nothing to be had for a larger one.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// It is no block.
    #[error(transparent)]
    BadPointer(#[from] BadPointer),
}
