//! What mappings of fmalloc can do beyond those of memmap2.

use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use bytemuck::{AnyBitPattern, NoUninit};
use fmalloc_proto::PAGE_SIZE;
use fmalloc_proto::messages::Request;

use super::mapping::{Mapping, Part};
use super::{Mmap, MmapMut};
use crate::link::Begun;
use crate::pager::Pager;

/// Pages that are being read in. Dropped, it lets them come all the same.
#[derive(Debug)]
pub struct Prefetch {
    begun: Option<(Pager, Begun)>,
}

impl Prefetch {
    /// Whether the pages are there, as far as the budget allows.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.begun.as_ref().is_none_or(|(_, begun)| begun.is_done())
    }

    /// Waits until they are. Quickest on the thread that began it.
    ///
    /// # Errors
    /// A lost daemon.
    pub fn wait(self) -> io::Result<()> {
        let Some((pager, begun)) = self.begun else { return Ok(()) };
        pager.link().finish(begun)?;
        Ok(())
    }
}

/// Keeps pages in RAM for as long as it lives.
#[derive(Debug)]
pub struct PinGuard<'a> {
    part: &'a Part,
    /// Pages of the region, in bytes.
    pages: Range<usize>,
}

impl Drop for PinGuard<'_> {
    fn drop(&mut self) {
        let Some(mapping) = &self.part.mapping else { return };
        let mut pins = mapping.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = pins.iter().position(|pages| *pages == self.pages) {
            pins.swap_remove(place);
        }
        for run in uncovered(&self.pages, &pins) {
            // Without a daemon they stay where they are, and who unlocks a part that is gone has nothing to unlock.
            let _ = self.part.lock(false, run);
        }
    }
}

/// The parts of `pages` that none of the others has.
fn uncovered(pages: &Range<usize>, others: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut rest = vec![pages.clone()];
    for other in others {
        rest = rest
            .into_iter()
            .flat_map(|run| {
                let before = run.start..run.end.min(other.start);
                let behind = run.start.max(other.end)..run.end;
                [before, behind]
            })
            .filter(|run| !run.is_empty())
            .collect();
    }
    rest
}

fn prefetch(part: &Part, offset: usize, len: usize) -> io::Result<Prefetch> {
    let range = part.within(offset, len)?;
    let Some(mapping) = &part.mapping else { return Ok(Prefetch { begun: None }) };
    let Some(pages) = mapping.region.around(&range)? else { return Ok(Prefetch { begun: None }) };
    let request = Request::Prefetch(mapping.region.part(&pages));
    let begun = mapping.region.link().begin(&request)?;
    Ok(Prefetch { begun: Some((mapping.region.pager().clone(), begun)) })
}

fn pin(part: &Part, offset: usize, len: usize) -> io::Result<PinGuard<'_>> {
    let range = part.within(offset, len)?;
    let start = range.start - range.start % PAGE_SIZE;
    let pages = if range.is_empty() { start..start } else { start..range.end.next_multiple_of(PAGE_SIZE) };
    if let Some(mapping) = &part.mapping {
        let mut pins = mapping.pins.lock().unwrap_or_else(PoisonError::into_inner);
        part.lock(true, pages.clone())?;
        pins.push(pages.clone());
    }
    Ok(PinGuard { part, pages })
}

fn resident(part: &Part, offset: usize, len: usize) -> io::Result<Vec<bool>> {
    let range = part.within(offset, len)?;
    part.mapping
        .as_ref()
        .map_or(Ok(Vec::new()), |mapping: &Arc<Mapping>| Ok(mapping.region.resident(range)?))
}

/// Bytes as values; those at the end that do not fill one are left out.
fn whole<T>(bytes: &[u8]) -> io::Result<&[u8]> {
    let fits = bytes.len().checked_div(size_of::<T>()).unwrap_or(0) * size_of::<T>();
    if bytes.as_ptr().align_offset(align_of::<T>()) == 0 {
        return Ok(&bytes[..fits]);
    }
    let text = format!("the mapping is not aligned for values of alignment {}", align_of::<T>());
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

macro_rules! extras {
    ($name:ident, $part:tt) => {
        impl $name {
            /// Begins to read the pages around `len` bytes from `offset` on, as far as the budget allows.
            ///
            /// # Errors
            /// `InvalidInput` for bytes outside the mapping, or a lost daemon.
            pub fn prefetch(&self, offset: usize, len: usize) -> io::Result<Prefetch> {
                prefetch(&self.$part, offset, len)
            }

            /// Reads the pages around `len` bytes from `offset` on and keeps them in RAM while the guard lives. They count
            /// against the budget.
            ///
            /// # Errors
            /// `InvalidInput` for bytes outside the mapping; what `mlock` says.
            pub fn pin(&self, offset: usize, len: usize) -> io::Result<PinGuard<'_>> {
                pin(&self.$part, offset, len)
            }

            /// For each page that `len` bytes from `offset` on touch, whether it is in RAM at this moment.
            ///
            /// # Errors
            /// `InvalidInput` for bytes outside the mapping, or a failure of the system.
            pub fn resident(&self, offset: usize, len: usize) -> io::Result<Vec<bool>> {
                resident(&self.$part, offset, len)
            }

            /// The pager behind the mapping, for figures ([`Pager::stats`]) and its budget; none of a mapping of no bytes.
            #[must_use]
            pub fn pager(&self) -> Option<&Pager> {
                self.$part.mapping.as_ref().map(|mapping| mapping.region.pager())
            }

            /// The number of the region behind the mapping, as `fmallocctl regions` shows it; none of a mapping of no bytes.
            #[must_use]
            pub fn region(&self) -> Option<u32> {
                self.$part.mapping.as_ref().map(|mapping| mapping.region.id())
            }

            /// The bytes as values of another type; those at the end that do not fill one are left out.
            ///
            /// # Errors
            /// `InvalidInput` if the mapping starts in the middle of a value's alignment.
            pub fn as_slice_of<T: AnyBitPattern>(&self) -> io::Result<&[T]> {
                whole::<T>(self).map(bytemuck::cast_slice)
            }
        }
    };
}

extras!(Mmap, 0);
extras!(MmapMut, part);

impl MmapMut {
    /// As [`MmapMut::as_slice_of`], to write to.
    ///
    /// # Errors
    /// As there.
    pub fn as_mut_slice_of<T: AnyBitPattern + NoUninit>(&mut self) -> io::Result<&mut [T]> {
        let len = whole::<T>(self)?.len();
        Ok(bytemuck::cast_slice_mut(&mut self[..len]))
    }

    /// A copy of a private or anonymous mapping as it is now; of a private one only what differs from the file is copied.
    ///
    /// # Errors
    /// `Unsupported` for a mapping that shares its file; else as for a new mapping.
    pub fn snapshot(&self) -> io::Result<Self> {
        self.part.snapshot().map(Self::plain)
    }

    /// Has all changes get into the file, or none if the process is killed or the power fails meanwhile. Of mappings made
    /// by [`super::MmapOptions::map_atomic`].
    ///
    /// # Errors
    /// `InvalidInput` for other mappings; `StorageFull` and what else the file system says about the file or its journal.
    /// Nothing has got into the file then, or it will be completed by the next flush, or when the file is mapped so again.
    pub fn flush_atomic(&self) -> io::Result<()> {
        self.flush_atomic_range(0, self.part.len)
    }

    /// [`MmapMut::flush_atomic`] of the pages around `len` bytes from `offset` on.
    ///
    /// # Errors
    /// As there; `InvalidInput` for bytes outside the mapping.
    pub fn flush_atomic_range(&self, offset: usize, len: usize) -> io::Result<()> {
        let range = self.part.within(offset, len)?;
        let Some(journal) = &self.journal else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "only a mapping made by MmapOptions::map_atomic can be flushed atomically: of others, pages get into \
                 the file whenever they are evicted",
            ));
        };
        let Some(mapping) = &self.part.mapping else { return Ok(()) };
        let (journal, start) = (&journal.0, journal.1 - journal.1 % fmalloc_proto::PAGE);
        let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
        journal.flush(start, &mapping.changed(range)?, |page| {
            // SAFETY: the changed pages are the region's. Who writes to them meanwhile takes the risk of a mixture.
            unsafe { std::slice::from_raw_parts(mapping.region.as_ptr().add(page), PAGE_SIZE) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_other_guards_stay_locked() {
        assert_eq!(uncovered(&(0..10), &[12..20, 3..5, 4..6]), [0..3, 6..10]);
        assert!(uncovered(&(2..4), &[0..3, 3..9]).is_empty());
    }
}
