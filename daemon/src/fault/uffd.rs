//! A client's userfaultfd in the daemon's hands: handshake, registration, reading messages, mapping pages. The only
//! file that knows the kernel's structures for it, and what each errno means.
//!
//! The client has the same file open and may do to it whatever it likes; nothing here may block on that or believe it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use fmalloc_proto::PAGE;
use fmalloc_proto::num::to_usize;
use nix::errno::Errno;
use userfaultfd::{FeatureFlags, RegisterMode, Uffd};

use crate::pager::Stop;

const POISON_FEATURE: u64 = 1 << 14;
/// In a fault message: the page is there, and protected against writes.
const FAULT_PROTECTED: u64 = 2;
const COPY_PROTECTED: u64 = 2;
const MESSAGE: usize = 32;
/// Kind of message: a child was forked.
const FORK: u8 = 0x13;
/// Most messages taken by one call.
pub const BATCH: usize = 64;

/// An address that is never part of a mapping that we know: for calls that shall only show whether they could be made.
const NOWHERE: u64 = 0x1_0000;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct Fill {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct Protect {
    start: u64,
    len: u64,
    mode: u64,
}

mod raw {
    use super::{Api, Copy, Fill, Protect};

    nix::ioctl_readwrite!(
        /// UFFDIO_API: the handshake.
        uffdio_api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(
        /// UFFDIO_COPY: maps copies of pages.
        uffdio_copy, 0xaa, 0x03, Copy);
    nix::ioctl_readwrite!(
        /// UFFDIO_ZEROPAGE: maps the zero page.
        uffdio_zeropage, 0xaa, 0x04, Fill);
    nix::ioctl_readwrite!(
        /// UFFDIO_WRITEPROTECT: lets writes wait, or go on.
        uffdio_writeprotect, 0xaa, 0x06, Protect);
    nix::ioctl_readwrite!(
        /// UFFDIO_CONTINUE: maps what is there already, in memory of other kinds than ours.
        uffdio_continue, 0xaa, 0x07, Fill);
    nix::ioctl_readwrite!(
        /// UFFDIO_POISON: makes accesses fail.
        uffdio_poison, 0xaa, 0x08, Fill);
}

/// What the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// A thread waits for the page at this address.
    Fault {
        /// Where.
        addr: u64,
        /// Which thread, in the client's pid namespace.
        thread: u32,
        /// It is there, but protected against writes.
        protected: bool,
    },
    /// Discard is about to happen.
    Remove {
        /// Start address.
        start: u64,
        /// End address.
        end: u64,
    },
    /// Was unmapped.
    Unmap {
        /// Start address.
        start: u64,
        /// End address.
        end: u64,
    },
    /// Was moved.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes.
        len: u64,
    },
    /// A child was forked: see [`ClientUffd::next_forked`].
    Fork,
    /// Something that was not asked for.
    Other(u8),
}

/// A client's userfaultfd.
#[derive(Debug)]
pub struct ClientUffd {
    uffd: Uffd,
    info: File,
    no_wait: bool,
    /// The kernel can poison pages.
    pub poison: bool,
    /// The agent evicts by write-protection.
    write_protect: bool,
    /// Userfaultfds of children, for messages that were read.
    forked: VecDeque<OwnedFd>,
    lacks_descriptors: bool,
}

impl ClientUffd {
    /// Does the API handshake. Fails where it was done before: nobody else may have a say in what is reported. `forks`:
    /// children shall have the memory too, which takes CAP_SYS_PTRACE.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn handshake(fd: OwnedFd, poison: bool, write_protect: bool, forks: bool) -> Result<Self, Errno> {
        let mut wanted = FeatureFlags::EVENT_REMOVE
            | FeatureFlags::EVENT_UNMAP
            | FeatureFlags::EVENT_REMAP
            | FeatureFlags::THREAD_ID;
        wanted.set(FeatureFlags::PAGEFAULT_FLAG_WP, write_protect);
        wanted.set(FeatureFlags::EVENT_FORK, forks);
        let attempt = |features| {
            let mut api = Api { api: 0xaa, features, ioctls: 0 };
            // SAFETY: the structure is the kernel's, and the fd is ours.
            unsafe { raw::uffdio_api(fd.as_raw_fd(), &raw mut api) }
        };
        let poison = poison && attempt(wanted.bits() | POISON_FEATURE).is_ok();
        if !poison {
            attempt(wanted.bits())?;
        }
        Self::of(fd, poison, write_protect)
    }

    /// The userfaultfd of a forked child, which is like its parent's.
    ///
    /// # Errors
    /// What the system refused.
    pub fn inherited(fd: OwnedFd, poison: bool) -> Result<Self, Errno> {
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        Self::of(fd, poison, false)
    }

    fn of(fd: OwnedFd, poison: bool, write_protect: bool) -> Result<Self, Errno> {
        let raw = fd.into_raw_fd();
        // SAFETY: the descriptor was ours and is handed over.
        let uffd = unsafe { Uffd::from_raw_fd(raw) };
        set_nonblocking(raw);
        let info = File::open(format!("/proc/self/fdinfo/{raw}"))
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
        Ok(Self {
            uffd,
            info,
            no_wait: true,
            poison,
            write_protect,
            forked: VecDeque::new(),
            lacks_descriptors: false,
        })
    }

    /// The userfaultfd of the next child, one for each [`Message::Fork`].
    pub fn next_forked(&mut self) -> Option<OwnedFd> {
        self.forked.pop_front()
    }

    /// Another descriptor of the same userfaultfd, for the client to hold.
    ///
    /// # Errors
    /// What the system refused.
    pub fn share(&self) -> Result<OwnedFd, Errno> {
        // SAFETY: it is open for as long as `self` lives.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.raw()) };
        fd.try_clone_to_owned().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)))
    }

    /// Whether a page belongs to the userfaultfd: what is asked for never happens to memory of our kind, but the kernel
    /// looks for the mapping first.
    #[must_use]
    pub fn covers(&self, addr: u64) -> bool {
        let mut fill = Fill { start: addr, len: PAGE, mode: 0, done: 0 };
        // SAFETY: the structure is the kernel's; nothing happens to the client's memory.
        let result = unsafe { raw::uffdio_continue(self.raw(), &raw mut fill) };
        result != Err(Errno::ENOENT)
    }

    /// For polling.
    #[must_use]
    pub fn raw(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }

    /// Puts a range under our faults. May block on the client's memory.
    ///
    /// # Errors
    /// What the kernel refused.
    pub fn register(&self, addr: u64, len: u64) -> Result<(), userfaultfd::Error> {
        let mut mode = RegisterMode::MISSING;
        mode.set(RegisterMode::WRITE_PROTECT, self.write_protect);
        self.uffd.register_with_mode(pointer(addr), to_usize(len), mode).map(|_| ())
    }

    /// Takes a range out again and wakes all who wait there. What is no longer mapped does not matter.
    pub fn unregister(&self, addr: u64, len: u64) {
        let _ = self.uffd.unregister(pointer(addr), to_usize(len));
    }

    /// Lets threads that wait for these pages try again.
    pub fn wake(&self, addr: u64, pages: u64) {
        let _ = self.uffd.wake(pointer(addr), to_usize(pages * PAGE));
    }

    /// Maps copies of `pages` pages from `src`, and wakes who waits for them. Gives how many it mapped, and what stopped
    /// it from mapping all.
    pub fn copy(&self, addr: u64, src: *const u8, pages: u64) -> (u64, Option<Stop>) {
        let mut mapped = 0;
        while mapped < pages {
            let (dst, src) = (addr + mapped * PAGE, src as u64 + mapped * PAGE);
            let mut copy = Copy { dst, src, len: (pages - mapped) * PAGE, mode: 0, done: 0 };
            // SAFETY: the structure is the kernel's; `src` has `pages` readable pages, as callers promise by their
            // buffers; the kernel checks the address in the client.
            let result = unsafe { raw::uffdio_copy(self.raw(), &raw mut copy) };
            match outcome(result, copy.done, pages - mapped) {
                (done, None) => mapped += done,
                (done, stop) => return (mapped + done, self.explained(stop)),
            }
        }
        (mapped, None)
    }

    /// Maps a page of zeros for the agent, in such a way that others read it and wait with writes.
    pub fn assist(&self, addr: u64, zeros: *const u8) -> Option<Stop> {
        let mode = if self.write_protect { COPY_PROTECTED } else { 0 };
        let mut copy = Copy { dst: addr, src: zeros as u64, len: PAGE, mode, done: 0 };
        // SAFETY: as in `copy`.
        let result = unsafe { raw::uffdio_copy(self.raw(), &raw mut copy) };
        self.explained(outcome(result, copy.done, 1).1)
    }

    /// Lets writes to a page go on, and wakes who waits there.
    pub fn unprotect(&self, addr: u64) -> Option<Stop> {
        let mut request = Protect { start: addr, len: PAGE, mode: 0 };
        // SAFETY: the structure is the kernel's; it checks the address in the client.
        let result = unsafe { raw::uffdio_writeprotect(self.raw(), &raw mut request) };
        self.explained(outcome(result, 0, 1).1)
    }

    /// The kernel looks for the mapping before it looks whether mappings change: a call that mremap or munmap overtakes
    /// finds nothing, and only the unread event tells where the page is now.
    fn explained(&self, stop: Option<Stop>) -> Option<Stop> {
        stop.map(|stop| if stop == Stop::NoRange { self.test().unwrap_or(stop) } else { stop })
    }

    /// Makes every access to the page fail, and wakes who waits for it.
    pub fn poison_page(&self, addr: u64) -> Option<Stop> {
        let mut fill = Fill { start: addr, len: PAGE, mode: 0, done: 0 };
        // SAFETY: the structure is the kernel's; it checks the address in the client.
        let result = unsafe { raw::uffdio_poison(self.raw(), &raw mut fill) };
        self.explained(outcome(result, fill.done, 1).1)
    }

    /// What a call that maps would say now, without mapping anything: none if it could.
    #[must_use]
    pub fn test(&self) -> Option<Stop> {
        test(self.raw())
    }

    /// Reads up to `most` messages, faults before events. Empty if there are none. Never blocks: on kernels without
    /// RWF_NOWAIT for this file, only if the client clears O_NONBLOCK, and then only this thread.
    pub fn read(&mut self, buffer: &mut Vec<Message>, most: usize) {
        buffer.clear();
        let mut bytes = [0_u8; MESSAGE * BATCH];
        let len = MESSAGE * most.clamp(1, BATCH);
        let got = self.read_bytes(&mut bytes[..len]);
        for bytes in bytes[..got].chunks_exact(MESSAGE) {
            buffer.push(match bytes[0] {
                FORK => self.own_child(bytes),
                _ => parse(bytes),
            });
        }
    }

    /// The kernel has installed a descriptor here; it must not be lost, or the child would read zeros.
    fn own_child(&mut self, message: &[u8]) -> Message {
        let number = u32::from_ne_bytes(message[8..12].try_into().unwrap_or_default());
        let Ok(fd) = RawFd::try_from(number) else { return Message::Other(FORK) };
        // SAFETY: the kernel has made this descriptor for whoever reads the message, which nobody else has.
        self.forked.push_back(unsafe { OwnedFd::from_raw_fd(fd) });
        Message::Fork
    }

    fn read_bytes(&mut self, bytes: &mut [u8]) -> usize {
        self.lacks_descriptors = false;
        if self.no_wait {
            let mut part = [IoSliceMut::new(bytes)];
            // SAFETY: the vector describes a live buffer.
            let got = unsafe { libc::preadv2(self.raw(), part.as_mut_ptr().cast(), 1, -1, libc::RWF_NOWAIT) };
            match usize::try_from(got) {
                Ok(got) => return got,
                Err(_) if Errno::last() == Errno::EOPNOTSUPP => self.no_wait = false,
                Err(_) => {
                    self.lacks_descriptors = matches!(Errno::last(), Errno::EMFILE | Errno::ENFILE);
                    return 0;
                }
            }
        }
        nix::unistd::read(&self.uffd, bytes).unwrap_or_else(|errno| {
            self.lacks_descriptors = matches!(errno, Errno::EMFILE | Errno::ENFILE);
            0
        })
    }

    /// Whether the last reading failed because this process has too many descriptors: the event of a fork stays unread.
    #[must_use]
    pub fn lacks_descriptors(&self) -> bool {
        self.lacks_descriptors
    }

    /// Whether anything waits to be read, faults or events.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        let mut fds = [libc::pollfd { fd: self.raw(), events: libc::POLLIN, revents: 0 }];
        // SAFETY: one entry, no waiting.
        unsafe { libc::poll(fds.as_mut_ptr(), 1, 0) > 0 }
    }

    /// Faults that wait to be read. While there are any, reading gives faults and not events.
    #[must_use]
    pub fn pending_faults(&self) -> usize {
        let mut text = [0_u8; 512];
        let got = self.info.read_at(&mut text, 0).unwrap_or(0);
        let text = std::str::from_utf8(&text[..got]).unwrap_or_default();
        text.lines()
            .find_map(|line| line.strip_prefix("pending:"))
            .and_then(|number| number.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Puts O_NONBLOCK back, which the client shares and may have cleared: without it the file cannot be polled.
    pub fn restore_nonblocking(&self) {
        set_nonblocking(self.raw());
    }
}

fn set_nonblocking(fd: RawFd) {
    // SAFETY: plain fcntl calls on an open descriptor.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags >= 0 && flags & libc::O_NONBLOCK == 0 {
            libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
        }
    }
}

/// The client's address as the pointer that the crate's calls want; never followed here.
fn pointer(addr: u64) -> *mut std::ffi::c_void {
    std::ptr::without_provenance_mut(to_usize(addr))
}

/// Decodes a mapping call: the result field holds bytes done or a negative errno. A partial success hides the reason for
/// the stop; the next call will tell.
fn outcome(result: Result<i32, Errno>, field: i64, pages: u64) -> (u64, Option<Stop>) {
    let Err(errno) = result else { return (pages, None) };
    let done = u64::try_from(field).unwrap_or(0) / PAGE;
    if done > 0 {
        return (done, None);
    }
    let stop = match errno {
        Errno::EEXIST => Stop::Exists,
        Errno::ENOENT | Errno::EINVAL | Errno::EFAULT => Stop::NoRange,
        Errno::ENOMEM => Stop::NoMemory,
        Errno::ESRCH => Stop::Gone,
        _ => Stop::Again,
    };
    (0, Some(stop))
}

fn parse(bytes: &[u8]) -> Message {
    let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
    match bytes[0] {
        0x12 => Message::Fault {
            addr: word(16),
            thread: u32::try_from(word(24) & 0xffff_ffff).unwrap_or(0),
            protected: word(8) & FAULT_PROTECTED != 0,
        },
        0x14 => Message::Remap { from: word(8), to: word(16), len: word(24) },
        0x15 => Message::Remove { start: word(8), end: word(16) },
        0x16 => Message::Unmap { start: word(8), end: word(16) },
        other => Message::Other(other),
    }
}

fn test(uffd: RawFd) -> Option<Stop> {
    let mut fill = Fill { start: NOWHERE, len: PAGE, mode: 0, done: 0 };
    // SAFETY: the structure is the kernel's; nothing of ours is at this address in the client, so nothing happens.
    match unsafe { raw::uffdio_zeropage(uffd, &raw mut fill) } {
        Err(Errno::EAGAIN) => Some(Stop::Again),
        Err(Errno::ESRCH) => Some(Stop::Gone),
        _ => None,
    }
}

/// Whether the address space behind a userfaultfd is gone.
#[must_use]
pub fn is_gone(uffd: &OwnedFd) -> bool {
    test(uffd.as_raw_fd()) == Some(Stop::Gone)
}

/// Whether a descriptor that a peer sent is a userfaultfd at all.
#[must_use]
pub fn is_userfaultfd(fd: &OwnedFd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
}
