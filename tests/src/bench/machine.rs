//! What this machine is: figures without it mean nothing.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::group::Version;

/// What the JSON says about the machine.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    kernel: String,
    cpu: String,
    cpus: usize,
    ram_bytes: u64,
    virtual_machine: bool,
    file_system: String,
    cgroup: u8,
    cgroup_mounted: bool,
    transparent_huge_pages: String,
    swappiness: String,
    page_cluster: String,
    other_swap: usize,
    optimised: bool,
}

impl Machine {
    /// This one, with the files of the benchmark in `dir`.
    pub(crate) fn this(dir: &Path, version: Version, cgroup_mounted: bool) -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = read("/proc/meminfo");
        let kib = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        let huge = read("/sys/kernel/mm/transparent_hugepage/enabled");
        Self {
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu: model.map_or_else(String::new, |(_, name)| name.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, Into::into),
            ram_bytes: kib * 1024,
            virtual_machine: cpuinfo.contains(" hypervisor"),
            file_system: file_system(&read("/proc/self/mounts"), dir),
            cgroup: if version == Version::One { 1 } else { 2 },
            cgroup_mounted,
            transparent_huge_pages: huge.split(['[', ']']).nth(1).unwrap_or("none").to_owned(),
            swappiness: read("/proc/sys/vm/swappiness"),
            page_cluster: read("/proc/sys/vm/page-cluster"),
            other_swap: read("/proc/swaps").lines().skip(1).count(),
            optimised: !cfg!(debug_assertions),
        }
    }

    /// One line for people.
    pub(crate) fn line(&self) -> String {
        format!(
            "Linux {} on {} CPUs ({}{}), {} GiB of RAM, {}, memory cgroup v{}{}",
            self.kernel,
            self.cpus,
            self.cpu,
            if self.virtual_machine { ", virtual" } else { "" },
            self.ram_bytes.div_ceil(1 << 30),
            self.file_system,
            self.cgroup,
            if self.cgroup_mounted { ", mounted for this" } else { "" },
        )
    }

    /// What makes figures of this machine doubtful.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.optimised {
            warnings.push("this is not the release build: its figures mean nothing".to_owned());
        }
        if self.other_swap > 0 {
            warnings
                .push("this machine has other swap as well, which zswap may compress meanwhile".to_owned());
        }
        warnings
    }
}

fn read(file: &str) -> String {
    fs::read_to_string(file).unwrap_or_default().trim().to_owned()
}

/// Kind and options of the file system that `dir` is on, in the text of /proc/self/mounts.
fn file_system(mounts: &str, dir: &Path) -> String {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let holding = fields.filter(|fields| fields.len() > 3 && dir.starts_with(fields[1]));
    // Of mounts at the same place the last one is on top.
    let longest = holding.max_by_key(|fields| fields[1].len());
    longest.map_or_else(String::new, |fields| format!("{} ({})", fields[2], fields[3]))
}
