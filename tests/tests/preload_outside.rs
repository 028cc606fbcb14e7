//! `fmallocctl run` from outside: to the shell, the terminal and whoever waits it is the program.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};

use fmalloc_tests::run::Runs;
use fmalloc_tests::{PATIENCE, process, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Once as the program itself, once as its parent.
const WAYS: [&[&str]; 2] =
    [&["--ram", "16M", "--swap-size", "64M"], &["--ram", "16M", "--swap-size", "64M", "--stats"]];

#[test]
fn the_exit_status_is_the_program_s() {
    let Some(runs) = Runs::new() else { return };
    for way in WAYS {
        for code in [0, 1, 42, 255] {
            let mut command = runs.command(way);
            let output = command.args(["sh", "-c", &format!("exit {code}")]).output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{output:?}");
        }
        for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGABRT, Signal::SIGHUP] {
            let mut command = runs.command(way);
            let script = format!("kill -{} $$; sleep 10", signal as i32);
            let output = command.args(["sh", "-c", &script]).output().unwrap();
            assert_eq!(output.status.signal(), Some(signal as i32), "{output:?}");
        }
    }
}

/// A script that has said that it runs.
fn start(runs: &Runs, way: &[&str], program: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut command = runs.command(way);
    let mut child = command.args(program).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    (child, output)
}

#[test]
fn signals_reach_the_program_once() {
    let Some(runs) = Runs::new() else { return };
    for way in WAYS {
        let script = "$|=1; for my $s (qw(HUP INT TERM USR1 USR2 WINCH)) { $SIG{$s} = sub { print \"$s\\n\" } } \
                      print \"ready\\n\"; sleep 1 while 1;";
        let (mut child, mut output) = start(&runs, way, &["perl", "-e", script]);
        let pid = Pid::from_raw(child.id().cast_signed());
        for (signal, name) in [
            (Signal::SIGHUP, "HUP\n"),
            (Signal::SIGINT, "INT\n"),
            (Signal::SIGTERM, "TERM\n"),
            (Signal::SIGUSR1, "USR1\n"),
            (Signal::SIGUSR2, "USR2\n"),
            (Signal::SIGWINCH, "WINCH\n"),
            (Signal::SIGUSR1, "USR1\n"),
        ] {
            kill(pid, signal).unwrap();
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            assert_eq!(line, name, "{way:?}");
        }
        let below = children(child.id());
        kill(pid, Signal::SIGKILL).unwrap();
        child.wait().unwrap();
        // What cannot be passed on leaves the program behind.
        for pid in below {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

#[test]
fn a_stop_stops_and_a_continue_continues_both() {
    let Some(runs) = Runs::new() else { return };
    for way in WAYS {
        let (mut child, mut output) =
            start(&runs, way, &["bash", "-c", "echo ready; kill -TSTP $$; echo again; exit 7"]);
        wait_until("it has stopped", || state(child.id()) == "T");
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGCONT).unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "again\n");
        assert_eq!(process::wait(&mut child, PATIENCE).unwrap().code(), Some(7));
    }
}

#[test]
fn the_program_sees_its_surroundings_as_they_are() {
    let Some(runs) = Runs::new() else { return };
    for way in WAYS {
        let mut command = runs.command(way);
        // Arguments and name untouched; no descriptor, child or ignored signal but its own.
        // Of the signals those with names; two above them are libc's own affair.
        let script = "echo \"$0|$1|$2\"; ls /proc/self/fd | tr '\\n' ' '; grep SigIgn /proc/self/status | tail -c 8; \
                      grep SigBlk /proc/self/status | tail -c 8; wait -n 2>&1; echo $?";
        let native = std::process::Command::new("bash")
            .args(["-c", script, "a b", "--stats", ""])
            .stdin(Stdio::null())
            .output();
        let paged = command.args(["bash", "-c", script, "a b", "--stats", ""]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&paged.stdout), String::from_utf8_lossy(&native.unwrap().stdout));
    }
}

fn state(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("State:")).unwrap_or_default();
    line.split_whitespace().nth(1).unwrap_or_default().to_owned()
}

fn children(pid: u32) -> Vec<u32> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}
