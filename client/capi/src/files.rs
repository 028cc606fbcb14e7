//! Regions over files, for programs that share a file's content rather than want memory.

use std::ffi::c_char;

use crate::failure::{Failure, pointer};
use crate::options::path;
use crate::regions::{Pager, Region, get};

/// A file for reading: what is written to its memory never gets into the file.
pub const FMALLOC_FILE_READ: u32 = 0;
/// A file for reading and writing: changes get into it by fmalloc_region_flush, on eviction and at the end.
pub const FMALLOC_FILE_SHARED: u32 = 1;
/// A file for reading and writing that stays as it is: changes go to swap, and are gone at the end.
pub const FMALLOC_FILE_COPY: u32 = 2;

/// A pager for files: with a budget of 0 the one that this process has for them, which is a connection to the service or else a
/// private daemon, and its budget that of FMALLOC_RAM or the default; otherwise one of its own with this budget in bytes. NULL
/// with errno and a message if it fails.
#[unsafe(no_mangle)]
pub extern "C" fn fmalloc_pager_default(budget: u64) -> *mut Pager {
    pointer(system::pager(budget).map(Pager::boxed))
}

/// The content of a file in memory, from `offset` on, which must be a multiple of 4096; a length of 0 means up to its end. `path`
/// is in UTF-8 on Windows. `mode`: one of FMALLOC_FILE_READ and so on. Nobody else should write to the file meanwhile. NULL with
/// errno and a message if it fails; ENOSYS on Windows, where this does not exist yet.
///
/// # Safety
/// `pager` must be valid, the path a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fmalloc_region_open_file(
    pager: *const Pager,
    path: *const c_char,
    offset: u64,
    length: u64,
    mode: u32,
) -> *mut Region {
    let open = || {
        // SAFETY: the caller's.
        let (pager, path) = unsafe { (get(pager)?, self::path(path)?) };
        let path = path.ok_or_else(|| Failure::invalid("no path was given"))?;
        system::open(pager, &path, offset, length, mode)
    };
    pointer(open())
}

#[cfg(unix)]
mod system {
    use std::fs::OpenOptions;
    use std::io;
    use std::path::Path;

    use fmalloc_client::mmap::{MmapOptions, MmapRaw, default_pager};
    use fmalloc_client::{ConnectOptions, Error, Pager as ClientPager, PrivateOptions};
    use fmalloc_proto::num::to_usize;

    use super::{FMALLOC_FILE_COPY, FMALLOC_FILE_READ, FMALLOC_FILE_SHARED};
    use crate::failure::Failure;
    use crate::regions::{Pager, Region};

    pub(super) fn pager(budget: u64) -> Result<ClientPager, Failure> {
        if budget == 0 {
            return Ok(default_pager()?);
        }
        let options = ConnectOptions { budget: Some(budget), ..ConnectOptions::default() };
        match ClientPager::connect_with(&options) {
            Err(Error::NoDaemon { .. }) => Ok(ClientPager::private(&PrivateOptions::new(budget))?),
            other => Ok(other?),
        }
    }

    pub(super) fn open(
        pager: &Pager,
        path: &Path,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> Result<*mut Region, Failure> {
        let failed = |error: io::Error| Failure::from(error).about(path);
        let mut options = MmapOptions::new();
        options.pager(pager.get()).offset(offset);
        if length > 0 {
            options.len(to_usize(length));
        }
        let open = |write: bool| OpenOptions::new().read(true).write(write).open(path).map_err(failed);
        let map = match mode {
            FMALLOC_FILE_READ => options.map_raw_read_only(&open(false)?),
            FMALLOC_FILE_SHARED => options.map_raw(&open(true)?),
            // SAFETY: nobody gets a reference into it, only its address.
            FMALLOC_FILE_COPY => unsafe { options.map_copy(&open(false)?) }.map(MmapRaw::from),
            other => return Err(Failure::invalid(format!("{other} is no way to map a file; see fmalloc.h"))),
        };
        let map = map.map_err(failed)?;
        if map.is_empty() {
            return Err(Failure::invalid("there is nothing in it to map").about(path));
        }
        Ok(Region::of_file(map, mode == FMALLOC_FILE_SHARED))
    }
}

#[cfg(windows)]
mod system {
    use std::path::Path;

    use fmalloc_client::Pager as ClientPager;

    use crate::failure::Failure;
    use crate::regions::{Pager, Region};

    fn missing() -> Failure {
        Failure::new(libc::ENOSYS, "regions over files are not there on Windows yet")
    }

    pub(super) fn pager(_: u64) -> Result<ClientPager, Failure> {
        Err(missing())
    }

    pub(super) fn open(_: &Pager, _: &Path, _: u64, _: u64, _: u32) -> Result<*mut Region, Failure> {
        Err(missing())
    }
}
