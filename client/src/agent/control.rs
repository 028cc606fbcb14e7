//! The agent's side of the control socket: requests go out in order, replies come back in any, and nothing here waits.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fmalloc_proto::codec;
use fmalloc_proto::limits::MAX_MESSAGE;
use fmalloc_proto::messages::{Empty, Reply, Request};
use fmalloc_proto::transport::{self, TransportError};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::mailbox::{Job, Slot, Waiter};
use crate::link::Link;
use crate::sys;

/// How long the agent waits for the daemon to take note of an orderly end.
const FAREWELL: Duration = Duration::from_secs(2);
const FAREWELL_ID: u32 = 3;

/// The daemon does not answer any more, or not in a way that can be understood.
#[derive(Debug)]
pub(crate) struct Gone;

/// The control connection after the handshake.
#[derive(Debug)]
pub(crate) struct Control {
    socket: OwnedFd,
    outgoing: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    pending: HashMap<u32, Waiter>,
    buffer: Vec<u8>,
}

impl Control {
    pub(crate) fn new(socket: OwnedFd) -> Result<Self, Errno> {
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let buffer = vec![0; MAX_MESSAGE];
        Ok(Self { socket, outgoing: VecDeque::new(), pending: HashMap::new(), buffer })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether requests wait for room in the socket.
    pub(crate) fn is_blocked(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Queues a request.
    pub(crate) fn post(&mut self, job: Job) {
        let fds = match job.file.map(|file| file.open()).transpose() {
            Ok(fds) => fds.map(Vec::from).unwrap_or_default(),
            Err(failure) => return job.waiter.answer(Reply::Error(failure)),
        };
        self.pending.insert(job.id, job.waiter);
        self.outgoing.push_back((job.frame, fds));
    }

    /// Sends what the socket takes.
    pub(crate) fn send(&mut self) -> Result<(), Gone> {
        while let Some((frame, fds)) = self.outgoing.front() {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match transport::send(self.socket.as_fd(), frame, &fds) {
                Ok(()) => drop(self.outgoing.pop_front()),
                Err(TransportError::WouldBlock) => break,
                Err(_) => return Err(Gone),
            }
        }
        Ok(())
    }

    /// Takes all replies that are there and hands them out.
    pub(crate) fn receive(&mut self, link: &Link) -> Result<(), Gone> {
        loop {
            let len = match transport::recv(self.socket.as_fd(), &mut self.buffer) {
                Ok((len, _)) => len,
                Err(TransportError::WouldBlock) => return Ok(()),
                Err(_) => return Err(Gone),
            };
            let bytes = self.buffer.get(..len).unwrap_or_default();
            let (id, reply) = codec::decode::<Reply>(bytes).map_err(|_| Gone)?;
            if let Reply::Budget(budget) = &reply {
                link.budget.store(budget.bytes, Ordering::Relaxed);
            }
            if let Some(waiter) = self.pending.remove(&id) {
                waiter.answer(reply);
            }
        }
    }

    /// Tells the daemon that this client ends, and waits a little for it to take note.
    pub(crate) fn farewell(&mut self, link: &Link) {
        let Ok(frame) = codec::encode(FAREWELL_ID, &Request::Goodbye(Empty {})) else { return };
        let (_slot, waiter) = Slot::new();
        self.post(Job { id: FAREWELL_ID, frame, file: None, waiter });
        let deadline = Instant::now() + FAREWELL;
        while self.send().is_ok() && self.receive(link).is_ok() && self.pending.contains_key(&FAREWELL_ID) {
            let left = deadline.saturating_duration_since(Instant::now());
            let events = if self.is_blocked() { libc::POLLIN | libc::POLLOUT } else { libc::POLLIN };
            if sys::poll(&mut [sys::watch(Some(self.fd()), events)], Some(left)) != Ok(true) {
                break;
            }
        }
    }

    /// Gives up all requests but keeps the connection.
    pub(crate) fn abandon(self) -> OwnedFd {
        self.socket
    }
}
