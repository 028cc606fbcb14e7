//! A child: does what its plan says and reports each step on stdout. It holds nothing of the data but the memory under
//! test, so that its cgroup's limit is the limit of that.

use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{SysconfVar, sysconf};

use super::content::Content;
use super::kinds::{Set, Workload};
use super::memory::Memory;
use super::plan::{Cpu, Latency, Measured, Plan, Said};
use super::work;

/// How often a child tells how far it is.
const TELL: Duration = Duration::from_secs(1);

/// Data that is not what was written: no failure weighs more.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Wrong(pub(crate) String);

/// What the workloads of a child share.
#[derive(Debug)]
pub(crate) struct Desk {
    /// What to do.
    pub(crate) plan: Plan,
    /// The data.
    pub(crate) content: Content,
    /// Operations of the running workload that were done, for those that take the same time each.
    pub(crate) done: AtomicUsize,
}

/// Does what the plan, in JSON, says. Failures are reported like results.
///
/// # Errors
/// That nobody listens, or that the plan makes no sense.
pub(crate) fn run(plan: &str) -> Result<()> {
    let plan: Plan = serde_json::from_str(plan).context("the plan")?;
    let content = Content::new(plan.seed, plan.random);
    let desk = Desk { plan, content, done: AtomicUsize::new(0) };
    let outcome = Memory::new(&desk.plan.memory, desk.plan.size).and_then(|mut memory| {
        let set = desk.plan.workloads.first().context("no workload")?.set();
        match set {
            Set::Pages => work::pages::all(&desk, &mut memory),
            Set::Small => work::pages::small(&desk, &mut memory),
            Set::Sort | Set::ParallelSort => work::sort::all(&desk, &mut memory),
            Set::Stream => work::stream::all(&desk, &mut memory),
            Set::Bfs => work::bfs::all(&desk, &mut memory),
            Set::Churn => work::churn::all(&desk, &mut memory),
        }
    });
    say(&match outcome {
        Ok(()) => Said::End,
        Err(error) => match error.downcast::<Wrong>() {
            Ok(wrong) => Said::Wrong(wrong.to_string()),
            Err(error) => Said::Failed(format!("{error:#}")),
        },
    })
}

fn say(said: &Said) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(said)?)?;
    Ok(out.flush()?)
}

impl Desk {
    /// Says that something begins that is not measured.
    ///
    /// # Errors
    /// That nobody listens.
    pub(crate) fn preparing(&self, what: &str) -> Result<()> {
        say(&Said::Preparing(what.to_owned()))
    }

    /// Whether the plan has this workload.
    pub(crate) fn wants(&self, workload: Workload) -> bool {
        self.plan.workloads.contains(&workload)
    }

    /// Measures a workload that handles so many bytes, operations or edges.
    ///
    /// # Errors
    /// Those of the workload.
    pub(crate) fn measure(
        &self,
        workload: Workload,
        amount: usize,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.measure_faults(workload, amount, || work().map(|()| None))
    }

    /// [`Desk::measure`] for a workload that times single faults.
    ///
    /// # Errors
    /// Those of the workload.
    pub(crate) fn measure_faults(
        &self,
        workload: Workload,
        amount: usize,
        work: impl FnOnce() -> Result<Option<Latency>>,
    ) -> Result<()> {
        #[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
        let amount = amount as f64;
        say(&Said::Begin(workload, amount))?;
        let daemon = self.daemon_cpu();
        let (client, faults) = own_usage()?;
        let begin = Instant::now();
        let latency = self.while_telling(work)?;
        let seconds = begin.elapsed().as_secs_f64();
        let (client_end, faults_end) = own_usage()?;
        let measured = Measured {
            workload,
            seconds,
            amount,
            faults: faults_end - faults,
            client: client_end - client,
            daemon: self.daemon_cpu() - daemon,
            latency,
        };
        say(&Said::Done(measured))
    }

    /// Tells now and then how many operations are done.
    fn while_telling<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.done.store(0, Ordering::Relaxed);
        let (end, ended) = channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while ended.recv_timeout(TELL) == Err(RecvTimeoutError::Timeout) {
                    let done = u32::try_from(self.done.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
                    if done > 0 && say(&Said::Progress(done.into())).is_err() {
                        break;
                    }
                }
            });
            let outcome = work();
            drop(end);
            outcome
        })
    }

    fn daemon_cpu(&self) -> Cpu {
        self.plan.daemon.and_then(cpu_of).unwrap_or_default()
    }
}

fn own_usage() -> Result<(Cpu, u64)> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    #[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
    let seconds = |time: TimeVal| time.num_microseconds() as f64 / 1e6;
    let cpu = Cpu { user: seconds(usage.user_time()), system: seconds(usage.system_time()) };
    let faults = usage.minor_page_faults() + usage.major_page_faults();
    Ok((cpu, u64::try_from(faults)?))
}

/// CPU time of a process so far, all its threads.
pub(crate) fn cpu_of(pid: u32) -> Option<Cpu> {
    cpu_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The same from the text of /proc/PID/stat; the name in it may hold anything.
pub(crate) fn cpu_in(stat: &str) -> Option<Cpu> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut seconds = || Some(fields.next()?.parse::<u32>().map(f64::from).ok()? / ticks_per_second());
    Some(Cpu { user: seconds()?, system: seconds()? })
}

/// The unit of CPU times in /proc.
pub(crate) fn ticks_per_second() -> f64 {
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|ticks| i32::try_from(ticks).ok());
    f64::from(ticks.unwrap_or(100))
}
