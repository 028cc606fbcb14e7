//! What has been measured so far, and the medians of it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::job::Reading;
use super::kinds::{Peer, Scenario, Workload};
use super::plan::Measured;

/// The least, the median and the greatest of some figures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// The least.
    pub(crate) min: f64,
    /// Half are no greater; the mean of the two in the middle if there is no one there.
    pub(crate) median: f64,
    /// The greatest.
    pub(crate) max: f64,
}

impl Spread {
    /// Of at least one figure.
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut figures: Vec<f64> = figures.into_iter().collect();
        figures.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*figures.first()?, *figures.last()?);
        let middle = figures.len() / 2;
        let median = if figures.len() % 2 == 1 {
            figures[middle]
        } else {
            f64::midpoint(figures[middle - 1], figures[middle])
        };
        Some(Self { min, median, max })
    }
}

/// All readings: one for each run in which there was one.
#[derive(Debug, Default)]
pub(crate) struct Figures(BTreeMap<(Scenario, Workload, Peer), BTreeMap<u32, Reading>>);

/// Whether there is a figure.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Status {
    /// In every run.
    Ok,
    /// It was stopped in a run: rates are at most these.
    Bound,
    /// There is none, and why.
    Unavailable(String),
}

impl Figures {
    /// Keeps a reading.
    pub(crate) fn put(
        &mut self,
        scenario: Scenario,
        workload: Workload,
        peer: Peer,
        run: u32,
        reading: Reading,
    ) {
        self.0.entry((scenario, workload, peer)).or_default().insert(run, reading);
    }

    /// Whether a peer does a workload in less than the bound, as far as is known.
    pub(crate) fn is_worth_a_run(&self, scenario: Scenario, workload: Workload, peer: Peer) -> bool {
        self.readings(scenario, workload, peer).all(|(_, reading)| matches!(reading, Reading::Value(_)))
    }

    /// The state of a row.
    pub(crate) fn status(&self, scenario: Scenario, workload: Workload, peer: Peer) -> Status {
        let mut status = Status::Unavailable("it was not run".to_owned());
        for (_, reading) in self.readings(scenario, workload, peer) {
            match reading {
                Reading::Unavailable(reason) => return Status::Unavailable(reason.clone()),
                Reading::Bound(_) => status = Status::Bound,
                Reading::Value(_) if status != Status::Bound => status = Status::Ok,
                Reading::Value(_) => {}
            }
        }
        status
    }

    /// Rates of a row by run; those of stopped runs are bounds.
    pub(crate) fn rates(&self, scenario: Scenario, workload: Workload, peer: Peer) -> BTreeMap<u32, f64> {
        let rate = |reading: &Reading| match reading {
            Reading::Value(measured) => Some(measured.rate()),
            Reading::Bound(rate) => Some(*rate),
            Reading::Unavailable(_) => None,
        };
        self.readings(scenario, workload, peer)
            .filter_map(|(run, reading)| Some((run, rate(reading)?)))
            .collect()
    }

    /// fmalloc to a peer, of runs that have both. A run in which the peer was stopped counts with its bound.
    pub(crate) fn ratio(&self, scenario: Scenario, workload: Workload, peer: Peer) -> Option<Spread> {
        let peer = self.rates(scenario, workload, peer);
        let ours = self.rates(scenario, workload, Peer::Fmalloc);
        Spread::of(ours.iter().filter_map(|(run, rate)| Some(rate / peer.get(run)?)))
    }

    /// What was measured of a row, with its details.
    pub(crate) fn measured(
        &self,
        scenario: Scenario,
        workload: Workload,
        peer: Peer,
    ) -> impl Iterator<Item = &Measured> {
        self.readings(scenario, workload, peer).filter_map(|(_, reading)| match reading {
            Reading::Value(measured) => Some(measured),
            _ => None,
        })
    }

    fn readings(
        &self,
        scenario: Scenario,
        workload: Workload,
        peer: Peer,
    ) -> impl Iterator<Item = (u32, &Reading)> {
        self.0.get(&(scenario, workload, peer)).into_iter().flatten().map(|(run, reading)| (*run, reading))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::Cpu;

    fn value(seconds: f64) -> Reading {
        Reading::Value(Measured {
            workload: Workload::Fill,
            seconds,
            amount: 1e6,
            faults: 0,
            client: Cpu::default(),
            daemon: Cpu::default(),
            latency: None,
        })
    }

    const ROW: (Scenario, Workload) = (Scenario::Disk, Workload::Fill);

    fn figures(ours: &[Reading], theirs: &[Reading]) -> Figures {
        let mut figures = Figures::default();
        for (peer, readings) in [(Peer::Fmalloc, ours), (Peer::KernelSwap, theirs)] {
            for (run, reading) in (0..).zip(readings) {
                figures.put(ROW.0, ROW.1, peer, run, reading.clone());
            }
        }
        figures
    }

    #[test]
    fn spread_of_one_two_and_three() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([3.0]), Some(Spread { min: 3.0, median: 3.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 2.0]), Some(Spread { min: 2.0, median: 3.0, max: 4.0 }));
        assert_eq!(Spread::of([9.0, 1.0, 2.0]), Some(Spread { min: 1.0, median: 2.0, max: 9.0 }));
    }

    #[test]
    fn ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() {
        let figures = figures(&[value(1.0), value(2.0), value(10.0)], &[value(10.0), value(4.0), value(1.0)]);
        let ratio = figures.ratio(ROW.0, ROW.1, Peer::KernelSwap).unwrap();
        assert_eq!((ratio.min, ratio.median, ratio.max), (0.1, 2.0, 10.0));
        assert_eq!(figures.status(ROW.0, ROW.1, Peer::KernelSwap), Status::Ok);
    }

    #[test]
    fn stopped_run_is_a_bound_and_is_not_repeated() {
        let figures = figures(&[value(1.0), value(1.0)], &[Reading::Bound(0.25)]);
        assert_eq!(figures.status(ROW.0, ROW.1, Peer::KernelSwap), Status::Bound);
        assert_eq!(figures.ratio(ROW.0, ROW.1, Peer::KernelSwap).unwrap().median, 4.0);
        assert!(!figures.is_worth_a_run(ROW.0, ROW.1, Peer::KernelSwap));
        assert!(figures.is_worth_a_run(ROW.0, ROW.1, Peer::Fmalloc));
    }

    #[test]
    fn row_without_a_figure_says_why() {
        let figures = figures(&[value(1.0)], &[Reading::Unavailable("no".to_owned())]);
        let status = figures.status(ROW.0, ROW.1, Peer::KernelSwap);
        assert_eq!(status, Status::Unavailable("no".to_owned()));
        assert_eq!(figures.ratio(ROW.0, ROW.1, Peer::KernelSwap), None);
        assert!(matches!(figures.status(ROW.0, ROW.1, Peer::Zram), Status::Unavailable(_)));
    }
}
