//! SOCK_SEQPACKET with file descriptors: one packet is one message, its fds travel with it, and a packet that
//! was cut is an error. All calls work on blocking and non-blocking sockets and are thread-safe; waiting for
//! readiness is the caller's.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
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
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match socket::recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Ok(message) => break message,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    let mut fds = Vec::new();
    if let Ok(messages) = message.cmsgs() {
        for control in messages {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just installed these descriptors for us; nobody else owns them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
    }
    if fds.len() > MAX_FDS || message.flags.intersects(MsgFlags::MSG_CTRUNC | MsgFlags::MSG_TRUNC) {
        return Err(TransportError::Truncated);
    }
    if message.bytes == 0 {
        return Err(TransportError::Closed);
    }
    Ok((message.bytes, fds))
}

/// Connects to the daemon's socket at `path`; the result is blocking and close-on-exec.
///
/// # Errors
/// The errno of the failing call: ENOENT and ECONNREFUSED mean that no daemon listens there.
pub fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let socket =
        socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// A connected pair of close-on-exec sockets, for a private daemon and for tests.
///
/// # Errors
/// The errno of `socketpair`.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}
