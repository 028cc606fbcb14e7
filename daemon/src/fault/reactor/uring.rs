//! The reactor over io_uring: one system call submits and waits, and any number of transfers are in flight from one
//! thread.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::{Completion, Io, Reactor, Ready, Watched};

const ENTRIES: u32 = 256;
/// Tokens of transfers are below this.
const POLL_UFFD: u64 = 1 << 62;
const POLL_AGENT: u64 = POLL_UFFD + 1;
const POLL_COMMANDS: u64 = POLL_UFFD + 2;

/// See the module.
pub struct Uring {
    ring: IoUring,
    watched: Watched,
    swap: RawFd,
    /// Length of each transfer in flight, by token, to tell a short one.
    lengths: Vec<u32>,
    armed: [bool; 3],
}

impl Uring {
    /// A ring that transfers to and from `swap`.
    ///
    /// # Errors
    /// Where io_uring is missing, forbidden or out of resources.
    pub fn new(watched: Watched, swap: RawFd) -> io::Result<Self> {
        // Without interrupts from completions; kernels before 6.1 lack the flags and do without.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .build(ENTRIES)
            .or_else(|_| IoUring::new(ENTRIES))?;
        if !ring.params().is_feature_ext_arg() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring cannot wait with a timeout"));
        }
        Ok(Self { ring, watched, swap, lengths: Vec::new(), armed: [false; 3] })
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: entries refer to descriptors that outlive the ring and to memory that `submit`'s caller keeps.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }

    fn arm(&mut self, place: usize, fd: RawFd, token: u64) -> io::Result<()> {
        if !self.armed[place] {
            let events = u32::try_from(libc::POLLIN).unwrap_or(1);
            self.push(&opcode::PollAdd::new(Fd(fd), events).build().user_data(token))?;
            self.armed[place] = true;
        }
        Ok(())
    }
}

impl Reactor for Uring {
    unsafe fn submit(&mut self, io: Io) {
        let (fd, memory) = (Fd(io.file.unwrap_or(self.swap)), io.memory.as_ptr());
        let entry = if io.is_read {
            opcode::Read::new(fd, memory, io.len).offset(io.offset).build()
        } else {
            opcode::Write::new(fd, memory, io.len).offset(io.offset).build()
        };
        let place = usize::try_from(io.token).unwrap_or(usize::MAX);
        if place >= self.lengths.len() {
            self.lengths.resize(place + 1, 0);
        }
        self.lengths[place] = io.len;
        // A ring that takes nothing any more fails again, and is reported, in `wait`.
        let _ = self.push(&entry.user_data(io.token));
    }

    fn wait(
        &mut self,
        timeout: Option<Duration>,
        watch_uffd: bool,
        done: &mut Vec<Completion>,
    ) -> io::Result<Ready> {
        if watch_uffd {
            self.arm(0, self.watched.uffd, POLL_UFFD)?;
        }
        self.arm(1, self.watched.agent, POLL_AGENT)?;
        self.arm(2, self.watched.commands, POLL_COMMANDS)?;
        let limit = timeout.map(|t| Timespec::new().sec(t.as_secs()).nsec(t.subsec_nanos()));
        let args = match &limit {
            Some(limit) => SubmitArgs::new().timespec(limit),
            None => SubmitArgs::new(),
        };
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY)) => {}
            Err(error) => return Err(error),
        }
        let mut ready = Ready::default();
        for entry in self.ring.completion() {
            match entry.user_data() {
                POLL_UFFD => {
                    self.armed[0] = false;
                    let broken =
                        entry.result() & i32::from(libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0;
                    ready.uffd_error |= broken;
                    ready.uffd = true;
                }
                POLL_AGENT => {
                    self.armed[1] = false;
                    ready.agent = true;
                }
                POLL_COMMANDS => {
                    self.armed[2] = false;
                    ready.commands = true;
                }
                token => {
                    let place = usize::try_from(token).unwrap_or(usize::MAX);
                    let len = self.lengths.get(place).copied().unwrap_or(0);
                    done.push(Completion::of(token, len.into(), entry.result().into()));
                }
            }
        }
        Ok(ready)
    }
}
