//! Whether somebody else used the machine while something was measured: CPU time that went neither to the benchmark nor
//! to the kernel's own threads, and time that the machine's host took.

use std::collections::HashMap;
use std::fs;

use serde::Serialize;

use super::child::{cpu_in, ticks_per_second};

/// Above this part of all CPUs a run's figures are doubtful.
pub(crate) const TOLERATED: f64 = 0.05;
/// In /proc/PID/stat: a thread of the kernel.
const PF_KTHREAD: u64 = 0x20_0000;

/// The CPU times of the machine at one moment, in seconds.
#[derive(Debug)]
pub(crate) struct Moment {
    busy: f64,
    stolen: f64,
    all: f64,
    kernel: HashMap<u32, f64>,
    own: f64,
}

/// Parts of all CPU time between two moments.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub(crate) struct Load {
    /// Other programs.
    pub(crate) others: f64,
    /// The host of a virtual machine.
    pub(crate) stolen: f64,
}

impl Moment {
    /// Now. Children of the benchmark count once they have been waited for.
    pub(crate) fn now() -> Self {
        let (busy, stolen, all) = machine(&fs::read_to_string("/proc/stat").unwrap_or_default());
        let mut kernel = HashMap::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            if is_of_the_kernel(&stat) {
                kernel.insert(pid, cpu_in(&stat).unwrap_or_default().total());
            }
        }
        Self { busy, stolen, all, kernel, own: own() }
    }

    /// What others did since `self`.
    pub(crate) fn until(&self, end: &Self) -> Load {
        let all = (end.all - self.all).max(0.01);
        let before = |pid| self.kernel.get(pid).copied().unwrap_or(0.0);
        let kernel: f64 = end.kernel.iter().map(|(pid, time)| (time - before(pid)).max(0.0)).sum();
        let others = end.busy - self.busy - kernel - (end.own - self.own);
        Load { others: (others / all).max(0.0), stolen: (end.stolen - self.stolen) / all }
    }
}

/// Busy, stolen and all time of all CPUs, from the text of /proc/stat.
fn machine(stat: &str) -> (f64, f64, f64) {
    let line = stat.lines().next().unwrap_or_default();
    let fields = line.split_whitespace().skip(1).map(|field| field.parse::<f64>().unwrap_or(0.0));
    // user nice system idle iowait irq softirq steal; the rest is part of user.
    let times: Vec<f64> = fields.take(8).map(|ticks| ticks / ticks_per_second()).collect();
    let at = |n: usize| times.get(n).copied().unwrap_or(0.0);
    // Interrupts hit whoever runs: they are the disk's, mostly.
    (at(0) + at(1) + at(2), at(7), times.iter().sum())
}

fn is_of_the_kernel(stat: &str) -> bool {
    let flags =
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & PF_KTHREAD != 0)
}

/// CPU time of this process and of the children that it has waited for.
fn own() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().skip(11).take(4);
    fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / ticks_per_second()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_time_is_split() {
        let stat = "cpu  100 0 100 700 50 20 20 10 0 0\ncpu0 1 2 3\n";
        let (busy, stolen, all) = machine(stat);
        let near = |found: f64, exact: f64| (found - exact).abs() < 1e-9;
        assert!(near(busy, 2.0) && near(stolen, 0.1) && near(all, 10.0), "{busy} {stolen} {all}");
        assert!(is_of_the_kernel("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0"));
        assert!(!is_of_the_kernel("1 (a) b) S 0 1 1 0 -1 4194560 0 0"));
    }

    #[test]
    fn load_of_others_is_what_nobody_else_explains() {
        let moment = |busy, all, kernel, own| Moment {
            busy,
            stolen: 0.0,
            all,
            kernel: HashMap::from([(2, kernel)]),
            own,
        };
        let load = moment(0.0, 0.0, 1.0, 0.0).until(&moment(6.0, 10.0, 2.0, 3.0));
        assert!((load.others - 0.2).abs() < 1e-9);
        assert_eq!(moment(0.0, 0.0, 0.0, 0.0).until(&moment(1.0, 10.0, 0.0, 2.0)).others, 0.0);
    }
}
