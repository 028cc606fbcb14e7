//! What a program's library would say to a daemon, up to the point where it has been granted a budget; then goodbye.

use std::os::fd::{AsFd, OwnedFd};

use fmalloc_proto::codec;
use fmalloc_proto::hello::{Hello, HelloReply, Role};
use fmalloc_proto::limits::{MAX_MESSAGE, MIN_BUDGET};
use fmalloc_proto::messages::{Empty, ErrorCode, Open, Opened, Reply, Request};
use fmalloc_proto::transport::{self, TransportError};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// Seconds to wait for an answer.
const PATIENCE: i64 = 10;

/// What a daemon granted.
#[derive(Debug)]
pub(super) struct Grant {
    /// `/dev/userfaultfd`, if the daemon passed it.
    pub(super) device: Option<OwnedFd>,
}

/// Why it granted nothing.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Set where the daemon said no; else there was no proper conversation.
    pub(super) code: Option<ErrorCode>,
    /// What happened.
    pub(super) text: String,
}

impl Refusal {
    fn broken(text: impl ToString) -> Self {
        Self { code: None, text: text.to_string() }
    }
}

impl From<TransportError> for Refusal {
    fn from(error: TransportError) -> Self {
        Self::broken(match error {
            TransportError::WouldBlock => format!("no answer within {PATIENCE} s"),
            TransportError::Closed => "it closed the connection without an answer".to_owned(),
            other => other.to_string(),
        })
    }
}

/// Asks for the smallest budget, and gives it back.
pub(super) fn ask_for_budget(socket: &OwnedFd) -> Result<Grant, Refusal> {
    setsockopt(socket, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE, 0)).map_err(Refusal::broken)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    transport::send(socket.as_fd(), &Hello::new(Role::Pager).encode(), &[])?;
    let (length, _) = transport::recv(socket.as_fd(), &mut buffer)?;
    let hello = HelloReply::decode(&buffer[..length]).map_err(Refusal::broken)?;
    if hello.version.is_none() {
        let text =
            format!("it speaks protocol versions {} to {} only: update the older side", hello.min, hello.max);
        return Err(Refusal::broken(text));
    }
    let open =
        Open { name: "fmallocctl doctor".to_owned(), budget: MIN_BUDGET, user_mode_only: false, group: None };
    let (reply, mut fds) = exchange(socket, &mut buffer, 1, &Request::Open(open))?;
    let Reply::Opened(Opened { device, .. }) = reply else {
        return Err(Refusal::broken(format!("it answered something else: {reply:?}")));
    };
    // The last one; the others are a ring and doorbells, of no use without pages.
    let device = if device { fds.pop() } else { None };
    let _ = exchange(socket, &mut buffer, 2, &Request::Goodbye(Empty {}));
    Ok(Grant { device })
}

fn exchange(
    socket: &OwnedFd,
    buffer: &mut [u8],
    id: u32,
    request: &Request,
) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
    let frame = codec::encode(id, request).map_err(Refusal::broken)?;
    // A daemon that refuses us has perhaps answered and hung up already: its answer counts.
    match transport::send(socket.as_fd(), &frame, &[]) {
        Err(error) if error != TransportError::Closed => return Err(error.into()),
        _ => {}
    }
    let (length, fds) = transport::recv(socket.as_fd(), buffer)?;
    match codec::decode::<Reply>(&buffer[..length]) {
        Ok((_, Reply::Error(failure))) => Err(Refusal { code: Some(failure.code), text: failure.text }),
        Ok((_, reply)) if fds.len() == reply.fd_count() => Ok((reply, fds)),
        Ok(_) => Err(Refusal::broken("an answer came with the wrong number of descriptors")),
        Err(error) => Err(Refusal::broken(error)),
    }
}
