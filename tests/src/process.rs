//! What the kernel says about a process, and how tests start and end theirs.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A user without any rights.
pub const NOBODY: u32 = 65534;

/// A field of /proc/PID/status that counts memory, in bytes. None if the process has ended.
#[must_use]
pub fn memory(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The highest resident set so far in bytes, shared memory included.
///
/// # Panics
/// If the process has ended.
#[must_use]
pub fn peak_resident(pid: u32) -> u64 {
    memory(pid, "VmHWM").expect("a live process")
}

/// Whether the process runs: it exists and is not a zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    memory(pid, "VmRSS").is_some()
}

/// Open descriptors of a process.
#[must_use]
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Processes whose command line contains `text`.
#[must_use]
pub fn with_argument(text: &str) -> Vec<u32> {
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<u32>().ok();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(number);
    let has = |pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&words).contains(text)
    };
    pids.filter(has).collect()
}

/// What each thread of a process does, for the report of a test that hangs.
#[must_use]
pub fn threads(pid: u32) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        let stack: Vec<String> =
            read("stack").lines().take(6).map(|line| line.trim_start_matches("[<0>] ").to_owned()).collect();
        let state =
            read("status").lines().find(|line| line.starts_with("State")).unwrap_or_default().to_owned();
        text.push_str(&format!(
            "  {} {} {state}: {}\n",
            entry.file_name().display(),
            read("comm").trim(),
            stack.join(" < ")
        ));
    }
    text
}

/// Has the process end with the thread that starts it, should that be killed.
pub fn end_with_us(command: &mut Command) -> &mut Command {
    // SAFETY: prctl is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        })
    }
}

/// Sends a signal to a process that this program has started and not yet waited for.
///
/// # Panics
/// If that fails.
pub fn signal(child: &Child, signal: Signal) {
    kill(pid(child), signal).expect("a signal to a child");
}

/// Its process id in the form that nix wants.
#[must_use]
pub fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a process id"))
}

/// Waits for the end, for so long at most.
///
/// # Panics
/// If the child cannot be waited for.
pub fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let begin = Instant::now();
    loop {
        match child.try_wait().expect("a child to wait for") {
            None if begin.elapsed() > patience => return None,
            None => std::thread::sleep(Duration::from_millis(2)),
            status => return status,
        }
    }
}
