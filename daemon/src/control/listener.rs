//! The socket that clients connect to: bound only if nobody else answers there, removed at the end. Or one that a
//! service manager has made, which is left as it is.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use fmalloc_proto::transport;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket};
use tokio::io::unix::AsyncFd;

use super::auth::Peer;
use super::connection::watch;
use crate::config::Service;
use crate::service::Inherited;

const TURN_ATTEMPTS: u32 = 40;
const TURN_PAUSE: Duration = Duration::from_millis(25);

/// A listening socket with a name in the file system.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
    /// Device and inode, so that a successor's socket is not removed in its place. None if it is not ours to remove.
    identity: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at the configured place. Must be called on the runtime.
    pub(crate) fn bind(service: &Service) -> anyhow::Result<Self> {
        let path = &service.socket;
        let dir = path.parent().unwrap_or(path);
        let dir =
            File::open(dir).with_context(|| format!("cannot open {dir:?}, the directory of the socket"))?;
        take_turns(&dir);
        remove_stale(path)?;
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)
            .with_context(|| format!("cannot bind the socket {path:?}"))?;
        let meta = fs::symlink_metadata(path)?;
        let identity = (meta.dev(), meta.ino());
        // Nobody can connect before `listen`, so there is no moment of a wider mode.
        if let Some(gid) = service.allow_gids.first() {
            chown(path, None, Some(*gid)).with_context(|| format!("cannot give {path:?} to group {gid}"))?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(service.socket_mode.0))?;
        listen(&fd, Backlog::MAXALLOWABLE)?;
        Ok(Self { socket: watch(fd)?, path: path.clone(), identity: Some(identity) })
    }

    /// Takes over a socket that listens already. Must be called on the runtime.
    pub(crate) fn inherit(inherited: Inherited) -> io::Result<Self> {
        let Inherited { socket, path } = inherited;
        let flags = OFlag::from_bits_retain(fcntl(&socket, FcntlArg::F_GETFL)?);
        fcntl(&socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { socket: watch(socket)?, path, identity: None })
    }

    /// The next connection. Cancel-safe.
    pub(crate) async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let mut ready = self.socket.readable().await?;
            match accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
                // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
                Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(Errno::ECONNABORTED | Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let there = fs::symlink_metadata(&self.path).map(|meta| (meta.dev(), meta.ino())).ok();
        if self.identity.is_some() && self.identity == there {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Of two daemons that start at the same time, the second must find the first one's socket, not remove it. Anybody who
/// may read the directory may hold this lock, so nobody is waited for long.
fn take_turns(dir: &File) {
    for _ in 0..TURN_ATTEMPTS {
        match dir.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(TURN_PAUSE),
            Ok(()) | Err(TryLockError::Error(_)) => return,
        }
    }
}

/// Removes the socket of a daemon that is no more.
fn remove_stale(path: &Path) -> anyhow::Result<()> {
    match transport::connect(path) {
        Err(Errno::ENOENT) => Ok(()),
        Err(Errno::ECONNREFUSED) => {
            let kind = fs::symlink_metadata(path)?.file_type();
            if !std::os::unix::fs::FileTypeExt::is_socket(&kind) {
                bail!("{path:?} exists and is no socket; remove it, or name another with --socket");
            }
            tracing::info!(path = %path.display(), "removing the socket of a daemon that has ended");
            fs::remove_file(path).with_context(|| format!("cannot remove the stale socket {path:?}"))
        }
        Ok(connected) => {
            let pid = Peer::of(std::os::fd::AsFd::as_fd(&connected)).map_or(0, |peer| peer.pid);
            bail!("process {pid} listens on {path:?} already; stop it, or name another socket with --socket")
        }
        Err(errno) => bail!("cannot find out whether somebody listens on {path:?}: {errno}"),
    }
}
