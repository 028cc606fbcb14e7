//! Runs the program as a child, for the figures at its end, and is to the outside as the program would be: signals go on
//! to it, a stop stops both, and the end is the program's.

use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, kill, raise, signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::figures::Figures;
use super::server::Server;
use super::{FAILED, Failure, Options, cannot_run};

/// How often the memory of the tree is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Signals that mean this process itself, or cannot wait.
const OWN: [Signal; 6] =
    [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGSYS];

/// Runs the program to its end and prints the figures.
pub(super) fn run(mut command: Command, server: Server, options: &Options) -> Result<ExitCode, Failure> {
    let system = |what: &str, errno: Errno| Failure::new(FAILED, format!("{what}: {errno}"));
    // Children that outlive their parents become ours, and stay visible.
    nix::sys::prctl::set_child_subreaper(true).map_err(|errno| system("becoming a subreaper", errno))?;
    let mut ours = SigSet::all();
    OWN.into_iter().for_each(|signal| ours.remove(signal));
    let before =
        ours.thread_swap_mask(SigmaskHow::SIG_SETMASK).map_err(|errno| system("blocking signals", errno))?;
    // SAFETY: one system call, on a set of the closure's own.
    unsafe {
        command.pre_exec(move || {
            before.thread_set_mask()?;
            Ok(())
        });
    }
    let begin = Instant::now();
    let child = command.spawn().map_err(|error| cannot_run(command.get_program().as_ref(), &error))?;
    let child = Pid::from_raw(i32::try_from(child.id()).unwrap_or(0));
    let mut figures = Figures::new(server);
    let end = loop {
        if let Some(end) = reap(child) {
            break end;
        }
        figures.look(child);
        if let Some(info) = next_signal(&ours) {
            pass_on(child, &info);
        }
    };
    figures.print(options, begin.elapsed());
    match end {
        WaitStatus::Exited(_, code) => Ok(ExitCode::from(code.to_le_bytes()[0])),
        WaitStatus::Signaled(_, signal, _) => die(signal),
        _ => Ok(ExitCode::from(FAILED)),
    }
}

/// Takes note of children that have ended or stopped; gives the end of the program.
fn reap(child: Pid) -> Option<WaitStatus> {
    let mut end = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
            Ok(WaitStatus::Stopped(pid, _)) if pid == child => {
                // Whoever waits for us sees the program stop; when we are continued, so is it.
                let _ = raise(Signal::SIGSTOP);
                let _ = kill(child, Signal::SIGCONT);
            }
            Ok(status @ (WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..))) if pid == child => {
                end = Some(status);
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return end,
            Err(Errno::EINTR) | Ok(_) => {}
            Err(_) => return end,
        }
    }
}

/// The next signal that is for us, if one comes before it is time to look at the tree.
fn next_signal(set: &SigSet) -> Option<libc::siginfo_t> {
    let time = libc::timespec { tv_sec: 0, tv_nsec: i64::from(LOOK.subsec_nanos()) };
    let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
    // SAFETY: set and time are valid, and there is room for the answer.
    let got = unsafe { libc::sigtimedwait(set.as_ref(), info.as_mut_ptr(), &raw const time) };
    // SAFETY: filled in if the call succeeded.
    (got > 0).then(|| unsafe { info.assume_init() })
}

fn pass_on(child: Pid, info: &libc::siginfo_t) {
    // What the terminal sends, the program got as well. A child's end is not for the program.
    if info.si_code != libc::SI_KERNEL && info.si_signo != libc::SIGCHLD {
        // SAFETY: plain numbers; real-time signals are passed on too.
        unsafe { libc::kill(child.as_raw(), info.si_signo) };
    }
}

/// Ends as the program did, by the same signal, without a second core.
fn die(by: Signal) -> ! {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    // SAFETY: the default action is set, nothing of ours runs.
    let _ = unsafe { signal(by, SigHandler::SigDfl) };
    let mut set = SigSet::empty();
    set.add(by);
    let _ = raise(by);
    let _ = set.thread_unblock();
    // Of a signal that ended the program but does not end us.
    std::process::exit(128 + by as i32)
}
