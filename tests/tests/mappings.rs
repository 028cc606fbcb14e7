//! madvise, munmap, mremap, mprotect and mlock by the program on regions that are being evicted: as on ordinary memory.

use std::os::unix::process::ExitStatusExt;

use fmalloc_tests::daemon::number;
use fmalloc_tests::rng::seed;
use fmalloc_tests::{Daemon, MIB, Worker, place, wait_until};

/// A client with a region that is four times its budget, filled with pattern 1, so that most of it is in swap.
fn filled() -> Option<(Daemon, Worker)> {
    let daemon = Daemon::start("8M", "256M")?;
    let mut worker = daemon.client("8M");
    worker.ask("region a 32M");
    worker.ask("fill a 1");
    Some((daemon, worker))
}

/// Something else that needs all the RAM there is, all the time.
fn press(worker: &mut Worker) {
    worker.ask("region pressure 24M");
    worker.ask("start pressure press pressure");
}

#[test]
fn hazard_05_discard_free_and_protect_at_random_under_eviction_equal_a_shadow_copy() {
    let Some(daemon) = Daemon::start("8M", "256M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 24M");
    press(&mut worker);
    println!("{} steps", worker.ask(&format!("mix a {} 4 10000", seed())));
    worker.ask("stop pressure");
    worker.ask("drop a");
    worker.ask("drop pressure");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn hazard_05_pieces_moved_by_mremap_at_random_under_eviction_keep_their_content() {
    let Some(daemon) = Daemon::start("8M", "256M") else { return };
    let mut worker = daemon.client("8M");
    worker.ask("region a 24M");
    press(&mut worker);
    println!("{} moves and writes", worker.ask(&format!("wander a {} 8000", seed())));
    worker.ask("stop pressure");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn dontneed_on_swapped_memory_gives_zeros_and_the_slots_back() {
    let Some((daemon, mut worker)) = filled() else { return };
    worker.ask("madvise a dontneed 8M 16M");
    worker.ask("zeros a 8M 16M");
    worker.ask("verify a 1 1 0 8M");
    worker.ask("verify a 1 1 24M 8M");
    let used = daemon.status("swap_used_bytes");
    assert!(used <= 17 * MIB, "{used}");
    assert_eq!(daemon.status("swap_claimed_bytes"), 32 * MIB, "the memory may be written again");
    worker.ask("fill a 2 1 8M 16M");
    worker.ask("verify a 2 1 8M 16M");
    worker.quit();
}

#[test]
fn hazard_05_free_gives_old_content_or_zeros_until_the_page_is_written_and_then_keeps_that() {
    let Some((_daemon, mut worker)) = filled() else { return };
    for seed in 2..8 {
        // The end of the region is resident at this moment, the rest is not.
        worker.ask("madvise a free");
        worker.ask(&format!("fill a {seed} 2 28M 4M"));
        worker.ask(&format!("fill a {seed} 2 0 28M"));
        worker.ask(&format!("verify a {seed} 2"));
    }
    worker.quit();
}

#[test]
fn unmapped_part_gives_slots_and_claim_back_and_a_touch_is_sigsegv() {
    let Some((daemon, mut worker)) = filled() else { return };
    worker.ask("munmap a 4M 8M");
    wait_until("the claim is given back", || daemon.status("swap_claimed_bytes") == 24 * MIB);
    let used = daemon.status("swap_used_bytes");
    assert!(used <= 24 * MIB, "{used}");
    worker.ask("verify a 1 1 0 4M");
    worker.ask("verify a 1 1 12M 20M");
    let status = worker.dies("touch a 8M");
    assert_eq!(status.signal(), Some(libc::SIGSEGV), "{status}");
    daemon.wait_until_empty();
}

#[test]
fn moved_region_has_its_content_at_the_new_place() {
    let Some((daemon, mut worker)) = filled() else { return };
    press(&mut worker);
    for seed in 2..6 {
        assert_eq!(worker.ask("mremap a 32M elsewhere"), false);
        worker.ask(&format!("verify a {}", seed - 1));
        worker.ask(&format!("fill a {seed}"));
        worker.ask(&format!("verify a {seed}"));
    }
    assert_eq!(daemon.status("swap_claimed_bytes"), 56 * MIB);
    worker.ask("stop pressure");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn shrunk_region_gives_its_tail_back_and_grows_in_place_with_zeros() {
    let Some((daemon, mut worker)) = filled() else { return };
    press(&mut worker);
    assert_eq!(worker.ask("mremap a 16M in-place"), true);
    wait_until("the claim is given back", || daemon.status("swap_claimed_bytes") == 40 * MIB);
    // Nothing has taken the addresses meanwhile.
    assert_eq!(worker.ask("mremap a 32M in-place"), true);
    worker.ask("verify a 1 1 0 16M");
    worker.ask("zeros a 16M 16M");
    worker.ask("fill a 2 4");
    worker.ask("verify a 2 4");
    assert_eq!(daemon.status("swap_claimed_bytes"), 56 * MIB, "what grew is claimed when it is touched");
    worker.ask("stop pressure");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn region_that_grows_by_moving_keeps_its_content_and_gets_zeros() {
    let Some((daemon, mut worker)) = filled() else { return };
    // At a place with something behind it that is in the way.
    worker.ask("mremap a 16M elsewhere");
    worker.ask("sparse wall 1G");
    worker.ask("mremap a 64M may-move");
    worker.ask("verify a 1 1 0 16M");
    worker.ask("zeros a 16M 48M");
    worker.ask("fill a 2 2");
    worker.ask("verify a 2 2");
    assert_eq!(daemon.status("swap_claimed_bytes"), 64 * MIB);
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn hazard_11_read_only_pages_keep_their_content_and_are_evicted_again_once_writable() {
    let Some((daemon, mut worker)) = filled() else { return };
    worker.ask("mprotect a read 28M 4M");
    press(&mut worker);
    worker.ask("verify a 1 1 28M 4M");
    if !place::disabled().move_pages {
        wait_until("protected pages are counted", || worker.stats("unevictable_pages") > 0);
    }
    worker.ask("mprotect a write 28M 4M");
    worker.ask("fill a 2 1 28M 4M");
    wait_until("nothing is unevictable any more", || worker.stats("unevictable_pages") == 0);
    worker.ask("verify a 2 1 28M 4M");
    worker.ask("verify a 1 1 0 28M");
    worker.ask("stop pressure");
    worker.quit();
    daemon.wait_until_empty();
}

#[test]
fn hazard_11_executable_pages_and_pieces_of_split_mappings_keep_their_content() {
    let Some((_daemon, mut worker)) = filled() else { return };
    // Every fourth page, so that neighbours belong to different mappings.
    for page in (0..256).step_by(4) {
        worker.ask(&format!("mprotect a execute {} 4K", (31 << 20) + page * 4096));
    }
    press(&mut worker);
    if !place::disabled().move_pages {
        wait_until("executable pages are counted", || worker.stats("unevictable_pages") > 0);
    }
    worker.ask("verify a 1");
    worker.ask("mprotect a write 31M 1M");
    worker.ask("fill a 2 1 31M 1M");
    wait_until("nothing is unevictable any more", || worker.stats("unevictable_pages") == 0);
    worker.ask("verify a 2 1 31M 1M");
    worker.ask("stop pressure");
    worker.ask("verify a 1 1 0 31M");
    worker.quit();
}

#[test]
fn pages_without_access_keep_their_content() {
    let Some((_daemon, mut worker)) = filled() else { return };
    worker.ask("mprotect a none 28M 4M");
    press(&mut worker);
    worker.ask("verify a 1 1 0 28M");
    worker.ask("mprotect a write 28M 4M");
    worker.ask("verify a 1 1 28M 4M");
    worker.ask("stop pressure");
    worker.ask("verify a 1");
    worker.quit();
}

#[test]
fn hazard_11_client_that_locks_more_than_its_budget_waits_says_so_and_goes_on_when_it_can() {
    let Some((daemon, mut worker)) = filled() else { return };
    worker.ask("start lock mlock a lock 0 16M");
    wait_until("the client is hindered", || {
        let row = daemon.row(&mut worker);
        row["condition"].as_str().is_some_and(|text| text.contains("locked"))
    });
    let row = daemon.row(&mut worker);
    assert!(number(&row, "resident_bytes") + number(&row, "overhead_bytes") <= 8 * MIB, "{row}");
    assert_eq!(worker.ask("finished lock"), false);
    worker.ask("mlock a unlock 0 16M");
    worker.ask("finish lock");
    worker.ask("verify a 1");
    wait_until("nothing hinders it", || daemon.row(&mut worker)["condition"] == "");
    worker.quit();
}

#[test]
fn hazard_01_pinned_pages_stay_where_the_kernel_writes_to_them() {
    if !place::can_move() {
        return;
    }
    let Some((daemon, mut worker)) = filled() else { return };
    let file = daemon.dir().join("file");
    worker.ask(&format!("file-out a 1 {}", file.display()));
    worker.ask("fill a 2 1 8M 1M");
    worker.ask("pin a 8M 1M");
    press(&mut worker);
    wait_until("pinned pages are counted", || worker.stats("unevictable_pages") >= 256);
    worker.ask(&format!("pinned-in a 8M 1M {}", file.display()));
    worker.ask("verify a 1");
    worker.ask("unpin");
    wait_until("nothing is unevictable any more", || worker.stats("unevictable_pages") == 0);
    worker.ask("stop pressure");
    worker.ask("verify a 1");
    worker.quit();
}

#[test]
fn hazard_11_locked_pages_stay_and_are_counted_until_they_are_unlocked() {
    let Some((_daemon, mut worker)) = filled() else { return };
    worker.ask("mlock a lock 30M 1M");
    press(&mut worker);
    wait_until("locked pages are counted", || worker.stats("unevictable_pages") > 0);
    assert_eq!(worker.ask("resident a 30M 1M")["pages"], 256);
    worker.ask("mlock a unlock 30M 1M");
    wait_until("nothing is unevictable any more", || worker.stats("unevictable_pages") == 0);
    worker.ask("stop pressure");
    worker.ask("verify a 1");
    worker.quit();
}
