//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use fmalloc_proto::PAGE;
use fmalloc_proto::size::Size;

use super::kinds::{Peer, Scenario, Workload};

const EXAMPLES: &str = "\
Figures are rates: more is better, and a ratio above 1 means that fmalloc is faster. Each is the median of the runs,
with the least and the greatest beside it; the ratio is the median of the ratios of paired runs. All data is verified.

RAM is counted alike for everybody: the limit of a memory cgroup in which the peer's process runs, with fmalloc's daemon
beside its client. What zswap and zram hold outside the cgroup is measured in a first pass and taken off their limit.

Examples:
  fmalloc-bench --quick                                  a first impression, within 3 minutes
  fmalloc-bench --json out.json                          1 GiB in 256 MiB, all workloads, all peers
  fmalloc-bench --scenario all --runs 5                  every scenario
  fmalloc-bench --workloads rand-read-1,rand-read-8 --peers kernel-swap --runs 9

It needs root, the release build of fmallocd beside it, and a machine with nothing else to do. It makes its files in
--dir and puts everything back: at its end, when interrupted, and at the next start if it was killed.";

/// Measures memory larger than RAM: fmalloc beside kernel swap and whatever else one could pick.
#[derive(Debug, Parser)]
#[command(name = "fmalloc-bench", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true, args_override_self = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) options: Options,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Sets of figures besides the comparison of the peers; each is a module of its own.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// One group of workloads in this process: how the benchmark starts itself
    #[command(hide = true)]
    Child {
        /// JSON of `plan::Plan`
        plan: String,
    },
}

/// What to compare.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// What the data is like, and how much of it RAM holds; or all
    #[arg(long, value_delimiter = ',', default_value = "disk", value_parser = scenario)]
    scenario: Vec<Scenarios>,
    /// Data [default: 1G, with --quick 256M]
    #[arg(long)]
    size: Option<Size>,
    /// RAM of the scenarios disk and incompressible [default: a quarter of --size]
    #[arg(long)]
    ram: Option<Size>,
    /// RAM of the scenario compressed [default: three quarters of --size]
    #[arg(long)]
    compressed_ram: Option<Size>,
    /// Only these workloads [default: all]
    #[arg(long, value_delimiter = ',')]
    workloads: Vec<Workload>,
    /// Only these peers; none for fmalloc alone [default: all]
    #[arg(long, value_delimiter = ',', value_parser = peer)]
    peers: Option<Vec<Option<Peer>>>,
    /// Runs of everything, interleaved [default: 3, with --quick 1]
    #[arg(long)]
    runs: Option<usize>,
    /// Operations of random workloads [default: 200000, with --quick 20000]
    #[arg(long)]
    ops: Option<usize>,
    /// A quick impression: less data, one run
    #[arg(long)]
    pub(crate) quick: bool,
    /// Start no further run if it would end later than so many minutes after the start
    #[arg(long, value_name = "MINUTES")]
    within: Option<u64>,
    /// Stop a peer that takes longer than so many seconds on a workload, and report the figure as a bound [default: 120,
    /// with --quick 20]
    #[arg(long, value_name = "SECONDS")]
    bound: Option<u64>,
    /// Leave out the floors: the raw disk and memory without a limit
    #[arg(long)]
    pub(crate) no_floors: bool,
    /// Where the swap file and the mapped file are made, on the disk to measure
    #[arg(long, default_value = "/var/tmp")]
    pub(crate) dir: PathBuf,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Change one bit of the data behind the back of fmalloc's workloads, to see that they notice
    #[arg(long, hide = true)]
    pub(crate) flip: bool,
}

/// One scenario or all.
#[derive(Debug, Clone)]
enum Scenarios {
    One(Scenario),
    All,
}

fn scenario(text: &str) -> Result<Scenarios, String> {
    if text == "all" { Ok(Scenarios::All) } else { Scenario::from_str(text, false).map(Scenarios::One) }
        .map_err(|_| format!("{text:?} is none of {}", names::<Scenario>("all")))
}

fn peer(text: &str) -> Result<Option<Peer>, String> {
    if text == "none" { Ok(None) } else { Peer::from_str(text, false).map(Some) }
        .map_err(|_| format!("{text:?} is none of {}", names::<Peer>("none")))
}

fn names<T: ValueEnum>(last: &str) -> String {
    let values = T::value_variants().iter().filter_map(T::to_possible_value);
    let mut names: Vec<String> = values.map(|value| value.get_name().to_owned()).collect();
    names.push(last.to_owned());
    names.join(", ")
}

impl Options {
    /// Data in bytes, whole pages.
    pub(crate) fn size(&self) -> u64 {
        let size = self.size.map_or(if self.quick { 256 << 20 } else { 1 << 30 }, |size| size.0);
        size / PAGE * PAGE
    }

    /// RAM in bytes.
    pub(crate) fn ram(&self, scenario: Scenario) -> u64 {
        let (given, usual) = match scenario {
            Scenario::Compressed => (self.compressed_ram, self.size() / 4 * 3),
            Scenario::Disk | Scenario::Incompressible => (self.ram, self.size() / 4),
        };
        given.map_or(usual, |size| size.0) / PAGE * PAGE
    }

    /// Each scenario once.
    pub(crate) fn scenarios(&self) -> Vec<Scenario> {
        let wanted = |scenario: &Scenario| {
            self.scenario.iter().any(|given| match given {
                Scenarios::One(one) => one == scenario,
                Scenarios::All => true,
            })
        };
        Scenario::value_variants().iter().copied().filter(wanted).collect()
    }

    /// Each workload once, in the order in which they run.
    pub(crate) fn workloads(&self) -> Vec<Workload> {
        let wanted = |workload: &Workload| self.workloads.is_empty() || self.workloads.contains(workload);
        Workload::value_variants().iter().copied().filter(wanted).collect()
    }

    /// Each peer once.
    pub(crate) fn peers(&self) -> Vec<Peer> {
        let wanted = |peer: &Peer| {
            self.peers.as_ref().is_none_or(|given| given.iter().flatten().any(|one| one == peer))
        };
        Peer::value_variants().iter().copied().filter(wanted).collect()
    }

    /// Runs.
    pub(crate) fn runs(&self) -> usize {
        self.runs.unwrap_or(if self.quick { 1 } else { 3 })
    }

    /// Operations of a random workload.
    pub(crate) fn ops(&self) -> usize {
        self.ops.unwrap_or(if self.quick { 20_000 } else { 200_000 })
    }

    /// The longest that a workload may take.
    pub(crate) fn bound(&self) -> Duration {
        Duration::from_secs(self.bound.unwrap_or(if self.quick { 20 } else { 120 }))
    }

    /// The longest that all of it should take.
    pub(crate) fn within(&self) -> Option<Duration> {
        self.within.map(|minutes| Duration::from_secs(60 * minutes))
    }

    /// Whether there is something to measure.
    ///
    /// # Errors
    /// What makes no sense, for people.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(self.runs() > 0 && self.ops() > 0, "--runs and --ops must be at least 1");
        ensure!(!self.bound().is_zero(), "--bound must be at least 1 second");
        ensure!(self.size() >= 16 << 20, "--size must be at least 16M");
        for scenario in self.scenarios() {
            let (size, ram) = (self.size(), self.ram(scenario));
            if ram >= size {
                bail!(
                    "{scenario}: {} of data fit in {} of RAM: nothing would be paged",
                    Size(size),
                    Size(ram)
                );
            }
            let least = fmalloc_proto::limits::MIN_BUDGET;
            ensure!(ram >= least, "{scenario}: fmalloc needs {} of RAM at least", Size(least));
        }
        if !self.dir.is_dir() {
            bail!("--dir {} is not a directory", self.dir.display());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Options {
        Cli::try_parse_from([&["fmalloc-bench"], arguments].concat()).unwrap().options
    }

    #[test]
    fn defaults_are_those_of_the_disk_scenario() {
        let options = parsed(&[]);
        options.check().unwrap();
        assert_eq!(options.scenarios(), [Scenario::Disk]);
        assert_eq!((options.size(), options.ram(Scenario::Disk)), (1 << 30, 256 << 20));
        assert_eq!(options.ram(Scenario::Compressed), 768 << 20);
        assert_eq!((options.runs(), options.ops(), options.peers().len()), (3, 200_000, 5));
        assert_eq!(options.workloads().len(), Workload::value_variants().len());
    }

    #[test]
    fn lists_select_and_keep_the_order_of_the_benchmark() {
        let options =
            parsed(&["--scenario", "all", "--workloads", "sort,fill", "--peers", "zram,kernel-swap"]);
        assert_eq!(options.scenarios().len(), 3);
        assert_eq!(options.workloads(), [Workload::Fill, Workload::Sort]);
        assert_eq!(options.peers(), [Peer::KernelSwap, Peer::Zram]);
        assert!(parsed(&["--peers", "none"]).peers().is_empty());
    }

    #[test]
    fn data_that_fits_is_refused() {
        assert!(parsed(&["--size", "1G", "--ram", "1G"]).check().is_err());
        assert!(Cli::try_parse_from(["fmalloc-bench", "--peers", "native"]).is_err());
    }
}
