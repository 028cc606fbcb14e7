//! What the agent shares with the application: nothing that a program could close, catch, or wait for.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says so by ending")]

mod double;

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

use double::{Double, alone, eventually, passes_a_byte, threads_named};
use fmalloc_client::{Error, Health, Region};
use fmalloc_proto::messages::Request;
use nix::unistd::pipe;

const PAGE: usize = fmalloc_client::PAGE_SIZE;

#[test]
fn the_agent_survives_a_program_that_closes_every_descriptor() {
    let _alone = alone();
    let (reader, writer) = pipe().unwrap();
    let double = Double::friendly();
    let others = agents();
    let pager = double.connect().unwrap();
    let agent = new_agent(&others);

    let links = |thread: u32| -> Vec<String> {
        let dir = std::fs::read_dir(format!("/proc/self/task/{thread}/fd")).unwrap();
        let target = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read_link(entry.ok()?.path()).ok();
        dir.filter_map(target).map(|path| path.to_string_lossy().into_owned()).collect()
    };
    let pipe_name = std::fs::read_link(format!("/proc/self/fd/{}", reader.as_raw_fd())).unwrap();
    let held = links(agent);
    assert!(!held.iter().any(|link| *link == pipe_name.to_string_lossy()), "{held:?}");
    assert_eq!(held.iter().filter(|link| *link == "/dev/null").count(), 3, "{held:?}");
    assert_eq!(held.iter().filter(|link| *link == "anon_inode:[userfaultfd]").count(), 2, "{held:?}");
    let own = links(std::process::id());
    assert!(!own.iter().any(|link| link.contains("userfaultfd")), "{own:?}");

    for thread in agents().into_iter().chain(threads_named("fmalloc-herald")) {
        let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        let blocked = u64::from_str_radix(blocked.trim(), 16).unwrap();
        // All but KILL and STOP, which nobody can block, and the two that belong to libc.
        let expected = !((1 << (libc::SIGKILL - 1)) | (1 << (libc::SIGSTOP - 1)) | (0b11 << 31));
        assert_eq!(blocked, expected, "{blocked:x}");
    }
    let own = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    assert!(
        own.lines().any(|line| line == "SigBlk:\t0000000000000000"),
        "the caller's own mask is as before"
    );
    assert!(passes_a_byte(&reader, &writer));
    std::mem::forget((reader, writer));

    // SAFETY: what some programs do; nothing in this process needs a descriptor beyond the standard three.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    let mut region = Region::new(&pager, 4 * PAGE).unwrap();
    region.fill(1);
    region.discard(0..PAGE).unwrap();
    assert!(pager.stats().is_ok());
    drop(region);
    drop(pager);
    double.join();
}

#[test]
fn a_lost_daemon_fails_requests_keeps_memory_and_is_said_once() {
    let _alone = alone();
    // The line goes to whatever is descriptor 2 of the process.
    let (reader, writer) = pipe().unwrap();
    // SAFETY: takes and gives back the standard error of this process.
    let stderr = unsafe { libc::dup(2) };
    // SAFETY: as above.
    assert_eq!(unsafe { libc::dup2(writer.as_raw_fd(), 2) }, 2);
    drop(writer);

    let double = Double::start(|peer, id, request| {
        if let Request::Stats(_) = request {
            // Dies while somebody waits for an answer.
            return false;
        }
        let reply = peer.usual(&request);
        peer.reply(id, &reply);
        true
    });
    let others = agents();
    let pager = double.connect().unwrap();
    let agent = new_agent(&others);
    let mut region = Region::new(&pager, 4 * PAGE).unwrap();
    region.fill(3);
    let addr = region.as_ptr();
    let outcome = pager.stats();
    let mut ready = libc::pollfd { fd: reader.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: waits for the line, ten seconds at most.
    assert_eq!(unsafe { libc::poll(&raw mut ready, 1, 10_000) }, 1);
    // SAFETY: as above.
    unsafe {
        libc::dup2(stderr, 2);
        libc::close(stderr);
    }
    assert!(matches!(outcome, Err(Error::DaemonGone)), "{outcome:?}");
    double.join();
    assert_eq!(pager.health(), Health::DaemonGone);
    assert!(matches!(Region::new(&pager, PAGE), Err(Error::DaemonGone)));
    assert!(matches!(region.discard(0..PAGE), Err(Error::DaemonGone)));
    assert!(region.iter().all(|byte| *byte == 3));

    drop((region, pager));
    // SAFETY: the mapping is left behind on purpose.
    assert_eq!(unsafe { *addr }, 3);
    assert!(agents().contains(&agent), "the agent holds on to the userfaultfd");
    let held = std::fs::read_dir(format!("/proc/self/task/{agent}/fd")).unwrap();
    let is_uffd = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().contains("userfaultfd"))
    };
    assert_eq!(held.filter_map(Result::ok).filter(is_uffd).count(), 2);

    // SAFETY: the descriptor is ours from here on.
    let mut said = unsafe { std::fs::File::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(reader)) };
    let mut text = String::new();
    said.read_to_string(&mut text).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("fmalloc")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert!(lines[0].contains("daemon is gone"), "{text}");
}

#[test]
fn without_regions_a_lost_daemon_leaves_nothing_behind() {
    let _alone = alone();
    let before = agents();
    let double = Double::start(|_, _, _| false);
    let pager = double.connect().unwrap();
    assert!(matches!(pager.stats(), Err(Error::DaemonGone)));
    assert!(matches!(Region::new(&pager, PAGE), Err(Error::DaemonGone)));
    drop(pager);
    eventually("the end of the agent", || agents() == before);
    double.join();
}

fn agents() -> Vec<u32> {
    threads_named("fmalloc-agent")
}

/// The agent that is not one of the others; tests of this file leave some behind.
fn new_agent(others: &[u32]) -> u32 {
    agents().into_iter().find(|agent| !others.contains(agent)).unwrap()
}
