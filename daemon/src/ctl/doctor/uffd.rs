//! Userfaultfds of this process, for trials on memory of its own. The only file of the examination that knows the
//! kernel's structures.
//!
//! A trial that fails never hangs: whoever waits for a page is woken when the range is unregistered or the userfaultfd
//! closed, and then reads zeros, which the trial notices.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::time::Duration;

use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_proto::{PAGE, PAGE_SIZE};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

const API: u64 = 0xAA;
const REGISTER_MODE_MISSING: u64 = 1;
const USER_MODE_ONLY: i32 = 1;
const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
const EVENT_PAGEFAULT: u8 = 0x12;

#[allow(missing_docs, unreachable_pub, reason = "nix's macros make public functions; the module is private")]
mod raw {
    #[repr(C)]
    pub struct Handshake {
        pub api: u64,
        pub features: u64,
        pub ioctls: u64,
    }

    #[repr(C)]
    pub struct Range {
        pub start: u64,
        pub len: u64,
    }

    #[repr(C)]
    pub struct Register {
        pub start: u64,
        pub len: u64,
        pub mode: u64,
        pub ioctls: u64,
    }

    /// Shared by UFFDIO_COPY and UFFDIO_MOVE.
    #[repr(C)]
    pub struct Transfer {
        pub dst: u64,
        pub src: u64,
        pub len: u64,
        pub mode: u64,
        pub done: i64,
    }

    #[repr(C)]
    pub struct Fill {
        pub start: u64,
        pub len: u64,
        pub mode: u64,
        pub done: i64,
    }

    nix::ioctl_readwrite!(handshake, 0xAA, 0x3F, Handshake);
    nix::ioctl_readwrite!(register, 0xAA, 0x00, Register);
    nix::ioctl_read!(unregister, 0xAA, 0x01, Range);
    nix::ioctl_readwrite!(copy, 0xAA, 0x03, Transfer);
    nix::ioctl_readwrite!(move_pages, 0xAA, 0x05, Transfer);
    nix::ioctl_readwrite!(poison, 0xAA, 0x08, Fill);
    nix::ioctl_write_int_bad!(new_from_device, nix::request_code_none!(0xAA, 0x00));
}

/// The ways in which this process can have a userfaultfd.
#[derive(Debug)]
pub(super) struct Access {
    /// `/dev/userfaultfd` as the service passed it.
    pub(super) passed: Option<OwnedFd>,
    /// `/dev/userfaultfd` as this user opens it.
    pub(super) device: Result<File, Errno>,
    /// The system call, faults of the kernel included.
    pub(super) call: Result<(), Errno>,
    /// The system call, faults of programs only. The kernel allows that to everybody.
    pub(super) user_mode: Result<(), Errno>,
}

impl Access {
    pub(super) fn new(passed: Option<OwnedFd>) -> Self {
        let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
        Self {
            passed,
            device: device.map_err(|error| errno(&error)),
            call: from_call(FLAGS).map(drop),
            user_mode: from_call(FLAGS | USER_MODE_ONLY).map(drop),
        }
    }

    /// Whether this user's own programs can have a full one without the service.
    pub(super) fn own(&self) -> bool {
        self.device.is_ok() || self.call.is_ok()
    }

    /// Whether a full one can be had in some way.
    pub(super) fn full(&self) -> bool {
        self.passed.is_some() || self.own()
    }

    /// The best that can be had; says by its error why none can.
    pub(super) fn make(&self) -> Result<Uffd, Errno> {
        match (&self.passed, &self.device) {
            (Some(device), _) => from_device(device.as_raw_fd()),
            (None, Ok(device)) => from_device(device.as_raw_fd()),
            (None, Err(_)) if self.call.is_ok() => from_call(FLAGS),
            (None, Err(_)) => from_call(FLAGS | USER_MODE_ONLY),
        }
    }
}

/// A userfaultfd.
#[derive(Debug)]
pub(super) struct Uffd(OwnedFd);

impl Uffd {
    /// The API handshake, which can be done once; gives all features that the kernel has.
    pub(super) fn handshake(&self, features: u64) -> Result<u64, Errno> {
        let mut request = raw::Handshake { api: API, features, ioctls: 0 };
        // SAFETY: the structure has the kernel's layout and outlives the call.
        unsafe { raw::handshake(self.raw(), &raw mut request) }?;
        Ok(request.features)
    }

    pub(super) fn register(&self, area: &Area) -> Result<(), Errno> {
        let mut request =
            raw::Register { start: area.addr(0), len: area.len(), mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: as above; it changes how faults of the area are served.
        unsafe { raw::register(self.raw(), &raw mut request) }.map(drop)
    }

    /// Wakes who waits there.
    pub(super) fn unregister(&self, area: &Area) {
        let mut range = raw::Range { start: area.addr(0), len: area.len() };
        // SAFETY: as above.
        let _ = unsafe { raw::unregister(self.raw(), &raw mut range) };
    }

    /// Fills a missing page and wakes who waits for it.
    pub(super) fn copy(&self, dst: u64, page: &[u8; PAGE_SIZE]) -> Result<(), Errno> {
        let src = to_u64(page.as_ptr().expose_provenance());
        let mut request = raw::Transfer { dst, src, len: PAGE, mode: 0, done: 0 };
        // SAFETY: as above; only a missing page of a registered range is filled.
        unsafe { raw::copy(self.raw(), &raw mut request) }.map(drop)
    }

    /// Moves all pages of one area into another.
    pub(super) fn move_pages(&self, to: &Area, from: &Area) -> Result<(), Errno> {
        let mut request =
            raw::Transfer { dst: to.addr(0), src: from.addr(0), len: from.len(), mode: 0, done: 0 };
        // SAFETY: as above; both areas belong to the trial, which holds no reference into them.
        unsafe { raw::move_pages(self.raw(), &raw mut request) }.map(drop)
    }

    /// Makes any access to the first page fail.
    pub(super) fn poison(&self, area: &Area) -> Result<(), Errno> {
        let mut request = raw::Fill { start: area.addr(0), len: PAGE, mode: 0, done: 0 };
        // SAFETY: as above.
        unsafe { raw::poison(self.raw(), &raw mut request) }.map(drop)
    }

    /// The address of the next fault, if one comes in time.
    pub(super) fn next_fault(&self, patience: Duration) -> Option<u64> {
        let patience = u16::try_from(patience.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut fds, patience), Ok(1)) {
            return None;
        }
        let mut message = [0_u8; 32];
        match nix::unistd::read(&self.0, &mut message) {
            Ok(32) if message[0] == EVENT_PAGEFAULT => {
                Some(u64::from_ne_bytes(message[16..24].try_into().ok()?))
            }
            _ => None,
        }
    }

    /// Whether it can be read without ever blocking, whatever its flags.
    pub(super) fn reads_without_waiting(&self) -> bool {
        let mut message = [0_u8; 32];
        let mut part = libc::iovec { iov_base: message.as_mut_ptr().cast(), iov_len: message.len() };
        // SAFETY: the vector describes a live buffer.
        let got = unsafe { libc::preadv2(self.raw(), &raw mut part, 1, -1, libc::RWF_NOWAIT) };
        got >= 0 || Errno::last() == Errno::EAGAIN
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn from_device(device: RawFd) -> Result<Uffd, Errno> {
    // SAFETY: the request takes flags by value.
    let fd = unsafe { raw::new_from_device(device, FLAGS) }?;
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

/// The error number of an I/O error.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Some pages of private anonymous memory that nothing refers to but a trial.
#[derive(Debug)]
pub(super) struct Area {
    base: NonNull<u8>,
    pages: usize,
}

// SAFETY: the area is plain memory of the process; every access to it is by volatile or system call.
unsafe impl Sync for Area {}

impl Area {
    pub(super) fn new(pages: usize) -> Result<Self, Errno> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let (access, len) = (libc::PROT_READ | libc::PROT_WRITE, pages * PAGE_SIZE);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        // SAFETY: the mapping is ours and empty; the advice only keeps its pages small.
        unsafe { libc::madvise(base, len, libc::MADV_NOHUGEPAGE) };
        NonNull::new(base.cast()).map(|base| Self { base, pages }).ok_or(Errno::ENOMEM)
    }

    pub(super) fn len(&self) -> u64 {
        to_u64(self.pages) * PAGE
    }

    /// Address of a page.
    pub(super) fn addr(&self, page: usize) -> u64 {
        to_u64(self.base.as_ptr().expose_provenance()) + to_u64(page) * PAGE
    }

    /// The first byte of a page; may fault and wait.
    pub(super) fn read(&self, page: usize) -> u8 {
        // SAFETY: the page is within the mapping, which lives as long as `self`.
        unsafe { self.at(page).read_volatile() }
    }

    /// Writes the first byte of a page.
    pub(super) fn write(&self, page: usize, value: u8) {
        // SAFETY: the page is within the mapping, which lives as long as `self`.
        unsafe { self.at(page).write_volatile(value) }
    }

    /// Has the kernel read a page: `write(2)` of all of it.
    pub(super) fn write_to(&self, page: usize, fd: &OwnedFd) -> Result<usize, Errno> {
        // SAFETY: the page is within the mapping; the kernel checks whether it can be read.
        let wrote = unsafe { libc::write(fd.as_raw_fd(), self.at(page).cast(), PAGE_SIZE) };
        Errno::result(wrote).map(|wrote| usize::try_from(wrote).unwrap_or(0))
    }

    /// How many pages are in RAM.
    pub(super) fn resident(&self) -> Result<usize, Errno> {
        let mut flags = vec![0_u8; self.pages];
        // SAFETY: the range is ours, and there is a byte for each page.
        let outcome =
            unsafe { libc::mincore(self.base.as_ptr().cast(), to_usize(self.len()), flags.as_mut_ptr()) };
        Errno::result(outcome)?;
        Ok(flags.iter().filter(|flag| **flag & 1 == 1).count())
    }

    fn at(&self, page: usize) -> *mut u8 {
        debug_assert!(page < self.pages);
        self.base.as_ptr().wrapping_add(page * PAGE_SIZE)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it was ever made.
        unsafe { libc::munmap(self.base.as_ptr().cast(), to_usize(self.len())) };
    }
}
