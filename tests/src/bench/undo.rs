//! The journal of what the benchmark has changed on the machine and how to put it back. A step is on disk before the
//! change is made; it is undone when its [`Change`] is dropped, when a signal ends the program, or, if the program was
//! killed, by the next one that starts.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};

use super::{group, peers};

/// Where the journal is. One benchmark at a time runs on a machine: it changes zswap for all.
const JOURNAL: &str = "/var/tmp/fmalloc-bench.undo";
/// Held for as long as a benchmark runs.
const LOCK: &str = "/var/tmp/fmalloc-bench.lock";
/// Two benchmarks at once would measure each other.
const PATIENCE: Duration = Duration::from_secs(600);

/// How to put one thing back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Step {
    /// A file.
    RemoveFile(PathBuf),
    /// A directory with all that is in it.
    RemoveDirectory(PathBuf),
    /// A swap file or device in use.
    SwapOff(PathBuf),
    /// A setting of the kernel and its former value.
    Restore(PathBuf, String),
    /// A zram device of this number.
    RemoveZram(u32),
    /// A cgroup, with all processes in it.
    RemoveGroup(PathBuf),
    /// A mount.
    Unmount(PathBuf),
    /// A module of the kernel.
    Unload(String),
}

/// What is in the journal.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    /// Swap, cgroups and devices do not outlive the machine's start.
    boot: String,
    steps: Vec<(u64, Step)>,
    next: u64,
}

/// The journal of this run. Clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct Undo(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    journal: Mutex<Journal>,
    _lock: File,
}

/// Something that has been changed; put back when dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Change {
    undo: Undo,
    number: u64,
}

impl Undo {
    /// Waits until no other benchmark runs, and puts back what one that was killed has left.
    ///
    /// # Errors
    /// What the file system says, or another benchmark that does not end.
    pub(crate) fn open() -> Result<Self> {
        let lock = File::create(LOCK).with_context(|| format!("creating {LOCK}"))?;
        let begin = Instant::now();
        while lock.try_lock().is_err() {
            if begin.elapsed() > PATIENCE {
                anyhow::bail!("another fmalloc-bench runs (it holds {LOCK}); try again when it has ended");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let boot =
            fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
        if let Ok(text) = fs::read_to_string(JOURNAL) {
            let left: Journal = serde_json::from_str(&text).unwrap_or_default();
            eprintln!("fmalloc-bench: putting back what a benchmark that was killed has left");
            for (_, step) in left.steps.iter().rev() {
                if left.boot == boot || matches!(step, Step::RemoveFile(_) | Step::RemoveDirectory(_)) {
                    step.undo();
                }
            }
            let _ = fs::remove_file(JOURNAL);
        }
        let journal = Mutex::new(Journal { boot, ..Journal::default() });
        Ok(Self(Arc::new(Inner { journal, _lock: lock })))
    }

    /// Has a signal that ends the program put everything back first. To be called before any thread is started.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn on_signals(&self) -> Result<()> {
        let mut signals = SigSet::empty();
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().for_each(|signal| signals.add(signal));
        signals.thread_block().context("blocking signals")?;
        let undo = self.clone();
        let watch = move || {
            if let Ok(signal) = signals.wait() {
                eprintln!("\nfmalloc-bench: {signal}: putting everything back");
                // Held until the end: nothing more can be changed.
                let mut journal = undo.lock();
                while let Some((_, step)) = journal.steps.pop() {
                    step.undo();
                }
                let _ = fs::remove_file(JOURNAL);
                std::process::exit(128 + signal as i32);
            }
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(watch).context("starting a thread")?;
        Ok(())
    }

    /// Makes a change that `step` puts back.
    ///
    /// # Errors
    /// Those of the journal, and of the change: it is undone then, as it may have been made in part.
    pub(crate) fn change<T>(&self, step: Step, make: impl FnOnce() -> Result<T>) -> Result<(T, Change)> {
        let mut journal = self.lock();
        let number = journal.next;
        journal.next += 1;
        journal.steps.push((number, step));
        write(&journal)?;
        let change = Change { undo: self.clone(), number };
        let made = make();
        drop(journal);
        made.map(|made| (made, change))
    }

    fn lock(&self) -> MutexGuard<'_, Journal> {
        self.0.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        let mut journal = self.undo.lock();
        if let Some(place) = journal.steps.iter().position(|(number, _)| *number == self.number) {
            journal.steps[place].1.undo();
            journal.steps.remove(place);
            let _ = write(&journal);
        }
    }
}

fn write(journal: &Journal) -> Result<()> {
    if journal.steps.is_empty() {
        let _ = fs::remove_file(JOURNAL);
        return Ok(());
    }
    // Renamed into place: a journal cut short would undo nothing.
    let new = format!("{JOURNAL}.new");
    let mut file = File::create(&new).with_context(|| format!("creating {new}"))?;
    file.write_all(&serde_json::to_vec(journal)?)?;
    fs::rename(&new, JOURNAL).with_context(|| format!("writing {JOURNAL}"))
}

impl Step {
    /// Does what it says; where that fails says so, since nobody else will.
    fn undo(&self) {
        let outcome = match self {
            Self::RemoveFile(path) => gone(fs::remove_file(path)),
            Self::RemoveDirectory(path) => gone(fs::remove_dir_all(path)),
            Self::SwapOff(path) => peers::swap::off(path),
            Self::Restore(path, value) => fs::write(path, value).map_err(Into::into),
            Self::RemoveZram(number) => peers::zram::remove(*number),
            Self::RemoveGroup(path) => group::remove(path),
            Self::Unmount(path) => run("umount", &[&path.display().to_string()]),
            Self::Unload(module) => run("rmmod", &[module]),
        };
        if let Err(error) = outcome {
            eprintln!("fmalloc-bench: could not put back {self:?}: {error:#}");
        }
    }
}

/// What is gone already needs no removal.
fn gone(outcome: std::io::Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Runs a program of the system.
///
/// # Errors
/// That it is not there, or what it says.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("running {program}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), text.trim());
    Ok(())
}

/// Changes a setting of the kernel for as long as the value lives.
///
/// # Errors
/// That it cannot be read or written.
pub(crate) fn set(undo: &Undo, file: &Path, value: &str) -> Result<Change> {
    let former = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let step = Step::Restore(file.to_owned(), former.trim().to_owned());
    let write = || fs::write(file, value).with_context(|| format!("writing {value} to {}", file.display()));
    undo.change(step, write).map(|((), change)| change)
}
