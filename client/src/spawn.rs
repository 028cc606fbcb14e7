//! Starting a private daemon so that the application never notices: its `wait` does not see the daemon, and the daemon
//! inherits no descriptor, signal mask or handler of it. Runs on the agent's thread.

use std::env;
use std::ffi::{CString, OsStr, OsString, c_char, c_int, c_void};
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::transport;
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use crate::error::Error;
use crate::options::{PrivateOptions, variable};
use crate::sys;

const STACK: usize = 64 * 1024;
const LAST_SIGNAL: c_int = 64;
/// The kernel's `struct sigaction`; all zeros is the default action.
const SIGACTION_WORDS: usize = 4;
const SIGSET_BYTES: usize = 8;
/// Libraries that were loaded into the application by force are not meant for its daemon, this project's own least.
const NOT_INHERITED: [&str; 2] = ["LD_PRELOAD", "LD_AUDIT"];

/// A private daemon that is about to be started.
#[derive(Debug)]
pub(crate) struct Launch {
    program: PathBuf,
    arguments: Vec<OsString>,
    log: Option<PathBuf>,
    /// Where forked children find the daemon, if they are to. Nothing is left of it when the daemon has ended.
    address: Option<PathBuf>,
}

impl Launch {
    /// Finds the program and works out its arguments.
    ///
    /// # Errors
    /// [`Error::NoDaemonBinary`], too small a budget, or a directory that cannot be named.
    pub(crate) fn new(options: &PrivateOptions) -> Result<Self, Error> {
        // It would only end, with the reason in its log.
        if options.budget < MIN_BUDGET {
            let budget = options.budget;
            return Err(Error::invalid(format!(
                "a budget of {budget} bytes: at least {MIN_BUDGET} are needed"
            )));
        }
        let program = find_program(options.daemon.as_deref())?;
        let dir = options
            .swap_dir
            .clone()
            .or_else(|| variable("FMALLOC_SWAP_DIR").map(PathBuf::from))
            .unwrap_or_else(|| PathBuf::from("/var/tmp"));
        // The daemon works in the root directory.
        let dir = std::path::absolute(&dir)
            .map_err(|error| Error::invalid(format!("swap directory {}: {error}", dir.display())))?;
        let budget = options.budget.to_string();
        let mut arguments: Vec<OsString> =
            vec!["--private".into(), "--swap-dir".into(), dir.into(), "--ram".into(), budget.clone().into()];
        arguments.extend(["--default-budget".into(), budget.into()]);
        if let Some(size) = options.swap_size {
            arguments.extend(["--swap-size".into(), size.to_string().into()]);
        }
        if options.user_mode_only {
            arguments.push("--user-mode-only".into());
        }
        let log = variable("FMALLOC_DAEMON_LOG").map(PathBuf::from);
        let address = if options.inherit {
            arguments.extend(["--private-owner".into(), process::id().to_string().into()]);
            let random = sys::random().map_err(|errno| Error::system("getting a random number", errno))?;
            Some(format!("@fmalloc-{}-{random:016x}", process::id()).into())
        } else {
            None
        };
        Ok(Self { program, arguments, log, address })
    }

    /// A connection to the daemon for a forked child.
    ///
    /// # Errors
    /// [`Error::System`] where it is gone or out of reach.
    pub(crate) fn reach_again(&self) -> Result<OwnedFd, Error> {
        let connected = self.address.as_deref().map_or(Err(Errno::EINVAL), transport::connect);
        connected.map_err(|errno| Error::system("connecting to the parent's private daemon", errno))
    }

    /// Starts the daemon and gives this side of its only connection, or of the first one if children may follow.
    ///
    /// # Errors
    /// [`Error::System`] where it could not be started.
    pub(crate) fn start(&self) -> Result<OwnedFd, Error> {
        let sockets = match &self.address {
            None => transport::pair(),
            Some(name) => transport::listen_abstract(name)
                .and_then(|listening| Ok((transport::connect(name)?, listening))),
        };
        let (ours, theirs) = sockets.map_err(|errno| Error::system("making a socket pair", errno))?;
        let log = match &self.log {
            None => None,
            Some(path) => Some(OpenOptions::new().append(true).create(true).open(path).map_err(|error| {
                let what = format!("opening FMALLOC_DAEMON_LOG {}", path.display());
                Error::System { what, errno: error.raw_os_error().unwrap_or(0) }
            })?),
        };
        let number = theirs.as_raw_fd();
        let mut words: Vec<&OsStr> = vec![self.program.as_os_str()];
        words.extend(self.arguments.iter().map(OsString::as_os_str));
        let number_text = number.to_string();
        words.extend([OsStr::new("--private-fd"), OsStr::new(&number_text)]);
        let words = words.into_iter().map(|word| c_string(word.as_bytes())).collect::<Result<Vec<_>, _>>()?;
        let environment = env::vars_os()
            .filter(|(name, _)| !NOT_INHERITED.iter().any(|other| name == other))
            .map(|(name, value)| c_string(&[name.as_bytes(), b"=", value.as_bytes()].concat()))
            .collect::<Result<Vec<_>, _>>()?;
        let log = log.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        run_detached(&words, &environment, number, log).map_err(|errno| {
            let what = format!("starting the private daemon {}", self.program.display());
            Error::system(&what, errno)
        })?;
        Ok(ours)
    }
}

/// What the two children need, prepared before there are any: they share this process's memory and may neither
/// allocate nor lock.
struct Plan {
    words: *const *const c_char,
    environment: *const *const c_char,
    socket: RawFd,
    log: RawFd,
    stack: *mut c_void,
    errno: AtomicI32,
}

/// Runs a program as a child of nobody here: a first child without an exit signal leaves the session, starts a second
/// one and ends; the second becomes the program. As in `posix_spawn`, both share this process's memory and the caller
/// is stopped until they are done with it, which stays quick and cheap when the process is huge. All signals must be
/// blocked in the caller: no handler may run in a child.
fn run_detached(words: &[CString], environment: &[CString], socket: RawFd, log: RawFd) -> Result<(), Errno> {
    let list = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
    };
    let (words, environment) = (list(words), list(environment));
    let mut first = vec![0_u8; STACK];
    let mut second = vec![0_u8; STACK];
    let plan = Plan {
        words: words.as_ptr(),
        environment: environment.as_ptr(),
        socket,
        log,
        stack: top(&mut second),
        errno: AtomicI32::new(0),
    };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK;
    let argument = ptr::from_ref(&plan).cast_mut().cast();
    // SAFETY: the stack is ours alone, the plan outlives the child, and the caller sleeps until the child has ended.
    let child = Errno::result(unsafe { libc::clone(first_child, top(&mut first), flags, argument) })?;
    // Without __WALL a child that has no exit signal is invisible: that is what hides it from the application.
    // SAFETY: no status is asked for.
    let wait = || Errno::result(unsafe { libc::waitpid(child, ptr::null_mut(), libc::__WALL) });
    while wait() == Err(Errno::EINTR) {}
    match plan.errno.load(Ordering::Acquire) {
        0 => Ok(()),
        errno => Err(Errno::from_raw(errno)),
    }
}

/// The aligned upper end of a stack.
fn top(stack: &mut [u8]) -> *mut c_void {
    let range = stack.as_mut_ptr_range();
    range.end.map_addr(|end| end & !15).cast()
}

extern "C" fn first_child(argument: *mut c_void) -> c_int {
    // SAFETY: `run_detached` passes its plan, which outlives us.
    let plan = unsafe { &*argument.cast::<Plan>() };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: only system calls; the second stack is ours, and we sleep until the second child is done with it.
    unsafe {
        libc::setsid();
        if libc::clone(second_child, plan.stack, flags, argument) < 0 {
            plan.errno.store(Errno::last_raw(), Ordering::Release);
        }
        libc::_exit(0)
    }
}

extern "C" fn second_child(argument: *mut c_void) -> c_int {
    // SAFETY: as in `first_child`.
    let plan = unsafe { &*argument.cast::<Plan>() };
    // SAFETY: only system calls, on structures that are ours; descriptors and handlers are copies, so that changing
    // them does not touch the application.
    unsafe {
        libc::chdir(c"/".as_ptr());
        if plan.log >= 0 {
            libc::dup2(plan.log, 1);
            libc::dup2(plan.log, 2);
        }
        libc::fcntl(plan.socket, libc::F_SETFD, 0);
        // By number, because libc's own function leaves its internal signals as they are: ignored ones would stay so.
        let default = [0_u64; SIGACTION_WORDS];
        for signal in 1..=LAST_SIGNAL {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null_mut::<c_void>(),
                SIGSET_BYTES,
            );
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        libc::execve(*plan.words, plan.words, plan.environment);
        plan.errno.store(Errno::last_raw(), Ordering::Release);
        libc::_exit(127)
    }
}

fn c_string(bytes: &[u8]) -> Result<CString, Error> {
    CString::new(bytes).map_err(|_| Error::invalid("a path with a zero byte"))
}

/// The `fmallocd` to start: the one that is named, else the first that is found.
fn find_program(chosen: Option<&Path>) -> Result<PathBuf, Error> {
    let named = variable("FMALLOC_DAEMON").map(PathBuf::from);
    let places = match chosen.map(Path::to_owned).or(named) {
        Some(path) => vec![path],
        None => usual_places(),
    };
    let mut tried = Vec::new();
    for path in places {
        // The daemon works in the root directory.
        let path = std::path::absolute(&path).unwrap_or(path);
        match access(&path, AccessFlags::X_OK) {
            Ok(()) if path.is_file() => return Ok(path),
            Ok(()) => tried.push((path, "not a file".to_owned())),
            Err(errno) => tried.push((path, errno.desc().to_owned())),
        }
    }
    Err(Error::NoDaemonBinary { tried })
}

fn usual_places() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Ok(own) = env::current_exe() {
        // The parent serves cargo's `target/*/examples` and `target/*/deps`.
        places.extend(own.ancestors().skip(1).take(2).map(|dir| dir.join("fmallocd")));
    }
    if let Some(path) = variable("PATH") {
        let dirs = path.into_vec();
        let dirs = dirs.split(|byte| *byte == b':').filter(|dir| dir.starts_with(b"/"));
        places.extend(dirs.map(|dir| Path::new(OsStr::from_bytes(dir)).join("fmallocd")));
    }
    places
        .extend(["/usr/libexec/fmalloc/fmallocd", "/usr/local/libexec/fmalloc/fmallocd"].map(PathBuf::from));
    places
}
