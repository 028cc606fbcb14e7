//! A program that knows nothing of fmalloc, for tests of `fmallocctl run`: `fmalloc-program COMMAND ARGUMENTS…` calls libc
//! as programs do, verifies every byte, and ends with 0, or with a panic that says what was wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is a failed test")]

mod allocations;
mod block;
mod faults;
mod forks;
mod maps;

use std::io::Read;

use block::{Block, MIB};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["memory", mib] => memory(number(mib)),
        ["allocations"] => allocations::all(),
        ["threads", threads, mib] => allocations::threads(number(threads), number(mib)),
        ["late"] => allocations::late(),
        ["double-free"] => allocations::double_free(),
        ["maps"] => maps::all(),
        ["reserve"] => maps::reserve(),
        ["fork", mib] => forks::both_write(number(mib)),
        ["fork-threads", mib] => forks::with_threads(number(mib)),
        ["fork-exec", times] => forks::exec(number(times)),
        ["daemonise", mib, path] => forks::daemonise(number(mib), path),
        ["close-fds", mib] => faults::close_fds(number(mib)),
        ["setuid", mib, when] => faults::setuid(number(mib), when),
        ["seccomp", mib] => faults::seccomp(number(mib)),
        ["ptrace", mib] => faults::ptrace(number(mib)),
        ["mlockall", mib] => faults::mlockall(number(mib)),
        ["mlock", mib] => faults::mlock(number(mib)),
        ["exhaust"] => faults::exhaust(),
        ["hold", mib] => hold(number(mib)),
        _ => panic!("unknown command {words:?}"),
    }
    println!("done");
}

fn number(text: &str) -> usize {
    text.parse().unwrap()
}

/// Fills blocks, verifies, writes again, verifies.
fn memory(mib: usize) {
    let mut blocks: Vec<Block> = (0..mib).map(|_| Block::new(MIB)).collect();
    for round in 1..=2 {
        blocks.iter_mut().enumerate().for_each(|(n, block)| block.fill(round * 10_000 + n));
        blocks.iter().enumerate().for_each(|(n, block)| block.check(round * 10_000 + n));
    }
}

/// Fills memory, says so, and verifies it when something comes on stdin.
fn hold(mib: usize) {
    let mut blocks: Vec<Block> = (0..mib).map(|_| Block::new(MIB)).collect();
    blocks.iter_mut().enumerate().for_each(|(n, block)| block.fill(n));
    println!("ready");
    std::io::stdin().read_exact(&mut [0]).unwrap();
    blocks.iter().enumerate().for_each(|(n, block)| block.check(n));
}
