//! The RAM of compressed pools. zswap and zram keep compressed pages outside the cgroup of the process that they belong
//! to, so a limit alone would give these peers more RAM than others. First passes find the limit with which process and
//! pool together have the RAM of the scenario.

use anyhow::Result;
use fmalloc_proto::size::Size;

use super::job::{Bench, Job};
use super::kinds::Peer;
use super::peers::Stage;

/// First passes at most.
const PASSES: usize = 6;
/// Process and pool together may pass the RAM by this part of it.
const TOLERANCE: u64 = 50;
/// A process needs this part of the RAM, or it thrashes for want of room and not for want of a good pager.
const LEAST: u64 = 8;
/// Operations of a first pass: a part of those of a run.
const OPS: usize = 4;

/// How a peer fits into the RAM of a scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Room {
    /// With this limit for its processes.
    Fits {
        /// Bytes.
        limit: u64,
        /// What its pool took then.
        pool: u64,
        /// What its pool is kept below, if it has to be.
        pool_limit: Option<u64>,
    },
    /// It does not, and why.
    Not(String),
}

/// Finds out how the peer of a job fits.
///
/// # Errors
/// What keeps the benchmark itself from going on.
pub(crate) fn room(bench: &Bench, job: &Job<'_>) -> Result<Room> {
    let all = Room::Fits { limit: job.ram, pool: 0, pool_limit: None };
    if !matches!(job.peer, Peer::Zswap | Peer::Zram) {
        return Ok(all);
    }
    // Where the kernel charges zswap's pool to the cgroup, the limit holds for both already.
    let probe = bench.groups.make(&bench.undo, "probe", None)?;
    if job.peer == Peer::Zswap && probe.zswap().is_some() {
        return Ok(all);
    }
    drop(probe);
    let job = Job { ops: job.ops.div_ceil(OPS), ..job.clone() };
    match passes(bench, &job, None)? {
        // zswap may spill to its swap file, so a pool kept small is a fair use of it.
        Room::Not(_) if job.peer == Peer::Zswap => passes(bench, &job, Some(job.ram / 2)),
        room => Ok(room),
    }
}

fn passes(bench: &Bench, job: &Job<'_>, pool_limit: Option<u64>) -> Result<Room> {
    let mut last: Option<(u64, u64)> = None;
    let mut job = job.clone();
    for _ in 0..PASSES {
        let stage = match Stage::set(&bench.undo, job.peer, &bench.swap, pool_limit) {
            Ok(stage) => stage,
            Err(error) => return Ok(Room::Not(format!("{error:#}"))),
        };
        let outcome = bench.run(&job, &stage, Some(job.ram))?;
        let pool = outcome.pool_peak;
        if outcome.overflow {
            return Ok(Room::Not(format!(
                "cannot hold the data in this RAM: its pool alone passes {}",
                Size(job.ram)
            )));
        }
        if job.limit + pool <= job.ram + job.ram / TOLERANCE {
            return Ok(Room::Fits { limit: job.limit, pool, pool_limit });
        }
        let next = next_limit(job.ram, (job.limit, pool), last);
        if next < job.ram / LEAST {
            return Ok(Room::Not(format!(
                "cannot hold the data in this RAM: its pool takes {} of {} and leaves too little for the process",
                Size(pool),
                Size(job.ram)
            )));
        }
        last = Some((job.limit, pool));
        job.limit = next;
    }
    Ok(Room::Not(format!("no limit found in {PASSES} passes with which process and pool keep to the RAM")))
}

/// The next limit to try, from what the pool took with this one and the one before. A pool grows as the limit falls:
/// where the line through both meets the RAM, or just the difference if there is no line yet.
fn next_limit(ram: u64, (limit, pool): (u64, u64), last: Option<(u64, u64)>) -> u64 {
    let plain = ram.saturating_sub(pool);
    let Some((last_limit, last_pool)) = last else { return plain };
    let (fell, grew) = (last_limit.saturating_sub(limit), pool.saturating_sub(last_pool));
    if grew >= fell {
        return plain.min(limit - limit / 8);
    }
    // Both fall by one, of which the pool takes back `grew / fell`.
    let over = u128::from((limit + pool).saturating_sub(ram));
    let step = over * u128::from(fell) / u128::from(fell - grew);
    limit.saturating_sub(u64::try_from(step).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_is_found_for_a_pool_that_grows_as_it_falls() {
        // Data of 1000 of which a page outside takes half a page in the pool: 600 = limit + (1000 - limit) / 2.
        let pool = |limit: u64| (1000 - limit) / 2;
        let first = next_limit(600, (600, pool(600)), None);
        let second = next_limit(600, (first, pool(first)), Some((600, pool(600))));
        assert_eq!(second, 200);
        assert_eq!(second + pool(second), 600);
    }

    #[test]
    fn pool_that_grows_faster_than_the_limit_falls_ends_the_search() {
        let mut limit = 100;
        let mut last = None;
        for _ in 0..PASSES {
            let pool = 300 - 2 * limit;
            let next = next_limit(100, (limit, pool), last);
            assert!(next < limit);
            (last, limit) = (Some((limit, pool)), next);
            if limit < 100 / LEAST {
                return;
            }
        }
        panic!("still at {limit}");
    }
}
