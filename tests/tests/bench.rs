//! The benchmark itself, with sizes that say nothing about speed: that it measures what it says, notices wrong data, and
//! leaves the machine as it was.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is a failed test")]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use fmalloc_tests::{place, process, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

const TINY: [&str; 8] = ["--size", "16M", "--ram", "6M", "--ops", "400", "--bound", "300"];
const ZSWAP: &str = "/sys/module/zswap/parameters";

fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(place::binary("fmalloc-bench"));
    command.args(TINY).arg("--dir").arg(dir).args(arguments).stdin(Stdio::null());
    command
}

fn run(dir: &Path, arguments: &[&str]) -> Output {
    process::end_with_us(&mut command(dir, arguments)).output().unwrap()
}

fn start(dir: &Path, arguments: &[&str]) -> Child {
    let mut command = command(dir, arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    process::end_with_us(&mut command).spawn().unwrap()
}

fn zswap() -> Vec<String> {
    let read = |name: &str| fs::read_to_string(Path::new(ZSWAP).join(name)).unwrap_or_default();
    ["enabled", "compressor", "max_pool_percent"].map(read).to_vec()
}

/// Swap, cgroups and mounts that name the benchmark of this process id.
fn traces(pid: u32) -> Vec<String> {
    let name = format!("fmalloc-bench-{pid}");
    let mut found: Vec<String> = Vec::new();
    for file in ["/proc/swaps", "/proc/self/mountinfo"] {
        let text = fs::read_to_string(file).unwrap();
        found.extend(text.lines().filter(|line| line.contains(&name)).map(str::to_owned));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let groups =
        mounts.lines().filter(|line| line.contains(" - cgroup")).filter_map(|line| line.split(' ').nth(4));
    let mut places: Vec<String> = groups.map(str::to_owned).collect();
    places.push("/run".to_owned());
    // A group of version 1 is made below that of the benchmark.
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().filter(|line| line.contains("memory")).filter_map(|line| line.split(':').nth(2));
    let below: Vec<String> =
        own.flat_map(|own| places.iter().map(move |place| format!("{place}{own}"))).collect();
    for place in places.iter().chain(&below) {
        let entries = fs::read_dir(place).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.path().display().to_string());
        found.extend(names.filter(|path| path.contains(&name)));
    }
    found
}

fn is_empty(dir: &TempDir) -> bool {
    fs::read_dir(dir.path()).unwrap().next().is_none()
}

/// Benchmarks wait for one another; a test must not wait for those of other tests with its own clock running.
fn turn() -> Option<File> {
    place::can_page().then(|| {
        let lock = File::create("/var/tmp/fmalloc-test-bench.lock").unwrap();
        lock.lock().unwrap();
        lock
    })
}

/// Runs it, and gives its JSON and its tables.
fn report(arguments: &[&str]) -> (Value, String) {
    let (dir, out) = (place::directory(), place::directory());
    let json = out.path().join("out.json");
    let before = zswap();
    let output = run(dir.path(), &[arguments, &["--json", json.to_str().unwrap()]].concat());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}\n{text}", output.status);
    assert!(is_empty(&dir), "files are left");
    assert_eq!(zswap(), before);
    let report = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    (report, String::from_utf8_lossy(&output.stdout).into_owned())
}

fn assert_rows(report: &Value, count: usize) {
    let rows = report["results"].as_array().unwrap();
    assert_eq!(rows.len(), count, "scenarios, workloads, peers");
    for row in rows {
        for field in ["scenario", "workload", "peer", "unit"] {
            assert!(row[field].is_string(), "{row}");
        }
        assert_spread(&row["fmalloc"], row);
        match row["status"].as_str().unwrap() {
            "ok" => {
                assert_spread(&row["peer_value"], row);
                assert_spread(&row["ratio"], row);
            }
            "unavailable" => {
                let reason = row["reason"].as_str().unwrap();
                assert!(row["ratio"].is_null() && !reason.is_empty(), "{row}");
                // Within so little RAM the kernel may give up, but it has no other excuse.
                let excused = row["peer"] != "kernel-swap" || reason.contains("killed by the kernel");
                assert!(excused && !reason.contains("WRONG"), "{row}");
            }
            other => panic!("{other}: {row}"),
        }
    }
}

#[test]
fn bench_measures_every_workload_and_leaves_nothing_behind() {
    let Some(_turn) = turn() else { return };
    let (report, table) = report(&["--runs", "1", "--peers", "kernel-swap,file-mmap-random"]);
    assert_eq!((report["size"].as_u64(), report["ram"].as_u64()), (Some(16 << 20), Some(6 << 20)));
    assert_rows(&report, 12 * 2);
    let latency = report["latency"].as_array().unwrap();
    let row = latency.iter().find(|row| row["peer"] == "fmalloc").unwrap();
    assert!(row["faults"].as_u64().unwrap() > 0, "{row}");
    assert!(row["p50"]["min"].as_f64() <= row["p99.9"]["max"].as_f64(), "{row}");
    let floors = report["floors"].as_array().unwrap();
    let raw = |row: &&Value| row["floor"].as_str().unwrap().starts_with("raw-");
    assert_eq!((floors.iter().filter(raw).count(), floors.len()), (4, 4 + 12));
    assert!(table.contains("zipf-rw-4") && table.contains("kernel-swap"), "{table}");
}

#[test]
fn bench_sets_up_every_peer_in_every_scenario_and_undoes_it() {
    let Some(_turn) = turn() else { return };
    let options = ["--scenario", "all", "--runs", "2", "--workloads", "fill,rand-write-1", "--no-floors"];
    let (report, _) =
        report(&[&options[..], &["--peers", "kernel-swap,zswap,zram,file-mmap-random"]].concat());
    assert_rows(&report, 3 * 2 * 4);
}

fn assert_spread(spread: &Value, row: &Value) {
    let [min, median, max] = ["min", "median", "max"].map(|field| spread[field].as_f64().unwrap_or(-1.0));
    assert!(0.0 < min && min <= median && median <= max, "{row}");
}

#[test]
fn bench_of_a_pager_that_changes_a_bit_fails_in_every_set_of_workloads() {
    let Some(_turn) = turn() else { return };
    let (dir, out) = (place::directory(), place::directory());
    let json = out.path().join("out.json");
    let options =
        ["--flip", "--peers", "none", "--no-floors", "--runs", "1", "--json", json.to_str().unwrap()];
    let output = run(dir.path(), &options);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let warnings = report["warnings"].as_array().unwrap();
    let wrong = warnings.iter().filter(|warning| warning.as_str().unwrap().contains("WRONG DATA")).count();
    assert_eq!(wrong, 7, "pages, small, sort, parallel sort, stream, bfs, churn: {warnings:?}");
}

#[test]
fn bench_that_is_interrupted_or_killed_is_undone() {
    let Some(_turn) = turn() else { return };
    let dir = place::directory();
    let endless =
        ["--peers", "kernel-swap", "--workloads", "rand-read-1", "--ops", "1000000000", "--no-floors"];
    let swaps = |pid: u32| {
        let text = fs::read_to_string("/proc/swaps").unwrap();
        text.lines().any(|line| line.contains(&format!("fmalloc-bench-{pid}.")))
    };
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        // fmalloc is stopped after three seconds, and then it is the kernel's turn.
        let bound = ["--bound", "3"];
        let mut bench = start(dir.path(), &[&endless[..], &bound].concat());
        let pid = bench.id();
        wait_until("the kernel swaps to the benchmark's file", || {
            assert!(bench.try_wait().unwrap().is_none(), "the benchmark has ended");
            swaps(pid)
        });
        process::signal(&bench, signal);
        let status = process::wait(&mut bench, fmalloc_tests::PATIENCE).expect("an end");
        if signal == Signal::SIGKILL {
            assert!(!traces(pid).is_empty(), "there is something to put back");
            let next =
                run(dir.path(), &["--peers", "none", "--workloads", "reread", "--runs", "1", "--no-floors"]);
            assert!(next.status.success(), "{}", String::from_utf8_lossy(&next.stderr));
        } else {
            assert_eq!(status.code(), Some(143));
        }
        assert_eq!(traces(pid), Vec::<String>::new());
        assert!(is_empty(&dir), "files are left");
    }
}
