//! `fmallocctl` against a real daemon: output, exit codes, who may use it.

use std::process::{Command, Output};

use fmalloc_proto::hello::Role;
use serde_json::Value;

use super::support::{Daemon, MIB};

fn ctl(daemon: &Daemon, args: &[&str]) -> Output {
    let socket = daemon.place.socket();
    Command::new(env!("CARGO_BIN_EXE_fmallocctl")).arg("--socket").arg(socket).args(args).output().unwrap()
}

fn json(daemon: &Daemon, args: &[&str]) -> Value {
    let output = ctl(daemon, &[&["--json"], args].concat());
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn status_tells_about_the_daemon() {
    let daemon = Daemon::start(&[]);
    let status = json(&daemon, &["status"]);
    assert_eq!(status["pid"], daemon.pid());
    assert_eq!(status["pool_bytes"], 256 * MIB);
    assert_eq!(status["swap_bytes"], 64 * MIB);
    assert_eq!(status["swap_path"], daemon.place.path("swap").to_str().unwrap());
    assert_eq!(status["draining"], false);
    let table = String::from_utf8(ctl(&daemon, &["status"]).stdout).unwrap();
    assert!(table.contains("0 B of 256 MiB granted"), "{table}");
}

#[test]
fn clients_are_listed() {
    let daemon = Daemon::start(&[]);
    let peer = daemon.connect(Role::Pager);
    peer.open(8 * MIB).unwrap();
    let rows = json(&daemon, &["clients"]);
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(rows[0]["budget_bytes"], 8 * MIB);
    assert_eq!(rows[0]["pid"], std::process::id());
    let table = String::from_utf8(ctl(&daemon, &["clients"]).stdout).unwrap();
    assert!(table.lines().nth(1).unwrap().contains("8 MiB"), "{table}");
    assert_eq!(json(&daemon, &["regions"]), Value::Array(Vec::new()));
}

#[test]
fn every_json_field_is_documented() {
    let daemon = Daemon::start(&[]);
    let peer = daemon.connect(Role::Pager);
    peer.open(8 * MIB).unwrap();
    let help = String::from_utf8(ctl(&daemon, &["--help"]).stdout).unwrap();
    let (status, clients) = (json(&daemon, &["status"]), json(&daemon, &["clients"]));
    for object in [&status, &clients[0]] {
        for field in object.as_object().unwrap().keys() {
            assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{field} "))), "{field}");
        }
    }
    assert!(help.contains("Exit codes"));
}

#[test]
fn exit_codes_are_as_documented() {
    let daemon = Daemon::start(&[]);
    let code = |args: &[&str]| ctl(&daemon, args).status.code();
    assert_eq!(code(&["status"]), Some(0));
    assert_eq!(code(&["limit", "99", "64M"]), Some(1));
    assert_eq!(code(&["evict", "99:1"]), Some(1));
    assert_eq!(code(&["limit", "1", "64X"]), Some(2));
    assert_eq!(code(&["limit", "1", "1K"]), Some(2));
    assert_eq!(code(&["evict", "one"]), Some(2));
    assert_eq!(code(&[]), Some(2));
}

#[test]
fn no_daemon_is_said_clearly() {
    let output = Command::new(env!("CARGO_BIN_EXE_fmallocctl"))
        .args(["--socket", "/nonexistent/socket", "status"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("/nonexistent/socket") && text.contains("Start one"), "{text}");
}

#[test]
fn user_without_permission_is_told() {
    if !super::support::is_root() {
        return;
    }
    use std::os::unix::process::CommandExt;
    let daemon = Daemon::start(&["--socket-mode", "0666"]);
    // The other user must be able to run it wherever this tree lies.
    let copy = daemon.place.path("fmallocctl");
    std::fs::copy(env!("CARGO_BIN_EXE_fmallocctl"), &copy).unwrap();
    let output = Command::new(copy)
        .arg("--socket")
        .arg(daemon.place.socket())
        .arg("status")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("uid 65534 may not"));
}
