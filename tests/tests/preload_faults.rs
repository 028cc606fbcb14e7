//! `fmallocctl run` where something is amiss: the program works, or is refused with a reason; it never reads wrong bytes.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use fmalloc_tests::run::{Runs, program};
use fmalloc_tests::{PATIENCE, daemon, place, process, wait_until};
use nix::sys::signal::Signal;

#[test]
fn a_program_that_closes_all_descriptors_keeps_its_memory() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("16M", program(), &["close-fds", "48"]).succeeded().paged();
}

#[test]
fn a_program_that_becomes_another_user_keeps_its_memory() {
    let Some(runs) = Runs::new() else { return };
    for when in ["before", "after"] {
        let _ = runs
            .run("16M", place::share("fmalloc-program", runs.dir()), &["setuid", "48", when])
            .succeeded()
            .paged();
    }
}

#[test]
fn a_program_under_a_seccomp_filter_keeps_its_memory() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("16M", program(), &["seccomp", "48"]).succeeded().paged();
}

#[test]
fn a_traced_program_keeps_its_memory() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("16M", program(), &["ptrace", "32"]).succeeded().paged();
}

#[test]
fn locked_memory_is_paged_but_for_a_little() {
    let Some(runs) = Runs::new() else { return };
    let _ = runs.run("16M", program(), &["mlockall", "48"]).succeeded().paged();
    let _ = runs.run("16M", program(), &["mlock", "48"]).succeeded().paged();
}

#[test]
fn a_full_swap_file_makes_malloc_fail_and_loses_nothing() {
    let Some(runs) = Runs::new() else { return };
    let done =
        runs.run_with(&["--ram", "16M", "--swap-size", "64M"], program(), &["exhaust"]).succeeded().paged();
    let mib: u64 =
        done.stdout().lines().nth(1).and_then(|line| line.strip_suffix(" MiB")).unwrap().parse().unwrap();
    assert!((48..=70).contains(&mib), "{mib} MiB of 64 were to be had: {done}");
}

#[test]
fn a_fork_that_swap_cannot_bear_fails_with_enomem() {
    let Some(runs) = Runs::new() else { return };
    let done = runs.run_with(&["--ram", "16M", "--swap-size", "64M"], program(), &["fork", "40"]);
    assert!(!done.output.status.success());
    assert!(done.stderr().contains("fork: Cannot allocate memory"), "{done}");
}

#[test]
fn a_lost_daemon_makes_the_program_wait_until_a_signal_ends_it() {
    let Some(runs) = Runs::new() else { return };
    let mut command = runs.command(&["--ram", "16M", "--swap-size", "1G"]);
    command.arg(program()).args(["hold", "48"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    // Without figures the program has taken the place of fmallocctl: its id is the owner's.
    let owner = child.id().to_string();
    let daemons = process::with_argument(&runs.dir().display().to_string());
    let daemons: Vec<u32> = daemons.into_iter().filter(|pid| *pid != child.id()).collect();
    let [daemon] = daemons[..] else { panic!("daemons of {owner}: {daemons:?}") };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.cast_signed()), Signal::SIGKILL).unwrap();
    wait_until("the daemon is gone", || !process::is_alive(daemon));
    // Not closed: whoever waits for a page in `read` holds the pipe.
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"x").unwrap();
    assert_eq!(process::wait(&mut child, Duration::from_secs(2)), None, "it went on without its memory");
    process::signal(&child, Signal::SIGTERM);
    let end = process::wait(&mut child, PATIENCE).expect("a signal does not end it");
    assert_eq!(end.signal(), Some(libc::SIGTERM));
    line.clear();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "", "it printed something that it cannot know");
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said.matches("the paging daemon is gone").count(), 1, "{said}");
}

#[test]
fn what_cannot_be_run_is_refused_with_the_reason() {
    let Some(runs) = Runs::new() else { return };
    let refused = |options: &[&str], program: &str, code: i32, words: &[&str]| {
        let done = runs.run_with(options, program, &[]);
        assert_eq!(done.output.status.code(), Some(code), "{done}");
        for word in words {
            assert!(done.stderr().contains(word), "{word}: {done}");
        }
    };
    refused(&[], "no-such-program", 127, &["no such program"]);
    refused(&["--ram", "1M"], "true", 2, &["too little", "8 MiB"]);
    refused(&["--ram", "200%"], "true", 2, &["not a share"]);
    refused(&["--ram", "lots"], "true", 2, &["not a size"]);
    refused(&["--swap-dir", "/no/such/dir"], "true", 125, &["not a directory"]);
    // Set-user-ID of somebody else.
    let path = runs.dir().join("raised");
    std::fs::copy("/bin/true", &path).unwrap();
    std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o4755);
    std::fs::set_permissions(&path, mode).unwrap();
    refused(&[], path.to_str().unwrap(), 126, &["changes its user"]);
}

#[test]
fn a_missing_library_or_daemon_is_named() {
    let Some(runs) = Runs::new() else { return };
    for (name, words) in [
        ("FMALLOC_PRELOAD", ["libfmalloc_preload.so is missing", "/nowhere"]),
        ("FMALLOC_DAEMON", ["cannot start", "/nowhere"]),
        ("FMALLOC_SOCKET", ["no fmallocd answers", "/nowhere"]),
    ] {
        let mut command = runs.command(&["--ram", "16M"]);
        if name == "FMALLOC_SOCKET" {
            // A service that is named is not replaced by another.
            command = std::process::Command::new(place::binary("fmallocctl"));
            command.args(["run", "--ram", "16M", "--"]);
        }
        let output = command.arg("true").env(name, "/nowhere").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(125), "{said}");
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
    }
}

#[test]
fn a_running_service_is_used_and_gets_everything_back() {
    let Some(service) = fmalloc_tests::Daemon::start("64M", "512M") else { return };
    let mut command = std::process::Command::new(place::binary("fmallocctl"));
    let json = service.dir().join("stats.json");
    command.args(["run", "--ram", "16M", "--stats-json"]).arg(&json).arg("--").arg(program());
    let output = command.args(["memory", "48"]).env("FMALLOC_SOCKET", service.socket()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stats: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!(daemon::number(&stats, "budget_bytes"), 16 << 20);
    assert!(daemon::number(&stats, "pages_out") > 0, "{stats:#}");
    service.wait_until_empty();
    // More than it has is refused with a way out.
    let mut command = std::process::Command::new(place::binary("fmallocctl"));
    command.args(["run", "--ram", "1G", "--", "true"]).env("FMALLOC_SOCKET", service.socket());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("--private"), "{said}");
}
