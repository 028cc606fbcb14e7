//! Clients that share one budget: a process and its forked children, or all programs of a process tree.
//!
//! Each member has a share of the budget and keeps within it. The shares never sum to more than the budget. Who is short
//! takes what is free, else asks for frames of the member that has most of them for each fault that it makes; that one
//! gives them when its agent has moved pages out. So members that do nothing end up with little, and nobody waits for
//! another's eviction who could evict pages of its own.
//!
//! Whatever happens, a member can use its floor: what the daemon must hold for it, and a few frames. A fork is refused where the
//! floors would not fit into the budget. A forked child begins with all that its parent has in RAM, on credit: until one of
//! both writes to it, there is one frame for both.
//!
//! One lock for each group, taken by fault threads of groups with several members only, and then only when one of them is
//! short or owes frames.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::ClientStats;
use nix::sys::eventfd::EventFd;

/// Frames that a member can use in any case.
pub const LEAST_FRAMES: u64 = 128;
/// How often a member may ask for more.
const PAUSE: Duration = Duration::from_millis(1);
/// After this time faults count half.
const HALF_LIFE: Duration = Duration::from_millis(100);

/// A group.
#[derive(Debug)]
pub struct Group {
    budget: AtomicU64,
    /// It has or had several members: shares must be looked after.
    shared: AtomicBool,
    resident: Sum,
    held: Sum,
    state: Mutex<State>,
}

/// What all members have of something, and the most that it ever was.
#[derive(Debug, Default)]
struct Sum {
    now: AtomicU64,
    peak: AtomicU64,
}

impl Sum {
    fn change(&self, from: u64, to: u64) {
        if from < to {
            let sum = self.now.fetch_add(to - from, Ordering::Relaxed) + (to - from);
            self.peak.fetch_max(sum, Ordering::Relaxed);
        } else if to < from {
            self.now.fetch_sub(from - to, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    shares: Shares,
    wakes: Vec<(u64, Arc<EventFd>)>,
    members_ever: u64,
    /// Sums over members that have ended.
    ended: ClientStats,
}

/// A member's place in its group, held by its fault thread.
#[derive(Debug)]
pub struct Membership {
    group: Arc<Group>,
    member: u64,
    resident: u64,
    held: u64,
    asked: Option<Instant>,
}

/// What a fault thread knows of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Bytes that it holds: frames, and what the daemon holds for it.
    pub held: u64,
    /// Of these, what the daemon holds and cannot do without.
    pub overhead: u64,
    /// Faults so far.
    pub faults: u64,
    /// It lacks frames.
    pub short: bool,
}

impl Group {
    /// A group without members.
    #[must_use]
    pub fn new(budget: u64) -> Arc<Self> {
        let state = State { shares: Shares::new(budget), ..State::default() };
        Arc::new(Self {
            budget: AtomicU64::new(budget),
            shared: AtomicBool::new(false),
            resident: Sum::default(),
            held: Sum::default(),
            state: Mutex::new(state),
        })
    }

    /// Bytes for all members together.
    #[must_use]
    pub fn budget(&self) -> u64 {
        self.budget.load(Ordering::Relaxed)
    }

    /// Changes the budget. Members get within their new shares as fast as their agents move pages out.
    pub fn set_budget(&self, bytes: u64) {
        self.budget.store(bytes, Ordering::Relaxed);
        let mut state = self.lock();
        state.shares.set_budget(bytes);
        state.wake_all();
    }

    /// Whether another member whose daemon side takes `overhead` bytes would find room for its floor.
    #[must_use]
    pub fn has_room(&self, overhead: u64) -> bool {
        let floors: u64 = self.lock().shares.members.iter().map(|member| member.floor).sum();
        floors.saturating_add(floor(overhead)) <= self.budget()
    }

    /// Whether shares have to be looked after at all.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    /// Members now, members ever, and sums over the ended ones, with the group's own peak.
    #[must_use]
    pub fn totals(&self) -> (u64, u64, ClientStats) {
        let state = self.lock();
        let now = u64::try_from(state.shares.members.len()).unwrap_or(u64::MAX);
        let peak_resident_pages = self.resident.peak.load(Ordering::Relaxed);
        let peak_held_bytes = self.held.peak.load(Ordering::Relaxed);
        (now, state.members_ever, ClientStats { peak_resident_pages, peak_held_bytes, ..state.ended })
    }

    /// Takes a member in; its thread is woken through `wake`.
    pub fn join(self: &Arc<Self>, wake: &Arc<EventFd>, overhead: u64) -> Membership {
        let mut state = self.lock();
        state.members_ever += 1;
        let member = state.members_ever;
        state.shares.join(member, floor(overhead));
        state.wakes.push((member, Arc::clone(wake)));
        if state.shares.members.len() > 1 {
            self.shared.store(true, Ordering::Relaxed);
        }
        Membership { group: Arc::clone(self), member, resident: 0, held: 0, asked: None }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn wake(&self, member: u64) {
        if let Some((_, wake)) = self.wakes.iter().find(|(other, _)| *other == member) {
            // A full counter is a wake-up too.
            let _ = nix::unistd::write(wake.as_fd(), &1_u64.to_ne_bytes());
        }
    }

    fn wake_all(&self) {
        self.wakes.iter().for_each(|(member, _)| self.wake(*member));
    }
}

impl Membership {
    /// The group.
    #[must_use]
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Tells the group how many frames the member has, and how many bytes it holds in all.
    pub fn count(&mut self, resident: u64, held: u64) {
        self.group.resident.change(self.resident, resident);
        self.group.held.change(self.held, held);
        (self.resident, self.held) = (resident, held);
    }

    /// What the member shall keep to in bytes, now that its needs are these.
    pub fn balance(&mut self, needs: Needs, now: Instant) -> u64 {
        let group = Arc::clone(&self.group);
        let mut state = group.lock();
        // One that is short at every turn need not ask at every turn.
        let asks = needs.short && self.asked.is_none_or(|asked| now - asked >= PAUSE);
        if asks {
            self.asked = Some(now);
        }
        let (target, wake) = state.shares.balance(self.member, needs, asks, now);
        wake.into_iter().for_each(|member| state.wake(member));
        target
    }

    /// The member has ended, with these figures.
    pub fn leave(mut self, stats: &ClientStats) {
        self.count(0, 0);
        let mut state = self.group.lock();
        state.shares.leave(self.member);
        state.wakes.retain(|(member, _)| *member != self.member);
        add(&mut state.ended, stats);
        state.wake_all();
    }
}

/// Adds what is counted, not what is a state of the moment.
pub fn add(sum: &mut ClientStats, more: &ClientStats) {
    sum.faults += more.faults;
    sum.faults_zero += more.faults_zero;
    sum.faults_read += more.faults_read;
    sum.faults_rescued += more.faults_rescued;
    sum.faults_packed += more.faults_packed;
    sum.faults_stalled += more.faults_stalled;
    sum.pages_in += more.pages_in;
    sum.pages_readahead += more.pages_readahead;
    sum.pages_out += more.pages_out;
    sum.pages_clean += more.pages_clean;
    sum.pages_zero += more.pages_zero;
    sum.pages_spilled += more.pages_spilled;
    sum.io_errors += more.io_errors;
}

/// What a member can use in any case, in bytes.
fn floor(overhead: u64) -> u64 {
    overhead + LEAST_FRAMES * PAGE
}

/// Who may use how much. Decides, and knows neither threads nor locks.
#[derive(Debug, Default)]
struct Shares {
    budget: u64,
    members: Vec<Member>,
    /// When faults were halved last.
    halved: Option<Instant>,
}

#[derive(Debug)]
struct Member {
    member: u64,
    /// What it may use.
    share: u64,
    /// What it shall come down to, if that is less.
    target: u64,
    floor: u64,
    /// Lacks frames, and is told when some are free.
    short: bool,
    faults: u64,
    /// Recent faults.
    pressure: u64,
}

impl Shares {
    fn new(budget: u64) -> Self {
        Self { budget, ..Self::default() }
    }

    fn free(&self) -> u64 {
        self.budget.saturating_sub(self.members.iter().map(|member| member.share).sum())
    }

    fn join(&mut self, member: u64, floor: u64) {
        // The only one has all. Others begin with nothing, and take what is free or owed to them when they need it.
        let share = if self.members.is_empty() { self.budget } else { 0 };
        let new = Member { member, share, target: share, floor, short: false, faults: 0, pressure: 0 };
        self.members.push(new);
    }

    fn leave(&mut self, member: u64) {
        self.members.retain(|other| other.member != member);
    }

    fn set_budget(&mut self, bytes: u64) {
        let before = self.budget.max(1);
        self.budget = bytes;
        if let [only] = &mut self.members[..] {
            (only.share, only.target) = (bytes, bytes);
            return;
        }
        for member in &mut self.members {
            let part = u128::from(member.target) * u128::from(bytes) / u128::from(before);
            member.target = member.target.min(u64::try_from(part).unwrap_or(u64::MAX));
            // The old promise is void: whoever asked for less knows that it takes a moment.
            member.share = member.target;
        }
    }

    /// Brings one member's figures up to date. Gives what it shall keep to, and who has something to do about theirs.
    fn balance(&mut self, member: u64, needs: Needs, asks: bool, now: Instant) -> (u64, Vec<u64>) {
        self.age(now);
        let alone = self.members.len() == 1;
        let (budget, mut wake) = (self.budget, Vec::new());
        let Some(place) = self.members.iter().position(|other| other.member == member) else {
            return (0, wake);
        };
        let me = &mut self.members[place];
        me.pressure += needs.faults.saturating_sub(me.faults);
        (me.faults, me.floor, me.short) = (needs.faults, floor(needs.overhead), needs.short);
        if alone {
            (me.share, me.target) = (budget, budget);
            return (budget, wake);
        }
        if me.target < me.share {
            let left = me.share.min(needs.held).max(me.target);
            if left < me.share {
                me.share = left;
                wake.extend(self.members.iter().filter(|other| other.short).map(|other| other.member));
            }
        }
        if asks {
            wake.extend(self.provide(place));
        }
        let me = &self.members[place];
        (me.target.max(me.floor), wake)
    }

    /// Gets a member more: what is free, else what another shall give. Gives that other.
    fn provide(&mut self, place: usize) -> Option<u64> {
        let free = self.free();
        let step = (self.budget / 32).max(64 * PAGE);
        let me = &mut self.members[place];
        // Who owes takes nothing.
        if me.target < me.share && me.share >= me.floor {
            return None;
        }
        let want = step.max(me.floor.saturating_sub(me.share));
        let got = want.min(free);
        me.share += got;
        me.target = me.share;
        if got == want {
            return None;
        }
        let (share, pressure, needy) = (me.share, me.pressure, me.share < me.floor);
        // Owed already, by members that have not got down yet.
        let owed: u64 = self.members.iter().map(|other| other.share - other.target.min(other.share)).sum();
        let lack = (want - got).saturating_sub(owed);
        if lack == 0 {
            return None;
        }
        let others = self.members.iter_mut().enumerate().filter(|(other, _)| *other != place);
        let (_, giver) = others
            .filter(|(_, other)| other.target > other.floor)
            .max_by_key(|(_, other)| other.target / (other.pressure + 1))?;
        let richer = u128::from(giver.target) * u128::from(pressure + 1)
            > 2 * u128::from(share) * u128::from(giver.pressure + 1);
        if !(needy || richer) {
            return None;
        }
        giver.target = giver.target.saturating_sub(lack).max(giver.floor);
        Some(giver.member)
    }

    fn age(&mut self, now: Instant) {
        let halved = *self.halved.get_or_insert(now);
        if now.saturating_duration_since(halved) >= HALF_LIFE {
            self.halved = Some(now);
            self.members.iter_mut().for_each(|member| member.pressure /= 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn needs(held: u64, faults: u64, short: bool) -> Needs {
        Needs { held, overhead: MIB, faults, short }
    }

    #[test]
    fn the_only_member_has_all_and_again_after_the_others_have_left() {
        let now = Instant::now();
        let mut shares = Shares::new(64 * MIB);
        shares.join(1, floor(MIB));
        assert_eq!(shares.balance(1, needs(0, 0, false), false, now).0, 64 * MIB);
        shares.join(2, floor(MIB));
        assert_eq!(shares.balance(2, needs(0, 0, false), false, now).0, floor(MIB), "nothing but its floor");
        shares.leave(1);
        assert_eq!(shares.balance(2, needs(0, 0, false), false, now).0, 64 * MIB);
    }

    #[test]
    fn a_busy_member_gets_the_frames_of_an_idle_one_as_that_gives_them() {
        let mut now = Instant::now();
        let mut shares = Shares::new(64 * MIB);
        shares.join(1, floor(MIB));
        shares.balance(1, needs(64 * MIB, 1000, true), true, now);
        shares.join(2, floor(MIB));
        let (mut idle, mut faults, mut mine) = (64 * MIB, 0, 0);
        for _ in 0..200 {
            now += HALF_LIFE;
            faults += 1000;
            let (share, wake) = shares.balance(2, needs(mine, faults, true), true, now);
            mine = share;
            if wake.contains(&1) {
                idle = shares.balance(1, needs(idle, 1000, false), false, now).0;
                shares.balance(1, needs(idle, 1000, false), false, now);
            }
        }
        assert_eq!(idle, floor(MIB));
        assert!(mine > 60 * MIB, "{mine}");
    }

    #[test]
    fn two_that_are_equally_busy_share_and_do_not_take_turns() {
        let mut now = Instant::now();
        let mut shares = Shares::new(64 * MIB);
        shares.join(1, floor(MIB));
        shares.join(2, floor(MIB));
        let mut held = [64 * MIB, 0];
        for round in 1..400 {
            now += HALF_LIFE / 10;
            for member in [1, 2_usize] {
                let needs = needs(held[member - 1], round * 100, true);
                let id = member as u64;
                // It gets there at once.
                held[member - 1] = shares.balance(id, needs, true, now).0;
                shares.balance(id, Needs { held: held[member - 1], ..needs }, false, now);
            }
        }
        assert!(held.iter().all(|held| *held > 16 * MIB), "{held:?}");
    }

    proptest! {
        #[test]
        fn shares_never_sum_to_more_than_the_budget(
            steps in proptest::collection::vec((0_u8..6, 1_u64..5, 0_u64..80, 0_u64..3000, any::<bool>()), 1..300)
        ) {
            let mut now = Instant::now();
            let mut shares = Shares::new(64 * MIB);
            for (what, member, size, faults, flag) in steps {
                now += Duration::from_millis(faults / 50);
                let there = shares.members.iter().any(|other| other.member == member);
                match what {
                    0 if !there => shares.join(member, floor(MIB)),
                    1 if flag => shares.leave(member),
                    2 if flag => shares.set_budget((8 + size) * MIB),
                    _ if there => {
                        let (share, wake) = shares.balance(member, needs(size * MIB, faults, flag), flag, now);
                        prop_assert!(share >= floor(MIB));
                        prop_assert!(wake.iter().all(|w| shares.members.iter().any(|m| m.member == *w)));
                    }
                    _ => {}
                }
                let sum: u64 = shares.members.iter().map(|member| member.share).sum();
                prop_assert!(sum <= shares.budget, "{} of {}", sum, shares.budget);
                prop_assert!(shares.members.iter().all(|member| member.target <= member.share));
            }
        }
    }
}
