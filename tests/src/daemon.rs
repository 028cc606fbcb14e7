//! A real `fmallocd` in a directory of its own, and what `fmallocctl` says about it.

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::failing::{self, Plan};
use crate::process::NOBODY;
use crate::{PATIENCE, Worker, place, process, wait_until};

/// A running daemon; ends with the value, and its files go with it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: TempDir,
    swap_dir: Option<TempDir>,
}

impl Daemon {
    /// Starts a daemon with a RAM pool and a swap file of these sizes. None where tests cannot run.
    #[must_use]
    pub fn start(ram: &str, swap: &str) -> Option<Self> {
        Self::start_with(ram, swap, &[])
    }

    /// [`Daemon::start`] with further arguments.
    ///
    /// # Panics
    /// If the daemon does not get ready.
    #[must_use]
    pub fn start_with(ram: &str, swap: &str, more: &[&str]) -> Option<Self> {
        place::can_page()
            .then(|| Self::run(Command::new(place::binary("fmallocd")), place::directory(), ram, swap, more))
    }

    /// [`Daemon::start_with`] of a daemon whose swap I/O fails as the plan says: not at all, at first.
    ///
    /// # Panics
    /// If the daemon does not get ready.
    #[must_use]
    pub fn start_failing(ram: &str, swap: &str, more: &[&str]) -> Option<(Self, Plan)> {
        place::can_page().then(|| {
            let dir = place::directory();
            let path = dir.path().join("plan");
            let plan = Plan::open(&path);
            let mut command = Command::new(place::binary("fmallocd-failing"));
            command.env(failing::PLAN, path);
            (Self::run(command, dir, ram, swap, more), plan)
        })
    }

    fn run(mut command: Command, dir: TempDir, ram: &str, swap: &str, more: &[&str]) -> Self {
        let log = File::create(dir.path().join("log")).expect("a file for the log");
        // Whatever this machine has configured is not for tests.
        File::create(dir.path().join("empty.toml")).expect("a configuration file");
        command.arg("--config").arg(dir.path().join("empty.toml"));
        command.arg("--socket").arg(dir.path().join("socket"));
        let swap_dir = place::swap_directory();
        command.arg("--swap").arg(swap_dir.as_ref().unwrap_or(&dir).path().join("swap"));
        command.args(["--ram", ram, "--swap-size", swap]).args(more);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a descriptor")).stderr(log);
        if place::is_user_mode() {
            // Now, as long as nobody runs it.
            place::share("fmalloc-worker", dir.path());
            command.uid(NOBODY).gid(NOBODY);
            for dir in std::iter::once(&dir).chain(&swap_dir) {
                chown(dir.path(), Some(NOBODY), Some(NOBODY)).expect("a directory of nobody's");
            }
        }
        let child = process::end_with_us(&mut command).spawn().expect("a daemon");
        let mut daemon = Self { child, dir, swap_dir };
        wait_until("the daemon is ready", || {
            let ended = daemon.child.try_wait().expect("a child to wait for");
            assert!(ended.is_none(), "the daemon ended: {ended:?}\n{}", daemon.log());
            daemon.log().lines().any(|line| line.ends_with("ready"))
        });
        daemon
    }

    /// Where its files are; other users may look, and tests may put files there.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its swap file.
    #[must_use]
    pub fn swap(&self) -> PathBuf {
        self.swap_dir.as_ref().unwrap_or(&self.dir).path().join("swap")
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir().join("socket")
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir().join("log")).unwrap_or_default()
    }

    /// A client process of this user, not connected yet.
    #[must_use]
    pub fn worker(&self) -> Worker {
        if place::is_user_mode() {
            return self.worker_of(NOBODY);
        }
        Worker::start(self.dir(), &place::binary("fmalloc-worker"), None, &[])
    }

    /// A client process of another user, not connected yet.
    #[must_use]
    pub fn worker_of(&self, uid: u32) -> Worker {
        Worker::start(self.dir(), &place::share("fmalloc-worker", self.dir()), Some(uid), &[])
    }

    /// A client process of this user with a budget.
    #[must_use]
    pub fn client(&self, budget: &str) -> Worker {
        let mut worker = self.worker();
        worker.ask(&format!("connect {budget}"));
        worker
    }

    /// Runs `fmallocctl` with these arguments.
    ///
    /// # Panics
    /// If it cannot be run.
    #[must_use]
    pub fn ctl(&self, arguments: &[&str]) -> Output {
        ctl(&self.socket(), arguments)
    }

    /// What `fmallocctl --json` prints.
    ///
    /// # Panics
    /// If it fails or prints something else.
    #[must_use]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.ctl(&[&["--json"], arguments].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "fmallocctl {arguments:?}: {}: {stderr}", output.status);
        serde_json::from_slice(&output.stdout).expect("JSON from fmallocctl")
    }

    /// A field of `fmallocctl status` that is a number.
    ///
    /// # Panics
    /// If there is no such field.
    #[must_use]
    pub fn status(&self, field: &str) -> u64 {
        number(&self.json(&["status"]), field)
    }

    /// The row of a client.
    ///
    /// # Panics
    /// If it is not listed.
    #[must_use]
    pub fn row(&self, worker: &mut Worker) -> Value {
        let client = worker.client();
        let rows = self.json(&["clients"]);
        let row = rows.as_array().expect("an array").iter().find(|row| row["client"] == client);
        row.unwrap_or_else(|| panic!("client {client} is not listed: {rows}")).clone()
    }

    /// Waits until nobody has anything any more.
    pub fn wait_until_empty(&self) {
        let mut status = Value::Null;
        wait_until("all is given back", || {
            status = self.json(&["status"]);
            ["clients", "regions", "pool_granted_bytes", "swap_claimed_bytes", "swap_used_bytes"]
                .iter()
                .all(|field| number(&status, field) == 0)
        });
    }

    /// Waits until there are so many clients.
    pub fn wait_until_clients(&self, count: u64) {
        wait_until("the others have left", || number(&self.json(&["status"]), "clients") == count);
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        process::signal(&self.child, signal);
    }

    /// Kills it as the kernel would, and waits until it is gone.
    ///
    /// # Panics
    /// If it cannot be waited for.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().expect("a child to wait for");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        process::wait(&mut self.child, PATIENCE).expect("the daemon does not end")
    }

    /// Whether it has not ended within this time.
    pub fn stays(&mut self, time: Duration) -> bool {
        process::wait(&mut self.child, time).is_none()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of fmallocd\n{}---", self.log());
        }
    }
}

/// Runs `fmallocctl` for the daemon at `socket`.
///
/// # Panics
/// If it cannot be run.
#[must_use]
pub fn ctl(socket: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(place::binary("fmallocctl"));
    command.arg("--socket").arg(socket).args(arguments).stdin(Stdio::null());
    process::end_with_us(&mut command).output().expect("fmallocctl")
}

/// A field that is a number.
///
/// # Panics
/// If there is no such field.
#[must_use]
pub fn number(object: &Value, field: &str) -> u64 {
    object[field].as_u64().unwrap_or_else(|| panic!("no number {field} in {object}"))
}
