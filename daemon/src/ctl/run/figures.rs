//! What a run has cost: asked of the daemon, and seen in /proc.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use fmalloc_proto::PAGE;
use fmalloc_proto::groups::{GroupStats, GroupToken};
use fmalloc_proto::messages::{Reply, Request};
use fmalloc_proto::size::Size;
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;
use serde::Serialize;

use super::Options;
use super::server::Server;

/// The tree is measured no more often than this: it takes as long as the tree is large.
const MEASURE: Duration = Duration::from_millis(100);

/// Collected while the program runs.
#[derive(Debug)]
pub(super) struct Figures {
    server: Server,
    last: Option<Instant>,
    peak_tree: u64,
}

/// As JSON. Sizes in bytes, times in seconds, the rest numbers of pages or faults.
#[derive(Debug, Serialize)]
struct Report {
    /// For the program and all that it started.
    budget_bytes: u64,
    /// Most paged memory in RAM at once, with what the daemon holds for it. Never above the budget.
    peak_paged_resident_bytes: u64,
    /// Most that all processes of the program, and the daemon for them, had in RAM at once, seen from outside.
    peak_tree_resident_bytes: u64,
    /// From start to end.
    wall_seconds: f64,
    /// Processes that were paged.
    paged_processes: u64,
    faults: u64,
    faults_zero: u64,
    faults_read: u64,
    faults_rescued: u64,
    faults_stalled: u64,
    pages_in: u64,
    pages_readahead: u64,
    pages_out: u64,
    pages_clean: u64,
    pages_zero: u64,
    poisoned_pages: u64,
    io_errors: u64,
}

impl Figures {
    pub(super) fn new(server: Server) -> Self {
        Self { server, last: None, peak_tree: 0 }
    }

    /// Looks at the tree, if it is time.
    pub(super) fn look(&mut self, root: Pid) {
        if self.last.is_some_and(|last| last.elapsed() < MEASURE) {
            return;
        }
        let mut tree = descendants(std::process::id());
        if tree.is_empty() {
            tree.push(root.as_raw().cast_unsigned());
        }
        // Shared pages count once; only where several share does the kernel have to look at each.
        let each = if tree.len() == 1 { resident } else { proportional };
        let mut sum: u64 = tree.into_iter().filter_map(each).sum();
        sum += match self.server.own {
            Some(daemon) => resident(daemon).unwrap_or(0),
            None => self.ask().map_or(0, |group| group.stats.overhead_bytes),
        };
        self.peak_tree = self.peak_tree.max(sum);
        self.last = Some(Instant::now());
    }

    /// Prints what is wanted, now that the program has ended.
    pub(super) fn print(&mut self, options: &Options, wall: Duration) {
        // The largest process as the kernel remembers it, should it have gone by between two looks.
        let largest = getrusage(UsageWho::RUSAGE_CHILDREN).map_or(0, |usage| usage.max_rss());
        let own = self.server.own.and_then(resident).unwrap_or(0);
        self.peak_tree = self.peak_tree.max(u64::try_from(largest).unwrap_or(0) * 1024 + own);
        let Some(group) = self.ask() else {
            eprintln!("fmallocctl: no figures: the daemon does not answer any more");
            return;
        };
        let report = Report::new(&group, self.peak_tree, wall);
        if let Some(path) = &options.stats_json
            && let Err(error) = report.write(path)
        {
            eprintln!("fmallocctl: --stats-json {}: {error}", path.display());
        }
        if options.stats {
            let _ = io::stderr().write_all(report.text().as_bytes());
        }
    }

    fn ask(&mut self) -> Option<GroupStats> {
        match self.server.link.ask(&Request::GroupStats(GroupToken { token: self.server.token })) {
            Ok(Reply::GroupStats(stats)) => Some(*stats),
            _ => None,
        }
    }
}

impl Report {
    fn new(group: &GroupStats, peak_tree: u64, wall: Duration) -> Self {
        let stats = &group.stats;
        Self {
            budget_bytes: stats.budget_bytes,
            peak_paged_resident_bytes: stats.peak_resident_pages * PAGE,
            peak_tree_resident_bytes: peak_tree,
            wall_seconds: wall.as_secs_f64(),
            // One was the trial.
            paged_processes: group.members_ever.saturating_sub(1),
            faults: stats.faults,
            faults_zero: stats.faults_zero,
            faults_read: stats.faults_read,
            faults_rescued: stats.faults_rescued,
            faults_stalled: stats.faults_stalled,
            pages_in: stats.pages_in,
            pages_readahead: stats.pages_readahead,
            pages_out: stats.pages_out,
            pages_clean: stats.pages_clean,
            pages_zero: stats.pages_zero,
            poisoned_pages: stats.poisoned_pages,
            io_errors: stats.io_errors,
        }
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(path, text)
    }

    fn text(&self) -> String {
        let size = |pages: u64| Size(pages * PAGE);
        let mut text = format!(
            "fmalloc: {:.2} s within {} of RAM: at most {} of paged memory in RAM, {} with code, stacks and the daemon\n\
             fmalloc: {} faults: {} first touches, {} read from swap, {} answered without I/O, {} had to wait for RAM\n\
             fmalloc: {} read back ({} ahead of use), {} written; {} went out unchanged, {} as zeros\n",
            self.wall_seconds,
            Size(self.budget_bytes),
            Size(self.peak_paged_resident_bytes),
            Size(self.peak_tree_resident_bytes),
            self.faults,
            self.faults_zero,
            self.faults_read,
            self.faults_rescued,
            self.faults_stalled,
            size(self.pages_in),
            size(self.pages_readahead),
            size(self.pages_out),
            size(self.pages_clean),
            size(self.pages_zero),
        );
        if self.paged_processes == 0 {
            text.push_str("fmalloc: no process was large enough to be paged\n");
        }
        if self.poisoned_pages + self.io_errors > 0 {
            let lost = format!("{} pages were lost, {} I/O errors", self.poisoned_pages, self.io_errors);
            text.push_str(&format!("fmalloc: {lost}\n"));
        }
        text
    }
}

/// A field of /proc/meminfo in bytes.
pub(super) fn meminfo(field: &str) -> Option<u64> {
    field_of(&fs::read_to_string("/proc/meminfo").ok()?, field)
}

fn field_of(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// What a process has in RAM, pages that it shares included.
fn resident(pid: u32) -> Option<u64> {
    field_of(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmRSS")
}

/// What a process has in RAM, its part of what it shares.
fn proportional(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
    text.ok().and_then(|text| field_of(&text, "Pss")).or_else(|| resident(pid))
}

/// All processes below this one.
fn descendants(root: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pairs: Vec<(u32, u32)> = entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name before it may hold anything.
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(pairs.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.remove(0);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_below_this_process_and_has_memory() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert!(descendants(std::process::id()).contains(&child.id()));
        assert!(!descendants(child.id()).contains(&child.id()));
        assert!(proportional(child.id()).unwrap() <= resident(child.id()).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(meminfo("MemTotal") > meminfo("MemAvailable"));
    }
}
