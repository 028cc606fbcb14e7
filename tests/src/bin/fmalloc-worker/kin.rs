//! Forked children that go on with the regions. A child takes commands as this process does, through its parent.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use anyhow::{Context, anyhow, bail, ensure};
use fmalloc_client::{ConnectOptions, Pager, PrivateOptions, Region, fork};
use fmalloc_proto::codec;
use fmalloc_proto::groups::GroupToken;
use fmalloc_proto::hello::{Hello, Role};
use fmalloc_proto::messages::{Budget, Reply, Request};
use fmalloc_proto::size::Size;
use fmalloc_proto::transport;
use fmalloc_tests::pattern::{self, WORDS};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::state::{Args, State};
use crate::{Outcome, serve};

/// Children of this process by name.
#[derive(Default)]
pub(crate) struct Children(Mutex<HashMap<String, Child>>);

struct Child {
    pid: Pid,
    line: BufReader<UnixStream>,
}

/// `connect-inherit BUDGET`: at FMALLOC_SOCKET, with the option that children inherit.
pub(crate) fn connect(state: &State, args: &mut Args<'_>) -> Outcome {
    let budget = args.text()?.parse::<Size>()?.0;
    let options = ConnectOptions { budget: Some(budget), inherit: true, ..ConnectOptions::default() };
    let pager = Pager::connect_with(&options)?;
    state.set_pager(Some(pager));
    Ok(Value::Null)
}

/// `private-inherit BUDGET SWAP_DIR SWAP_SIZE`: a daemon of its own, with the option that children inherit.
pub(crate) fn private(state: &State, args: &mut Args<'_>) -> Outcome {
    let mut options = PrivateOptions { inherit: true, ..PrivateOptions::new(args.size()?) };
    options.swap_dir = Some(args.text()?.into());
    options.swap_size = Some(args.size()?);
    state.set_pager(Some(Pager::private(&options)?));
    Ok(Value::Null)
}

/// Asks for something on a control connection of its own.
fn control(request: &Request) -> anyhow::Result<Reply> {
    let path = std::env::var_os("FMALLOC_SOCKET").context("no socket")?;
    let socket = transport::connect(path.as_ref())?;
    let mut buffer = vec![0; 65536];
    transport::send(socket.as_fd(), &Hello::new(Role::Control).encode(), &[])?;
    transport::recv(socket.as_fd(), &mut buffer)?;
    transport::send(socket.as_fd(), &codec::encode(1, request)?, &[])?;
    let (len, _) = transport::recv(socket.as_fd(), &mut buffer)?;
    Ok(codec::decode::<Reply>(&buffer[..len])?.1)
}

/// `new-group BUDGET`: gives the token.
pub(crate) fn new_group(args: &mut Args<'_>) -> Outcome {
    match control(&Request::NewGroup(Budget { bytes: args.size()? }))? {
        Reply::Group(group) => Ok(group.token.to_string().into()),
        other => bail!("{other:?}"),
    }
}

/// `group-stats TOKEN`.
pub(crate) fn group_stats(args: &mut Args<'_>) -> Outcome {
    match control(&Request::GroupStats(GroupToken { token: args.text()?.parse()? }))? {
        Reply::GroupStats(group) => Ok(json!({
            "members": group.members,
            "members_ever": group.members_ever,
            "peak_resident_pages": group.stats.peak_resident_pages,
            "budget_bytes": group.stats.budget_bytes,
            "faults": group.stats.faults,
            "pages_out": group.stats.pages_out,
        })),
        other => bail!("{other:?}"),
    }
}

/// `connect-group TOKEN`: shares the group's budget.
pub(crate) fn join(state: &State, args: &mut Args<'_>) -> Outcome {
    let group = Some(args.text()?.parse()?);
    let options = ConnectOptions { group, inherit: true, ..ConnectOptions::default() };
    state.set_pager(Some(Pager::connect_with(&options)?));
    Ok(Value::Null)
}

/// `fork CHILD`: gives its process id.
pub(crate) fn make(state: &Arc<State>, args: &mut Args<'_>) -> Outcome {
    let name = args.text()?.to_owned();
    let pager = state.pager()?;
    let (ours, theirs) = UnixStream::pair()?;
    state.versions.before_fork();
    // SAFETY: the child uses what this thread knows; other threads hold no lock of the state for long.
    match unsafe { fork(&[&pager]) }? {
        Some(pid) => {
            state.versions.after_fork();
            let pid = Pid::from_raw(i32::try_from(pid)?);
            drop(theirs);
            let child = Child { pid, line: BufReader::new(ours) };
            state.children.0.lock().unwrap().insert(name, child);
            Ok(pid.as_raw().into())
        }
        None => {
            drop(ours);
            // The parent's children are not this one's, and must see when the parent lets them go.
            state.children.0.lock().unwrap().clear();
            let input = BufReader::new(theirs.try_clone().unwrap());
            drop(pager);
            let code = i32::from(!serve(state, input, theirs));
            state.clear();
            state.set_pager(None);
            // SAFETY: ends the child without running what the parent has registered.
            unsafe { libc::_exit(code) }
        }
    }
}

/// `child CHILD COMMAND…`: has it done by the child.
pub(crate) fn tell(state: &State, args: &mut Args<'_>) -> Outcome {
    let mut children = state.children.0.lock().unwrap();
    let child = children.get_mut(args.text()?).context("no such child")?;
    writeln!(child.line.get_mut(), "{}", args.rest())?;
    let mut answer = String::new();
    ensure!(child.line.read_line(&mut answer)? > 0, "the child has ended");
    let mut answer: Value = serde_json::from_str(&answer)?;
    match answer.get_mut("ok") {
        Some(value) => Ok(value.take()),
        None => bail!("child: {}", answer["error"]),
    }
}

/// `child-tell CHILD COMMAND…`: the same, and nobody waits for the answer.
pub(crate) fn order(state: &State, args: &mut Args<'_>) -> Outcome {
    let mut children = state.children.0.lock().unwrap();
    let child = children.get_mut(args.text()?).context("no such child")?;
    writeln!(child.line.get_mut(), "{}", args.rest())?;
    Ok(Value::Null)
}

/// `outlive NAME SEED FILE`: in a child: waits for the end of its parent, checks the pattern, writes another and checks that,
/// and writes what came of it to a file.
pub(crate) fn outlive(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let (seed, file): (u64, _) = (args.number()?, args.text()?);
    let parent = nix::unistd::getppid();
    while nix::unistd::getppid() == parent {
        thread::sleep(std::time::Duration::from_millis(1));
    }
    let check = |seed: u64| {
        (0..memory.pages()).try_for_each(|index| pattern::check(seed, index as u64, memory.page(index)))
    };
    let outcome = check(seed).and_then(|()| {
        (0..memory.pages()).for_each(|index| pattern::write(seed + 1, index as u64, memory.page(index)));
        check(seed + 1)
    });
    std::fs::write(file, outcome.err().unwrap_or_else(|| "good".to_owned()))?;
    Ok(Value::Null)
}

/// `nag`: calls the library on and on, so that the agent has more to do than to move pages.
pub(crate) fn nag(state: &State, stop: &AtomicBool) -> Outcome {
    let pager = state.pager()?;
    let mut calls = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        pager.stats()?;
        let mut region = Region::new(&pager, 1 << 20)?;
        region[4096] = 1;
        ensure!(region[4096] == 1 && region[0] == 0, "a new region has wrong bytes");
        calls += 1;
    }
    Ok(calls.into())
}

/// `fork-lost NAME DAEMON`: the child kills the daemon before it has anything of it, and then would read.
pub(crate) fn lost(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let daemon = Pid::from_raw(args.number()?);
    let prepared = state.pager()?.prepare_fork()?;
    // SAFETY: the child makes system calls and reads memory.
    match Errno::result(unsafe { libc::fork() })? {
        0 => {
            let _ = kill(daemon, Signal::SIGKILL);
            thread::sleep(std::time::Duration::from_millis(100));
            // SAFETY: this is the child, and this thread has prepared.
            unsafe { prepared.in_child() };
            let zeros = (0..memory.pages()).any(|index| memory.page(index)[1] == 0);
            // SAFETY: ends the child.
            unsafe { libc::_exit(if zeros { 7 } else { 0 }) }
        }
        pid => {
            prepared.in_parent();
            ended(Pid::from_raw(pid))
        }
    }
}

/// `child-wait CHILD`: lets it end, and says how it did.
pub(crate) fn wait(state: &State, args: &mut Args<'_>) -> Outcome {
    let child = state.children.0.lock().unwrap().remove(args.text()?).context("no such child")?;
    drop(child.line);
    ended(child.pid)
}

/// `child-kill CHILD`.
pub(crate) fn end(state: &State, args: &mut Args<'_>) -> Outcome {
    let child = state.children.0.lock().unwrap().remove(args.text()?).context("no such child")?;
    kill(child.pid, Signal::SIGKILL)?;
    ended(child.pid)
}

fn ended(pid: Pid) -> Outcome {
    Ok(match waitpid(pid, None)? {
        WaitStatus::Exited(_, code) => format!("exit {code}"),
        WaitStatus::Signaled(_, signal, _) => signal.as_str().to_owned(),
        other => format!("{other:?}"),
    }
    .into())
}

/// `fork-raw OFFSET NAME`: a fork that the library does not know of; its child touches memory, and is killed if that takes
/// long.
pub(crate) fn raw(state: &State, args: &mut Args<'_>) -> Outcome {
    let offset = args.bytes()?;
    let memory = state.memory(args.text()?)?;
    // SAFETY: the child makes system calls and reads memory.
    match Errno::result(unsafe { libc::fork() })? {
        0 => {
            let word = std::hint::black_box(memory.page(offset / 4096)[0]);
            // SAFETY: ends the child.
            unsafe { libc::_exit(if word == 0 { 7 } else { 0 }) }
        }
        pid => {
            let pid = Pid::from_raw(pid);
            let begin = Instant::now();
            while begin.elapsed().as_millis() < 500 {
                if let WaitStatus::Exited(_, code) = waitpid(pid, Some(WaitPidFlag::WNOHANG))? {
                    return Ok(format!("exit {code}").into());
                }
                thread::sleep(std::time::Duration::from_millis(5));
            }
            kill(pid, Signal::SIGKILL)?;
            ended(pid)
        }
    }
}

/// `fork-exec COUNT [plain]`: forks children that run another program; gives the microseconds of each fork and of each child
/// until it has ended. `plain`: by the C library's fork, without preparation.
pub(crate) fn exec(state: &State, args: &mut Args<'_>) -> Outcome {
    let count: u32 = args.number()?;
    let plain = args.optional() == Some("plain");
    let pager = if plain { None } else { Some(state.pager()?) };
    let (mut forks, mut wholes) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let begin = Instant::now();
        let child = match &pager {
            // SAFETY: the child runs another program at once.
            Some(pager) => unsafe { fork(&[pager]) }?,
            // SAFETY: as above.
            None => match Errno::result(unsafe { libc::fork() })? {
                0 => None,
                pid => Some(u32::try_from(pid)?),
            },
        };
        let Some(pid) = child else {
            let error = Command::new("/bin/true").exec();
            eprintln!("exec: {error}");
            // SAFETY: ends the child.
            unsafe { libc::_exit(99) }
        };
        forks.push(begin.elapsed().as_secs_f64() * 1e6);
        let status = waitpid(Pid::from_raw(i32::try_from(pid)?), None)?;
        wholes.push(begin.elapsed().as_secs_f64() * 1e6);
        ensure!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok(json!({ "fork_us": median(forks), "whole_us": median(wholes) }))
}

/// Pages that threads write again and again, each time with the next version, and which versions they had around a fork.
#[derive(Default)]
pub(crate) struct Versions(Mutex<Option<Arc<Written>>>);

struct Written {
    /// Version of each page that is complete.
    done: Vec<AtomicU64>,
    /// The same as it was before the last fork.
    before: Mutex<Vec<u64>>,
    /// The same after it, in memory that parent and child share; the first word says that it is there.
    after: &'static [AtomicU64],
}

impl Versions {
    fn get(&self) -> anyhow::Result<Arc<Written>> {
        self.0.lock().unwrap().clone().context("no versions are written")
    }

    fn before_fork(&self) {
        if let Ok(written) = self.get() {
            written.after[0].store(0, Ordering::SeqCst);
            *written.before.lock().unwrap() =
                written.done.iter().map(|version| version.load(Ordering::SeqCst)).collect();
        }
    }

    fn after_fork(&self) {
        if let Ok(written) = self.get() {
            for (to, from) in written.after[1..].iter().zip(&written.done) {
                to.store(from.load(Ordering::SeqCst), Ordering::SeqCst);
            }
            written.after[0].store(1, Ordering::SeqCst);
        }
    }
}

fn word(page: usize, version: u64) -> u64 {
    version << 32 | page as u64
}

/// `versions NAME`: prepares a region for `write-versions`; all its pages have version 0, which is zeros.
pub(crate) fn versions(state: &State, args: &mut Args<'_>) -> Outcome {
    let pages = state.memory(args.text()?)?.pages();
    let len = (pages + 1) * 8;
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping, which is never unmapped; zeros are atomics.
    let after = unsafe {
        let at = libc::mmap(std::ptr::null_mut(), len, access, kind, -1, 0);
        ensure!(at != libc::MAP_FAILED, "no shared memory");
        std::slice::from_raw_parts(at.cast::<AtomicU64>(), pages + 1)
    };
    let done = (0..pages).map(|_| AtomicU64::new(0)).collect();
    let written = Written { done, before: Mutex::default(), after };
    *state.versions.0.lock().unwrap() = Some(Arc::new(written));
    Ok(Value::Null)
}

/// `write-versions NAME THREADS`: writes the next version to pages, each thread to its own, until stopped.
pub(crate) fn write_versions(state: &State, args: &mut Args<'_>, stop: &AtomicBool) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let threads: usize = args.number()?;
    let written = state.versions.get()?;
    let total = AtomicU64::new(0);
    thread::scope(|scope| {
        for thread in 0..threads {
            let (memory, written, total) = (&memory, &written, &total);
            scope.spawn(move || {
                let mut rng = fmalloc_tests::rng::Rng::new(thread as u64 + 1);
                let own = memory.pages() / threads;
                let mut at = 0;
                while !stop.load(Ordering::Relaxed) {
                    at = if rng.below(8) == 0 { rng.index(own) } else { (at + 1) % own };
                    let page = at * threads + thread;
                    let version = written.done[page].load(Ordering::Relaxed) + 1;
                    for place in memory.page(page) {
                        // SAFETY: a word of the page, seen by a child in the middle of the page's writing.
                        unsafe { std::ptr::write_volatile(place, word(page, version)) };
                    }
                    written.done[page].store(version, Ordering::SeqCst);
                    total.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    Ok(total.into_inner().into())
}

/// `check-versions NAME`: in a child: each page has a version that it had during the fork. In the parent, with `now`: the
/// version that was written last.
pub(crate) fn check_versions(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let now = args.optional() == Some("now");
    let written = state.versions.get()?;
    let before = written.before.lock().unwrap().clone();
    let begin = Instant::now();
    while !now && written.after[0].load(Ordering::SeqCst) == 0 {
        ensure!(begin.elapsed().as_secs() < 30, "the parent does not say what it has written");
        thread::yield_now();
    }
    for (index, done) in written.done.iter().enumerate() {
        let (least, most) = if now {
            let done = done.load(Ordering::SeqCst);
            (done, done)
        } else {
            (before[index], written.after[index + 1].load(Ordering::SeqCst) + 1)
        };
        let page = memory.page(index);
        let (new, old) = (page[0] >> 32, page[WORDS - 1] >> 32);
        let text = || anyhow!("page {index} has versions {new} and {old}, it had {least} to {most}");
        ensure!(new == old || (!now && new == old + 1), text());
        // The one that was complete before the fork, or a later one, which was begun at least before it ended.
        ensure!(old >= least && new <= most, text());
        let turn = page.iter().take_while(|found| **found == expected(index, new)).count();
        ensure!(page[turn..].iter().all(|found| *found == expected(index, old)), text());
    }
    Ok(memory.pages().into())
}

fn expected(page: usize, version: u64) -> u64 {
    if version == 0 { 0 } else { word(page, version) }
}
