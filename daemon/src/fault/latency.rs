//! Where the time of a fault goes: a histogram for each step, filled by a client's fault thread from one fault in
//! seventeen and read by anybody. Recording is a clock reading and an increment, without lock or allocation.
//!
//! The kernel does not say when a thread ran into its fault: the time until the fault thread wakes is not in these
//! figures.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fmalloc_proto::messages::LatencyRow;

use crate::pager::page::PageId;

/// Buckets for each doubling of time: a bucket is at most a quarter wide.
const PER_OCTAVE: u32 = 4;
/// Up to about 4 s.
const BUCKETS: usize = 32 * PER_OCTAVE as usize;
/// One in so many is timed. Prime, so that what happens in turns is timed in turns.
const EVERY: u32 = 17;
/// Faults followed at once.
const FOLLOWED: usize = 16;

/// The steps, in the order in which they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// From the wake-up of the fault thread until its messages are read.
    Message,
    /// From there until the read is submitted.
    Queue,
    /// The read, as long as the device takes, and until the fault thread has heard of it.
    Read,
    /// Unpacking a page.
    Unpack,
    /// Mapping it and waking the thread: one system call.
    Map,
    /// All of a fault that is answered without reading, from the message to the mapped page.
    WithoutRead,
    /// All of a fault that is answered by reading.
    WithRead,
}

impl Step {
    const ALL: [(Self, &str); 7] = [
        (Self::Message, "message"),
        (Self::Queue, "queue"),
        (Self::Read, "read"),
        (Self::Unpack, "unpack"),
        (Self::Map, "map"),
        (Self::WithoutRead, "fault without read"),
        (Self::WithRead, "fault with read"),
    ];
}

#[derive(Debug)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    longest: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; BUCKETS], longest: AtomicU64::new(0) }
    }
}

/// The bucket of a time in nanoseconds.
fn bucket(nanos: u64) -> usize {
    let nanos = nanos.max(4);
    let octave = nanos.ilog2();
    let quarter = (nanos >> (octave - 2)) & 3;
    usize::try_from(u64::from((octave - 2) * PER_OCTAVE) + quarter).unwrap_or(0).min(BUCKETS - 1)
}

/// The longest time that belongs into a bucket.
fn limit(bucket: usize) -> u64 {
    let (octave, quarter) = (bucket / PER_OCTAVE as usize, bucket as u64 % u64::from(PER_OCTAVE));
    ((5 + quarter) << octave) - 1
}

impl Histogram {
    fn add(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        self.longest.fetch_max(nanos, Ordering::Relaxed);
    }

    fn row(&self, step: &str) -> LatencyRow {
        let counts: Vec<u64> = self.buckets.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let (samples, longest) = (counts.iter().sum::<u64>(), self.longest.load(Ordering::Relaxed));
        let quantile = |per_mille: u64| {
            let wanted = (samples * per_mille).div_ceil(1000).max(1);
            let mut seen = 0;
            let found = counts.iter().position(|count| {
                seen += count;
                seen >= wanted
            });
            found.map_or(0, |bucket| limit(bucket).min(longest))
        };
        LatencyRow {
            step: step.to_owned(),
            samples,
            p50_ns: quantile(500),
            p90_ns: quantile(900),
            p99_ns: quantile(990),
            p999_ns: quantile(999),
            max_ns: longest,
        }
    }
}

/// The histograms of one client.
#[derive(Debug, Default)]
pub struct Latency([Histogram; Step::ALL.len()]);

impl Latency {
    fn add(&self, step: Step, time: Duration) {
        self.0[step as usize].add(time);
    }

    /// A row for each step.
    #[must_use]
    pub fn rows(&self) -> Vec<LatencyRow> {
        Step::ALL.iter().map(|(step, name)| self.0[*step as usize].row(name)).collect()
    }
}

/// A fault that is followed.
#[derive(Debug, Clone, Copy)]
struct Followed {
    page: PageId,
    since: Instant,
    /// When its read was submitted.
    submitted: Option<Instant>,
}

/// What the fault thread keeps to fill the histograms.
#[derive(Debug, Default)]
pub struct Sampler {
    count: u32,
    followed: Vec<Followed>,
}

impl Sampler {
    /// Whether the next operation of a kind that is not followed from end to end shall be timed.
    #[must_use]
    pub fn start(&mut self) -> Option<Instant> {
        self.count = self.count.wrapping_add(1);
        self.count.is_multiple_of(EVERY).then(Instant::now)
    }

    /// Notes how long something took that [`Sampler::start`] wanted to be timed.
    pub fn end(&self, latency: &Latency, step: Step, since: Option<Instant>) {
        if let Some(since) = since {
            latency.add(step, since.elapsed());
        }
    }

    /// Follows a fault on `page`, if it is its turn.
    pub fn fault(&mut self, page: impl FnOnce() -> Option<PageId>) {
        if let Some(since) = self.start()
            && self.followed.len() < FOLLOWED
            && let Some(page) = page()
        {
            self.followed.push(Followed { page, since, submitted: None });
        }
    }

    /// The pages are being read.
    pub fn submitted(&mut self, latency: &Latency, pages: &[PageId]) {
        if self.followed.is_empty() {
            return;
        }
        for followed in self.followed.iter_mut().filter(|followed| pages.contains(&followed.page)) {
            let now = Instant::now();
            latency.add(Step::Queue, now - followed.since);
            followed.submitted = Some(now);
        }
    }

    /// They have been read.
    pub fn read(&mut self, latency: &Latency, pages: &[PageId]) {
        for followed in self.followed.iter().filter(|followed| pages.contains(&followed.page)) {
            if let Some(submitted) = followed.submitted {
                latency.add(Step::Read, submitted.elapsed());
            }
        }
    }

    /// These pages of a region have been mapped.
    pub fn mapped(&mut self, latency: &Latency, region: u16, pages: &Range<u64>) {
        if self.followed.is_empty() {
            return;
        }
        let is = |followed: &mut Followed| {
            followed.page.region() == region && pages.contains(&followed.page.index())
        };
        for done in self.followed.extract_if(.., is) {
            let step = if done.submitted.is_some() { Step::WithRead } else { Step::WithoutRead };
            latency.add(step, done.since.elapsed());
        }
        // What was discarded meanwhile is never mapped.
        if self.followed.len() == FOLLOWED {
            self.followed.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_all_times_without_gaps() {
        for nanos in (0..5000).chain([1 << 20, (1 << 20) + 1, 3_999_999_999]) {
            let place = bucket(nanos);
            assert!(nanos <= limit(place), "{nanos} in {place}");
            assert!(place == 0 || nanos > limit(place - 1), "{nanos} in {place}");
            assert!(nanos < 16 || limit(place) - nanos <= nanos / 4 + 1, "{nanos}: {}", limit(place));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_those_of_what_was_added() {
        let histogram = Histogram::default();
        (1..=1000).for_each(|n| histogram.add(Duration::from_micros(n)));
        let row = histogram.row("read");
        assert_eq!((row.samples, row.max_ns), (1000, 1_000_000));
        for (found, exact) in [(row.p50_ns, 500_000), (row.p90_ns, 900_000), (row.p99_ns, 990_000)] {
            assert!(found >= exact && found <= exact * 5 / 4, "{found} for {exact}");
        }
        assert_eq!(Histogram::default().row("read").p50_ns, 0);
    }

    #[test]
    fn faults_are_followed_to_the_end() {
        let (latency, mut sampler) = (Latency::default(), Sampler::default());
        let page = PageId::new(1, 5);
        for _ in 0..EVERY {
            sampler.fault(|| Some(page));
        }
        sampler.submitted(&latency, &[PageId::new(1, 4), page]);
        sampler.read(&latency, &[PageId::new(1, 4), page]);
        sampler.mapped(&latency, 1, &(0..5));
        sampler.mapped(&latency, 1, &(5..6));
        sampler.mapped(&latency, 1, &(5..6));
        let samples: Vec<u64> = latency.rows().iter().map(|row| row.samples).collect();
        assert_eq!(samples, [0, 1, 1, 0, 0, 0, 1]);
    }
}
