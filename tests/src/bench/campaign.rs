//! What runs in which order. A run is everything once; within it each set of workloads goes through all peers before the
//! next, so that figures that are compared lie close together in time, and each run begins with another peer.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fmalloc_proto::size::Size;

use super::calibrate::{Room, room};
use super::figures::{Figures, Spread};
use super::graph::Graph;
use super::group::Groups;
use super::job::{ALLOWANCE, Bench, Job, Reading};
use super::kinds::{Peer, Scenario, Set, Workload};
use super::machine::Machine;
use super::options::Options;
use super::peers::swap::SwapFile;
use super::peers::{Stage, fmalloc};
use super::report::{self, BusyRow, FloorRow, MemoryRow, Report};
use super::undo::{Change, Step, Undo};
use super::{floors, graph, table};

/// Which peers single faults are timed of.
const TIMED: [Peer; 4] = [Peer::Fmalloc, Peer::KernelSwap, Peer::Zswap, Peer::Zram];
/// How long a floor of the disk is measured, and with `--quick`.
const FLOOR_TIME: (Duration, Duration) = (Duration::from_secs(2), Duration::from_millis(500));

/// The state of the benchmark.
struct Campaign<'a> {
    options: &'a Options,
    bench: Bench,
    figures: Figures,
    rooms: BTreeMap<(Scenario, Set, Peer), Room>,
    floors: BTreeMap<floors::Floor, Vec<f64>>,
    memory: BTreeMap<(Scenario, Set, Peer), MemoryRow>,
    busy: Vec<BusyRow>,
    warnings: Vec<String>,
    wrong: bool,
    begin: Instant,
}

/// Runs the benchmark and prints and writes what it found. Says whether every row has a figure of fmalloc, all of it
/// right.
///
/// # Errors
/// What keeps it from running at all.
pub(crate) fn run(options: &Options) -> Result<bool> {
    options.check()?;
    ensure!(nix::unistd::geteuid().is_root(), "needs root, for cgroups, swap and full userfaultfd: use sudo");
    fmalloc::program()?;
    let begin = Instant::now();
    let undo = Undo::open()?;
    undo.on_signals()?;
    let groups = Groups::find(&undo)?;
    let machine = Machine::this(&options.dir, groups.version, groups.mounted);
    let work = std::path::PathBuf::from(format!("/run/fmalloc-bench-{}", std::process::id()));
    let make = || fs::create_dir_all(&work).with_context(|| format!("making {}", work.display()));
    let ((), _work) = undo.change(Step::RemoveDirectory(work.clone()), make)?;

    let scenarios: BTreeMap<Scenario, u64> =
        options.scenarios().into_iter().map(|scenario| (scenario, options.ram(scenario))).collect();
    let most = scenarios.values().copied().max().unwrap_or(0);
    eprintln!("fmalloc-bench: {}", machine.line());
    eprintln!(
        "fmalloc-bench: writing a swap file of {} in {}",
        Size(options.size() + most),
        options.dir.display()
    );
    let swap = SwapFile::make(&undo, &options.dir, options.size() + most)?;
    let bench = Bench {
        undo,
        groups,
        swap,
        dir: options.dir.clone(),
        work,
        size: options.size(),
        bound: options.bound(),
    };
    let mut campaign = Campaign {
        options,
        bench,
        figures: Figures::default(),
        rooms: BTreeMap::new(),
        floors: BTreeMap::new(),
        memory: BTreeMap::new(),
        busy: Vec::new(),
        warnings: machine.warnings(),
        wrong: false,
        begin,
    };
    let runs = campaign.all(&scenarios)?;
    campaign.conclude(scenarios, runs, machine)
}

impl Campaign<'_> {
    /// All scenarios; gives the number of runs that were made.
    fn all(&mut self, scenarios: &BTreeMap<Scenario, u64>) -> Result<u32> {
        let graph = self.graph()?;
        let graph = graph.as_ref().map(|(graph, _)| graph);
        self.warm_up()?;
        let mut longest = Duration::ZERO;
        for run in 0..u32::try_from(self.options.runs())? {
            let late = |limit| self.begin.elapsed() + longest > limit;
            if run > 0 && self.options.within().is_some_and(late) {
                self.warnings.push(format!(
                    "time was up after {run} of {} runs; leave out --within for all of them",
                    self.options.runs()
                ));
                return Ok(run);
            }
            let begin = Instant::now();
            self.raw(run)?;
            for (scenario, ram) in scenarios {
                self.scenario(*scenario, *ram, run, graph)?;
            }
            longest = longest.max(begin.elapsed());
        }
        Ok(u32::try_from(self.options.runs())?)
    }

    fn graph(&self) -> Result<Option<(Graph, Change)>> {
        if !self.options.workloads().contains(&Workload::Bfs) {
            return Ok(None);
        }
        eprintln!("fmalloc-bench: making a graph");
        graph::make(&self.bench.undo, &self.options.dir, self.bench.size).map(Some)
    }

    /// A pass that does not count: the machine's memory and disk have been used once then. Filling does that.
    fn warm_up(&self) -> Result<()> {
        let job = Job {
            scenario: Scenario::Disk,
            peer: Peer::Native,
            workloads: vec![Workload::Fill],
            ram: self.bench.size,
            limit: self.bench.size,
            run: 0,
            ops: 1,
            graph: None,
            flip: false,
        };
        let stage = Stage::set(&self.bench.undo, Peer::Native, &self.bench.swap, None)?;
        self.bench.run(&job, &stage, None).map(drop)
    }

    /// The floors of the disk.
    fn raw(&mut self, run: u32) -> Result<()> {
        if self.options.no_floors {
            return Ok(());
        }
        let time = if self.options.quick { FLOOR_TIME.1 } else { FLOOR_TIME.0 };
        for floor in floors::ALL {
            match floor.measure(&self.bench.swap, u64::from(run), time) {
                Ok(rate) => self.floors.entry(floor).or_default().push(rate),
                Err(error) => self.warnings.push(format!("no floor {}: {error:#}", floor.name())),
            }
        }
        Ok(())
    }

    fn scenario(&mut self, scenario: Scenario, ram: u64, run: u32, graph: Option<&Graph>) -> Result<()> {
        let workloads = self.options.workloads();
        let mut sets: Vec<Set> = workloads.iter().map(|workload| workload.set()).collect();
        sets.dedup();
        let mut peers = [&[Peer::Fmalloc], &self.options.peers()[..]].concat();
        if !self.options.no_floors {
            peers.push(Peer::Native);
        }
        for set in sets {
            let turn = usize::try_from(run)? % peers.len();
            for peer in peers[turn..].iter().chain(&peers[..turn]).copied() {
                let wanted = |workload: &Workload| {
                    workload.set() == set
                        && (*workload != Workload::Latency || TIMED.contains(&peer))
                        && self.figures.is_worth_a_run(scenario, *workload, peer)
                };
                let job = Job {
                    scenario,
                    peer,
                    workloads: workloads.iter().copied().filter(wanted).collect(),
                    ram,
                    limit: ram,
                    run,
                    ops: self.options.ops(),
                    graph: graph.filter(|_| set == Set::Bfs),
                    flip: self.options.flip && peer == Peer::Fmalloc,
                };
                if !job.workloads.is_empty() {
                    self.job(job, set)?;
                }
            }
        }
        Ok(())
    }

    fn job(&mut self, mut job: Job<'_>, set: Set) -> Result<()> {
        let (scenario, peer, run) = (job.scenario, job.peer, job.run);
        let place = (scenario, set, peer);
        if !self.rooms.contains_key(&place) {
            let room = room(&self.bench, &job)?;
            self.rooms.insert(place, room);
        }
        let (limit, pool_limit) = match self.rooms[&place].clone() {
            Room::Fits { limit, pool_limit, .. } => (limit, pool_limit),
            Room::Not(reason) => {
                self.unavailable(&job, &reason);
                return Ok(());
            }
        };
        job.limit = limit;
        let stage = match Stage::set(&self.bench.undo, peer, &self.bench.swap, pool_limit) {
            Ok(stage) => stage,
            Err(error) => {
                self.unavailable(&job, &format!("{error:#}"));
                return Ok(());
            }
        };
        let outcome = self.bench.run(&job, &stage, None)?;
        let row = self.memory.entry(place).or_insert_with(|| MemoryRow {
            scenario,
            workload: job.workloads[0],
            peer,
            limit,
            allowance: ALLOWANCE,
            peak: 0,
            pool_peak: 0,
            note: stage.note.clone(),
        });
        row.peak = row.peak.max(outcome.peak);
        row.pool_peak = row.pool_peak.max(outcome.pool_peak);
        let workload = job.workloads[0];
        self.busy.push(BusyRow { scenario, workload, peer, run: run + 1, load: outcome.load });
        let what = format!("{scenario}, run {}, {peer}", run + 1);
        if let Some(text) = outcome.wrong {
            self.wrong = true;
            self.warnings.push(format!("{what}: WRONG DATA: {text}"));
        }
        let mut line = format!("{what}:");
        for (workload, reading) in outcome.readings {
            line.push_str(&match &reading {
                Reading::Value(measured) => {
                    format!("  {workload} {:.1} {}", measured.rate(), measured.workload.unit())
                }
                Reading::Bound(rate) => {
                    format!("  {workload} stopped, at most {rate:.1} {}", workload.unit())
                }
                Reading::Unavailable(reason) => format!("  {workload} unavailable: {reason}"),
            });
            self.figures.put(scenario, workload, peer, run, reading);
        }
        eprintln!("[{:4} s] {line}", self.begin.elapsed().as_secs());
        Ok(())
    }

    fn unavailable(&mut self, job: &Job<'_>, reason: &str) {
        eprintln!(
            "[{:4} s] {}, {}: unavailable: {reason}",
            self.begin.elapsed().as_secs(),
            job.scenario,
            job.peer
        );
        for workload in &job.workloads {
            let reading = Reading::Unavailable(reason.to_owned());
            self.figures.put(job.scenario, *workload, job.peer, job.run, reading);
        }
    }

    /// Prints the tables, writes the JSON.
    fn conclude(self, scenarios: BTreeMap<Scenario, u64>, runs: u32, machine: Machine) -> Result<bool> {
        let (workloads, peers) = (self.options.workloads(), self.options.peers());
        let everyone = [&[Peer::Fmalloc], &peers[..]].concat();
        let mut floors: Vec<FloorRow> = Vec::new();
        for (floor, rates) in self.floors {
            floors.extend(Spread::of(rates).map(|value| FloorRow {
                floor: floor.name(),
                scenario: None,
                workload: None,
                value,
                unit: floor.unit().to_string(),
            }));
        }
        let each = || scenarios.keys().copied();
        let (figures, listed) = (&self.figures, &workloads[..]);
        let alone = |peer| each().flat_map(move |one| report::alone(figures, one, listed, peer));
        floors.extend(alone(Peer::Native));
        let report = Report {
            size: self.bench.size,
            ram: scenarios.values().next().copied().unwrap_or(0),
            results: each().flat_map(|one| report::rows(&self.figures, one, &workloads, &peers)).collect(),
            fmalloc: alone(Peer::Fmalloc).collect(),
            floors,
            latency: each().flat_map(|one| report::latency(&self.figures, one, &everyone)).collect(),
            cpu: each().flat_map(|one| report::cpu(&self.figures, one, &workloads, &everyone)).collect(),
            memory: self.memory.into_values().collect(),
            scenarios: scenarios.clone(),
            runs,
            ops: self.options.ops(),
            bound: self.bench.bound.as_secs(),
            machine,
            warnings: [self.warnings, report::busy(&self.busy)].concat(),
            busy: self.busy,
        };
        print!("{}", table::all(&report));
        eprintln!("fmalloc-bench: took {} s", self.begin.elapsed().as_secs());
        if let Some(file) = &self.options.json {
            let text = serde_json::to_string_pretty(&report)?;
            fs::write(file, text + "\n").with_context(|| format!("writing {}", file.display()))?;
        }
        let missing = |scenario| {
            workloads.iter().any(|workload| self.figures.rates(scenario, *workload, Peer::Fmalloc).is_empty())
        };
        Ok(!self.wrong && !scenarios.keys().copied().any(missing))
    }
}
