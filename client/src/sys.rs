//! Raw system calls that nix does not wrap, userfaultfd's ioctls first of all. The only file of this crate that knows
//! the layout of kernel structures. Errors are errnos; results that the kernel packs into signed fields are decoded.

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use fmalloc_proto::PAGE;
use fmalloc_proto::num::to_usize;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`: the kernel tells of writes to protected pages (Linux 5.7).
pub(crate) const FEATURE_WRITE_PROTECT: u64 = 1;
/// `UFFD_FEATURE_MOVE`: the kernel has UFFDIO_MOVE (Linux 6.8).
pub(crate) const FEATURE_MOVE: u64 = 1 << 16;

const API: u64 = 0xAA;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WRITE_PROTECT: u64 = 2;
const MOVE_MODE_DONTWAKE: u64 = 1;
const USER_MODE_ONLY: i32 = 1;

#[allow(missing_docs, unreachable_pub, reason = "nix's macros make public functions; the module is private")]
mod raw {
    #[repr(C)]
    pub struct Handshake {
        pub api: u64,
        pub features: u64,
        pub ioctls: u64,
    }

    #[repr(C)]
    pub struct Register {
        pub start: u64,
        pub len: u64,
        pub mode: u64,
        pub ioctls: u64,
    }

    /// Shared by UFFDIO_ZEROPAGE and UFFDIO_CONTINUE.
    #[repr(C)]
    pub struct Map {
        pub start: u64,
        pub len: u64,
        pub mode: u64,
        pub mapped: i64,
    }

    #[repr(C)]
    pub struct Move {
        pub dst: u64,
        pub src: u64,
        pub len: u64,
        pub mode: u64,
        pub moved: i64,
    }

    #[repr(C)]
    pub struct Protect {
        pub start: u64,
        pub len: u64,
        pub mode: u64,
    }

    #[repr(C)]
    pub struct Range {
        pub start: u64,
        pub len: u64,
    }

    #[repr(C)]
    pub struct Copy {
        pub dst: u64,
        pub src: u64,
        pub len: u64,
        pub mode: u64,
        pub copied: i64,
    }

    #[cfg(test)]
    nix::ioctl_read!(wake, 0xAA, 0x02, Range);
    nix::ioctl_readwrite!(copy, 0xAA, 0x03, Copy);
    nix::ioctl_readwrite!(handshake, 0xAA, 0x3F, Handshake);
    nix::ioctl_readwrite!(register, 0xAA, 0x00, Register);
    nix::ioctl_read!(unregister, 0xAA, 0x01, Range);
    nix::ioctl_readwrite!(zeropage, 0xAA, 0x04, Map);
    nix::ioctl_readwrite!(move_pages, 0xAA, 0x05, Move);
    nix::ioctl_readwrite!(write_protect, 0xAA, 0x06, Protect);
    nix::ioctl_readwrite!(map_existing, 0xAA, 0x07, Map);
    nix::ioctl_write_int_bad!(new_from_device, nix::request_code_none!(0xAA, 0x00));
}

/// Whether a range belongs to a userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coverage {
    /// All of it, within one mapping.
    Whole,
    /// Not all of it, or it spans mappings.
    No,
    /// An event about changed mappings has not been read yet: ask again.
    Changing,
}

/// A userfaultfd.
#[derive(Debug)]
pub(crate) struct Uffd(OwnedFd);

impl Uffd {
    /// Makes one for this process: from `device` if the daemon passed it, else from the device node, else by the
    /// system call; one that cannot serve system calls only if that is accepted.
    pub(crate) fn create(device: Option<BorrowedFd<'_>>, user_mode_only: bool) -> Result<Self, Errno> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        if let Some(device) = device {
            return from_device(device, flags);
        }
        let own = open("/dev/userfaultfd", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty());
        if let Ok(uffd) = own.and_then(|device| from_device(device.as_fd(), flags)) {
            return Ok(uffd);
        }
        match from_call(flags) {
            Err(Errno::EPERM) if user_mode_only => from_call(flags | USER_MODE_ONLY),
            other => other,
        }
    }

    /// One that the daemon sent.
    pub(crate) fn received(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The API handshake; gives the features that the kernel has.
    pub(crate) fn handshake(&self, features: u64) -> Result<u64, Errno> {
        let mut request = raw::Handshake { api: API, features, ioctls: 0 };
        // SAFETY: the structure has the kernel's layout and outlives the call.
        unsafe { raw::handshake(self.raw(), &raw mut request) }?;
        Ok(request.features)
    }

    /// Registers a mapping for missing pages, and for writes to protected ones if `write_protect` says so.
    pub(crate) fn register(&self, start: u64, len: u64, write_protect: bool) -> Result<(), Errno> {
        let more = if write_protect { REGISTER_MODE_WRITE_PROTECT } else { 0 };
        let mut request = raw::Register { start, len, mode: REGISTER_MODE_MISSING | more, ioctls: 0 };
        // SAFETY: as above; registration changes how faults are served, no memory.
        unsafe { raw::register(self.raw(), &raw mut request) }.map(drop)
    }

    /// Ends the registration of a range, and wakes who waits there.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut request = raw::Range { start, len };
        // SAFETY: as above.
        unsafe { raw::unregister(self.raw(), &raw mut request) }.map(drop)
    }

    /// Lets writes to the present pages of a registered range wait, or lets them go on. ENOENT: not all of it is
    /// registered so, or (before Linux 6.3) it spans mappings. EAGAIN: mappings are changing.
    pub(crate) fn write_protect(&self, start: u64, len: u64, protect: bool) -> Result<(), Errno> {
        let mut request = raw::Protect { start, len, mode: protect.into() };
        // SAFETY: as above; no content changes.
        unsafe { raw::write_protect(self.raw(), &raw mut request) }.map(drop)
    }

    /// Fills a missing page of a registered range with a copy of the one at `src`, and wakes who waits for it.
    ///
    /// # Safety
    /// There must be a readable page at `src`.
    pub(crate) unsafe fn copy(&self, dst: u64, src: u64) -> Result<(), Errno> {
        let mut request = raw::Copy { dst, src, len: PAGE, mode: 0, copied: 0 };
        // SAFETY: the structure has the kernel's layout and outlives the call; the caller answers for the source.
        unsafe { raw::copy(self.raw(), &raw mut request) }.map(drop)
    }

    /// Maps zero pages where nothing is present.
    pub(crate) fn map_zeros(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut request = raw::Map { start, len, mode: 0, mapped: 0 };
        // SAFETY: as above; only missing pages of a registered range are filled.
        unsafe { raw::zeropage(self.raw(), &raw mut request) }.map(drop)
    }

    /// Moves pages out of `src` into `dst`, a range registered with this userfaultfd where nothing is present.
    /// Gives the bytes moved, at least a page; if fewer than `len`, the page after them has an error of its own, which
    /// the next call tells. Page by page this is atomic: a write lands in the page before it moves, or faults after.
    ///
    /// # Safety
    /// `src` must be memory whose faults this process's pager answers with the bytes taken, and `dst` the caller's.
    pub(crate) unsafe fn move_pages(&self, dst: u64, src: u64, len: u64) -> Result<u64, Errno> {
        let mut request = raw::Move { dst, src, len, mode: MOVE_MODE_DONTWAKE, moved: 0 };
        // SAFETY: the structure has the kernel's layout and outlives the call; the caller answers for the ranges.
        let outcome = unsafe { raw::move_pages(self.raw(), &raw mut request) };
        match (outcome, u64::try_from(request.moved)) {
            (Ok(_), _) => Ok(len),
            (Err(_), Ok(moved)) if moved > 0 => Ok(moved),
            (Err(errno), _) => Err(errno),
        }
    }

    /// Whether the range belongs to this userfaultfd, or rather to any: UFFDIO_CONTINUE never does anything to private
    /// anonymous memory, but looks up the mapping first.
    pub(crate) fn coverage(&self, start: u64, len: u64) -> Coverage {
        let mut request = raw::Map { start, len, mode: 0, mapped: 0 };
        // SAFETY: the structure has the kernel's layout and outlives the call.
        match unsafe { raw::map_existing(self.raw(), &raw mut request) } {
            Err(Errno::ENOENT | Errno::ESRCH) => Coverage::No,
            Err(Errno::EAGAIN) => Coverage::Changing,
            _ => Coverage::Whole,
        }
    }

    /// Another descriptor of the same userfaultfd.
    pub(crate) fn try_clone(&self) -> Result<Self, Errno> {
        let copy = self.0.try_clone();
        copy.map(Self).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)))
    }

    /// Fills a missing page and wakes who waits for it, as the daemon does.
    #[cfg(test)]
    pub(crate) fn fill(&self, dst: u64, page: &[u8; fmalloc_proto::PAGE_SIZE]) -> Result<(), Errno> {
        // SAFETY: the page outlives the call.
        unsafe { self.copy(dst, fmalloc_proto::num::to_u64(page.as_ptr().expose_provenance())) }
    }

    /// Wakes who waits for a page.
    #[cfg(test)]
    pub(crate) fn wake(&self, start: u64) -> Result<(), Errno> {
        let mut request = raw::Range { start, len: PAGE };
        // SAFETY: the structure has the kernel's layout and outlives the call.
        unsafe { raw::wake(self.raw(), &raw mut request) }.map(drop)
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn from_device(device: BorrowedFd<'_>, flags: i32) -> Result<Uffd, Errno> {
    // SAFETY: the request takes flags by value.
    let fd = unsafe { raw::new_from_device(device.as_raw_fd(), flags) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(Uffd(unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn from_call(flags: i32) -> Result<Uffd, Errno> {
    // SAFETY: the call takes flags by value.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(Uffd(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Gives the calling thread an empty file descriptor table of its own, without closing anything of other threads.
/// One call does both: `unshare` is refused in many containers, and copying the table first would flush the
/// application's files when the copies are closed.
pub(crate) fn leave_fd_table() -> Result<(), Errno> {
    // SAFETY: takes numbers by value; the calling thread holds no descriptor.
    let outcome =
        unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE) };
    Errno::result(outcome).map(drop)
}

/// A number that cannot be guessed.
pub(crate) fn random() -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    // SAFETY: the buffer is valid for its length; so few bytes come at once or not at all.
    Errno::result(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) })?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Sends SIGURG to one thread of this process.
pub(crate) fn nudge(process: u32, thread: i32) -> Result<(), Errno> {
    // SAFETY: takes numbers by value.
    Errno::result(unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGURG) }).map(drop)
}

/// The calling thread's id.
pub(crate) fn thread_id() -> i32 {
    nix::unistd::gettid().as_raw()
}

/// `poll`; gives false when the time is over. Without a time it waits for ever.
pub(crate) fn poll(fds: &mut [libc::pollfd], time: Option<Duration>) -> Result<bool, Errno> {
    let timeout_ms = time.map_or(-1, |time| i32::try_from(time.as_millis()).unwrap_or(i32::MAX));
    let count = libc::nfds_t::try_from(fds.len()).map_err(|_| Errno::EINVAL)?;
    loop {
        // SAFETY: the slice is valid for its length.
        match Errno::result(unsafe { libc::poll(fds.as_mut_ptr(), count, timeout_ms) }) {
            Err(Errno::EINTR) => {}
            other => return other.map(|ready| ready > 0),
        }
    }
}

/// What `poll` should watch for one descriptor; none is skipped.
pub(crate) fn watch(fd: Option<BorrowedFd<'_>>, events: i16) -> libc::pollfd {
    libc::pollfd { fd: fd.map_or(-1, |fd| fd.as_raw_fd()), events, revents: 0 }
}

/// `madvise` by number.
///
/// # Safety
/// As for `madvise`: no reference may rely on content that the advice drops.
pub(crate) unsafe fn madvise(addr: u64, len: u64, advice: i32) -> Result<(), Errno> {
    // SAFETY: the caller's.
    Errno::result(unsafe { libc::madvise(pointer(addr), to_usize(len), advice) }).map(drop)
}

/// Moves the page table entries of private anonymous memory to `to`, where what was mapped is unmapped first (also if it
/// fails). What is left behind stays mapped, and empty, if `keep` says so. Atomic, but for the events that it raises
/// afterwards and that it waits for: one for the move, and one for what it unmapped, where those belong to a userfaultfd.
///
/// # Safety
/// No reference may rely on either range.
pub(crate) unsafe fn remap(from: u64, len: u64, to: u64, keep: bool) -> Result<(), Errno> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | if keep { libc::MREMAP_DONTUNMAP } else { 0 };
    let len = to_usize(len);
    // SAFETY: the caller's.
    let moved = unsafe { libc::mremap(pointer(from), len, len, flags, pointer(to)) };
    if moved == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
}

/// Maps addresses that nobody can touch; with `replace` in place of whatever is mapped there.
///
/// # Safety
/// With `replace`, the range must be the caller's.
pub(crate) unsafe fn reserve(at: u64, len: u64, replace: bool) -> Result<(), Errno> {
    let place = if replace { libc::MAP_FIXED } else { libc::MAP_FIXED_NOREPLACE };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | place;
    // SAFETY: the caller's.
    let got = unsafe { libc::mmap(pointer(at), to_usize(len), libc::PROT_NONE, flags, -1, 0) };
    if got == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
}

/// An address of this process as a pointer.
pub(crate) fn pointer(addr: u64) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(to_usize(addr))
}

/// Maps private anonymous memory without claiming swap of the kernel's; not part of core dumps, in small pages, and
/// inherited by a forked child only if that is wanted.
pub(crate) fn map_anonymous(len: usize, access: i32, inherit: bool) -> Result<std::ptr::NonNull<u8>, Errno> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    let fork = if inherit { libc::MADV_DOFORK } else { libc::MADV_DONTFORK };
    for advice in [fork, libc::MADV_DONTDUMP, libc::MADV_NOHUGEPAGE] {
        // SAFETY: the mapping is ours, and none of these drops content.
        let outcome = Errno::result(unsafe { libc::madvise(base, len, advice) });
        // A kernel without huge pages does not know the last one.
        if let Err(errno) = outcome
            && advice != libc::MADV_NOHUGEPAGE
        {
            // SAFETY: nobody else knows the mapping yet.
            unsafe { libc::munmap(base, len) };
            return Err(errno);
        }
    }
    std::ptr::NonNull::new(base.cast()).ok_or(Errno::ENOMEM)
}
