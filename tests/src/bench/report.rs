//! The JSON: what the tables are made of as well.

use std::collections::BTreeMap;

use serde::Serialize;

use super::busy::{Load, TOLERATED};
use super::figures::{Figures, Spread, Status};
use super::kinds::{Peer, Scenario, Workload};
use super::machine::Machine;
use super::plan::{Cpu, Latency, Measured};

/// All of it. Sizes in bytes.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Data.
    pub(crate) size: u64,
    /// RAM of the first scenario.
    pub(crate) ram: u64,
    /// One row for each scenario, workload and peer.
    pub(crate) results: Vec<Row>,
    /// fmalloc alone: the same figures as in the results, and there without any peer.
    pub(crate) fmalloc: Vec<FloorRow>,
    /// The disk itself, and memory without a limit.
    pub(crate) floors: Vec<FloorRow>,
    /// Single faults.
    pub(crate) latency: Vec<LatencyRow>,
    /// CPU time of faults.
    pub(crate) cpu: Vec<CpuRow>,
    /// Limits and what was taken of them.
    pub(crate) memory: Vec<MemoryRow>,
    /// RAM of each scenario.
    pub(crate) scenarios: BTreeMap<Scenario, u64>,
    /// Runs that were made.
    pub(crate) runs: u32,
    /// Operations of random workloads.
    pub(crate) ops: usize,
    /// Seconds after which a workload is stopped.
    pub(crate) bound: u64,
    /// Where it was measured.
    pub(crate) machine: Machine,
    /// Others on the machine during each child.
    pub(crate) busy: Vec<BusyRow>,
    /// What makes the figures doubtful.
    pub(crate) warnings: Vec<String>,
}

/// fmalloc beside a peer.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// The data.
    pub(crate) scenario: Scenario,
    /// What was measured.
    pub(crate) workload: Workload,
    /// Beside whom.
    pub(crate) peer: Peer,
    /// `ok`, `bound` (the peer was stopped: its figures are at most these, the ratio at least this), `unavailable`.
    pub(crate) status: &'static str,
    /// Why it is unavailable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// Present unless fmalloc's own figure is ok: `bound` or `unavailable`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fmalloc_status: Option<String>,
    /// fmalloc.
    pub(crate) fmalloc: Option<Spread>,
    /// The peer.
    pub(crate) peer_value: Option<Spread>,
    /// Of the figures; more is better.
    pub(crate) unit: String,
    /// Of fmalloc to the peer, run by run; above 1 fmalloc is faster.
    pub(crate) ratio: Option<Spread>,
}

/// A figure beside nothing.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct FloorRow {
    /// `raw-…`: the disk; `native`: memory without a limit; `fmalloc`.
    pub(crate) floor: String,
    /// Only for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scenario: Option<Scenario>,
    /// Only for memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) workload: Option<Workload>,
    /// The figure.
    pub(crate) value: Spread,
    /// Of the figure.
    pub(crate) unit: String,
}

/// Percentiles of single faults in microseconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LatencyRow {
    /// The data.
    pub(crate) scenario: Scenario,
    /// Whose.
    pub(crate) peer: Peer,
    /// Half took no longer.
    pub(crate) p50: Spread,
    /// 99 of 100 took no longer.
    pub(crate) p99: Spread,
    /// 999 of 1000 took no longer.
    #[serde(rename = "p99.9")]
    pub(crate) p999: Spread,
    /// Faults that were timed, all runs.
    pub(crate) faults: usize,
    /// Always `µs`.
    pub(crate) unit: &'static str,
}

/// CPU seconds per million faults, medians.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CpuRow {
    /// The data.
    pub(crate) scenario: Scenario,
    /// What was measured.
    pub(crate) workload: Workload,
    /// Whose.
    pub(crate) peer: Peer,
    /// The program.
    pub(crate) client: Cpu,
    /// fmalloc's daemon.
    pub(crate) daemon: Cpu,
    /// All of it.
    pub(crate) total: f64,
    /// Page faults of a run.
    pub(crate) faults: f64,
    /// Always the same.
    pub(crate) unit: &'static str,
}

/// RAM of the processes of a peer, the most of all runs.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct MemoryRow {
    /// The data.
    pub(crate) scenario: Scenario,
    /// The first workload of those that were run together.
    pub(crate) workload: Workload,
    /// Whose.
    pub(crate) peer: Peer,
    /// The limit of the cgroup, without the allowance.
    pub(crate) limit: u64,
    /// What everybody has beyond it, for code, stacks and the kernel's page tables.
    pub(crate) allowance: u64,
    /// The most that the cgroup had at once.
    pub(crate) peak: u64,
    /// The most that a pool outside the cgroup had at once.
    pub(crate) pool_peak: u64,
    /// The compressor of a pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
}

/// Others on the machine while a peer ran a set of workloads; parts of all CPU time.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct BusyRow {
    /// The data.
    pub(crate) scenario: Scenario,
    /// The first workload of the set.
    pub(crate) workload: Workload,
    /// Whose figures are doubtful.
    pub(crate) peer: Peer,
    /// The number of the run, from 1.
    pub(crate) run: u32,
    /// The others.
    #[serde(flatten)]
    pub(crate) load: Load,
}

/// What to say about others, if they were there.
pub(crate) fn busy(rows: &[BusyRow]) -> Vec<String> {
    let others = warning(rows, "other programs", |load| load.others);
    let host = warning(rows, "the host of this virtual machine", |load| load.stolen);
    others.into_iter().chain(host).collect()
}

fn warning(rows: &[BusyRow], who: &str, part: fn(&Load) -> f64) -> Option<String> {
    let count = rows.iter().filter(|row| part(&row.load) > TOLERATED).count();
    let worst = rows.iter().max_by(|a, b| part(&a.load).total_cmp(&part(&b.load)))?;
    let BusyRow { scenario, workload, peer, run, load } = worst;
    let (limit, most) = (TOLERATED * 100.0, part(load) * 100.0);
    (count > 0).then(|| {
        format!(
            "busy machine: {who} had more than {limit:.0} % of the CPUs during {count} of {} measurements, at most \
             {most:.0} % ({scenario} {workload} {peer} run {run}): figures are doubtful",
            rows.len(),
        )
    })
}

/// The rows of a scenario.
pub(crate) fn rows(
    figures: &Figures,
    scenario: Scenario,
    workloads: &[Workload],
    peers: &[Peer],
) -> Vec<Row> {
    let mut rows = Vec::new();
    for workload in workloads.iter().copied().filter(|workload| *workload != Workload::Latency) {
        let ours = figures.status(scenario, workload, Peer::Fmalloc);
        for peer in peers.iter().copied() {
            let (status, reason) = match figures.status(scenario, workload, peer) {
                Status::Ok => ("ok", None),
                Status::Bound => ("bound", None),
                Status::Unavailable(reason) => ("unavailable", Some(reason)),
            };
            let spread = |peer| Spread::of(figures.rates(scenario, workload, peer).into_values());
            rows.push(Row {
                scenario,
                workload,
                peer,
                status,
                reason,
                fmalloc_status: match &ours {
                    Status::Ok => None,
                    Status::Bound => Some("bound".to_owned()),
                    Status::Unavailable(reason) => Some(format!("unavailable: {reason}")),
                },
                fmalloc: spread(Peer::Fmalloc),
                peer_value: if status == "unavailable" { None } else { spread(peer) },
                unit: workload.unit().to_string(),
                ratio: figures.ratio(scenario, workload, peer),
            });
        }
    }
    rows
}

/// What one gives, beside nobody.
pub(crate) fn alone(
    figures: &Figures,
    scenario: Scenario,
    workloads: &[Workload],
    peer: Peer,
) -> Vec<FloorRow> {
    let row = |workload: &Workload| {
        let rates = figures.rates(scenario, *workload, peer);
        Some(FloorRow {
            floor: peer.to_string(),
            scenario: Some(scenario),
            workload: Some(*workload),
            value: Spread::of(rates.into_values())?,
            unit: workload.unit().to_string(),
        })
    };
    workloads.iter().filter(|workload| **workload != Workload::Latency).filter_map(row).collect()
}

/// Percentiles of a scenario.
pub(crate) fn latency(figures: &Figures, scenario: Scenario, peers: &[Peer]) -> Vec<LatencyRow> {
    let row = |peer: &Peer| {
        let measured = figures.measured(scenario, Workload::Latency, *peer);
        let times: Vec<Latency> = measured.filter_map(|measured| measured.latency).collect();
        let spread = |get: fn(&Latency) -> f64| Spread::of(times.iter().map(get));
        Some(LatencyRow {
            scenario,
            peer: *peer,
            p50: spread(|times| times.p50)?,
            p99: spread(|times| times.p99)?,
            p999: spread(|times| times.p999)?,
            faults: times.iter().map(|times| times.faults).sum(),
            unit: "µs",
        })
    };
    peers.iter().filter_map(row).collect()
}

/// CPU times of a scenario.
pub(crate) fn cpu(
    figures: &Figures,
    scenario: Scenario,
    workloads: &[Workload],
    peers: &[Peer],
) -> Vec<CpuRow> {
    let row = |workload: Workload, peer: Peer| {
        let runs: Vec<&Measured> = figures.measured(scenario, workload, peer).collect();
        #[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
        let faults = |run: &Measured| run.faults as f64;
        let median = |get: fn(&Measured) -> f64| {
            let rates = runs.iter().filter(|run| run.faults > 0).map(|run| get(run) * 1e6 / faults(run));
            Spread::of(rates).map(|spread| spread.median)
        };
        let client = Cpu { user: median(|run| run.client.user)?, system: median(|run| run.client.system)? };
        let daemon = Cpu { user: median(|run| run.daemon.user)?, system: median(|run| run.daemon.system)? };
        let total = median(|run| run.client.total() + run.daemon.total())?;
        let faults = Spread::of(runs.iter().map(|run| faults(run)))?.median;
        Some(CpuRow { scenario, workload, peer, client, daemon, total, faults, unit: "s per million faults" })
    };
    let each =
        |workload: &Workload| peers.iter().filter_map(move |peer| row(*workload, *peer)).collect::<Vec<_>>();
    workloads.iter().flat_map(each).collect()
}
