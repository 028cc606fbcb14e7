//! Binds a fault thread to the processor of another thread, and lets it go again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::placement::Way;

/// Faults after which to look again where the other thread runs.
const LOOK: u32 = 64;

/// The processors of the calling thread.
#[derive(Debug, Default)]
pub struct Processor {
    /// Those that it had, while it is bound.
    before: Option<CpuSet>,
    /// The thread whose processor it has.
    with: Option<u32>,
    age: u32,
}

impl Processor {
    /// Goes where `way` says. A thread of `pid` that cannot be seen from here is left alone.
    pub fn go(&mut self, pid: u32, way: Way) {
        match way {
            Way::Free => self.free(),
            Way::With(thread) => {
                self.age += 1;
                if self.with != Some(thread) || self.age >= LOOK {
                    self.age = 0;
                    if self.follow(pid, thread).is_err() {
                        self.free();
                    }
                }
            }
        }
    }

    /// Whether it is bound.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.before.is_some()
    }

    fn free(&mut self) {
        if let Some(before) = self.before.take() {
            let _ = sched_setaffinity(Pid::from_raw(0), &before);
        }
        self.with = None;
    }

    fn follow(&mut self, pid: u32, thread: u32) -> io::Result<()> {
        let place = processor_of(&File::open(format!("/proc/{pid}/task/{thread}/stat"))?)?;
        let me = Pid::from_raw(0);
        if self.before.is_none() {
            self.before = Some(sched_getaffinity(me)?);
        }
        // Not where the administrator does not want this daemon.
        let allowed = self.before.as_ref().is_some_and(|before| before.is_set(place).unwrap_or(false));
        if !allowed {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut set = CpuSet::new();
        set.set(place)?;
        sched_setaffinity(me, &set)?;
        self.with = Some(thread);
        Ok(())
    }
}

/// The processor that a thread ran on last: the 39th field of its stat file.
fn processor_of(stat: &File) -> io::Result<usize> {
    let mut text = [0; 1024];
    let len = stat.read_at(&mut text, 0)?;
    let text = String::from_utf8_lossy(&text[..len]);
    // The second field is in parentheses and may hold anything.
    let rest = text.rsplit_once(')').map(|(_, rest)| rest);
    let field = rest.and_then(|rest| rest.split_whitespace().nth(36)?.parse().ok());
    field.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_followed_and_let_go() {
        let before = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let mut processor = Processor::default();
        let (pid, thread) = (std::process::id(), u32::try_from(nix::unistd::gettid().as_raw()).unwrap());
        processor.go(pid, Way::With(thread));
        assert!(processor.is_bound());
        let now = sched_getaffinity(Pid::from_raw(0)).unwrap();
        assert_eq!((0..CpuSet::count()).filter(|cpu| now.is_set(*cpu).unwrap()).count(), 1);
        processor.go(pid, Way::Free);
        assert!(!processor.is_bound());
        assert_eq!(sched_getaffinity(Pid::from_raw(0)).unwrap(), before);
        processor.go(pid, Way::With(1));
        assert!(!processor.is_bound(), "no such thread");
    }
}
