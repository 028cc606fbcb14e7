//! Ranges that system calls can use. On Windows those do not fault pages in, so the range is brought into RAM and kept
//! there; on Linux they do, and the same calls cost nothing.

use std::io::{self, Read, Write};
use std::ops::{Deref, DerefMut, Range};

use crate::Region;
use crate::error::Error;

/// Most bytes that the helpers pin at a time.
const CHUNK: usize = 1 << 20;

/// A range of a region that system calls can read, until this is dropped. On Windows it stays in RAM so long, and counts
/// against the budget; a range may be pinned several times.
#[derive(Debug)]
pub struct Pinned<'region> {
    region: &'region Region,
    range: Range<usize>,
}

/// A range of a region that system calls can read and write, as [`Pinned`].
#[derive(Debug)]
pub struct PinnedMut<'region> {
    region: &'region mut Region,
    range: Range<usize>,
}

impl Region {
    /// Makes `range` (in bytes) usable for system calls, such as a read from a file into it. On Windows, one that gets a
    /// pointer to a page that is not in RAM fails with `ERROR_NOACCESS` (998).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range outside the region, or if too much of the budget would be pinned; a failure of the
    /// system. Nothing is pinned then.
    pub fn pin(&self, range: Range<usize>) -> Result<Pinned<'_>, Error> {
        self.hold(&range, false)?;
        Ok(Pinned { region: self, range })
    }

    /// [`Region::pin`], for system calls that write to it.
    ///
    /// # Errors
    /// As [`Region::pin`].
    pub fn pin_mut(&mut self, range: Range<usize>) -> Result<PinnedMut<'_>, Error> {
        self.hold(&range, true)?;
        Ok(PinnedMut { region: self, range })
    }

    /// Reads from a file, or any other reader, into `range` (in bytes), pinning a part at a time.
    ///
    /// # Errors
    /// Those of the reader and of [`Region::pin`]; `UnexpectedEof` if it ends early. What was read until then is there.
    pub fn read_into(&mut self, range: Range<usize>, mut reader: impl Read) -> io::Result<()> {
        for part in parts(range) {
            reader.read_exact(&mut self.pin_mut(part).map_err(io::Error::other)?)?;
        }
        Ok(())
    }

    /// Writes from `range` (in bytes) to a file, or any other writer, pinning a part at a time.
    ///
    /// # Errors
    /// Those of the writer and of [`Region::pin`].
    pub fn write_from(&self, range: Range<usize>, mut writer: impl Write) -> io::Result<()> {
        for part in parts(range) {
            writer.write_all(&self.pin(part).map_err(io::Error::other)?)?;
        }
        Ok(())
    }
}

/// The range in parts that can be pinned one after the other.
fn parts(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(CHUNK).map(move |start| start..start.saturating_add(CHUNK).min(end))
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.region.release(&self.range);
    }
}

impl Drop for PinnedMut<'_> {
    fn drop(&mut self) {
        self.region.release(&self.range);
    }
}

impl Deref for Pinned<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.region[self.range.clone()]
    }
}

impl Deref for PinnedMut<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.region[self.range.clone()]
    }
}

impl DerefMut for PinnedMut<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.region[self.range.clone()]
    }
}
