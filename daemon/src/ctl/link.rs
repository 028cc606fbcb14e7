//! A blocking connection to a daemon.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use fmalloc_proto::codec;
use fmalloc_proto::hello::{Hello, HelloReply, Role};
use fmalloc_proto::limits::MAX_MESSAGE;
use fmalloc_proto::messages::{Reply, Request};
use fmalloc_proto::transport::{self, TransportError};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::CtlError;
use crate::config::{SYSTEM_SOCKET, user_socket};

/// Seconds within which a daemon answers what it knows by itself.
const PATIENCE: i64 = 10;

#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    path: PathBuf,
    last: u32,
    buffer: Vec<u8>,
}

impl Link {
    /// Connects to the daemon at `socket`, else to the system's, else to the user's own.
    pub(super) fn open(socket: Option<&Path>) -> Result<Self, CtlError> {
        let places = match socket {
            Some(path) => vec![path.to_owned()],
            None => std::iter::once(PathBuf::from(SYSTEM_SOCKET)).chain(user_socket()).collect(),
        };
        let mut tried = String::new();
        for path in places {
            match transport::connect(&path) {
                Ok(socket) => return Self { socket, path, last: 0, buffer: vec![0; MAX_MESSAGE] }.greet(),
                Err(errno) => tried.push_str(&format!("\n  {}: {}", path.display(), meaning(errno))),
            }
        }
        Err(CtlError::NoDaemon(format!(
            "no fmallocd answers; tried:{tried}\n\
             Start one with `systemctl start fmallocd`, or `fmallocd` as root or by yourself (see fmallocd --help), \
             or name its socket with --socket or FMALLOC_SOCKET. \
             `fmallocctl doctor` finds out what is missing."
        )))
    }

    /// Where the daemon is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn greet(mut self) -> Result<Self, CtlError> {
        self.set_patience(PATIENCE)?;
        let hello = Hello::new(Role::Control).encode();
        transport::send(self.socket.as_fd(), &hello, &[]).map_err(|error| self.lost(&error))?;
        let length = self.recv()?;
        match HelloReply::decode(&self.buffer[..length]) {
            Ok(HelloReply { version: Some(_), .. }) => Ok(self),
            Ok(reply) => Err(CtlError::NoDaemon(format!(
                "the daemon at {} speaks versions {} to {} of the protocol, this fmallocctl does not; \
                 use the one that came with it",
                self.path.display(),
                reply.min,
                reply.max
            ))),
            Err(error) => Err(CtlError::NoDaemon(format!("{} answers, but: {error}", self.path.display()))),
        }
    }

    /// Asks for what the daemon knows by itself.
    pub(super) fn ask(&mut self, request: &Request) -> Result<Reply, CtlError> {
        self.set_patience(PATIENCE)?;
        self.exchange(request)
    }

    /// Asks for what may take as long as the disk and the client do.
    pub(super) fn ask_patiently(&mut self, request: &Request) -> Result<Reply, CtlError> {
        self.set_patience(0)?;
        self.exchange(request)
    }

    fn exchange(&mut self, request: &Request) -> Result<Reply, CtlError> {
        self.last += 1;
        let frame = codec::encode(self.last, request).map_err(|error| CtlError::Usage(error.to_string()))?;
        // A daemon that refuses us has perhaps answered and hung up already: its answer counts.
        let sent = transport::send(self.socket.as_fd(), &frame, &[]);
        if let Err(error) = sent
            && error != TransportError::Closed
        {
            return Err(self.lost(&error));
        }
        loop {
            let length = self.recv()?;
            let (id, reply) = codec::decode::<Reply>(&self.buffer[..length]).map_err(|error| {
                CtlError::NoDaemon(format!("{} answers, but: {error}", self.path.display()))
            })?;
            match reply {
                Reply::Error(failure) if id == self.last || id == 0 => {
                    return Err(CtlError::Refused(failure));
                }
                reply if id == self.last => return Ok(reply),
                // A notice.
                _ => {}
            }
        }
    }

    fn recv(&mut self) -> Result<usize, CtlError> {
        match transport::recv(self.socket.as_fd(), &mut self.buffer) {
            Ok((length, _)) => Ok(length),
            Err(error) => Err(self.lost(&error)),
        }
    }

    fn lost(&self, error: &TransportError) -> CtlError {
        let path = self.path.display();
        CtlError::NoDaemon(match error {
            TransportError::WouldBlock => format!("the daemon at {path} has not answered for {PATIENCE} s"),
            TransportError::Closed => {
                format!("the daemon at {path} has closed the connection: it ended, or is too busy")
            }
            other => format!("the daemon at {path} cannot be reached: {other}"),
        })
    }

    /// Seconds to wait for an answer; 0 waits for ever.
    fn set_patience(&self, seconds: i64) -> Result<(), CtlError> {
        setsockopt(&self.socket, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0))
            .map_err(|errno| CtlError::NoDaemon(format!("cannot set up the socket: {errno}")))
    }
}

fn meaning(errno: Errno) -> String {
    match errno {
        Errno::ENOENT => "there is no socket".to_owned(),
        Errno::ECONNREFUSED => "a daemon was there and has ended".to_owned(),
        Errno::EACCES => "you may not connect; its mode or group says who may".to_owned(),
        other => other.to_string(),
    }
}
