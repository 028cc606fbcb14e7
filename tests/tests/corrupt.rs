//! A swap file whose content has changed under the daemon: an access fails, and never gives wrong bytes.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::fs::File;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;

use fmalloc_tests::{Daemon, Worker, place};

const LEN: usize = 64 << 20;

/// A daemon, a client whose memory was all in swap when that was overwritten, and one whose memory was not.
fn corrupted(more: &[&str]) -> Option<(Daemon, Worker, Worker)> {
    let daemon = Daemon::start_with("16M", &LEN.to_string(), more)?;
    let mut victim = daemon.client("8M");
    victim.ask("region a 32M");
    victim.ask("fill a 1");
    let client = victim.client().to_string();
    assert!(daemon.ctl(&["evict", &client]).status.success());
    assert_eq!(victim.ask("resident a")["pages"], 0);
    let mut bystander = daemon.client("8M");
    bystander.ask("region b 2M");
    bystander.ask("fill b 2");
    let mut swap = File::options().write(true).open(daemon.swap()).unwrap();
    swap.write_all(&vec![0xa5; LEN]).unwrap();
    swap.sync_all().unwrap();
    Some((daemon, victim, bystander))
}

fn assert_lost_with(signal: i32, more: &[&str]) {
    let Some((daemon, mut victim, mut bystander)) = corrupted(more) else { return };
    let refused = victim.refused("pipe-out a 1");
    assert!(refused.text.contains("EFAULT") || refused.text.contains("EHWPOISON"), "{}", refused.text);
    assert!(victim.stats("poisoned_pages") > 0);
    assert!(victim.stats("io_errors") > 0);
    let status = victim.dies("touch a 16M");
    assert_eq!(status.signal(), Some(signal), "{status}");
    assert!(daemon.log().contains("is lost"), "{}", daemon.log());
    bystander.ask("verify b 2");
    // The dead client's swap is given back a moment after its end.
    daemon.wait_until_clients(1);
    bystander.ask("region c 32M");
    bystander.ask("fill c 3");
    bystander.ask("verify c 3");
    bystander.ask("verify b 2");
    bystander.quit();
    daemon.wait_until_empty();
}

#[test]
fn page_whose_slot_has_other_bytes_gives_sigbus() {
    let signal = if place::disabled().poison { libc::SIGSEGV } else { libc::SIGBUS };
    assert_lost_with(signal, &[]);
}

#[test]
fn page_whose_slot_has_other_bytes_gives_sigsegv_where_nothing_can_be_poisoned() {
    assert_lost_with(libc::SIGSEGV, &["--no-poison"]);
}

#[test]
fn lost_pages_can_be_used_again_after_a_discard() {
    if place::disabled().poison {
        eprintln!("skipped: pages that lose their access lose it for good");
        return;
    }
    let Some((_daemon, mut victim, _bystander)) = corrupted(&[]) else { return };
    assert!(victim.try_ask("pipe-out a 1").is_err());
    victim.ask("discard a");
    victim.ask("zeros a");
    victim.ask("fill a 4");
    victim.ask("verify a 4");
    assert_eq!(victim.stats("poisoned_pages"), 0);
}
