//! What a service manager and the daemon say to each other: the socket that was made in advance, readiness, signs of
//! life, reloads, the end. All of it does nothing where no service manager runs the daemon.
//!
//! A private daemon uses none of it: the environment that it inherits belongs to the application.
//!
//! - [`log`]: log lines as a terminal or the journal wants them; `memory`: locked memory and the OOM score;
//! - [`reload`]: what SIGHUP can change.

pub mod log;
pub(crate) mod memory;
pub mod reload;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, bail};
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};
use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval};

/// A socket that listens already.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) socket: OwnedFd,
    /// Its name; empty if it is in the abstract name space or has none.
    pub(crate) path: PathBuf,
}

/// The listening socket that this process was started with (LISTEN_FDS), if any. To be asked once.
pub(crate) fn inherited_socket() -> anyhow::Result<Option<Inherited>> {
    let mut passed = sd_notify::listen_fds().context("LISTEN_FDS is set, but makes no sense")?;
    let (Some(fd), beyond) = (passed.next(), passed.len()) else { return Ok(None) };
    if beyond > 0 {
        bail!(
            "{} sockets were passed (LISTEN_FDS), fmallocd takes one: leave a single ListenSequentialPacket= in \
             fmallocd.socket",
            beyond + 1
        );
    }
    // SAFETY: `listen_fds` has just found it open; it was passed to this process for this use, and nothing else here
    // knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = getsockname::<UnixAddr>(socket.as_raw_fd());
    let (kind, listens) = (getsockopt(&socket, sockopt::SockType), getsockopt(&socket, sockopt::AcceptConn));
    let (Ok(address), Ok(SockType::SeqPacket), Ok(true)) = (address, kind, listens) else {
        bail!(
            "what was passed as a socket (LISTEN_FDS) is not a listening Unix socket of type SOCK_SEQPACKET: \
             fmallocd.socket must say ListenSequentialPacket=/run/fmalloc/fmallocd.sock"
        );
    };
    let path = address.path().map(PathBuf::from).unwrap_or_default();
    Ok(Some(Inherited { socket, path }))
}

/// Clients may connect from now on.
pub(crate) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The configuration is being read again; [`ready`] ends that.
pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// The end has begun.
pub(crate) fn stopping(status: &str) {
    tell(&[NotifyState::Stopping, NotifyState::Status(status)]);
}

/// Gives signs of life for ever, if they are wanted. Must run on the control thread: it is the one to be watched.
pub(crate) async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else { return };
    let mut tick = interval(limit / 3);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("the service manager cannot be told {states:?}: {error}");
    }
}
