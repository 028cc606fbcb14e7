//! fork, exec, and a program that closes descriptors that it does not know.

use std::hint::black_box;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{bail, ensure};
use fmalloc_client::{Advice, Error, Health, Pager, Region};
use fmalloc_tests::pattern::{self, WORDS};
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setgid, setuid};
use serde_json::Value;

use crate::Outcome;
use crate::state::{Args, State, page_at};

/// Runs something in a forked child and gives how that ended, for people.
fn in_child(work: impl FnOnce() -> anyhow::Result<()>) -> Outcome {
    // SAFETY: the child uses this process's memory alone; the locks of the C library are its atfork handlers' care.
    match unsafe { fork() }? {
        ForkResult::Child => {
            let code = match work() {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("child: {error:#}");
                    1
                }
            };
            // SAFETY: ends the child without running what the parent has registered.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => Ok(match waitpid(child, None)? {
            WaitStatus::Exited(_, code) => format!("exit {code}"),
            WaitStatus::Signaled(_, signal, _) => signal.as_str().to_owned(),
            other => format!("{other:?}"),
        }
        .into()),
    }
}

/// `fork-touch NAME OFFSET`: the child reads from the region.
pub(crate) fn fork_touch(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let addr = memory.base() + args.bytes()?;
    in_child(|| {
        black_box(page_at(addr)[0]);
        Ok(())
    })
}

/// `fork-calls NAME`: the child calls the library with what it has from its parent, and drops it.
pub(crate) fn fork_calls(state: &State, args: &mut Args<'_>) -> Outcome {
    let name = args.text()?;
    in_child(|| {
        let (pager, memory) = (state.pager()?, state.memory(name)?);
        ensure!(pager.health() == Health::Forked, "health is {:?}", pager.health());
        let mut region = memory.region.lock().unwrap();
        let len = region.len();
        let outcomes = [
            pager.stats().map(drop),
            pager.set_budget(8 << 20).map(drop),
            Region::new(&pager, 4096).map(drop),
            region.advise(0..len, Advice::WillNeed),
            region.discard(0..len),
            region.resident(0..len).map(drop),
        ];
        for (n, outcome) in outcomes.into_iter().enumerate() {
            ensure!(matches!(outcome, Err(Error::Forked)), "call {n} gave {outcome:?}");
        }
        drop(region);
        drop(memory);
        drop(pager);
        state.clear();
        state.set_pager(None);
        Ok(())
    })
}

/// `fork-own`: the child makes a pager and a region of its own.
pub(crate) fn fork_own() -> Outcome {
    in_child(|| {
        let pager = Pager::connect()?;
        let mut region = Region::new(&pager, 16 << 20)?;
        for (index, page) in region.as_mut_slice_of::<u64>().chunks_mut(WORDS).enumerate() {
            pattern::write(99, index as u64, page);
        }
        for (index, page) in region.as_slice_of::<u64>().chunks(WORDS).enumerate() {
            pattern::check(99, index as u64, page).map_err(|text| anyhow::anyhow!(text))?;
        }
        Ok(())
    })
}

/// `fork-pause`: a child that does nothing and ends with this process.
pub(crate) fn fork_pause() -> Outcome {
    // SAFETY: the child makes system calls only.
    match unsafe { fork() }? {
        ForkResult::Child => loop {
            // SAFETY: as above.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::pause();
            }
        },
        ForkResult::Parent { child } => Ok(child.as_raw().into()),
    }
}

/// `become UID`: all threads take another user's place.
pub(crate) fn become_user(args: &mut Args<'_>) -> Outcome {
    let id = args.number()?;
    setgid(Gid::from_raw(id))?;
    setuid(Uid::from_raw(id))?;
    Ok(Value::Null)
}

/// `children`: fails if `wait` sees any.
pub(crate) fn children() -> Outcome {
    match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
        Err(Errno::ECHILD) => Ok(Value::Null),
        other => bail!("wait sees a child: {other:?}"),
    }
}

/// `exec-sleep`: this process becomes another program, and answers no more.
pub(crate) fn exec_sleep() -> Outcome {
    Err(Command::new("sleep").arg("1000").exec().into())
}

/// `close-unknown`: closes all descriptors but the standard ones.
pub(crate) fn close_unknown() -> Outcome {
    // SAFETY: this program has no others that it uses.
    Errno::result(unsafe { libc::close_range(3, libc::c_uint::MAX, 0) })?;
    Ok(Value::Null)
}
