//! RAM, and what limits it.

use std::fs::read_to_string;

use fmalloc_proto::limits::MIN_BUDGET;
use fmalloc_proto::size::Size;

use super::report::{Report, State, sysctl};
use crate::control::cgroup;

pub(super) fn examine(report: &mut Report) {
    report.area("memory");
    let meminfo = read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    if let (Some(total), Some(available)) = (field("MemTotal"), field("MemAvailable")) {
        report.figure("ram_bytes", total);
        report.ok("RAM", format!("{}, {} available", Size(total), Size(available)));
    }
    overcommit(report);
    control_group(report);
}

fn overcommit(report: &mut Report) {
    if read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() == "2") {
        report.lacks(
            "overcommit",
            State::Costs,
            "vm.overcommit_memory=2: the kernel grants addresses only as far as RAM and its own swap suffice",
            "regions larger than that are refused, whatever swap fmalloc has",
            sysctl("vm.overcommit_memory=0"),
        );
    } else {
        report.ok("overcommit", "allowed: regions may be larger than RAM");
    }
}

fn control_group(report: &mut Report) {
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let has_memory =
        |line: &&str| line.split(':').nth(1).unwrap_or_default().split(',').any(|name| name == "memory");
    let version = match groups.lines().find(has_memory) {
        Some(_) => "version 1",
        None if groups.lines().any(|line| line.starts_with("0::")) => "version 2",
        None => return report.ok("cgroup", "none"),
    };
    let Some(limit) = cgroup::memory_limit(std::process::id().cast_signed()) else {
        return report.ok("cgroup", format!("{version}, no memory limit on this process"));
    };
    report.figure("cgroup_limit_bytes", limit);
    let found = format!("{version}, memory limit of {}", Size(limit));
    if limit / 4 * 3 < MIN_BUDGET {
        let cost = format!("a budget is at least {}, and would exceed the limit", Size(MIN_BUDGET));
        let mend =
            "raise it: systemctl set-property UNIT MemoryMax=1G, or docker update --memory 1G CONTAINER";
        report.lacks("cgroup", State::Blocks, found, cost, mend);
    } else {
        report.note(
            "cgroup",
            format!("{found}: keep budgets below it; the default budget is at most 3/4 of it"),
        );
    }
}
