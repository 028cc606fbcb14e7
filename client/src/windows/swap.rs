//! The swap file: made with all its space, open to nobody else, gone when it is closed unless it is to be kept.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use fmalloc_proto::size::Size;
use windows_sys::Win32::Foundation::{
    ERROR_ALREADY_EXISTS, ERROR_DISK_FULL, ERROR_FILE_EXISTS, ERROR_SHARING_VIOLATION,
};

use super::space::{GRANULE, Space};
use super::sys::{Code, File, Mode, Section, disk_free};
use crate::error::Error;

/// The file begins with this and is used from [`GRANULE`] on: nothing else is ever taken for a swap file.
const MAGIC: &[u8; 32] = b"fmalloc swap file, version 1\r\n\x1a\0";

/// An open swap file.
#[derive(Debug)]
pub(super) struct Swap {
    // The section goes first: a file with a section cannot be deleted.
    pub(super) section: Section,
    pub(super) file: File,
}

/// Makes or opens a swap file with room for `size` bytes.
///
/// # Errors
/// [`Error::SwapFull`] if the disk has not that much room, [`Error::Invalid`] if there is another file of that name,
/// or a failure of the system.
pub(super) fn open(path: Option<&Path>, size: u64, keep: bool) -> Result<(Swap, Space), Error> {
    let path = match path {
        Some(path) => path.to_owned(),
        None if keep => return Err(Error::invalid("a swap file that is kept needs a path")),
        None => unnamed_in(&std::env::temp_dir()),
    };
    let total = size.checked_next_multiple_of(GRANULE).and_then(|size| size.checked_add(GRANULE));
    let total =
        total.filter(|_| size > 0).ok_or_else(|| Error::invalid(format!("a swap file of {size} bytes")))?;
    let (file, old) = file(&path, keep)?;
    let ready = prepare(&path, &file, old, total);
    if ready.is_err() && keep && old == 0 {
        drop(file);
        let _ = std::fs::remove_file(&path);
        return Err(ready.err().unwrap_or_else(|| Error::invalid("swap file")));
    }
    ready?;
    let section = file.section().map_err(|code| failed("mapping the swap file", &path, code))?;
    Ok((Swap { section, file }, Space::new(GRANULE..total, old)))
}

/// A file that is ours alone, and how long it is already.
fn file(path: &Path, keep: bool) -> Result<(File, u64), Error> {
    let new = || File::open(path, Mode::New { temporary: !keep });
    match new() {
        Ok(file) => return Ok((file, 0)),
        Err(ERROR_FILE_EXISTS | ERROR_ALREADY_EXISTS) => {}
        Err(code) => return Err(failed("creating the swap file", path, code)),
    }
    // Opened without being deleted when it is closed: it may be anything.
    let file = File::open(path, Mode::Existing).map_err(|code| match code {
        ERROR_SHARING_VIOLATION => Error::invalid(format!(
            "{} is in use by another program; choose another swap file",
            path.display()
        )),
        code => failed("opening the swap file", path, code),
    })?;
    let mut start = [0; MAGIC.len()];
    let len = file.len().and_then(|len| file.read_start(&mut start).map(|_| len));
    let len = len.map_err(|code| failed("reading the swap file", path, code))?;
    if start != *MAGIC {
        return Err(Error::invalid(format!(
            "{} exists and is not a swap file of fmalloc; it is left alone, choose another name",
            path.display()
        )));
    }
    if keep {
        return Ok((file, len));
    }
    // Left by a program that died with the system.
    drop(file);
    std::fs::remove_file(path).map_err(|error| failed("deleting an old swap file", path, code_of(&error)))?;
    new().map(|file| (file, 0)).map_err(|code| failed("creating the swap file", path, code))
}

fn prepare(path: &Path, file: &File, old: u64, total: u64) -> Result<(), Error> {
    let full = |free: u64| Error::SwapFull {
        text: format!(
            "{} needs {}, its disk has {} free; choose a smaller size or another disk",
            path.display(),
            Size(total - old.min(total)),
            Size(free)
        ),
    };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let free = disk_free(directory).map_err(|code| failed("asking for free space", directory, code))?;
    if total > old && free < total - old {
        return Err(full(free));
    }
    match file.set_len(total).and_then(|()| file.write_at(0, MAGIC)) {
        Ok(()) => Ok(()),
        Err(ERROR_DISK_FULL) => Err(full(free)),
        Err(code) => Err(failed("making room in the swap file", path, code)),
    }
}

/// A name in a directory that no other pager uses.
pub(super) fn unnamed_in(directory: &Path) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    directory.join(format!("fmalloc-{}-{number}.swap", std::process::id()))
}

fn failed(what: &str, path: &Path, code: Code) -> Error {
    Error::system(&format!("{what} {}", path.display()), code)
}

fn code_of(error: &std::io::Error) -> Code {
    error.raw_os_error().and_then(|code| Code::try_from(code).ok()).unwrap_or(0)
}
