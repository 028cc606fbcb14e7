//! The reactor without io_uring: transfers are done at once by pread and pwrite, waiting is poll.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use nix::errno::Errno;

use super::{Completion, Io, Reactor, Ready, Watched};

/// See the module.
pub struct Psync {
    watched: Watched,
    swap: RawFd,
    done: Vec<Completion>,
}

impl Psync {
    /// A reactor that transfers to and from `swap`.
    #[must_use]
    pub fn new(watched: Watched, swap: RawFd) -> Self {
        Self { watched, swap, done: Vec::new() }
    }
}

impl Reactor for Psync {
    unsafe fn submit(&mut self, io: Io) {
        let (len, offset) = (io.len as usize, libc::off_t::try_from(io.offset).unwrap_or(libc::off_t::MAX));
        let memory = io.memory.as_ptr();
        let file = io.file.unwrap_or(self.swap);
        let got: i64 = loop {
            // SAFETY: the caller promises memory of this length.
            let got = unsafe {
                if io.is_read {
                    libc::pread(file, memory.cast(), len, offset)
                } else {
                    libc::pwrite(file, memory.cast(), len, offset)
                }
            };
            match Errno::result(got) {
                Ok(count) => break i64::try_from(count).unwrap_or(i64::MAX),
                Err(Errno::EINTR) => {}
                Err(errno) => break -i64::from(errno as i32),
            }
        };
        self.done.push(Completion::of(io.token, u64::from(io.len), got));
    }

    fn wait(
        &mut self,
        timeout: Option<Duration>,
        watch_uffd: bool,
        done: &mut Vec<Completion>,
    ) -> io::Result<Ready> {
        let timeout = if self.done.is_empty() { timeout } else { Some(Duration::ZERO) };
        done.append(&mut self.done);
        let uffd = if watch_uffd { self.watched.uffd } else { -1 };
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [entry(uffd), entry(self.watched.agent), entry(self.watched.commands)];
        let limit = timeout.map(|t| libc::timespec {
            tv_sec: libc::time_t::try_from(t.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: t.subsec_nanos().into(),
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: three entries, and a timeout that lives through the call.
        if unsafe { libc::ppoll(fds.as_mut_ptr(), 3, limit, std::ptr::null()) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted {
                Ok(Ready::default())
            } else {
                Err(error)
            };
        }
        Ok(Ready {
            uffd: fds[0].revents != 0,
            uffd_error: fds[0].revents & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0,
            agent: fds[1].revents != 0,
            commands: fds[2].revents != 0,
        })
    }
}
