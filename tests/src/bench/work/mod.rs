//! The workloads, as a child runs them. Each checks all data that it reads, and what it has written afterwards.

pub(crate) mod bfs;
pub(crate) mod churn;
pub(crate) mod pages;
pub(crate) mod sort;
pub(crate) mod stream;
pub(crate) mod zipf;

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;

use super::child::Wrong;

/// Threads of the workloads that UMap has published.
pub(crate) const THREADS: usize = 4;

/// Runs `work` on so many threads, numbered from 0, and gives the first error.
///
/// # Errors
/// Those of the threads.
pub(crate) fn on_threads(count: usize, work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count).map(|number| scope.spawn(move || work(number))).collect();
        let ended = threads.into_iter().map(|thread| {
            thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread of the workload panicked")))
        });
        // All are joined before the first error is looked at.
        ended.collect::<Vec<_>>().into_iter().collect()
    })
}

/// The operations of a thread, added up for all now and then: doing it for each would slow down what is in RAM.
#[derive(Debug)]
pub(crate) struct Tally<'a> {
    all: &'a AtomicUsize,
    own: usize,
}

impl<'a> Tally<'a> {
    const STEP: usize = 64;

    /// Nothing yet.
    pub(crate) fn new(all: &'a AtomicUsize) -> Self {
        Self { all, own: 0 }
    }

    /// One more.
    pub(crate) fn add(&mut self) {
        self.own += 1;
        if self.own == Self::STEP {
            self.all.fetch_add(Self::STEP, Ordering::Relaxed);
            self.own = 0;
        }
    }
}

/// The part of `0..total` that belongs to a thread.
pub(crate) fn share(total: usize, count: usize, number: usize) -> std::ops::Range<usize> {
    total * number / count..total * (number + 1) / count
}

/// # Errors
/// [`Wrong`] unless it is `right`.
pub(crate) fn check(right: bool, what: impl FnOnce() -> String) -> Result<()> {
    if right { Ok(()) } else { Err(Wrong(what()).into()) }
}
