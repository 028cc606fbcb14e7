//! Where a fault thread runs and how it waits, so that a fault costs few wake-ups of sleeping processors.
//!
//! A single thread that faults again and again is served best from its own processor: while it waits nobody else needs
//! that, and waking it needs no other. And while a read that it waits for is in flight, looking for the result again and
//! again keeps the processor from going to sleep. Neither is always better: it depends on the machine, on what else runs,
//! and on the program. So both are tried, in turns of some hundred faults, and what was faster stays for a while.
//!
//! Nothing that the program can see changes. With many threads that fault, or none, everything is as the kernel has it.

use std::time::{Duration, Instant};

/// Faults of one turn.
const TURN: u32 = 256;
/// Turns of the better way between two trials.
const KEEP: u32 = 32;
/// A pause between faults that is longer ends the turn: the program was doing something else.
const PAUSE: Duration = Duration::from_millis(5);
/// So long after the last fault everything is as it was.
pub const IDLE: Duration = Duration::from_millis(20);
/// Of 16 faults, those that one thread must have.
const MOST: u32 = 15;
/// How long to look for the result of a read at most, before sleeping.
pub const SPIN: Duration = Duration::from_micros(200);

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// As the kernel has it.
    Free,
    /// On the processor of this thread, and awake while it waits for a read.
    With(u32),
}

/// See the module. No system call.
#[derive(Debug)]
pub struct Placement {
    /// The thread that faulted last, and how many of the last 16 faults were its own, about.
    thread: u32,
    share: u32,
    last: Option<Instant>,
    trying: bool,
    /// Turns left until the next trial.
    keep: u32,
    /// Nanoseconds per fault, as measured: free, and with the thread.
    costs: [u64; 2],
    /// Faults and time of this turn.
    faults: u32,
    time: Duration,
    near: bool,
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            thread: 0,
            share: 0,
            last: None,
            trying: false,
            keep: 0,
            costs: [0; 2],
            faults: 0,
            time: Duration::ZERO,
            near: false,
        }
    }
}

impl Placement {
    /// A fault of a thread was read at this time.
    pub fn fault(&mut self, thread: u32, now: Instant) {
        if thread == self.thread {
            self.share = (self.share + 1).min(16);
        } else if self.share > 0 {
            self.share -= self.share.div_ceil(4);
        } else {
            self.thread = thread;
        }
        let since = self.last.replace(now).map_or(Duration::MAX, |last| now.saturating_duration_since(last));
        if since > PAUSE || self.share < MOST {
            (self.faults, self.time) = (0, Duration::ZERO);
            return;
        }
        self.faults += 1;
        self.time += since;
        if self.faults == TURN {
            self.end_turn();
        }
    }

    fn end_turn(&mut self) {
        let cost = u64::try_from(self.time.as_nanos()).unwrap_or(u64::MAX) / u64::from(TURN);
        (self.faults, self.time) = (0, Duration::ZERO);
        self.costs[usize::from(self.near)] = cost;
        if self.trying {
            self.trying = false;
            self.near = self.costs[1] < self.costs[0];
            self.keep = KEEP;
        } else if self.keep > 0 {
            self.keep -= 1;
        } else {
            self.near = !self.near;
            self.trying = true;
        }
    }

    /// What to do from now on.
    #[must_use]
    pub fn way(&self) -> Way {
        if self.near && self.share >= MOST && self.thread != 0 { Way::With(self.thread) } else { Way::Free }
    }

    /// Nothing has happened for [`IDLE`]: the way is free until faults come again.
    pub fn rest(&mut self) {
        self.share = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets one thread fault, each fault taking as long as the way costs. Gives how many were served with it.
    fn run(placement: &mut Placement, now: &mut Instant, faults: u32, free: u64, near: u64) -> u32 {
        let mut with = 0;
        for _ in 0..faults {
            let is_near = placement.way() != Way::Free;
            with += u32::from(is_near);
            *now += Duration::from_micros(if is_near { near } else { free });
            placement.fault(7, *now);
        }
        with
    }

    #[test]
    fn the_faster_way_is_found_and_kept() {
        let (mut placement, mut now) = (Placement::default(), Instant::now());
        assert!(run(&mut placement, &mut now, 20_000, 60, 40) > 18_000);
        let mut placement = Placement::default();
        let with = run(&mut placement, &mut now, 20_000, 40, 60);
        assert!(with > 0 && with < 1500, "{with}: tried now and then, and left");
    }

    #[test]
    fn what_was_better_is_left_when_it_is_no_longer() {
        let (mut placement, mut now) = (Placement::default(), Instant::now());
        run(&mut placement, &mut now, 5_000, 60, 40);
        run(&mut placement, &mut now, 20_000, 40, 60);
        assert!(run(&mut placement, &mut now, 10_000, 40, 60) < 1500);
    }

    #[test]
    fn many_threads_and_idle_ones_are_left_alone() {
        let (mut placement, mut now) = (Placement::default(), Instant::now());
        run(&mut placement, &mut now, 5_000, 60, 40);
        assert_eq!(placement.way(), Way::With(7));
        placement.rest();
        assert_eq!(placement.way(), Way::Free);
        for n in 0..10_000 {
            now += Duration::from_micros(30);
            placement.fault(n % 8, now);
            assert_eq!(placement.way(), Way::Free);
        }
    }
}
