//! fmalloc's daemon, in the same cgroup as its client.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::swap::SwapFile;
use crate::bench::group::Group;
use crate::process;

const PATIENCE: Duration = Duration::from_secs(30);

/// A running `fmallocd`; ended with the value.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    /// Where it listens.
    pub(crate) socket: PathBuf,
}

impl Daemon {
    /// Starts it with this budget, on the swap file, its own files in `dir`.
    ///
    /// # Errors
    /// That it is not built, or does not get ready: with its log.
    pub(crate) fn start(dir: &Path, swap: &SwapFile, budget: u64, group: &Group) -> Result<Self> {
        let program = program()?;
        let (socket, log, config) = (dir.join("socket"), dir.join("log"), dir.join("empty.toml"));
        for file in [&socket, &log] {
            let _ = fs::remove_file(file);
        }
        File::create(&config)?;
        let mut command = Command::new(&program);
        command.arg("--config").arg(config).arg("--socket").arg(&socket).arg("--swap").arg(&swap.path);
        let budget = budget.to_string();
        command.args(["--swap-size", &swap.bytes.to_string(), "--ram", &budget, "--default-budget", &budget]);
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        group.enter(&mut command)?;
        let child = process::end_with_us(&mut command).spawn();
        let mut daemon = Self { child: child.with_context(|| program.display().to_string())?, socket };
        let begin = Instant::now();
        loop {
            let text = fs::read_to_string(&log).unwrap_or_default();
            if text.lines().any(|line| line.ends_with("ready")) {
                return Ok(daemon);
            }
            if let Some(status) = daemon.child.try_wait()? {
                bail!("fmallocd ended with {status}:\n{text}");
            }
            if begin.elapsed() > PATIENCE {
                bail!("fmallocd does not get ready:\n{text}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The `fmallocd` built with this program.
///
/// # Errors
/// That it is not there.
pub(crate) fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("the path of this program")?;
    let program = own.with_file_name("fmallocd");
    if !program.is_file() {
        bail!("{} is missing: run `make bench`, or build all programs as this one", program.display());
    }
    Ok(program)
}
