//! Memory cgroups, version 1 or 2, whichever this machine has: the limit under which a peer runs.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::undo::{Change, Step, Undo, run};

const PATIENCE: Duration = Duration::from_secs(10);
/// Where a hierarchy is mounted if this machine has none.
const OWN_MOUNT: &str = "/run/fmalloc-bench-cgroup";

/// Which interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// `memory.limit_in_bytes`.
    One,
    /// `memory.max`.
    Two,
}

/// The place where groups are made.
#[derive(Debug)]
pub(crate) struct Groups {
    parent: PathBuf,
    /// Which interface it has.
    pub(crate) version: Version,
    /// Whether the benchmark had to mount it.
    pub(crate) mounted: bool,
    _changes: Vec<Change>,
}

impl Groups {
    /// Finds the memory controller, mounting it where nobody has.
    ///
    /// # Errors
    /// That there is none, or that this process may not use it.
    pub(crate) fn find(undo: &Undo) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
        let mut changes = Vec::new();
        let (version, root, mounted) = match memory_mount(&mounts) {
            Some((version, root)) => (version, root, false),
            None => {
                let (version, change) = mount_own(undo)?;
                changes.extend(change);
                (version, PathBuf::from(OWN_MOUNT), true)
            }
        };
        let parent = match version {
            Version::One => {
                let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
                let below = own_group(&own).map(|path| root.join(path)).filter(|path| path.is_dir());
                below.unwrap_or(root)
            }
            // Below a group that has processes none can have the controller.
            Version::Two => {
                let control = root.join("cgroup.subtree_control");
                if !has_memory(&fs::read_to_string(&control).unwrap_or_default()) {
                    let step = Step::Restore(control.clone(), "-memory".to_owned());
                    let enable = || fs::write(&control, "+memory").context("enabling the memory controller");
                    changes.push(undo.change(step, enable)?.1);
                }
                root
            }
        };
        Ok(Self { parent, version, mounted, _changes: changes })
    }

    /// Makes a group, with a limit of so many bytes or none. It goes with the value, with all processes in it.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn make(&self, undo: &Undo, name: &str, limit: Option<u64>) -> Result<Group> {
        let path = self.parent.join(format!("fmalloc-bench-{}-{name}", std::process::id()));
        let step = Step::RemoveGroup(path.clone());
        let create = || fs::create_dir(&path).with_context(|| format!("making {}", path.display()));
        let ((), change) = undo.change(step, create)?;
        let file = match self.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        if let Some(limit) = limit {
            fs::write(path.join(file), limit.to_string()).with_context(|| format!("setting {file}"))?;
        }
        Ok(Group { path, version: self.version, _change: change })
    }
}

/// A group of processes.
#[derive(Debug)]
pub(crate) struct Group {
    path: PathBuf,
    version: Version,
    _change: Change,
}

impl Group {
    /// Has the command run in the group.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn enter(&self, command: &mut Command) -> Result<()> {
        let file = self.path.join("cgroup.procs");
        let procs: File = OpenOptions::new().write(true).open(&file).context("opening cgroup.procs")?;
        // SAFETY: one write, to a descriptor that the closure owns; async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                let written = libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1);
                if written == 1 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            });
        }
        Ok(())
    }

    /// The most memory that it had at once, in bytes.
    pub(crate) fn peak(&self) -> Option<u64> {
        let file = match self.version {
            Version::One => "memory.max_usage_in_bytes",
            Version::Two => "memory.peak",
        };
        fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }

    /// What of it the kernel holds compressed for zswap, in bytes. None where the kernel does not count that.
    pub(crate) fn zswap(&self) -> Option<u64> {
        fs::read_to_string(self.path.join("memory.zswap.current")).ok()?.trim().parse().ok()
    }
}

/// Ends all processes of a group and removes it.
///
/// # Errors
/// That it does not get empty.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let begin = Instant::now();
    // What is cached of files would stay charged to the group.
    while path.is_dir() {
        let procs = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines().filter_map(|line| line.parse::<i32>().ok()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        if procs.is_empty() {
            let _ = fs::write(path.join("memory.force_empty"), "1");
            if fs::remove_dir(path).is_ok() {
                break;
            }
        }
        if begin.elapsed() > PATIENCE {
            bail!("{} still has processes: {}", path.display(), procs.replace('\n', " "));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The mount that has the memory controller, in the text of /proc/self/mountinfo.
fn memory_mount(mounts: &str) -> Option<(Version, PathBuf)> {
    let mut second = None;
    for line in mounts.lines() {
        let Some((front, back)) = line.split_once(" - ") else { continue };
        let Some(place) = front.split(' ').nth(4).map(PathBuf::from) else { continue };
        let back: Vec<&str> = back.split(' ').collect();
        match back.as_slice() {
            ["cgroup", _, options] if options.split(',').any(|option| option == "memory") => {
                return Some((Version::One, place));
            }
            ["cgroup2", ..] => {
                let controllers = fs::read_to_string(place.join("cgroup.controllers")).unwrap_or_default();
                if has_memory(&controllers) {
                    second = Some((Version::Two, place));
                }
            }
            _ => {}
        }
    }
    second
}

fn mount_own(undo: &Undo) -> Result<(Version, Vec<Change>)> {
    let place = Path::new(OWN_MOUNT);
    let make = || fs::create_dir_all(place).with_context(|| format!("making {OWN_MOUNT}"));
    let ((), directory) = undo.change(Step::RemoveDirectory(place.to_owned()), make)?;
    let kinds: [(Version, &[&str]); 2] =
        [(Version::Two, &["cgroup2", "cgroup2"]), (Version::One, &["cgroup", "-o", "memory", "cgroup"])];
    for (version, kind) in kinds {
        let attach = || run("mount", &[&["-t"], kind, &[OWN_MOUNT]].concat());
        let Ok(((), change)) = undo.change(Step::Unmount(place.to_owned()), attach) else { continue };
        let controllers = fs::read_to_string(place.join("cgroup.controllers")).unwrap_or_default();
        if version == Version::One || has_memory(&controllers) {
            return Ok((version, vec![change, directory]));
        }
    }
    bail!(
        "this kernel has no memory cgroup to limit RAM with, of version 1 or 2, or this user may not mount it"
    )
}

/// The group of this process in a hierarchy of version 1, in the text of /proc/self/cgroup.
fn own_group(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        controllers.split(',').any(|name| name == "memory").then(|| path.trim_start_matches('/'))
    })
}

fn has_memory(controllers: &str) -> bool {
    controllers.split_whitespace().any(|name| name == "memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_is_found_by_its_controller() {
        let mounts = "30 20 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                      31 20 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n";
        assert_eq!(memory_mount(mounts), Some((Version::One, "/sys/fs/cgroup/memory".into())));
        assert_eq!(memory_mount("30 20 0:26 / /x rw - cgroup cgroup rw,cpu\n"), None);
        assert_eq!(own_group("9:name=systemd:/\n4:hugetlb,memory:/a/b\n"), Some("a/b"));
        assert!(!has_memory("cpu memory_x") && has_memory("cpu memory io"));
    }
}
