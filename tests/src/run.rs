//! Programs under `fmallocctl run`, with a daemon of their own, and what they have cost.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::{MIB, daemon, place, process};

/// What a tree of processes may take beyond its budget: code, stacks, libc's own.
pub const BESIDE: u64 = 64 * MIB;

/// A place for runs.
#[derive(Debug)]
pub struct Runs {
    dir: TempDir,
}

/// What came of one.
#[derive(Debug)]
pub struct Done {
    /// Status and output.
    pub output: Output,
    /// The figures of `--stats-json`; null if nothing was run.
    pub stats: Value,
}

impl Runs {
    /// None where tests cannot run.
    #[must_use]
    pub fn new() -> Option<Self> {
        place::can_page().then(|| Self { dir: place::directory() })
    }

    /// A directory for files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `fmallocctl run` with these options, to which the program and its arguments are to be added.
    #[must_use]
    pub fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(place::binary("fmallocctl"));
        for name in ["FMALLOC_SOCKET", "FMALLOC_SWAP_DIR", "FMALLOC_DAEMON", "LD_PRELOAD", "XDG_RUNTIME_DIR"]
        {
            command.env_remove(name);
        }
        command.arg("run");
        if !options.contains(&"--swap-dir") {
            command.arg("--swap-dir").arg(self.dir());
        }
        command.args(options).arg("--").stdin(Stdio::null());
        // A panic for want of memory has none for a trace either.
        process::end_with_us(command.env("RUST_BACKTRACE", "0"));
        command
    }

    /// Runs a program within a budget, with a swap file of at most 4 GiB.
    ///
    /// # Panics
    /// If `fmallocctl` cannot be run.
    pub fn run(&self, ram: &str, program: impl AsRef<OsStr>, arguments: &[&str]) -> Done {
        self.run_with(&["--ram", ram, "--swap-size", "4G"], program, arguments)
    }

    /// [`Runs::run`] with options.
    ///
    /// # Panics
    /// As [`Runs::run`].
    pub fn run_with(&self, options: &[&str], program: impl AsRef<OsStr>, arguments: &[&str]) -> Done {
        let json = self.dir().join("stats.json");
        let _ = fs::remove_file(&json);
        let json_text = json.display().to_string();
        let mut command = self.command(&[options, &["--stats-json", &json_text]].concat());
        let output = command.arg(program).args(arguments).output().expect("fmallocctl");
        let text = fs::read(&json).unwrap_or_default();
        Done { output, stats: serde_json::from_slice(&text).unwrap_or(Value::Null) }
    }
}

/// The program of this package that calls libc in every way.
#[must_use]
pub fn program() -> PathBuf {
    place::binary("fmalloc-program")
}

impl Done {
    /// The program ended well.
    ///
    /// # Panics
    /// If not.
    #[must_use]
    pub fn succeeded(self) -> Self {
        assert!(self.output.status.success(), "{self}");
        self
    }

    /// It was really paged, and kept within its budget.
    ///
    /// # Panics
    /// If not.
    #[must_use]
    pub fn paged(self) -> Self {
        let (budget, peak) = ("budget_bytes", "peak_paged_resident_bytes");
        assert!(daemon::number(&self.stats, peak) <= daemon::number(&self.stats, budget), "{self}");
        self.forked()
    }

    /// [`Done::paged`] for a program that forked: right after that, pages that both sides share are counted twice.
    ///
    /// # Panics
    /// If not.
    #[must_use]
    pub fn forked(self) -> Self {
        let field = |name| daemon::number(&self.stats, name);
        assert!(field("pages_out") > 0, "nothing was written to swap: {self}");
        assert!(field("peak_tree_resident_bytes") <= field("budget_bytes") + BESIDE, "{self}");
        assert_eq!((field("poisoned_pages"), field("io_errors")), (0, 0), "{self}");
        self
    }

    /// What it printed.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    /// What it said.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (status, stats) = (self.output.status, &self.stats);
        write!(f, "{status}\n--- stdout\n{}--- stderr\n{}--- stats\n{stats:#}", self.stdout(), self.stderr())
    }
}
