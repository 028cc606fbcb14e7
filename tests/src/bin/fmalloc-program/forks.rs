//! `fork` while most memory is swapped out: both sides go on, each with bytes of its own.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::block::{Block, MIB};

/// Runs `child` in a forked child, and gives its process id.
fn fork(child: impl FnOnce()) -> libc::pid_t {
    // SAFETY: the child runs what it is given and ends.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(outcome.is_err())) }
        }
        pid => pid,
    }
}

fn wait(pid: libc::pid_t) {
    let mut status = 0;
    // SAFETY: there is room for a status.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child ended with {status:#x}");
}

fn make(mib: usize) -> Vec<Block> {
    let mut blocks: Vec<Block> = (0..mib).map(|_| Block::new(MIB)).collect();
    blocks.iter_mut().enumerate().for_each(|(n, block)| block.fill(n));
    blocks
}

fn check(blocks: &[Block], base: usize) {
    blocks.iter().enumerate().for_each(|(n, block)| block.check(base + n));
}

/// Parent, child and grandchild see what was there at the fork, then what each has written.
pub(crate) fn both_write(mib: usize) {
    let mut blocks = make(mib);
    let child = fork(|| {
        check(&blocks[..mib / 2], 0);
        let grandchild = fork(|| {
            check(&blocks, 0);
            let mut own: Vec<Block> = (0..mib / 4).map(|_| Block::new(MIB)).collect();
            own.iter_mut().enumerate().for_each(|(n, block)| block.fill(30_000 + n));
            check(&own, 30_000);
            check(&blocks, 0);
        });
        wait(grandchild);
        let mut blocks = std::mem::take(&mut blocks);
        blocks.iter_mut().step_by(2).enumerate().for_each(|(n, block)| block.fill(10_000 + n));
        for (n, block) in blocks.iter().enumerate() {
            block.check(if n % 2 == 0 { 10_000 + n / 2 } else { n });
        }
    });
    blocks.iter_mut().step_by(3).enumerate().for_each(|(n, block)| block.fill(20_000 + n));
    wait(child);
    for (n, block) in blocks.iter().enumerate() {
        block.check(if n % 3 == 0 { 20_000 + n / 3 } else { n });
    }
}

/// Forks while other threads allocate and write.
pub(crate) fn with_threads(mib: usize) {
    let blocks = make(mib);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let stop = &stop;
            scope.spawn(move || {
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let mut own: Vec<Block> = (0..8).map(|n| Block::new(MIB / 8 + n * 64)).collect();
                    own.iter_mut().for_each(|block| block.fill(thread * 1000 + round));
                    own.iter().for_each(|block| block.check(thread * 1000 + round));
                }
            });
        }
        for _ in 0..4 {
            let child = fork(|| {
                check(&blocks, 0);
                let mut own = Block::new(4 * MIB);
                own.fill(5);
                own.check(5);
            });
            wait(child);
        }
        stop.store(true, Ordering::Relaxed);
    });
    check(&blocks, 0);
}

/// Children that become another program, by fork and exec, by a shell and by vfork.
pub(crate) fn exec(times: usize) {
    let blocks = make(48);
    for _ in 0..times {
        // Rust's own way is posix_spawn, or fork with something to do before exec.
        assert!(Command::new("true").status().unwrap().success());
        let mut forked = Command::new("true");
        // SAFETY: does nothing.
        unsafe { std::os::unix::process::CommandExt::pre_exec(&mut forked, || Ok(())) };
        assert!(forked.status().unwrap().success());
        // SAFETY: a command line.
        assert_eq!(unsafe { libc::system(c"exit 3".as_ptr()) } >> 8, 3);
    }
    check(&blocks, 0);
}

/// Becomes a daemon in the way of libc, which forks behind every library's back.
pub(crate) fn daemonise(mib: usize, path: &str) {
    let blocks = make(mib);
    // SAFETY: this process has one thread of its own.
    assert_eq!(unsafe { libc::daemon(1, 1) }, 0);
    check(&blocks, 0);
    std::fs::write(path, "all is well").unwrap();
}
