//! Who a peer is, as the kernel vouches for it, and what it may do. Credentials are those of the moment when the peer
//! connected; a process that changes its user later keeps the rights it connected with.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};

/// A connected process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    /// As seen from the daemon's pid namespace; 0 if it is not visible there.
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    /// Primary and supplementary groups.
    pub(crate) gids: Vec<u32>,
}

impl Peer {
    /// Asks the kernel about the process at the other end of `socket`.
    pub(crate) fn of(socket: BorrowedFd<'_>) -> nix::Result<Self> {
        let credentials = getsockopt(&socket, PeerCredentials)?;
        let mut gids = vec![credentials.gid()];
        gids.extend(supplementary_groups(socket)?);
        Ok(Self { pid: credentials.pid(), uid: credentials.uid(), gids })
    }
}

fn supplementary_groups(socket: BorrowedFd<'_>) -> nix::Result<Vec<u32>> {
    let mut gids = vec![0_u32; 64];
    loop {
        let bytes = gids.len() * size_of::<u32>();
        let mut length = libc::socklen_t::try_from(bytes).map_err(|_| Errno::ERANGE)?;
        // SAFETY: the kernel writes at most `length` bytes, for which `gids` has room, and sets `length`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                gids.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = usize::try_from(length).map_err(|_| Errno::ERANGE)? / size_of::<u32>();
        match Errno::result(result) {
            Ok(_) => {
                gids.truncate(count);
                return Ok(gids);
            }
            // More groups than room; the kernel has said how many.
            Err(Errno::ERANGE) if count > gids.len() => gids.resize(count, 0),
            Err(errno) => return Err(errno),
        }
    }
}

/// A descriptor that becomes readable when the process at the other end ends.
///
/// The kernel gives the very process that connected (6.5 and newer); before that it is looked up by its number, which
/// could by then be another's, at worst of one that lives longer. `ask_socket` says whether to try the former.
pub(crate) fn pidfd(socket: BorrowedFd<'_>, peer: &Peer, ask_socket: bool) -> nix::Result<OwnedFd> {
    match if ask_socket { getsockopt(&socket, PeerPidfd) } else { Err(Errno::ENOPROTOOPT) } {
        Err(Errno::ENOPROTOOPT) => open_pidfd(peer.pid),
        other => other,
    }
}

/// A descriptor that becomes readable when this process ends.
pub(crate) fn open_pidfd(pid: i32) -> nix::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the call takes plain numbers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us (close-on-exec); nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Who may do what.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    own_uid: u32,
    uids: Vec<u32>,
    gids: Vec<u32>,
}

impl Policy {
    pub(crate) fn new(own_uid: u32, uids: &[u32], gids: &[u32]) -> Self {
        Self { own_uid, uids: uids.to_vec(), gids: gids.to_vec() }
    }

    /// May have its memory paged and look at its own clients.
    pub(crate) fn admits(&self, peer: &Peer) -> bool {
        self.is_administrator(peer)
            || self.uids.contains(&peer.uid)
            || peer.gids.iter().any(|gid| self.gids.contains(gid))
    }

    /// May see and change every client.
    pub(crate) fn is_administrator(&self, peer: &Peer) -> bool {
        peer.uid == 0 || peer.uid == self.own_uid
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn peer(uid: u32, gids: &[u32]) -> Peer {
        Peer { pid: 1, uid, gids: gids.to_vec() }
    }

    #[test]
    fn root_and_own_user_are_administrators() {
        let policy = Policy::new(500, &[], &[]);
        assert!(policy.is_administrator(&peer(0, &[0])));
        assert!(policy.is_administrator(&peer(500, &[500])));
        assert!(!policy.admits(&peer(501, &[500])));
    }

    #[test]
    fn listed_users_and_members_of_listed_groups_are_admitted_only() {
        let policy = Policy::new(0, &[1000], &[27]);
        assert!(policy.admits(&peer(1000, &[1000])));
        assert!(policy.admits(&peer(1001, &[1001, 27])));
        assert!(!policy.admits(&peer(1001, &[1001])));
        assert!(!policy.is_administrator(&peer(1000, &[27])));
    }

    #[test]
    fn peer_of_a_pair_is_this_process_with_all_its_groups() {
        let (one, _other) = fmalloc_proto::transport::pair().unwrap();
        let peer = Peer::of(one.as_fd()).unwrap();
        assert_eq!(u32::try_from(peer.pid).unwrap(), std::process::id());
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        let mut groups: Vec<u32> = nix::unistd::getgroups().unwrap().iter().map(|gid| gid.as_raw()).collect();
        groups.push(nix::unistd::getegid().as_raw());
        assert!(groups.iter().all(|gid| peer.gids.contains(gid)));
    }

    #[test]
    fn pidfd_becomes_readable_when_the_process_ends() {
        use nix::poll::{PollFd, PollFlags, poll};
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let fd = open_pidfd(i32::try_from(child.id()).unwrap()).unwrap();
        let readable = |timeout: u16| {
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, timeout).unwrap() == 1
        };
        assert!(!readable(0));
        child.kill().unwrap();
        assert!(readable(5000));
        child.wait().unwrap();
    }
}
