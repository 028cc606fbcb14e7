//! Programs from Debian's packages, unmodified, within a third of the memory that they need: each prints what it prints
//! natively.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::process::Command;

use fmalloc_tests::realworld::{Case, cases};
use fmalloc_tests::run::Runs;

/// Runs one case both ways. False where its package is missing, which CI does not let pass.
fn compare(name: &str) {
    let Some(runs) = Runs::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let case = cases(dir.path(), 1).into_iter().find(|case| case.name == name).unwrap();
    let Case { package, command, budget_mib, .. } = &case;
    let (program, arguments) = command.split_first().unwrap();
    let native = Command::new(program).args(arguments).output();
    let Some(native) = native.ok().filter(|native| native.status.success()) else {
        assert!(std::env::var_os("CI").is_none(), "this test needs the package {package}");
        eprintln!("skipped: this test needs the package {package}");
        return;
    };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = runs.run(&format!("{budget_mib}M"), program, &arguments).succeeded();
    assert!(done.output.stdout == native.stdout, "another result than natively: {}", done.stderr());
    println!("{}", done.stats);
    let _ = if name.contains("fork") { done.forked() } else { done.paged() };
}

#[test]
fn sort_with_a_buffer_above_the_budget() {
    compare("GNU sort");
}

#[test]
fn python_with_dicts_and_lists() {
    compare("python3, dict and lists");
}

#[test]
fn python_with_numpy_arrays() {
    compare("python3, numpy");
}

#[test]
fn python_that_forks() {
    compare("python3, fork");
}

#[test]
fn sqlite_in_memory_with_an_integrity_check() {
    compare("sqlite3 :memory:");
}

#[test]
fn zstd_with_a_long_window_and_two_threads() {
    compare("zstd --long -T2");
}

#[test]
fn perl_with_a_large_hash() {
    compare("perl, hash");
}
