//! What a user would otherwise have: the kernel's swap, in a file of its own, and a memory cgroup that limits a program.
//! Both go with the value.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

/// A swap file that is in use, and a place for cgroups.
#[derive(Debug)]
pub struct KernelSwap {
    file: PathBuf,
    cgroup: PathBuf,
    /// The file of the cgroup that holds the limit.
    limit: &'static str,
}

impl KernelSwap {
    /// Makes a swap file of `mib` MiB in `dir`. Needs root, and a memory controller.
    ///
    /// # Errors
    /// What is missing.
    pub fn start(dir: &Path, mib: u64) -> anyhow::Result<Self> {
        let name = format!("fmalloc-realworld-{}", std::process::id());
        let old = Path::new("/sys/fs/cgroup/memory");
        let (parent, limit) = if old.join("memory.limit_in_bytes").exists() {
            (old, "memory.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max")
        };
        let cgroup = parent.join(&name);
        fs::create_dir(&cgroup).context("making a memory cgroup")?;
        let swap = Self { file: dir.join(name), cgroup, limit };
        ensure!(swap.cgroup.join(limit).exists(), "no memory controller in {}", swap.cgroup.display());
        let file = File::create(&swap.file)?;
        fs::set_permissions(&swap.file, fs::Permissions::from_mode(0o600))?;
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, i64::try_from(mib << 20)?)?;
        for program in ["mkswap", "swapon"] {
            let output = Command::new(program).arg(&swap.file).output().context(program)?;
            if !output.status.success() {
                bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
            }
        }
        Ok(swap)
    }

    /// Has a program run within so many bytes.
    ///
    /// # Errors
    /// If the limit cannot be set.
    pub fn confine<'a>(&self, command: &'a mut Command, bytes: u64) -> anyhow::Result<&'a mut Command> {
        // Nobody is in it: what the last one left is not for the next.
        let _ = fs::write(self.cgroup.join("memory.force_empty"), "0");
        fs::write(self.cgroup.join(self.limit), bytes.to_string()).context("setting the limit")?;
        let procs = self.cgroup.join("cgroup.procs");
        // SAFETY: writing to a file is what a child may do; the path was made before.
        Ok(unsafe { command.pre_exec(move || fs::write(&procs, "0")) })
    }
}

impl Drop for KernelSwap {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(&self.file).output();
        let _ = fs::remove_file(&self.file);
        let _ = fs::remove_dir(&self.cgroup);
    }
}
