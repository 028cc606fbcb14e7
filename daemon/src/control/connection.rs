//! One SEQPACKET connection on the control thread: whole messages in and out, each checked for syntax and for its
//! number of file descriptors before anybody looks at its meaning.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use fmalloc_proto::codec::{self, CodecError};
use fmalloc_proto::hello::{Hello, HelloError, HelloReply, Role};
use fmalloc_proto::limits::{MAX_MESSAGE, MAX_TEXT};
use fmalloc_proto::messages::{ErrorCode, Failure, Reply, Request};
use fmalloc_proto::transport::{self, TransportError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, shutdown};
use thiserror::Error;
use tokio::io::unix::AsyncFd;

/// A goodbye that the peer does not take in waits no longer than this.
const LAST_WORDS: Duration = Duration::from_secs(1);

thread_local! {
    /// Packets are received here and leave it in the same poll, so that idle connections hold no buffer.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_MESSAGE]);
}

/// A connection; several tasks may send on it at once, one may receive.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: AsyncFd<OwnedFd>,
}

/// A request that is well-formed; whether it makes sense is yet to be seen.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) id: u32,
    pub(crate) request: Request,
    /// As many as [`Request::fd_count`] says.
    pub(crate) fds: Vec<OwnedFd>,
}

/// Why no message came.
#[derive(Debug, Error)]
pub(crate) enum RecvError {
    /// The peer has closed the connection.
    #[error("closed by the peer")]
    Closed,
    /// The peer broke the protocol; the connection must end.
    #[error("{text}")]
    Violation {
        /// Id of the request, 0 if it had none.
        id: u32,
        /// What was wrong.
        text: String,
    },
    /// The system failed.
    #[error(transparent)]
    System(TransportError),
}

impl RecvError {
    pub(crate) fn violation(id: u32, text: impl Into<String>) -> Self {
        Self::Violation { id, text: text.into() }
    }
}

impl From<TransportError> for RecvError {
    fn from(error: TransportError) -> Self {
        match error {
            TransportError::Closed => Self::Closed,
            TransportError::Truncated => Self::violation(0, error.to_string()),
            other => Self::System(other),
        }
    }
}

impl From<HelloError> for RecvError {
    fn from(error: HelloError) -> Self {
        Self::violation(0, error.to_string())
    }
}

/// What the daemon says when it refuses.
pub(crate) fn failure(code: ErrorCode, text: impl ToString) -> Failure {
    let mut text = text.to_string();
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    Failure { code, text }
}

/// Has the runtime tell when `fd` is ready. Must be called on the runtime.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor from here on, and an OwnedFd is never replaced or closed early.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

impl Connection {
    /// Takes over a connected socket. Must be called on the runtime.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { socket: watch(socket)? })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }

    /// Reads the hello and answers it; gives the role, or none if there is no common version. Cancel-safe.
    pub(crate) async fn hello(&self) -> Result<Option<Role>, RecvError> {
        let (bytes, fds) = self.recv().await?;
        if !fds.is_empty() {
            return Err(RecvError::violation(0, "a hello carries no file descriptors"));
        }
        let hello = Hello::decode(&bytes)?;
        let reply = HelloReply::to(&hello);
        self.send(&reply.encode(), &[]).await?;
        Ok(reply.version.map(|_| hello.role))
    }

    /// The next request. Cancel-safe: a message is either returned or still in the socket.
    pub(crate) async fn request(&self) -> Result<Incoming, RecvError> {
        let (bytes, fds) = self.recv().await?;
        let (id, request) = codec::decode::<Request>(&bytes).map_err(|error| match error {
            // Its header is sound, so the peer can be told which request was meant.
            CodecError::UnknownNumber(_) | CodecError::Body(_) | CodecError::Trailing(_) => {
                let id = bytes.get(4..8).and_then(|id| id.try_into().ok()).map_or(0, u32::from_le_bytes);
                RecvError::violation(id, error.to_string())
            }
            other => RecvError::violation(0, other.to_string()),
        })?;
        let wanted = request.fd_count();
        if fds.len() != wanted {
            let text = format!("{} file descriptors came with a request that has {wanted}", fds.len());
            return Err(RecvError::violation(id, text));
        }
        Ok(Incoming { id, request, fds })
    }

    /// Sends a reply, waiting while the peer does not read.
    pub(crate) async fn reply(
        &self,
        id: u32,
        reply: &Reply,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), TransportError> {
        self.send(&encode(id, reply), fds).await
    }

    /// Sends what nobody asked for, if the socket has room.
    pub(crate) fn notice(&self, reply: &Reply) {
        let _ = transport::send(self.as_fd(), &encode(0, reply), &[]);
    }

    /// Refuses a request and ends the connection.
    pub(crate) async fn refuse(&self, id: u32, failure: Failure) {
        let reply = Reply::Error(failure);
        let _ = tokio::time::timeout(LAST_WORDS, self.reply(id, &reply, &[])).await;
        self.end();
    }

    /// Ends the connection both ways; whoever still waits to send fails.
    pub(crate) fn end(&self) {
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        // Were anything left unread, closing would reset the connection and the peer would miss our last words.
        while matches!(self.try_recv(), Ok(_) | Err(TransportError::Truncated)) {}
    }

    async fn recv(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), TransportError> {
        loop {
            let mut ready = self.socket.readable().await.map_err(from_io)?;
            match self.try_recv() {
                Err(TransportError::WouldBlock) => ready.clear_ready(),
                result => return result,
            }
        }
    }

    fn try_recv(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), TransportError> {
        SCRATCH.with_borrow_mut(|scratch| {
            let (length, fds) = transport::recv(self.as_fd(), scratch)?;
            Ok((scratch[..length].to_vec(), fds))
        })
    }

    async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), TransportError> {
        loop {
            let mut ready = self.socket.writable().await.map_err(from_io)?;
            match transport::send(self.as_fd(), bytes, fds) {
                Err(TransportError::WouldBlock) => ready.clear_ready(),
                result => return result,
            }
        }
    }
}

fn encode(id: u32, reply: &Reply) -> Vec<u8> {
    codec::encode(id, reply).unwrap_or_else(|error| {
        tracing::error!(%error, "a reply could not be encoded");
        let failure = failure(ErrorCode::System, format!("the daemon could not encode its answer: {error}"));
        codec::encode(id, &Reply::Error(failure)).unwrap_or_default()
    })
}

fn from_io(error: io::Error) -> TransportError {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    TransportError::System(nix::errno::Errno::from_raw(errno))
}
