//! What programs do that could cut them off from who pages them, and what is wrong with their surroundings.

use std::ffi::c_long;

use crate::block::{Block, MIB};

fn make(mib: usize, base: usize) -> Vec<Block> {
    let mut blocks: Vec<Block> = (0..mib).map(|_| Block::new(MIB)).collect();
    blocks.iter_mut().enumerate().for_each(|(n, block)| block.fill(base + n));
    blocks
}

fn check(blocks: &[Block], base: usize) {
    blocks.iter().enumerate().for_each(|(n, block)| block.check(base + n));
}

/// Closes every descriptor that it does not know, opens others under their numbers, and goes on.
pub(crate) fn close_fds(mib: usize) {
    let half = make(mib / 2, 0);
    // SAFETY: nobody here uses these descriptors.
    assert_eq!(unsafe { libc::close_range(3, libc::c_uint::MAX, 0) }, 0);
    let files: Vec<_> = (0..64).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
    let other = make(mib / 2, 1000);
    check(&half, 0);
    check(&other, 1000);
    drop(files);
}

/// Becomes nobody before or after it has much memory.
pub(crate) fn setuid(mib: usize, when: &str) {
    let become_nobody = || {
        // SAFETY: plain numbers.
        unsafe {
            assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
            assert_eq!(libc::setgid(65534), 0);
            assert_eq!(libc::setuid(65534), 0);
        }
    };
    if when == "before" {
        become_nobody();
    }
    let half = make(mib / 2, 0);
    if when == "after" {
        become_nobody();
    }
    let other = make(mib / 2, 1000);
    check(&half, 0);
    check(&other, 1000);
    // SAFETY: takes nothing.
    assert_eq!(unsafe { libc::getuid() }, 65534);
}

/// Allows itself little more than memory and writing once it has begun.
pub(crate) fn seccomp(mib: usize) {
    let half = make(mib / 2, 0);
    let allowed = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_mremap,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_tgkill,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigprocmask,
        libc::SYS_exit_group,
        libc::SYS_exit,
        libc::SYS_munlock,
        libc::SYS_getpid,
    ];
    install(&allowed);
    let other = make(mib / 2, 1000);
    check(&half, 0);
    check(&other, 1000);
}

/// A filter that ends the process at any other system call.
fn install(allowed: &[c_long]) {
    // The codes of classic BPF: load a word, compare, return.
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let mut program = vec![statement(0x20, 0)];
    for number in allowed {
        let k = u32::try_from(*number).unwrap();
        program.push(libc::sock_filter { code: 0x15, jt: 0, jf: 1, k });
        program.push(statement(0x06, libc::SECCOMP_RET_ALLOW));
    }
    program.push(statement(0x06, libc::SECCOMP_RET_KILL_PROCESS));
    let filter =
        libc::sock_fprog { len: u16::try_from(program.len()).unwrap(), filter: program.as_mut_ptr() };
    // SAFETY: the program outlives the call that copies it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
    }
}

/// A traced child, stopped at every system call, does the same as any.
pub(crate) fn ptrace(mib: usize) {
    let command = std::env::current_exe().unwrap();
    let mut child = std::process::Command::new(command);
    child.args(["memory", &mib.to_string()]);
    // SAFETY: one system call.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut child, || {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            Ok(())
        });
    }
    let child = libc::pid_t::try_from(child.spawn().unwrap().id()).unwrap();
    let (mut status, mut stops) = (0, 0);
    loop {
        // SAFETY: there is room for a status; the child is ours, and is stopped where it is continued.
        unsafe {
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            if libc::WIFEXITED(status) {
                break;
            }
            assert!(libc::WIFSTOPPED(status), "the child ended with {status:#x}");
            stops += 1;
            let signal = match libc::WSTOPSIG(status) {
                libc::SIGTRAP => 0,
                other => other,
            };
            assert_eq!(libc::ptrace(libc::PTRACE_SYSCALL, child, 0, c_long::from(signal)), 0);
        }
    }
    assert_eq!(libc::WEXITSTATUS(status), 0);
    assert!(stops > 100, "only {stops} stops");
}

/// Wants all of its memory locked, and has more than there is RAM for it.
pub(crate) fn mlockall(mib: usize) {
    // SAFETY: plain numbers.
    unsafe {
        assert_eq!(libc::mlockall(libc::MCL_FUTURE), 0);
        let half = make(mib / 2, 0);
        assert_eq!(libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE), 0);
        let other = make(mib / 2, 1000);
        check(&half, 0);
        check(&other, 1000);
        assert_eq!(libc::munlockall(), 0);
    }
}

/// Locks a little, as for keys, and is refused more than the budget bears.
pub(crate) fn mlock(mib: usize) {
    let blocks = make(mib, 0);
    let refused = blocks.iter().position(|block| {
        // SAFETY: a block of ours.
        unsafe { libc::mlock(block.as_ptr(), MIB) != 0 }
    });
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOMEM));
    let refused = refused.expect("everything was locked");
    assert!(refused > 0, "nothing can be locked");
    for block in &blocks[..refused] {
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munlock(block.as_ptr(), MIB) }, 0);
    }
    check(&blocks, 0);
}

/// Takes memory until there is no more: says how much that was, loses nothing, and can go on with what it gives back.
pub(crate) fn exhaust() {
    // What is needed later is there before.
    let mut blocks = Vec::with_capacity(1 << 16);
    println!("begin");
    loop {
        // SAFETY: any size will do.
        let Some(mut block) = Block::from_raw(unsafe { libc::malloc(MIB) }, MIB) else { break };
        block.fill(blocks.len());
        blocks.push(block);
    }
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOMEM));
    println!("{} MiB", blocks.len());
    // SAFETY: plain numbers.
    let mapped = unsafe {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(std::ptr::null_mut(), 64 * MIB, prot, flags, -1, 0)
    };
    assert_eq!(mapped, libc::MAP_FAILED);
    check(&blocks, 0);
    blocks.truncate(blocks.len() / 2);
    let other = make(4, 1000);
    check(&other, 1000);
    check(&blocks, 0);
}
