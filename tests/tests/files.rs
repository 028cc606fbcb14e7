//! Files in memory, with a daemon and its faults: every byte is compared with what was written.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use fmalloc_client::mmap::{Mmap, MmapMut, MmapOptions, UncheckedAdvice};
use fmalloc_client::{ConnectOptions, PAGE_SIZE, Pager};
use fmalloc_proto::num::{to_u64, to_usize};
use fmalloc_tests::failing::{FOR_EVER, Fault};
use fmalloc_tests::pattern::{self, WORDS};
use fmalloc_tests::{Daemon, MIB, wait_until};

/// A daemon, and this process as a client of it with a budget of 8 MiB.
fn begin() -> Option<(Daemon, Pager)> {
    let daemon = Daemon::start("64M", "128M")?;
    let pager = connect(&daemon);
    Some((daemon, pager))
}

fn connect(daemon: &Daemon) -> Pager {
    Pager::connect_with(&ConnectOptions {
        socket: Some(daemon.socket()),
        budget: Some(8 * MIB),
        ..ConnectOptions::default()
    })
    .unwrap()
}

fn page_of(seed: u64, index: u64) -> Vec<u8> {
    pattern::words(seed, index).flat_map(u64::to_ne_bytes).collect()
}

/// A file of so many pages of a pattern.
fn create(path: &Path, seed: u64, pages: u64) -> File {
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    for index in 0..pages {
        file.write_all(&page_of(seed, index)).unwrap();
    }
    file
}

/// Each page of the file is one of the pattern of the seed that `seed` gives for it.
fn assert_file(path: &Path, pages: u64, seed: impl Fn(u64) -> u64) {
    let file = File::open(path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), pages * to_u64(PAGE_SIZE));
    let mut page = vec![0; PAGE_SIZE];
    for index in 0..pages {
        file.read_exact_at(&mut page, index * to_u64(PAGE_SIZE)).unwrap();
        assert!(page == page_of(seed(index), index), "page {index} of the file is wrong");
    }
}

fn map_mut(pager: &Pager, file: &File) -> MmapMut {
    // SAFETY: tests change the file only where that is what they are about.
    unsafe { MmapOptions::new().pager(pager).map_mut(file).unwrap() }
}

fn map(pager: &Pager, file: &File) -> Mmap {
    // SAFETY: as above.
    unsafe { MmapOptions::new().pager(pager).map(file).unwrap() }
}

fn pages(map: &mut MmapMut) -> &mut [[u64; WORDS]] {
    map.as_mut_slice_of().unwrap()
}

fn check(map: &[u8], seed: impl Fn(u64) -> u64) {
    for (index, page) in (0..).zip(map.chunks_exact(PAGE_SIZE)) {
        let words: Vec<u64> =
            page.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
        pattern::check(seed(index), index, &words).unwrap();
    }
}

const PAGES: u64 = 8192; // 32 MiB: four times the budget

#[test]
fn a_file_larger_than_the_budget_is_read_within_it_and_seen_by_fmallocctl() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    let file = create(&path, 1, PAGES);
    let map = map(&pager, &file);
    for _ in 0..2 {
        check(&map, |_| 1);
    }
    let rows = daemon.json(&["regions", &pager.client_id().to_string()]);
    let row = &rows.as_array().unwrap()[0];
    assert_eq!(row["label"], path.display().to_string());
    assert_eq!(row["length_bytes"], 32 * MIB);
    assert_eq!(row["claimed_bytes"], 0, "a file needs no swap");
    assert!(row["resident_bytes"].as_u64().unwrap() <= 8 * MIB, "{row}");
    let resident = map.resident(0, map.len()).unwrap().into_iter().filter(|there| *there).count();
    assert!((100..2048).contains(&resident), "{resident} pages are resident");
    let stats = pager.stats().unwrap();
    assert!(stats.file_pages_in >= 2 * PAGES - 2048, "{stats:?}");
    assert!(stats.pages_readahead > PAGES, "{stats:?}");
    assert!(stats.faults < PAGES / 4, "read one by one: {stats:?}");
    assert_eq!((stats.file_pages_out, stats.pages_out, stats.slots), (0, 0, 0));
    drop(map);
    assert_eq!(daemon.status("regions"), 0);
}

#[test]
fn changes_get_into_the_file_by_eviction_flush_and_drop() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    let file = create(&path, 1, PAGES);
    let mut map = map_mut(&pager, &file);
    for (index, page) in (0..).zip(pages(&mut map)) {
        if index % 3 != 0 {
            pattern::write(2, index, page);
        }
    }
    let expected = |index: u64| if index.is_multiple_of(3) { 1 } else { 2 };
    let stats = pager.stats().unwrap();
    assert!(stats.file_pages_out > PAGES / 3 && stats.pages_out == 0, "{stats:?}");
    map.flush().unwrap();
    assert_file(&path, PAGES, expected);
    check(&map, expected);
    let before = pager.stats().unwrap().file_pages_out;
    map.flush().unwrap();
    check(&map, expected);
    assert_eq!(pager.stats().unwrap().file_pages_out, before, "nothing was changed, so nothing is written");
    for (index, page) in (0..).zip(pages(&mut map)).skip(8000) {
        pattern::write(3, index, page);
    }
    drop(map);
    assert_file(&path, PAGES, |index| if index >= 8000 { 3 } else { expected(index) });
    drop(pager);
    daemon.wait_until_empty();
}

#[test]
fn flush_of_a_range_leaves_the_rest_and_nothing_is_evicted_by_it() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    let file = create(&path, 1, 64);
    let mut map = map_mut(&pager, &file);
    for (index, page) in (0..).zip(pages(&mut map)) {
        pattern::write(2, index, page);
    }
    map.flush_range(10 * PAGE_SIZE + 5, 3 * PAGE_SIZE).unwrap();
    assert_file(&path, 64, |index| if (10..14).contains(&index) { 2 } else { 1 });
    assert!(map.resident(0, map.len()).unwrap().iter().all(|there| *there), "a flush takes nothing away");
    assert_eq!(map.flush_range(63 * PAGE_SIZE, 2 * PAGE_SIZE).unwrap_err().kind(), ErrorKind::InvalidInput);
    map.flush_async().unwrap();
    wait_until("the file has all of it", || fs::read(&path).unwrap()[63 * PAGE_SIZE..] == page_of(2, 63)[..]);
    drop(map);
    assert_file(&path, 64, |_| 2);
    drop(daemon);
}

#[test]
fn flush_beside_writers_has_what_was_stored_before_it() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    let count: u64 = 3000; // more than the budget has room for
    file.set_len(count * to_u64(PAGE_SIZE)).unwrap();
    let map = MmapOptions::new().pager(&pager).map_raw(&file).unwrap();
    let word = |page: u64| {
        // SAFETY: a word of the mapping, which outlives the threads; all access to it is atomic.
        unsafe { AtomicU64::from_ptr(map.as_mut_ptr().add(to_usize(page) * PAGE_SIZE + 8).cast()) }
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (word, stop) = (&word, &stop);
            scope.spawn(move || {
                let mut page = thread;
                while !stop.load(Ordering::Relaxed) {
                    word(page).fetch_add(1, Ordering::Relaxed);
                    page = (page + 2 * 7) % count;
                }
            });
        }
        for _ in 0..10 {
            let before: Vec<u64> = (0..count).map(|page| word(page).load(Ordering::Relaxed)).collect();
            map.flush().unwrap();
            let content = fs::read(&path).unwrap();
            for (page, before) in before.iter().enumerate() {
                let at = page * PAGE_SIZE + 8;
                let found = u64::from_ne_bytes(content[at..at + 8].try_into().unwrap());
                assert!(found >= *before, "page {page}: {found} in the file, {before} before the flush");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let last: Vec<u64> = (0..count).map(|page| word(page).load(Ordering::Relaxed)).collect();
    drop(map);
    let content = fs::read(&path).unwrap();
    for (page, last) in last.iter().enumerate() {
        assert_eq!(content[page * PAGE_SIZE + 8..][..8], last.to_ne_bytes(), "page {page}");
    }
}

#[test]
fn private_changes_go_to_swap_and_come_back() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    let file = create(&path, 1, PAGES);
    // SAFETY: the file is this test's alone.
    let mut map = unsafe { MmapOptions::new().pager(&pager).map_copy(&file).unwrap() };
    assert_eq!(daemon.status("swap_claimed_bytes"), 32 * MIB);
    for (index, page) in (0..).zip(pages(&mut map)) {
        match index % 4 {
            1 => pattern::write(2, index, page),
            2 => page.fill(0),
            _ => {}
        }
    }
    let check_all = |map: &[u8], discarded: &dyn Fn(u64) -> bool| {
        for (index, page) in (0..).zip(map.chunks_exact(PAGE_SIZE)) {
            let expected = match index % 4 {
                _ if discarded(index) => page_of(1, index),
                1 => page_of(2, index),
                2 => vec![0; PAGE_SIZE],
                _ => page_of(1, index),
            };
            assert!(page == expected, "page {index} is wrong");
        }
    };
    check_all(&map, &|_| false);
    let copy = map.snapshot().unwrap();
    // SAFETY: nothing refers to the bytes.
    unsafe {
        map.unchecked_advise_range(UncheckedAdvice::DontNeed, 1000 * PAGE_SIZE, 2000 * PAGE_SIZE).unwrap();
    }
    check_all(&map, &|index| (1000..3000).contains(&index));
    check_all(&copy, &|_| false);
    assert_file(&path, PAGES, |_| 1);
    let stats = pager.stats().unwrap();
    assert!(stats.pages_out > 0 && stats.file_pages_out == 0, "{stats:?}");
    drop((map, copy, pager));
    daemon.wait_until_empty();
}

#[test]
fn the_end_of_a_file_reads_as_zeros_and_stays_where_it_is() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    fs::write(&path, vec![7; PAGE_SIZE + 100]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    // SAFETY: the file is this test's alone.
    let mut map = unsafe { MmapOptions::new().pager(&pager).len(2 * PAGE_SIZE).map_mut(&file).unwrap() };
    assert!(map[..PAGE_SIZE + 100].iter().all(|byte| *byte == 7));
    assert!(map[PAGE_SIZE + 100..].iter().all(|byte| *byte == 0));
    map.fill(9);
    map.flush().unwrap();
    assert_eq!(fs::read(&path).unwrap(), vec![9; PAGE_SIZE + 100]);
}

#[test]
fn reading_past_the_end_is_sigbus_and_reported() {
    let Some(daemon) = Daemon::start("16M", "16M") else { return };
    let path = daemon.dir().join("data");
    create(&path, 1, 4);
    let mut worker = daemon.client("8M");
    worker.ask(&format!("map m {} shared 32768", path.display()));
    worker.ask("map-verify m 1 0 4");
    let status = worker.dies("map-read m 16384");
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    assert!(daemon.log().contains("its file ends before it"), "{}", daemon.log());
    assert_file(&path, 4, |_| 1);

    let mut worker = daemon.client("8M");
    worker.ask(&format!("map m {} shared", path.display()));
    worker.ask("map-fill m 2 0 1");
    File::options().write(true).open(&path).unwrap().set_len(2 * to_u64(PAGE_SIZE)).unwrap();
    worker.ask("map-verify m 1 1 1");
    let status = worker.dies("map-read m 12288");
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    daemon.wait_until_empty();
}

#[test]
fn a_file_has_one_writer_among_processes_and_its_pages_are_shared_within_one() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    let file = create(&path, 1, 8);
    let mut worker = daemon.client("8M");
    worker.ask(&format!("map m {} shared", path.display()));
    // SAFETY: the file is this test's alone.
    let refused = unsafe { MmapOptions::new().pager(&pager).map_mut(&file).unwrap_err() };
    assert_eq!(refused.kind(), ErrorKind::ResourceBusy);
    assert!(refused.to_string().contains("another writable mapping"), "{refused}");
    // Readers see what has been flushed.
    worker.ask("map-fill m 2");
    worker.ask("map-flush m");
    check(&map(&pager, &file), |_| 2);
    worker.ask("map-drop m");

    let mut one = map_mut(&pager, &file);
    let mut two = map_mut(&pager, &file);
    let reader = map(&pager, &file);
    pattern::write(3, 0, &mut pages(&mut one)[0]);
    pattern::write(3, 7, &mut pages(&mut two)[7]);
    check(&reader, |index| if index == 0 || index == 7 { 3 } else { 2 });
    assert_eq!(daemon.status("regions"), 1);
    drop((one, two));
    assert_file(&path, 8, |index| if index == 0 || index == 7 { 3 } else { 2 });
    drop(reader);
    assert_file(&path, 8, |index| if index == 0 || index == 7 { 3 } else { 2 });
}

#[test]
fn what_others_write_is_read_later_and_lost_under_a_changed_page() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    let file = create(&path, 1, 4);
    let mut map = map_mut(&pager, &file);
    check(&map, |_| 1);
    pages(&mut map)[2][0] ^= 1;
    for index in 0..3 {
        file.write_all_at(&page_of(2, index), index * to_u64(PAGE_SIZE)).unwrap();
    }
    // What is in RAM stays as it is, until it leaves RAM.
    assert_eq!(map[..PAGE_SIZE], page_of(1, 0)[..]);
    // SAFETY: nothing refers to the bytes.
    unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed).unwrap() };
    wait_until("all pages have left RAM", || map.resident(0, map.len()).unwrap().iter().all(|there| !there));
    assert_eq!(map[..2 * PAGE_SIZE], [page_of(2, 0), page_of(2, 1)].concat()[..]);
    let mut changed = page_of(1, 2);
    changed[0] ^= 1;
    assert_eq!(map[2 * PAGE_SIZE..3 * PAGE_SIZE], changed[..], "the page that was changed here wins");
    map.flush().unwrap();
    assert_eq!(fs::read(&path).unwrap()[2 * PAGE_SIZE..3 * PAGE_SIZE], changed[..]);
    drop(daemon);
}

/// A file system of its own, in RAM and of a size that can be changed.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(path: PathBuf, size: &str) -> Self {
        fs::create_dir(&path).unwrap();
        Self::mount(&path, &format!("size={size}"));
        Self(path)
    }

    fn mount(path: &Path, options: &str) {
        let mut mount = Command::new("mount");
        let done = mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(path).status().unwrap();
        assert!(done.success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(done.is_ok_and(|status| status.success()));
    }
}

#[test]
fn a_full_disk_fails_the_flush_and_loses_nothing() {
    let Some((daemon, pager)) = begin() else { return };
    let disk = SmallDisk::new(daemon.dir().join("disk"), "4M");
    let path = disk.0.join("data");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    let count: u64 = 4096;
    file.set_len(count * to_u64(PAGE_SIZE)).unwrap();
    let mut map = map_mut(&pager, &file);
    // Half of the budget: all of it is in RAM, and does not fit on the disk together with the rest.
    for (index, page) in (0..1100).zip(pages(&mut map)) {
        pattern::write(1, index, page);
    }
    let error = map.flush().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
    assert!(error.to_string().contains("make room"), "{error}");
    check(&map[..1100 * PAGE_SIZE], |_| 1);
    // Stores go on while there is room in RAM; then the program waits, and fmallocctl says why.
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for (index, page) in (0..).zip(pages(&mut map)) {
                pattern::write(2, index, page);
            }
        });
        let client = pager.client_id();
        wait_until("fmallocctl says what is wrong", || {
            let rows = daemon.json(&["clients"]);
            let rows = rows.as_array().unwrap();
            rows.iter()
                .any(|row| row["client"] == client && row["condition"] == "a mapped file cannot be written")
        });
        assert!(!writer.is_finished(), "there is no room for all of it");
        SmallDisk::mount(&disk.0, "remount,size=64M");
        writer.join().unwrap();
    });
    map.flush().unwrap();
    check(&map, |_| 2);
    assert_file(&path, count, |_| 2);
    drop(map);
}

#[test]
fn what_a_flush_acknowledged_survives_the_end_of_client_and_daemon() {
    let Some(mut daemon) = Daemon::start("16M", "16M") else { return };
    let path = daemon.dir().join("data");
    create(&path, 1, 64);
    let mut worker = daemon.client("8M");
    worker.ask(&format!("map m {} shared", path.display()));
    worker.ask("map-fill m 2");
    worker.ask("map-flush m");
    worker.ask("map-fill m 3 0 1");
    worker.kill();
    daemon.wait_until_empty();
    assert_file(&path, 64, |_| 2);

    let mut worker = daemon.client("8M");
    worker.ask(&format!("map m {} shared", path.display()));
    worker.ask("map-fill m 4");
    worker.ask("map-flush m");
    worker.ask("map-fill m 5 0 32");
    daemon.kill();
    // The client still holds what it has changed since.
    worker.ask("map-verify m 5 0 32");
    worker.ask("map-verify m 4 32 32");
    let refused = worker.refused("map-flush m");
    assert_eq!(refused.kind, "DaemonGone");
    assert_file(&path, 64, |_| 4);
}

#[test]
fn an_atomic_flush_is_all_or_nothing_when_the_process_is_killed() {
    let Some(daemon) = Daemon::start("64M", "64M") else { return };
    let path = daemon.dir().join("data");
    let journal = daemon.dir().join("data.fmalloc-journal");
    let count: u64 = 3000; // more than the budget has room for
    create(&path, 1, count);
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..8_u64 {
        let mut worker = daemon.client("8M");
        worker.ask(&format!("map m {} atomic", path.display()));
        worker.tell(&format!("map-rewrite m {count}"));
        // At a moment of no meaning, but after a while.
        let flushes = daemon_writes(&journal);
        wait_until("a flush is under way", || daemon_writes(&journal) != flushes);
        std::thread::sleep(std::time::Duration::from_millis(round * 37 % 100));
        worker.kill();
        // Replays what was left.
        let mut worker = daemon.client("8M");
        worker.ask(&format!("map m {} atomic", path.display()));
        worker.ask("map-drop m");
        worker.quit();
        let content = fs::read(&path).unwrap();
        let seed = u64::from_ne_bytes(content[8..16].try_into().unwrap()) >> 40;
        assert_file(&path, count, |_| seed);
        assert!(!journal.exists(), "the journal is removed when there is no use for it");
        seen.insert(seed);
    }
    assert!(!seen.is_empty());
    daemon.wait_until_empty();
}

/// Something that changes with every write to the journal.
fn daemon_writes(journal: &Path) -> Option<(u64, std::time::SystemTime)> {
    let meta = fs::metadata(journal).ok()?;
    Some((meta.len(), meta.modified().ok()?))
}

#[test]
fn an_atomic_mapping_changes_its_file_by_flush_alone() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    let file = create(&path, 1, PAGES);
    // SAFETY: the file is this test's alone.
    let atomic = || unsafe { MmapOptions::new().pager(&pager).map_atomic(&file) };
    let mut map = atomic().unwrap();
    for (index, page) in (0_u64..).zip(pages(&mut map)) {
        if index.is_multiple_of(2) {
            pattern::write(2, index, page);
        }
    }
    assert_file(&path, PAGES, |_| 1);
    assert_eq!(atomic().unwrap_err().kind(), ErrorKind::ResourceBusy);
    map.flush_atomic().unwrap();
    assert_file(&path, PAGES, |index| 2 - index % 2);
    pattern::write(3, 5, &mut pages(&mut map)[5]);
    drop(map);
    assert_file(&path, PAGES, |index| 2 - index % 2);
    let plain = map_mut(&pager, &file);
    assert_eq!(plain.flush_atomic().unwrap_err().kind(), ErrorKind::InvalidInput);
    drop(daemon);
}

#[test]
fn prefetch_pin_and_a_budget_of_its_own() {
    let Some((daemon, pager)) = begin() else { return };
    let path = daemon.dir().join("data");
    let file = create(&path, 1, PAGES);
    let map = map(&pager, &file);
    let part = 500 * PAGE_SIZE;
    map.prefetch(part, part).unwrap().wait().unwrap();
    assert!(map.resident(part, part).unwrap().iter().all(|there| *there));
    let faults = pager.stats().unwrap().faults;
    let sum: u64 = map[part..2 * part].iter().map(|byte| u64::from(*byte)).sum();
    assert!(sum > 0 && pager.stats().unwrap().faults <= faults + 1, "they were there");

    let guard = map.pin(3 * PAGE_SIZE, 10 * PAGE_SIZE).unwrap();
    let other = map.pin(10 * PAGE_SIZE, 10 * PAGE_SIZE).unwrap();
    check(&map, |_| 1);
    assert!(map.resident(3 * PAGE_SIZE, 17 * PAGE_SIZE).unwrap().iter().all(|there| *there));
    drop(guard);
    check(&map, |_| 1);
    check(&map, |_| 1);
    assert!(map.resident(10 * PAGE_SIZE, 10 * PAGE_SIZE).unwrap().iter().all(|there| *there));
    drop(other);
    drop(map);

    // SAFETY: nobody changes what the environment says while this test runs; each test has a process of its own.
    unsafe { std::env::set_var("FMALLOC_SOCKET", daemon.socket()) };
    // SAFETY: the file is this test's alone.
    let own = unsafe { MmapOptions::new().budget(5 * MIB).populate().map(&file).unwrap() };
    check(&own, |_| 1);
    let stats = own.pager().unwrap().stats().unwrap();
    assert_eq!(stats.budget_bytes, 5 * MIB);
    assert!(stats.peak_resident_pages * to_u64(PAGE_SIZE) <= 5 * MIB);
}

#[test]
fn errors_of_the_disk_reach_who_flushes_and_lose_nothing() {
    let Some((daemon, plan)) = Daemon::start_failing("64M", "64M", &[]) else { return };
    let pager = connect(&daemon);
    let path = daemon.dir().join("data");
    let file = create(&path, 1, 64);
    let mut map = map_mut(&pager, &file);
    for (seed, fault) in (2..).zip([Fault::WriteError, Fault::ShortWrite, Fault::FullDisk]) {
        for (index, page) in (0..).zip(pages(&mut map)) {
            pattern::write(seed, index, page);
        }
        plan.arm(fault, 0, FOR_EVER, None);
        let error = map.flush().unwrap_err();
        let full = error.kind() == ErrorKind::StorageFull;
        assert_eq!(full, fault != Fault::WriteError, "{fault:?}: {error}");
        assert!(plan.injected() > 0);
        plan.disarm();
        check(&map, |_| seed);
        map.flush().unwrap();
        assert_file(&path, 64, |_| seed);
    }
    assert!(daemon.log().contains("a mapped file cannot be written"), "{}", daemon.log());
}

#[test]
fn a_page_that_cannot_be_read_is_read_again_and_then_sigbus() {
    let Some((daemon, plan)) = Daemon::start_failing("64M", "64M", &[]) else { return };
    let path = daemon.dir().join("data");
    create(&path, 1, 4);
    let mut worker = daemon.client("8M");
    worker.ask(&format!("map m {} shared", path.display()));
    plan.arm(Fault::ReadError, 0, 1, None);
    worker.ask("map-verify m 1");
    assert_eq!(plan.injected(), 1);
    assert_eq!(worker.stats("io_errors"), 1);
    worker.ask("map-drop m");
    worker.ask(&format!("map m {} shared", path.display()));
    plan.arm(Fault::ReadError, 0, FOR_EVER, None);
    let status = worker.dies("map-read m 0");
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    assert!(daemon.log().contains("could not be read"), "{}", daemon.log());
    daemon.wait_until_empty();
}
