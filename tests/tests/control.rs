//! fmallocctl: what it shows and changes, as tables and as JSON, and how it fails.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::process::Output;

use fmalloc_tests::daemon::{ctl, number};
use fmalloc_tests::process::NOBODY;
use fmalloc_tests::{Daemon, MIB, place, wait_until};
use serde_json::Value;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn fails(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
    text(&output.stderr)
}

fn fields(object: &Value) -> Vec<&str> {
    let mut fields: Vec<&str> = object.as_object().unwrap().keys().map(String::as_str).collect();
    fields.sort_unstable();
    fields
}

#[test]
fn budget_changed_up_and_down_under_load_is_kept_and_loses_nothing() {
    let Some(daemon) = Daemon::start("64M", "128M") else { return };
    let mut worker = daemon.client("16M");
    worker.ask("region a 64M");
    worker.ask("start churn churn a 1 4 0");
    let client = worker.client().to_string();
    for budget in [48, 8, 32, 4, 64, 5, 16] {
        let answer = daemon.json(&["limit", &client, &format!("{budget}M")]);
        assert_eq!(number(&answer, "budget_bytes"), budget * MIB);
        wait_until("the client is told", || worker.ask("budget") == budget * MIB);
        std::thread::sleep(std::time::Duration::from_millis(400));
        let row = daemon.row(&mut worker);
        let held = number(&row, "resident_bytes") + number(&row, "overhead_bytes");
        assert!(held <= budget * MIB, "{held} of {budget} MiB: {row}");
        assert_eq!(daemon.status("pool_granted_bytes"), budget * MIB);
    }
    println!("{}", worker.ask("stop churn"));
    assert_eq!(worker.ask("set-budget 24M"), 24 * MIB);
    assert_eq!(worker.refused("set-budget 65M").kind, "Limit");
    let refused = worker.refused("set-budget 1M");
    assert_eq!(refused.kind, "Invalid", "{}", refused.text);
    assert_eq!(worker.ask("budget"), 24 * MIB);
    worker.quit();
}

#[test]
fn evict_empties_a_client_or_a_region_as_far_as_wanted() {
    let Some(daemon) = Daemon::start("32M", "128M") else { return };
    let mut worker = daemon.client("32M");
    worker.ask("region a 8M");
    worker.ask("region b 8M");
    worker.ask("fill a 1");
    worker.ask("fill b 2");
    let client = worker.client().to_string();
    wait_until("the figures are up to date", || worker.stats("resident_pages") >= 4096);
    let before = worker.stats("resident_pages");

    let some = daemon.json(&["evict", &client, "2M"]);
    assert_eq!(number(&some, "evicted_bytes"), 2 * MIB);
    assert_eq!(worker.stats("resident_pages"), before - 512);

    let region = daemon.json(&["regions", &client])[1]["region"].as_u64().unwrap();
    let one = daemon.json(&["evict", &format!("{client}:{region}")]);
    assert!(number(&one, "evicted_bytes") >= 7 * MIB, "{one}");
    assert_eq!(worker.ask("resident b")["pages"], 0);
    assert!(worker.ask("resident a")["pages"].as_u64() > Some(1000));

    assert!(number(&daemon.json(&["evict", &client]), "evicted_bytes") > 0);
    assert_eq!(worker.stats("resident_pages"), 0);
    worker.ask("verify a 1");
    worker.ask("verify b 2");
    let plain = daemon.ctl(&["evict", &client, "1M"]);
    assert_eq!(text(&plain.stdout), "1 MiB left RAM\n");
    worker.quit();
}

#[test]
fn regions_and_clients_are_shown_as_they_are() {
    let Some(daemon) = Daemon::start("32M", "128M") else { return };
    assert_eq!(daemon.json(&["clients"]), Value::Array(Vec::new()));
    assert_eq!(daemon.json(&["regions"]), Value::Array(Vec::new()));
    let mut worker = daemon.worker();
    worker.ask("connect 8M some-name");
    worker.ask("region first 4M");
    worker.ask("region second 16M");
    worker.ask("fill second 1");
    let mut other = daemon.client("4M");
    other.ask("region third 1M");

    let rows = daemon.json(&["regions", &worker.client().to_string()]);
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0]["label"], "first");
    assert_eq!(rows[0]["resident_bytes"], 0);
    assert_eq!(number(&rows[1], "length_bytes"), 16 * MIB);
    assert_eq!(number(&rows[1], "claimed_bytes"), 16 * MIB);
    assert_eq!(
        number(&rows[1], "resident_bytes") + number(&rows[1], "swapped_bytes"),
        16 * MIB,
        "{}",
        rows[1]
    );
    assert_eq!(daemon.json(&["regions"]).as_array().unwrap().len(), 3);

    let row = daemon.row(&mut worker);
    assert_eq!(row["name"], "some-name");
    assert_eq!(row["pid"], worker.pid());
    assert_eq!(row["uid"], 0);
    assert_eq!(number(&row, "regions"), 2);
    assert_eq!(number(&row, "claimed_bytes"), 20 * MIB);
    assert_eq!(row["condition"], "");

    for (command, words) in [
        ("clients", ["some-name", "8 MiB"]),
        ("regions", ["second", "16 MiB"]),
        ("status", ["RAM pool", "32 MiB"]),
    ] {
        let output = daemon.ctl(&[command]);
        assert!(output.status.success());
        let table = text(&output.stdout);
        assert!(words.iter().all(|word| table.contains(word)), "{table}");
    }
    worker.quit();
    other.quit();
}

#[test]
fn json_has_the_documented_fields_and_no_others() {
    let Some(daemon) = Daemon::start("32M", "128M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 1M");
    let client = worker.client().to_string();
    let help = text(&daemon.ctl(&["--help"]).stdout);
    let documented = |begin: &str| -> Vec<String> {
        let lines = help.lines().skip_while(|line| !line.starts_with(begin)).skip(1);
        let mut fields: Vec<String> = lines
            .take_while(|line| line.starts_with("  "))
            .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
            .collect();
        fields.sort_unstable();
        fields
    };
    let first = |value: Value| value[0].clone();
    for (begin, object) in [
        ("status:", daemon.json(&["status"])),
        ("clients:", first(daemon.json(&["clients"]))),
        ("regions:", first(daemon.json(&["regions"]))),
        ("limit:", daemon.json(&["limit", &client, "9M"])),
        ("evict:", daemon.json(&["evict", &client])),
    ] {
        let documented = documented(begin);
        assert!(!documented.is_empty(), "{begin} {help}");
        assert_eq!(fields(&object), documented, "{begin}");
    }
    worker.quit();
}

#[test]
fn exit_codes_tell_refusals_from_usage_and_from_a_missing_daemon() {
    let Some(daemon) = Daemon::start("16M", "64M") else { return };
    let mut worker = daemon.client("8M");
    let client = worker.client().to_string();
    assert!(fails(&daemon.ctl(&["regions", "77"]), 1).contains("no client 77"));
    assert!(fails(&daemon.ctl(&["limit", &client, "17M"]), 1).contains("16 MiB"));
    assert!(fails(&daemon.ctl(&["evict", &format!("{client}:5")]), 1).contains("no region 5"));
    assert!(fails(&daemon.ctl(&["limit", &client, "lots"]), 2).contains("size"));
    assert!(fails(&daemon.ctl(&["limit", &client, "1M"]), 2).contains("4 MiB"));
    assert!(fails(&daemon.ctl(&["frobnicate"]), 2).contains("frobnicate"));
    worker.quit();
    let missing = daemon.dir().join("nowhere");
    let stderr = fails(&ctl(&missing, &["status"]), 3);
    assert!(stderr.contains("no fmallocd answers") && stderr.contains("nowhere"), "{stderr}");
    assert!(stderr.contains("systemctl start fmallocd"), "{stderr}");
}

#[test]
fn other_users_see_and_change_their_own_clients_only() {
    use std::os::unix::process::CommandExt;
    let Some(daemon) = Daemon::start_with("32M", "64M", &["--allow-uid", &NOBODY.to_string()]) else {
        return;
    };
    let mut ours = daemon.client("8M");
    let mut theirs = daemon.worker_of(NOBODY);
    theirs.ask("connect 8M");
    let as_nobody = |arguments: &[&str]| {
        let mut command = std::process::Command::new(place::share("fmallocctl", daemon.dir()));
        command.arg("--json").arg("--socket").arg(daemon.socket()).args(arguments);
        command.uid(NOBODY).gid(NOBODY).output().unwrap()
    };
    let rows: Value = serde_json::from_slice(&as_nobody(&["clients"]).stdout).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(rows[0]["client"], theirs.client());
    let (ours_number, theirs_number) = (ours.client().to_string(), theirs.client().to_string());
    assert!(as_nobody(&["limit", &theirs_number, "9M"]).status.success());
    fails(&as_nobody(&["limit", &ours_number, "9M"]), 1);
    fails(&as_nobody(&["evict", &ours_number]), 1);
    wait_until("root sees both", || daemon.json(&["clients"]).as_array().unwrap().len() == 2);
    ours.quit();
    theirs.quit();
}
