//! One peer, one set of workloads, once: a child process in a cgroup, watched until it ends or has to be stopped.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fmalloc_proto::size::Size;

use super::busy::{Load, Moment};
use super::graph::Graph;
use super::group::{Group, Groups};
use super::kinds::{Peer, Scenario, Workload};
use super::peers::fmalloc::Daemon;
use super::peers::swap::SwapFile;
use super::peers::{Pool, Stage};
use super::plan::{Kind, Measured, Plan, Said};
use super::undo::Undo;
use crate::process;

/// What the limit of every cgroup has beyond the RAM of the scenario: for code, stacks, the kernel's page tables and the
/// words that a workload keeps for itself; and for page tables, so much of the data again.
pub(crate) const ALLOWANCE: u64 = 16 << 20;
const ALLOWANCE_PART: u64 = 256;
/// Filling and verifying are not measured, but must end too: so many times the bound.
const PREPARING: u32 = 5;
/// A workload that tells how far it is need not be waited for: it is stopped after this part of the bound if at its pace it
/// would take this many times the bound.
const HOPELESS: (u32, f64) = (6, 2.0);
/// How often a pool is looked at.
const TICK: Duration = Duration::from_millis(10);

/// What all jobs share.
#[derive(Debug)]
pub(crate) struct Bench {
    /// The journal.
    pub(crate) undo: Undo,
    /// Where cgroups are made.
    pub(crate) groups: Groups,
    /// The swap file.
    pub(crate) swap: SwapFile,
    /// For files that are to be mapped: on the disk to measure.
    pub(crate) dir: PathBuf,
    /// For the daemon's socket and log.
    pub(crate) work: PathBuf,
    /// Bytes of data.
    pub(crate) size: u64,
    /// The longest that a workload may take.
    pub(crate) bound: Duration,
}

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Job<'a> {
    /// The kind of data.
    pub(crate) scenario: Scenario,
    /// On what.
    pub(crate) peer: Peer,
    /// Of one set.
    pub(crate) workloads: Vec<Workload>,
    /// RAM of the scenario.
    pub(crate) ram: u64,
    /// What of it the peer's processes may have: less where a pool has the rest.
    pub(crate) limit: u64,
    /// Number of the run: another seed for each.
    pub(crate) run: u32,
    /// Operations of random workloads.
    pub(crate) ops: usize,
    /// For BFS.
    pub(crate) graph: Option<&'a Graph>,
    /// Change a bit, to see that it is noticed.
    pub(crate) flip: bool,
}

/// What came of a workload.
#[derive(Debug, Clone)]
pub(crate) enum Reading {
    /// A figure.
    Value(Measured),
    /// It was stopped: it would have had at most this rate, in its unit.
    Bound(f64),
    /// It could not be done, and why.
    Unavailable(String),
}

/// What came of a job.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// For each workload.
    pub(crate) readings: Vec<(Workload, Reading)>,
    /// The most memory that the cgroup had at once.
    pub(crate) peak: u64,
    /// The most that the pool outside had at once.
    pub(crate) pool_peak: u64,
    /// The pool passed what it may have, and the job was stopped.
    pub(crate) overflow: bool,
    /// Data that was not what had been written.
    pub(crate) wrong: Option<String>,
    /// Others on the machine meanwhile.
    pub(crate) load: Load,
}

/// How a child ended.
enum Ended {
    /// All done.
    Well,
    /// Stopped during this workload; the rest can be tried.
    Stopped(Workload),
    /// Nothing more is to be had.
    Badly(String),
}

impl Bench {
    /// Runs a job on the stage that was set for its peer. A pool that passes `pool_limit` bytes ends it.
    ///
    /// # Errors
    /// What keeps the benchmark itself from going on; what befalls the peer is in the outcome.
    pub(crate) fn run(&self, job: &Job<'_>, stage: &Stage, pool_limit: Option<u64>) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let begin = Moment::now();
        let mut left = job.workloads.clone();
        while !left.is_empty() && !outcome.overflow && outcome.wrong.is_none() {
            let limit = job.limit + ALLOWANCE + self.size / ALLOWANCE_PART;
            let group = self.groups.make(
                &self.undo,
                &job.peer.to_string(),
                (job.peer != Peer::Native).then_some(limit),
            )?;
            let daemon = match job.peer {
                Peer::Fmalloc => match Daemon::start(&self.work, &self.swap, job.ram, &group) {
                    Ok(daemon) => Some(daemon),
                    Err(error) => {
                        give_up(&mut outcome, &mut left, &format!("{error:#}"));
                        break;
                    }
                },
                _ => None,
            };
            let (mut child, said) = self.start(job, &left, daemon.as_ref(), &group)?;
            let done = outcome.readings.len();
            let watch = Watch { pool: stage.pool(), pool_limit, bound: self.bound };
            let ended = watch.follow(&mut child, &said, &mut left, &mut outcome);
            let _ = child.kill();
            let status = child.wait().context("waiting for a child")?;
            outcome.peak = outcome.peak.max(group.peak().unwrap_or(0));
            match ended {
                Ended::Well => left.clear(),
                Ended::Stopped(workload) => left.retain(|one| *one != workload),
                Ended::Badly(reason) => {
                    // What was measured before was never verified.
                    outcome.readings[done..].iter().for_each(|(workload, _)| left.push(*workload));
                    outcome.readings.truncate(done);
                    give_up(&mut outcome, &mut left, &self.explain(job, reason, status, limit));
                }
            }
        }
        outcome.load = begin.until(&Moment::now());
        Ok(outcome)
    }

    fn start(
        &self,
        job: &Job<'_>,
        left: &[Workload],
        daemon: Option<&Daemon>,
        group: &Group,
    ) -> Result<(Child, Receiver<Said>)> {
        let memory = match job.peer {
            Peer::Fmalloc => {
                let socket = daemon.context("no daemon")?.socket.clone();
                Kind::Fmalloc { socket, budget: job.ram }
            }
            Peer::FileMmap => Kind::File { directory: self.dir.clone(), random: false },
            Peer::FileMmapRandom => Kind::File { directory: self.dir.clone(), random: true },
            Peer::KernelSwap | Peer::Zswap | Peer::Zram | Peer::Native => Kind::Anonymous,
        };
        let plan = Plan {
            memory,
            size: self.size,
            ram: job.ram,
            random: job.scenario.is_random(),
            workloads: left.to_vec(),
            ops: job.ops,
            seed: u64::from(job.run) + 1,
            graph: job.graph.cloned(),
            daemon: daemon.map(Daemon::pid),
            flip: job.flip,
        };
        let mut command = Command::new(std::env::current_exe().context("the path of this program")?);
        command.arg("child").arg(serde_json::to_string(&plan)?);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FMALLOC_") {
                command.env_remove(name);
            }
        }
        group.enter(&mut command)?;
        let mut child = process::end_with_us(&mut command).spawn().context("starting a child")?;
        let output = BufReader::new(child.stdout.take().context("the child's output")?);
        let (sender, said) = channel();
        // Ends with the child.
        std::thread::spawn(move || {
            let lines = output.lines().map_while(Result::ok);
            lines.map_while(|line| serde_json::from_str(&line).ok()).try_for_each(|said| sender.send(said))
        });
        Ok((child, said))
    }

    fn explain(&self, job: &Job<'_>, reason: String, status: ExitStatus, limit: u64) -> String {
        use std::os::unix::process::ExitStatusExt;
        if reason.is_empty() {
            if status.signal() == Some(libc::SIGKILL) {
                let log = std::fs::read_to_string(self.work.join("log")).unwrap_or_default();
                let log = if job.peer == Peer::Fmalloc { log } else { String::new() };
                return format!("killed by the kernel, its cgroup out of memory ({}) {log}", Size(limit));
            }
            return format!("the process ended: {status}");
        }
        reason
    }
}

/// Nothing more is to be had of what is left.
fn give_up(outcome: &mut Outcome, left: &mut Vec<Workload>, reason: &str) {
    let readings = left.drain(..).map(|workload| (workload, Reading::Unavailable(reason.to_owned())));
    outcome.readings.extend(readings);
}

/// The eye on a child.
struct Watch<'a> {
    pool: Option<&'a Pool>,
    pool_limit: Option<u64>,
    bound: Duration,
}

impl Watch<'_> {
    fn follow(
        &self,
        child: &mut Child,
        said: &Receiver<Said>,
        left: &mut Vec<Workload>,
        outcome: &mut Outcome,
    ) -> Ended {
        let mut running: Option<(Workload, f64)> = None;
        let mut since = Instant::now();
        loop {
            let news = said.recv_timeout(TICK);
            if let Some(pool) = self.pool {
                outcome.pool_peak = outcome.pool_peak.max(pool.bytes());
                if self.pool_limit.is_some_and(|limit| outcome.pool_peak > limit) {
                    outcome.overflow = true;
                    return Ended::Badly("its pool outgrew the RAM".to_owned());
                }
            }
            match news {
                Ok(Said::Preparing(_)) => (running, since) = (None, Instant::now()),
                Ok(Said::Begin(workload, amount)) => {
                    (running, since) = (Some((workload, amount)), Instant::now());
                }
                Ok(Said::Progress(done)) => {
                    let Some((workload, amount)) = running else { continue };
                    let elapsed = since.elapsed();
                    let needed = elapsed.as_secs_f64() * amount / done;
                    if elapsed > self.bound / HOPELESS.0 && needed > HOPELESS.1 * self.bound.as_secs_f64() {
                        outcome.readings.push((workload, self.at_most(workload, amount)));
                        return Ended::Stopped(workload);
                    }
                }
                Ok(Said::Done(measured)) => {
                    (running, since) = (None, Instant::now());
                    left.retain(|workload| *workload != measured.workload);
                    outcome.readings.push((measured.workload, Reading::Value(measured)));
                }
                Ok(Said::Wrong(text)) => {
                    outcome.wrong = Some(text.clone());
                    return Ended::Badly(format!("WRONG DATA: {text}"));
                }
                Ok(Said::Failed(text)) => return Ended::Badly(text),
                Ok(Said::End) => return Ended::Well,
                Err(RecvTimeoutError::Timeout) => match running {
                    Some((workload, amount)) if since.elapsed() > self.bound => {
                        outcome.readings.push((workload, self.at_most(workload, amount)));
                        return Ended::Stopped(workload);
                    }
                    None if since.elapsed() > self.bound * PREPARING => {
                        return Ended::Badly("filling or verifying took too long".to_owned());
                    }
                    _ => {}
                },
                // The child is gone; how is known when it has been waited for.
                Err(RecvTimeoutError::Disconnected) => {
                    let _ = process::wait(child, Duration::from_secs(5));
                    return Ended::Badly(String::new());
                }
            }
        }
    }

    /// The rate of a workload that takes the bound or longer.
    fn at_most(&self, workload: Workload, amount: f64) -> Reading {
        Reading::Bound(amount / self.bound.as_secs_f64() / workload.unit().scale())
    }
}
