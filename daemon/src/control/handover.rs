//! What the daemon makes for a client and hands over when it opens, and the check of what comes back: the ring, the
//! doorbells, `/dev/userfaultfd`, the client's userfaultfd.

use std::fs::{File, OpenOptions, read_link};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use fmalloc_proto::num::to_u64;
use fmalloc_proto::ring::{Layout, Ring};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// The descriptors of one client.
#[derive(Debug)]
pub(crate) struct Handover {
    pub(crate) ring: OwnedFd,
    pub(crate) agent_doorbell: EventFd,
    pub(crate) daemon_doorbell: EventFd,
}

impl Handover {
    /// Makes them.
    pub(crate) fn new(layout: Layout) -> io::Result<Self> {
        let doorbell = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        Ok(Self { ring: make_ring(layout)?, agent_doorbell: doorbell()?, daemon_doorbell: doorbell()? })
    }

    /// The doorbells once more: the agent's, the daemon's.
    pub(crate) fn bells(&self) -> io::Result<(EventFd, EventFd)> {
        let copy = |bell: &EventFd| {
            let fd = bell.as_fd().try_clone_to_owned()?;
            // SAFETY: it is a descriptor of an eventfd, and ours.
            Ok::<_, io::Error>(unsafe { EventFd::from_owned_fd(fd) })
        };
        Ok((copy(&self.agent_doorbell)?, copy(&self.daemon_doorbell)?))
    }

    /// In the order of [`fmalloc_proto::messages::Opened`].
    pub(crate) fn fds<'a>(&'a self, device: Option<&'a File>) -> Vec<BorrowedFd<'a>> {
        let mut fds = vec![self.ring.as_fd(), self.agent_doorbell.as_fd(), self.daemon_doorbell.as_fd()];
        fds.extend(device.map(AsFd::as_fd));
        fds
    }
}

/// An initialised ring whose size nobody can change any more: a client that shrank it would kill the daemon by SIGBUS.
fn make_ring(layout: Layout) -> io::Result<OwnedFd> {
    let file = File::from(memfd_create("fmalloc-ring", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(to_u64(layout.len()))?;
    Ring::map(file.as_fd(), layout)?.initialise();
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// A fresh open of the device, through which its holder makes userfaultfds that serve system calls too, without any
/// privilege of its own.
pub(crate) fn open_device() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")
}

/// Whether what a client sent is a userfaultfd. Ioctls of another kind of file could mean anything.
pub(crate) fn is_userfaultfd(fd: BorrowedFd<'_>) -> bool {
    read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|target| target == Path::new("anon_inode:[userfaultfd]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_keeps_its_size_and_is_valid() {
        let layout = Layout::new(4, 32).unwrap();
        let handover = Handover::new(layout).unwrap();
        let file = File::from(handover.ring.try_clone().unwrap());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 30).is_err());
        assert_eq!(file.metadata().unwrap().len(), to_u64(layout.len()));
        assert!(Ring::map(handover.ring.as_fd(), layout).unwrap().is_valid());
    }

    #[test]
    fn only_a_userfaultfd_is_one() {
        let (pipe, _) = nix::unistd::pipe().unwrap();
        assert!(!is_userfaultfd(pipe.as_fd()));
        let eventfd = EventFd::new().unwrap();
        assert!(!is_userfaultfd(eventfd.as_fd()));
    }
}
