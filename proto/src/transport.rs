//! SOCK_SEQPACKET with file descriptors: one packet is one message, its fds travel with it, and a packet that
//! was cut is an error. All calls work on blocking and non-blocking sockets and are thread-safe; waiting for
//! readiness is the caller's.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr,
};
use thiserror::Error;

use crate::limits::{MAX_FDS, MAX_MESSAGE};

/// Most fds that the kernel passes in one packet. There is room for all of them: those of a cut control message would be
/// installed and belong to nobody.
const SCM_MAX_FD: usize = 253;

/// Why no packet went or came.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TransportError {
    /// Nothing to read, or no room to write: wait for readiness.
    #[error("would block")]
    WouldBlock,
    /// The peer has closed the connection.
    #[error("connection closed by the peer")]
    Closed,
    /// The packet or its fds did not fit and were cut by the kernel.
    #[error("packet was truncated: more than {MAX_MESSAGE} bytes or {MAX_FDS} file descriptors")]
    Truncated,
    /// More to send than a packet may hold.
    #[error("packet of {bytes} bytes and {fds} file descriptors is over the limit")]
    TooLarge {
        /// Bytes asked for.
        bytes: usize,
        /// Fds asked for.
        fds: usize,
    },
    /// The system call failed.
    #[error("socket: {0}")]
    System(Errno),
}

impl From<Errno> for TransportError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EAGAIN => Self::WouldBlock,
            Errno::EPIPE | Errno::ECONNRESET => Self::Closed,
            other => Self::System(other),
        }
    }
}

/// Sends one packet.
///
/// # Errors
/// See [`TransportError`]; nothing has been sent then.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), TransportError> {
    if bytes.is_empty() || bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(TransportError::TooLarge { bytes: bytes.len(), fds: fds.len() });
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    loop {
        let flags = MsgFlags::MSG_NOSIGNAL;
        match socket::sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one packet into `buffer`, which should hold [`MAX_MESSAGE`] bytes, and gives its length and fds.
/// The fds are close-on-exec and owned at once: an error closes them.
///
/// # Errors
/// See [`TransportError`].
pub fn recv(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), TransportError> {
    let mut control = nix::cmsg_space!([RawFd; SCM_MAX_FD]);
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = control.capacity();
    let bytes = loop {
        // SAFETY: the header describes live buffers of the lengths it gives.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        match Errno::result(got) {
            Ok(got) => break usize::try_from(got).unwrap_or(0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    // SAFETY: the kernel has just filled the header in.
    let fds = unsafe { take_fds(&header) };
    if fds.len() > MAX_FDS || header.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC) != 0 {
        return Err(TransportError::Truncated);
    }
    if bytes == 0 { Err(TransportError::Closed) } else { Ok((bytes, fds)) }
}

/// Takes every fd that a received packet carries, also where the list was cut for want of free descriptors.
///
/// # Safety
/// The header must be as `recvmsg` left it, and nobody else may have taken its fds.
unsafe fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the macros stay within the control buffer that the kernel filled in; each fd in it is new and ours.
    unsafe {
        let mut control = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = control.as_ref() {
            if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(control).cast::<RawFd>();
                let len = message.cmsg_len.saturating_sub(data as usize - control as usize);
                for place in 0..len / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(place).read_unaligned()));
                }
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    fds
}

/// Connects to the daemon's socket at `path`; the result is blocking and close-on-exec.
///
/// # Errors
/// The errno of the failing call: ENOENT and ECONNREFUSED mean that no daemon listens there.
pub fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    socket::connect(socket.as_raw_fd(), &address(path)?)?;
    Ok(socket)
}

/// Listens at a name that is in no file system, `@` and what follows it, and goes away with the socket.
///
/// # Errors
/// The errno of the failing call: EADDRINUSE if somebody listens there.
pub fn listen_abstract(name: &Path) -> Result<OwnedFd, Errno> {
    let socket = socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(socket.as_raw_fd(), &address(name)?)?;
    socket::listen(&socket, Backlog::MAXALLOWABLE)?;
    Ok(socket)
}

/// A path, or a name in the abstract name space, which is written with an `@` in front as in /proc/net/unix.
fn address(path: &Path) -> Result<UnixAddr, Errno> {
    match path.as_os_str().as_bytes().strip_prefix(b"@") {
        Some(name) => UnixAddr::new_abstract(name),
        None => UnixAddr::new(path),
    }
}

/// A connected pair of close-on-exec sockets, for a private daemon and for tests.
///
/// # Errors
/// The errno of `socketpair`.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}
