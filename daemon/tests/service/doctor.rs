//! `fmallocctl doctor` on the machine that runs the tests, by different users and in different surroundings.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::support::{FMALLOCCTL, FMALLOCD, is_root, place, wait_until};

/// Copies of the programs where every user can run them, and no service unless one is started.
struct Clinic(TempDir);

impl Clinic {
    fn new() -> Self {
        let place = place();
        for program in [FMALLOCCTL, FMALLOCD] {
            fs::copy(program, place.path().join(Path::new(program).file_name().unwrap())).unwrap();
        }
        Self(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A doctor that asks for the socket of this place.
    fn doctor(&self) -> Command {
        let mut command = Command::new(self.path("fmallocctl"));
        command.args(["doctor", "--quick", "--json", "--socket"]).arg(self.path("socket"));
        command.env_remove("FMALLOC_DAEMON").env_remove("FMALLOC_SWAP_DIR").stderr(Stdio::null());
        command
    }

    fn service(&self, args: &[&str]) -> Service {
        let mut command = Command::new(FMALLOCD);
        command.arg("--socket").arg(self.path("socket")).arg("--swap").arg(self.path("swap"));
        command.args(["--swap-size", "16M", "--ram", "64M"]).args(args).stderr(Stdio::null());
        let service = Service(command.spawn().unwrap());
        wait_until("the service is ready", || self.path("socket").exists());
        service
    }
}

struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the doctor finds, and its exit code.
fn examine(command: &mut Command) -> (Value, i32) {
    let output = command.output().unwrap();
    let found = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (found, output.status.code().unwrap())
}

fn check<'a>(found: &'a Value, area: &str, name: &str) -> &'a Value {
    let checks = found["checks"].as_array().unwrap();
    let matches = |check: &&Value| check["area"] == area && check["check"] == name;
    checks.iter().find(matches).unwrap_or_else(|| panic!("no {area}/{name} in {found:#}"))
}

#[test]
fn every_finding_is_complete() {
    let clinic = Clinic::new();
    let (found, code) = examine(&mut clinic.doctor());
    assert_eq!(code == 0, found["usable"].as_bool().unwrap());
    assert!(code == 0 || code == 4, "{code}");
    assert_eq!(found["usable"], found["service"].as_bool().unwrap() || found["private"].as_bool().unwrap());
    for check in found["checks"].as_array().unwrap() {
        let state = check["state"].as_str().unwrap();
        assert!(["ok", "note", "costs", "blocks"].contains(&state), "{check}");
        assert!(!check["found"].as_str().unwrap().is_empty(), "{check}");
        // Whatever is missing has a price.
        assert_eq!(
            check["cost"].is_string(),
            ["costs", "blocks"].contains(&state) || check["cost"].is_string()
        );
        assert!(check["cost"].is_string() || check["mend"].is_null(), "{check}");
    }
    for feature in ["MOVE", "POISON", "EVENT_FORK", "THREAD_ID"] {
        assert!(["yes", "no", "denied"].contains(&found["features"][feature].as_str().unwrap()), "{found:#}");
    }
}

#[test]
fn without_a_service_it_says_how_to_start_one() {
    let clinic = Clinic::new();
    let (found, _) = examine(&mut clinic.doctor());
    assert_eq!(found["service"], false);
    let socket = check(&found, "service", "socket");
    assert_eq!(socket["state"], "blocks");
    assert!(socket["mend"].as_str().unwrap().contains("fmallocd"), "{socket}");
}

#[test]
fn root_with_a_service_can_do_everything() {
    if !is_root() {
        return;
    }
    let clinic = Clinic::new();
    let _service = clinic.service(&[]);
    let (found, code) = examine(&mut clinic.doctor());
    assert_eq!(code, 0);
    for way in ["usable", "service", "private", "private_user_mode"] {
        assert_eq!(found[way], true, "{way}: {found:#}");
    }
    for name in ["MOVE", "faults", "faults in system calls", "events"] {
        assert_eq!(check(&found, "kernel", name)["state"], "ok", "{found:#}");
    }
    assert!(found["figures"]["private_start_ms"].as_u64().unwrap() < 5000);
}

#[test]
fn unprivileged_user_is_helped_by_a_service_that_admits_him() {
    if !is_root() {
        return;
    }
    let clinic = Clinic::new();
    let as_nobody = || {
        let mut command = clinic.doctor();
        command.uid(65534).gid(65534);
        examine(&mut command)
    };
    let (alone, code) = as_nobody();
    // Unless the machine lets everybody have a userfaultfd.
    if alone["private"] == false {
        assert_eq!((code, &alone["usable"]), (4, &Value::Bool(false)));
        assert!(check(&alone, "permissions", "/dev/userfaultfd")["mend"].is_string());
        let call = check(&alone, "permissions", "userfaultfd(2)");
        assert!(call["mend"].as_str().unwrap().contains("vm.unprivileged_userfaultfd=1"), "{call}");
        assert_eq!(alone["private_user_mode"], true);
    }

    {
        let _service = clinic.service(&["--socket-mode", "0666"]);
        let (refused, _) = as_nobody();
        assert_eq!(refused["service"], false);
        let admission = check(&refused, "service", "admission");
        assert_eq!(admission["state"], "blocks");
        assert!(admission["mend"].is_string(), "{admission}");
    }
    fs::remove_file(clinic.path("socket")).unwrap();

    let _service = clinic.service(&["--allow-uid", "nobody"]);
    let (helped, code) = as_nobody();
    assert_eq!((code, &helped["service"]), (0, &Value::Bool(true)), "{helped:#}");
    assert_eq!(check(&helped, "service", "userfaultfd")["state"], "ok");
    assert_eq!(check(&helped, "kernel", "faults in system calls")["state"], "ok");
}

#[test]
fn missing_or_broken_daemon_program_closes_the_private_way() {
    let clinic = Clinic::new();
    for program in ["/nonexistent/fmallocd", "/bin/false"] {
        let (found, _) = examine(clinic.doctor().env("FMALLOC_DAEMON", program));
        assert_eq!(found["private"], false);
        assert_eq!(check(&found, "private daemon", "fmallocd")["state"], "blocks");
    }
}

#[test]
fn swap_directory_in_ram_or_missing_is_told() {
    let clinic = Clinic::new();
    let (found, _) = examine(clinic.doctor().args(["--swap-dir", "/dev/shm"]));
    let swap = check(&found, "disk", "private swap");
    assert_eq!(swap["state"], "costs", "{swap}");
    assert_eq!(found["private"], false, "the daemon refuses it");
    let (found, _) = examine(clinic.doctor().args(["--swap-dir", "/nonexistent"]));
    assert_eq!(check(&found, "disk", "private swap")["state"], "blocks");
}

#[test]
fn limits_of_the_shell_are_told() {
    let clinic = Clinic::new();
    let doctor = clinic.doctor();
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "ulimit -v 4000000; exec \"$0\" \"$@\""])
        .arg(doctor.get_program())
        .args(doctor.get_args());
    let (found, _) = examine(&mut limited);
    assert_eq!(check(&found, "permissions", "ulimit -v")["state"], "costs");
}

#[test]
fn without_move_it_warns_of_direct_io_into_regions() {
    let clinic = Clinic::new();
    let (found, _) = examine(clinic.doctor().env("FMALLOC_DISABLE", "poison, move"));
    let movement = check(&found, "kernel", "MOVE");
    assert_eq!(movement["state"], "costs", "{movement}");
    assert!(movement["cost"].as_str().unwrap().contains("O_DIRECT"), "{movement}");
}

#[test]
fn speed_of_the_disk_is_measured_and_nothing_is_left() {
    let clinic = Clinic::new();
    let swap = clinic.path("swap");
    fs::create_dir(&swap).unwrap();
    let mut command = Command::new(FMALLOCCTL);
    command.args(["doctor", "--json", "--socket", "/nonexistent/socket", "--swap-dir"]).arg(&swap);
    let (found, _) = examine(command.env("FMALLOC_DAEMON", FMALLOCD));
    if check(&found, "disk", "direct I/O")["state"] == "ok" {
        for figure in ["disk_write_bytes_s", "disk_read_bytes_s", "disk_page_us"] {
            assert!(found["figures"][figure].as_u64().unwrap() > 0, "{figure}");
        }
    }
    assert_eq!(fs::read_dir(&swap).unwrap().count(), 0);
}

#[test]
fn text_names_everything_that_json_does() {
    let clinic = Clinic::new();
    let (found, _) = examine(&mut clinic.doctor());
    let mut command = clinic.doctor();
    let args: Vec<_> = command.get_args().filter(|arg| *arg != "--json").map(ToOwned::to_owned).collect();
    command = Command::new(command.get_program());
    let text = String::from_utf8(command.args(args).output().unwrap().stdout).unwrap();
    for check in found["checks"].as_array().unwrap() {
        assert!(text.contains(check["check"].as_str().unwrap()), "{check}: {text}");
    }
    assert!(text.lines().last().unwrap().starts_with("fmalloc can"), "{text}");
}
