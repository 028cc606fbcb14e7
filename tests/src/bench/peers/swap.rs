//! The swap file: made once, and used in turn by the raw disk's floors, by fmalloc and by the kernel, so that all have
//! the same blocks of the same disk.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use fmalloc_proto::PAGE;
use fmalloc_proto::size::Size;
use nix::errno::Errno;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use crate::bench::undo::{Change, Step, Undo};
use crate::rng::Rng;

/// Before any other swap of the machine.
const FLAGS: i32 = 0x8000 | 0x7fff;
const CHUNK: usize = 1 << 20;

/// A file full of bytes, every block of it written.
#[derive(Debug)]
pub(crate) struct SwapFile {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// How large it is.
    pub(crate) bytes: u64,
    _change: Change,
}

#[repr(C, align(4096))]
struct Aligned([u8; CHUNK]);

impl SwapFile {
    /// Makes it. Random bytes: a disk may treat zeros better than data.
    ///
    /// # Errors
    /// A directory that is in RAM, a disk that is full.
    pub(crate) fn make(undo: &Undo, dir: &Path, bytes: u64) -> Result<Self> {
        let path = dir.join(format!("fmalloc-bench-{}.swap", std::process::id()));
        let bytes = bytes.next_multiple_of(CHUNK as u64);
        let fill = || {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            if fstatfs(&file)?.filesystem_type() == TMPFS_MAGIC {
                bail!("{} is in RAM (tmpfs); name a directory on a disk with --dir", dir.display());
            }
            write_all(&path, bytes).with_context(|| {
                format!("writing the swap file, {}; --size sets how much is needed", Size(bytes))
            })
        };
        let ((), change) = undo.change(Step::RemoveFile(path.clone()), fill)?;
        Ok(Self { path, bytes, _change: change })
    }

    /// Has the kernel swap to it, for as long as the value lives.
    ///
    /// # Errors
    /// What the kernel says; some file systems take no swap files.
    pub(crate) fn on(&self, undo: &Undo) -> Result<Change> {
        on(undo, &self.path, self.bytes)
    }
}

fn write_all(path: &Path, bytes: u64) -> Result<()> {
    let open = |flags| OpenOptions::new().write(true).custom_flags(flags).open(path);
    let file = open(libc::O_DIRECT).or_else(|_| open(0))?;
    let mut rng = Rng::new(1);
    let mut chunk = Box::new(Aligned([0; CHUNK]));
    for at in (0..bytes).step_by(CHUNK) {
        chunk.0.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&rng.word().to_ne_bytes()));
        file.write_all_at(&chunk.0, at)?;
    }
    Ok(file.sync_all()?)
}

/// Makes a file or device a swap area and has the kernel use it, for as long as the value lives.
///
/// # Errors
/// What the kernel says.
pub(crate) fn on(undo: &Undo, path: &Path, bytes: u64) -> Result<Change> {
    write_header(path, bytes).with_context(|| format!("making {} a swap area", path.display()))?;
    let name = CString::new(path.as_os_str().as_bytes())?;
    let start = || {
        // SAFETY: the name is a string that ends with zero.
        Errno::result(unsafe { libc::swapon(name.as_ptr(), FLAGS) })
            .map(drop)
            .with_context(|| format!("the kernel does not swap to {}", path.display()))
    };
    undo.change(Step::SwapOff(path.to_owned()), start).map(|((), change)| change)
}

/// Has the kernel stop; reads back what processes that live still have there.
///
/// # Errors
/// What the kernel says.
pub(crate) fn off(path: &Path) -> Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: as above.
    match Errno::result(unsafe { libc::swapoff(name.as_ptr()) }) {
        // It is not in use: the change was not made, or made and undone.
        Err(Errno::EINVAL | Errno::ENOENT) | Ok(_) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// What mkswap writes: version 1, the last page, and the signature at the end of the first page.
fn write_header(path: &Path, bytes: u64) -> Result<()> {
    const START: usize = 1024;
    const SIGNATURE: &[u8] = b"SWAPSPACE2";
    let page = usize::try_from(PAGE)?;
    let last = u32::try_from(bytes / PAGE - 1).context("more than 16 TiB of swap")?;
    let mut header = vec![0; page];
    header[START..START + 4].copy_from_slice(&1_u32.to_ne_bytes());
    header[START + 4..START + 8].copy_from_slice(&last.to_ne_bytes());
    header[page - SIGNATURE.len()..].copy_from_slice(SIGNATURE);
    let mut file: File = OpenOptions::new().write(true).open(path)?;
    file.write_all(&header)?;
    Ok(file.sync_all()?)
}
