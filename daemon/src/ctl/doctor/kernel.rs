//! The kernel's features, each by a real call on memory of this process.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use fmalloc_proto::{PAGE_SIZE, transport};
use io_uring::{IoUring, opcode, types};
use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};

use super::report::{Report, State, as_root, sysctl};
use super::rights;
use super::uffd::{Access, Area, Uffd, errno};

/// Every UFFD_FEATURE that the kernel has had so far, by its bit.
const FEATURES: [&str; 17] = [
    "PAGEFAULT_FLAG_WP",
    "EVENT_FORK",
    "EVENT_REMAP",
    "EVENT_REMOVE",
    "MISSING_HUGETLBFS",
    "MISSING_SHMEM",
    "EVENT_UNMAP",
    "SIGBUS",
    "THREAD_ID",
    "MINOR_HUGETLBFS",
    "MINOR_SHMEM",
    "EXACT_ADDRESS",
    "WP_HUGETLBFS_SHMEM",
    "WP_UNPOPULATED",
    "POISON",
    "WP_ASYNC",
    "MOVE",
];
/// Without these, what a program does to its memory would go unnoticed.
const NEEDED: [&str; 4] = ["EVENT_REMOVE", "EVENT_UNMAP", "EVENT_REMAP", "THREAD_ID"];
/// Pages of a trial.
const PAGES: usize = 16;
/// Far longer than a fault takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(5);

pub(super) fn examine(report: &mut Report, access: &Access) {
    report.area("kernel");
    report.kernel = userfaultfd(report, access) & own_descriptors(report);
    processes(report);
    io_uring(report);
}

/// Whether paging is possible at all.
fn userfaultfd(report: &mut Report, access: &Access) -> bool {
    let mask = match access.make().and_then(|uffd| uffd.handshake(0)) {
        Ok(mask) => mask,
        Err(errno) => {
            let found = format!("no userfaultfd can be had: {}", errno.desc());
            let cost = "nothing can be paged, and nothing below can be tried";
            let mend = match errno {
                Errno::ENOSYS if !rights::is_filtered() => newer_kernel("4.14 with CONFIG_USERFAULTFD"),
                // What forbids it is said, with the remedy, where the user's rights are.
                _ => String::new(),
            };
            report.lacks("userfaultfd", State::Blocks, found, cost, mend);
            return false;
        }
    };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    report.ok("userfaultfd", format!("Linux {}, handshake done, features {mask:#x}", release.trim()));
    let answers: Vec<_> = (0..).zip(FEATURES).map(|(bit, name)| (name, try_feature(access, bit))).collect();
    for (name, answer) in &answers {
        report.feature(name, answer);
    }
    let has = |name: &str| answers.contains(&(name, "yes"));
    let events = events(report, has);
    let movable = moves(report, access, has);
    poison(report, access, has("POISON"));
    fork(report, &answers);
    read_without_waiting(report, access);
    events & movable & faults(report, access)
}

/// Whether a userfaultfd with just this feature can be made.
fn try_feature(access: &Access, bit: u32) -> &'static str {
    match access.make().and_then(|uffd| uffd.handshake(1 << bit)) {
        Ok(_) => "yes",
        Err(Errno::EPERM) => "denied",
        Err(_) => "no",
    }
}

fn events(report: &mut Report, has: impl Fn(&'static str) -> bool) -> bool {
    let missing: Vec<_> = NEEDED.into_iter().filter(|name| !has(name)).collect();
    if missing.is_empty() {
        report.ok("events", NEEDED.join(", "));
    } else {
        report.lacks(
            "events",
            State::Blocks,
            format!("missing: {}", missing.join(", ")),
            "what a program does to its memory by madvise or munmap would go unnoticed: nothing is paged",
            newer_kernel("4.14"),
        );
    }
    missing.is_empty()
}

fn moves(report: &mut Report, access: &Access, has: impl Fn(&'static str) -> bool) -> bool {
    let switched_off = is_switched_off("move");
    if has("MOVE") && !switched_off {
        return match try_move(access) {
            Ok(()) => {
                report.ok("MOVE", format!("{PAGES} pages moved whole between two userfaultfds"));
                true
            }
            Err(error) => {
                let cost = "memory cannot be taken out of programs safely: nothing is paged";
                report.lacks("MOVE", State::Blocks, error, cost, newer_kernel("6.8"));
                false
            }
        };
    }
    let writable = has("PAGEFAULT_FLAG_WP");
    let (state, cost) = if writable {
        let cost = "eviction by write-protection is slower, and O_DIRECT or io_uring reads into regions are unsafe: \
                    what the disk writes during an eviction is lost";
        (State::Costs, cost)
    } else {
        (State::Blocks, "without write-protection either, memory cannot be taken out of programs safely")
    };
    let (found, mend) = if switched_off {
        ("switched off by FMALLOC_DISABLE".to_owned(), "unset FMALLOC_DISABLE".to_owned())
    } else {
        ("the kernel does not have it".to_owned(), newer_kernel("6.8"))
    };
    report.lacks("MOVE", state, found, cost, mend);
    writable
}

/// Whether programs of this environment do without a feature that is there.
fn is_switched_off(feature: &str) -> bool {
    let words = std::env::var("FMALLOC_DISABLE").unwrap_or_default();
    words.split(',').any(|word| word.trim() == feature)
}

/// Moves pages as the agent does: source and target belong to two userfaultfds.
fn try_move(access: &Access) -> Result<(), String> {
    let (source, target, from, to) = (|| {
        let (source, target) = (access.make()?, access.make()?);
        source.handshake(0)?;
        target.handshake(0)?;
        let (from, to) = (Area::new(PAGES)?, Area::new(PAGES)?);
        (0..PAGES).for_each(|page| from.write(page, pattern(page)));
        source.register(&from)?;
        target.register(&to)?;
        Ok((source, target, from, to))
    })()
    .map_err(|errno: Errno| format!("two registered ranges cannot be had: {}", errno.desc()))?;
    target.move_pages(&to, &from).map_err(|errno| format!("refused: {}", errno.desc()))?;
    let (left, arrived) = (from.resident(), to.resident());
    // Were a page missing after all, reading it would wait for an answer.
    source.unregister(&from);
    target.unregister(&to);
    if (left, arrived) != (Ok(0), Ok(PAGES)) || (0..PAGES).any(|page| to.read(page) != pattern(page)) {
        return Err(format!("moved {PAGES} pages, but {left:?} stayed and {arrived:?} arrived"));
    }
    Ok(())
}

fn pattern(page: usize) -> u8 {
    u8::try_from(page % 251).unwrap_or(0) + 1
}

fn poison(report: &mut Report, access: &Access, has: bool) {
    const COST: &str = "a page lost to a disk error loses its access rights instead: SIGSEGV, not SIGBUS";
    let outcome = if has {
        (|| {
            let (uffd, area) = (access.make()?, Area::new(1)?);
            uffd.handshake(0)?;
            uffd.register(&area)?;
            uffd.poison(&area)?;
            let (_reader, writer) = nix::unistd::pipe()?;
            // By a system call, which gives an error where a load would give a signal.
            Ok(area.write_to(0, &writer))
        })()
    } else {
        Err(Errno::ENOTTY)
    };
    match outcome {
        Ok(Err(Errno::EFAULT | Errno::EHWPOISON)) => report.ok("POISON", "a poisoned page gives errors"),
        Ok(other) => {
            report.lacks(
                "POISON",
                State::Costs,
                format!("a poisoned page gave {other:?}"),
                COST,
                newer_kernel("6.6"),
            );
        }
        Err(errno) => {
            let found = format!("cannot be had: {}", errno.desc());
            report.lacks("POISON", State::Costs, found, COST, newer_kernel("6.6"));
        }
    }
}

fn fork(report: &mut Report, answers: &[(&str, &str)]) {
    match answers.iter().find(|(name, _)| *name == "EVENT_FORK").map(|(_, answer)| *answer) {
        Some("yes") => report.ok("EVENT_FORK", "may be asked for"),
        Some("denied") => report.note(
            "EVENT_FORK",
            "denied to this user, who lacks CAP_SYS_PTRACE; the service has it. Regions are not inherited by fork \
             with a private daemon",
        ),
        _ => report.lacks(
            "EVENT_FORK",
            State::Costs,
            "the kernel does not have it",
            "regions are not inherited by fork",
            newer_kernel("4.14"),
        ),
    }
}

/// Whether faults reach whoever answers them.
fn faults(report: &mut Report, access: &Access) -> bool {
    match try_faults(access, |area, page| Ok(area.read(page))) {
        Ok(each) => {
            let us = each.as_micros();
            report.figure("fault_us", u64::try_from(us).unwrap_or(u64::MAX));
            report.ok("faults", format!("answered by another thread in {us} µs"));
        }
        Err(error) => {
            report.lacks("faults", State::Blocks, error, "nothing can be paged", newer_kernel("6.8"));
            return false;
        }
    }
    let pipe = nix::unistd::pipe();
    let through_pipe = |area: &Area, page: usize| {
        let (reader, writer) = pipe.as_ref().map_err(|errno| *errno)?;
        area.write_to(page, writer)?;
        let mut bytes = [0_u8; PAGE_SIZE];
        nix::unistd::read(reader, &mut bytes)?;
        Ok(bytes[0])
    };
    if !access.full() {
        // Why, and the remedy, is said where the user's rights are.
        report.note("faults in system calls", "not answered: only a user-mode userfaultfd can be had");
        return true;
    }
    match try_faults(access, through_pipe) {
        Ok(_) => {
            report.ok("faults in system calls", "answered: write(2) from memory that is not there works")
        }
        Err(error) => {
            report.lacks(
                "faults in system calls",
                State::Blocks,
                error,
                "system calls on swapped memory fail",
                "",
            );
        }
    }
    true
}

/// Has a thread touch missing pages one by one, and answers; gives the time for each.
fn try_faults(
    access: &Access,
    touch: impl Fn(&Area, usize) -> Result<u8, Errno> + Sync,
) -> Result<Duration, String> {
    let set_up = || {
        let (uffd, area) = (access.make()?, Area::new(PAGES)?);
        uffd.handshake(0)?;
        uffd.register(&area)?;
        Ok((uffd, area))
    };
    let (uffd, area) =
        set_up().map_err(|errno: Errno| format!("no range can be registered: {}", errno.desc()))?;
    std::thread::scope(|scope| {
        let toucher = std::thread::Builder::new().spawn_scoped(scope, || {
            let start = Instant::now();
            let good = (0..PAGES).all(|page| touch(&area, page) == Ok(pattern(page)));
            (good, start.elapsed())
        });
        let toucher = toucher.map_err(|error| format!("no thread can be started: {error}"))?;
        let answered = (0..PAGES).try_for_each(|page| answer(&uffd, &area, page));
        // Whoever still waits goes on with zeros, and fails.
        uffd.unregister(&area);
        match (answered, toucher.join()) {
            (Ok(()), Ok((true, time))) => Ok(time / u32::try_from(PAGES).unwrap_or(1)),
            (Err(error), _) => Err(error),
            _ => Err("a touched page did not have the bytes that it was given".to_owned()),
        }
    })
}

fn answer(uffd: &Uffd, area: &Area, page: usize) -> Result<(), String> {
    match uffd.next_fault(PATIENCE) {
        Some(addr) if addr == area.addr(page) => uffd
            .copy(addr, &[pattern(page); PAGE_SIZE])
            .map_err(|errno| format!("a fault cannot be answered: {}", errno.desc())),
        Some(addr) => Err(format!("a fault was reported at {addr:#x}, where there was none")),
        None => Err("a touched page was not reported".to_owned()),
    }
}

fn read_without_waiting(report: &mut Report, access: &Access) {
    let can = access.make().is_ok_and(|uffd| uffd.handshake(0).is_ok() && uffd.reads_without_waiting());
    if can {
        report.ok("RWF_NOWAIT", "a userfaultfd can be read without waiting, whatever its owner does");
    } else {
        report.note(
            "RWF_NOWAIT",
            "not for userfaultfds: a client can stop the thread that serves it, and only that one",
        );
    }
}

/// Whether a thread can have a descriptor table of its own, as the agent needs.
fn own_descriptors(report: &mut Report) -> bool {
    let outcome = std::thread::Builder::new().spawn(|| {
        // SAFETY: takes numbers by value; this thread holds no descriptor, and the table that is emptied is its own copy.
        let done =
            unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE) };
        Errno::result(done).map(drop)
    });
    match outcome.map_err(|error| errno(&error)).and_then(|thread| thread.join().unwrap_or(Err(Errno::EIO))) {
        Ok(()) => {
            report.ok("close_range", "a thread can have descriptors of its own");
            true
        }
        Err(errno) => {
            let found = format!("with CLOSE_RANGE_UNSHARE: {}", errno.desc());
            let cost = "the library cannot keep its descriptors apart from the program's, and does not start";
            let mend = if rights::is_filtered() { rights::relax_filter() } else { newer_kernel("5.9") };
            report.lacks("close_range", State::Blocks, found, cost, mend);
            false
        }
    }
}

/// How the death of a process is learnt, and where its pages are.
fn processes(report: &mut Report) {
    let peer = transport::pair().and_then(|(one, _other)| getsockopt(&one, sockopt::PeerPidfd));
    match peer {
        Ok(_) => report.ok("SO_PEERPIDFD", "the kernel names the very process behind a socket"),
        Err(errno) => report.lacks(
            "SO_PEERPIDFD",
            State::Costs,
            errno.desc(),
            "a client is looked up by its process id, which might by then be another's",
            newer_kernel("6.5"),
        ),
    }
    // SAFETY: the call takes plain numbers.
    let pidfd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) });
    match pidfd {
        Ok(fd) => {
            use std::os::fd::FromRawFd;
            // SAFETY: the kernel has just made this descriptor for us.
            drop(i32::try_from(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            report.ok("pidfd_open", "the end of a process can be waited for");
        }
        Err(errno) => report.lacks(
            "pidfd_open",
            if peer.is_ok() { State::Note } else { State::Blocks },
            errno.desc(),
            "where SO_PEERPIDFD is missing as well, the service cannot tell when a client has ended",
            if rights::is_filtered() { rights::relax_filter() } else { newer_kernel("5.3") },
        ),
    }
    match present_by_pagemap() {
        Ok(true) => report.ok("pagemap", "tells which pages are present"),
        outcome => report.lacks(
            "pagemap",
            State::Blocks,
            outcome.map_or_else(
                |error| error.to_string(),
                |_| "does not show a page that is present".to_owned(),
            ),
            "pages that a program has discarded cannot be told from those that it has not",
            "run where /proc is mounted with CONFIG_PROC_PAGE_MONITOR",
        ),
    }
}

fn present_by_pagemap() -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let area = Area::new(2)?;
    area.write(0, 1);
    let pagemap = std::fs::File::open("/proc/self/pagemap")?;
    let mut entries = [0_u8; 16];
    pagemap.read_exact_at(&mut entries, area.addr(0) / fmalloc_proto::PAGE * 8)?;
    // The highest bit of each little-endian entry.
    Ok(entries[7] & 0x80 != 0 && entries[15] & 0x80 == 0)
}

fn io_uring(report: &mut Report) {
    let error = match try_io_uring() {
        Ok(()) => return report.ok("io_uring", "set up, and a read came back"),
        Err(error) => error,
    };
    let setting = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let mend = match (setting.trim(), errno(&error)) {
        ("1" | "2", _) => sysctl("kernel.io_uring_disabled=0"),
        (_, Errno::EPERM | Errno::ENOSYS | Errno::EACCES) if rights::is_filtered() => rights::relax_filter(),
        (_, Errno::ENOMEM) => as_root("prlimit --memlock=unlimited --pid $$"),
        _ => newer_kernel("5.11 with CONFIG_IO_URING"),
    };
    let cost = "swap is read and written one request at a time: several threads that fault at once wait for each other";
    report.lacks("io_uring", State::Costs, format!("refused: {error}"), cost, mend);
}

fn try_io_uring() -> io::Result<()> {
    let mut ring = IoUring::new(4)?;
    if !ring.params().is_feature_ext_arg() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "it cannot wait with a timeout"));
    }
    let file = std::fs::File::open("/proc/self/exe")?;
    let mut bytes = vec![0_u8; PAGE_SIZE];
    let fd = types::Fd(std::os::fd::AsRawFd::as_raw_fd(&file));
    let entry = opcode::Read::new(fd, bytes.as_mut_ptr(), 4096).build();
    // SAFETY: file and buffer live until the completion below.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    match ring.completion().next().map(|entry| entry.result()) {
        Some(4096) => Ok(()),
        Some(negative) if negative < 0 => Err(io::Error::from_raw_os_error(-negative)),
        other => Err(io::Error::other(format!("a read came back with {other:?}"))),
    }
}

/// How to get a kernel of at least this version.
fn newer_kernel(version: &str) -> String {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let is_bookworm = release.lines().any(|line| line == "VERSION_CODENAME=bookworm");
    if is_bookworm {
        return format!(
            "echo deb http://deb.debian.org/debian bookworm-backports main | {} && {} && {}   # then restart",
            as_root("tee /etc/apt/sources.list.d/backports.list"),
            as_root("apt-get update"),
            as_root("apt-get install -t bookworm-backports linux-image-amd64")
        );
    }
    format!("install Linux {version} or newer, and restart")
}
