//! The Windows backend: everything that holds on every system too, with several units of paging, and what is Windows's
//! own: exceptions that are not ours, system calls on absent pages, the swap file. Run under wine by `make test-windows`.

#![cfg(windows)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says so by ending")]

mod shared;

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::windows::io::AsRawHandle;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::{ptr, thread};

use fmalloc_client::{Advice, ConnectOptions, Error, Health, LocalOptions, Pager, PrivateOptions, Region};
use shared::{BUDGET, LARGE, pager};
use windows_sys::Win32::Foundation::{
    ERROR_INVALID_USER_BUFFER, ERROR_NOACCESS, EXCEPTION_ACCESS_VIOLATION, EXCEPTION_IN_PAGE_ERROR,
    EXCEPTION_STACK_OVERFLOW, GetLastError, STATUS_IN_PAGE_ERROR, SetLastError,
};
use windows_sys::Win32::Storage::FileSystem::{ReadFile, WriteFile};
use windows_sys::Win32::System::Diagnostics::Debug::{
    AddVectoredExceptionHandler, EXCEPTION_CONTINUE_EXECUTION, EXCEPTION_CONTINUE_SEARCH, EXCEPTION_POINTERS,
    RaiseException, RemoveVectoredExceptionHandler,
};
use windows_sys::Win32::System::IO::OVERLAPPED;
use windows_sys::Win32::System::Memory::{
    MEM_COMMIT, MEM_RESERVE, PAGE_NOACCESS, PAGE_READWRITE, VirtualAlloc, VirtualProtect,
};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, TerminateProcess};

const SWAP: u64 = 256 << 20;

/// A directory of a test's own, gone with the value.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("fmalloc-test-{name}"));
        // Of a run that was killed.
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn with_unit(unit: usize) -> Pager {
    let budget = BUDGET.max(u64::try_from(unit).unwrap() * 160);
    let mut options = LocalOptions::new(budget, SWAP);
    options.unit = unit;
    Pager::local(&options).unwrap()
}

#[test]
fn a_pattern_survives_at_sixteen_times_the_budget() {
    shared::pattern(&pager(BUDGET, SWAP), 1);
}

#[test]
fn a_pattern_survives_with_eight_threads() {
    shared::pattern(&pager(BUDGET, SWAP), 8);
}

#[test]
fn a_pattern_survives_in_small_pages() {
    shared::pattern(&with_unit(4 << 10), 4);
}

#[test]
fn a_stampede_on_one_page_loses_no_write() {
    shared::stampede(&pager(BUDGET, SWAP), 8);
    shared::stampede(&with_unit(4 << 10), 8);
}

#[test]
fn random_changes_agree_with_a_copy() {
    for (seed, unit) in [(1, 4 << 10), (2, 16 << 10), (3, 64 << 10), (4, 256 << 10)] {
        let mut options = LocalOptions::new(BUDGET.max(u64::try_from(unit).unwrap() * 160), SWAP);
        options.unit = unit;
        let pager = Pager::local(&options).unwrap();
        // The first region's part of the file is used a second time, so that it has something else than zeros.
        shared::shadow(&pager, seed);
        shared::shadow(&pager, seed + 100);
    }
}

#[test]
fn two_regions_share_a_budget_and_the_file() {
    shared::two_regions(&pager(BUDGET, 8 * BUDGET));
}

#[test]
fn pages_never_written_are_never_read() {
    shared::never_written(&pager(BUDGET, SWAP));
}

#[test]
fn clean_pages_are_not_written() {
    shared::clean(&pager(BUDGET, SWAP));
}

#[test]
fn parts_of_a_sparse_region_are_usable_when_committed() {
    shared::sparse(&pager(BUDGET, SWAP));
}

#[test]
fn the_budget_changes_while_memory_is_in_use() {
    shared::budgets(&pager(BUDGET, SWAP));
}

#[test]
fn files_are_read_and_written_through_pins() {
    let directory = Directory::new("files");
    let path = directory.join("data");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    shared::files(&pager(BUDGET, SWAP), &mut file);
}

#[test]
fn regions_come_and_go_under_load() {
    shared::coming_and_going(&pager(BUDGET, SWAP), 8);
}

/// Addresses that the handlers below watch, and how often they saw them.
struct Watch {
    address: AtomicUsize,
    seen: AtomicU32,
    code: AtomicU32,
}

impl Watch {
    const fn new() -> Self {
        Self { address: AtomicUsize::new(0), seen: AtomicU32::new(0), code: AtomicU32::new(0) }
    }

    fn sees(&self, pointers: *mut EXCEPTION_POINTERS) -> bool {
        // SAFETY: the system's record.
        let record = unsafe { &*(*pointers).ExceptionRecord };
        let address = record.ExceptionInformation[1];
        let ours =
            record.NumberParameters >= 2 && address == self.address.load(Ordering::SeqCst) && address != 0;
        if ours {
            self.seen.fetch_add(1, Ordering::SeqCst);
            self.code.store(record.ExceptionCode.cast_unsigned(), Ordering::SeqCst);
        }
        ours
    }
}

#[test]
fn foreign_violations_reach_handlers_installed_before_and_after_ours() {
    static WATCH: Watch = Watch::new();
    static LAST: AtomicU32 = AtomicU32::new(0);
    unsafe extern "system" fn before(pointers: *mut EXCEPTION_POINTERS) -> i32 {
        WATCH.sees(pointers);
        EXCEPTION_CONTINUE_SEARCH
    }
    /// The program's own paging: makes the page usable and goes on.
    unsafe extern "system" fn after(pointers: *mut EXCEPTION_POINTERS) -> i32 {
        if !WATCH.sees(pointers) {
            return EXCEPTION_CONTINUE_SEARCH;
        }
        LAST.fetch_add(1, Ordering::SeqCst);
        let mut old = 0;
        let address = ptr::with_exposed_provenance(WATCH.address.load(Ordering::SeqCst));
        // SAFETY: the page is the test's.
        unsafe { VirtualProtect(address, 4096, PAGE_READWRITE, &raw mut old) };
        EXCEPTION_CONTINUE_EXECUTION
    }
    // SAFETY: both keep the rules of handlers.
    let first = unsafe { AddVectoredExceptionHandler(1, Some(before)) };
    let pager = pager(BUDGET, SWAP);
    let mut region = Region::new(&pager, 1 << 20).unwrap();
    region.fill(1);
    // SAFETY: as above.
    let last = unsafe { AddVectoredExceptionHandler(0, Some(after)) };

    // SAFETY: a page of the test's own, without access.
    let page =
        unsafe { VirtualAlloc(ptr::null(), 4096, MEM_RESERVE | MEM_COMMIT, PAGE_NOACCESS) }.cast::<u8>();
    WATCH.address.store(page.expose_provenance(), Ordering::SeqCst);
    // SAFETY: `after` makes it usable.
    unsafe { page.write_volatile(5) };
    assert_eq!((WATCH.seen.load(Ordering::SeqCst), LAST.load(Ordering::SeqCst)), (2, 1));

    // A part of a region that is not in use is foreign too, here with the access rights taken away by the test itself.
    let sparse = Region::sparse(&pager, 1 << 20).unwrap();
    let address = sparse.as_ptr().wrapping_add(70_000);
    WATCH.address.store(address.expose_provenance(), Ordering::SeqCst);
    // SAFETY: `after` makes it usable.
    assert_eq!(unsafe { address.read_volatile() }, 0);
    assert_eq!((WATCH.seen.load(Ordering::SeqCst), LAST.load(Ordering::SeqCst)), (4, 2));

    // Execution in a region is not ours, nor are other exceptions about its addresses.
    let inside = region.as_ptr().expose_provenance();
    WATCH.address.store(inside, Ordering::SeqCst);
    for (code, kind) in [(EXCEPTION_ACCESS_VIOLATION, 8), (0x1234, 0)] {
        let arguments = [kind, inside];
        // SAFETY: raises an exception, which `after` handles.
        unsafe { RaiseException(code.cast_unsigned(), 0, 2, arguments.as_ptr()) };
        assert_eq!(WATCH.code.load(Ordering::SeqCst), code.cast_unsigned());
    }
    assert_eq!((WATCH.seen.load(Ordering::SeqCst), LAST.load(Ordering::SeqCst)), (8, 4));
    assert_eq!(pager.health(), Health::Ok);

    // The disk's trouble is told to the program and to who asks the pager.
    let arguments = [0, inside, usize::try_from(STATUS_IN_PAGE_ERROR.cast_unsigned()).unwrap()];
    // SAFETY: as above.
    unsafe { RaiseException(EXCEPTION_IN_PAGE_ERROR.cast_unsigned(), 0, 3, arguments.as_ptr()) };
    assert_eq!((WATCH.seen.load(Ordering::SeqCst), LAST.load(Ordering::SeqCst)), (10, 5));
    assert_eq!((pager.health(), pager.stats().unwrap().io_errors), (Health::DiskFailed, 1));

    // Faults of ours are nobody else's business, whoever was there first: the first handler saw no address of a region
    // but those above.
    WATCH.address.store(0, Ordering::SeqCst);
    assert!(region.iter().all(|byte| *byte == 1));
    // SAFETY: ours.
    unsafe {
        RemoveVectoredExceptionHandler(first);
        RemoveVectoredExceptionHandler(last);
    }
}

#[test]
fn the_last_error_survives_a_fault() {
    let pager = pager(BUDGET, SWAP);
    let mut region = Region::new(&pager, LARGE / 2).unwrap();
    for (index, byte) in (0_u32..).zip(region.iter_mut().step_by(64 << 10)) {
        // SAFETY: a number of this thread.
        unsafe { SetLastError(index) };
        *byte = 1;
        // SAFETY: as above.
        assert_eq!(unsafe { GetLastError() }, index);
    }
}

#[test]
fn access_that_somebody_took_away_comes_back() {
    let pager = pager(BUDGET, SWAP);
    let mut region = Region::new(&pager, 1 << 20).unwrap();
    region.fill(9);
    let mut old = 0;
    // SAFETY: the region's memory; its content stays.
    assert_ne!(unsafe { VirtualProtect(region.as_ptr().cast(), 4096, PAGE_NOACCESS, &raw mut old) }, 0);
    region[1] += 1;
    assert_eq!(region[..3], [9, 10, 9]);
}

#[test]
fn a_system_call_on_an_absent_page_fails_with_998_and_works_when_it_is_pinned() {
    let pager = pager(BUDGET, SWAP);
    let mut region = Region::new(&pager, 1 << 20).unwrap();
    region.fill(b'x');
    let directory = Directory::new("998");
    let path = directory.join("out");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(&[b'y'; 8192]).unwrap();
    let call = |region: &Region, reading: bool| {
        let (mut count, mut at) = (0, OVERLAPPED::default());
        let (handle, buffer) = (file.as_raw_handle(), region.as_ptr());
        // SAFETY: the buffer is within the region, absent or not.
        let done = unsafe {
            if reading {
                ReadFile(handle, buffer, 4096, &raw mut count, &raw mut at)
            } else {
                WriteFile(handle, buffer, 4096, &raw mut count, &raw mut at)
            }
        };
        // SAFETY: reads a number of this thread.
        if done == 0 { Err(unsafe { GetLastError() }) } else { Ok(count) }
    };
    // Wine has another number where a buffer cannot be read.
    let absent = |error| error == Err(ERROR_NOACCESS) || error == Err(ERROR_INVALID_USER_BUFFER);
    region.advise(0..1 << 20, Advice::Cold).unwrap();
    assert_eq!(region.resident(0..4096).unwrap(), [false]);
    assert_eq!(call(&region, true), Err(ERROR_NOACCESS));
    assert!(absent(call(&region, false)));
    let pin = region.pin(0..4096).unwrap();
    region.advise(0..1 << 20, Advice::Cold).unwrap();
    assert_eq!(region.resident(0..4096).unwrap(), [true]);
    assert_eq!(pager.stats().unwrap().unevictable_pages, 16);
    assert_eq!(call(&region, false), Ok(4096));
    drop(pin);
    let pin = region.pin_mut(0..4096).unwrap();
    assert!(pin.iter().all(|byte| *byte == b'x'));
    drop(pin);
    assert_eq!(call(&region, true), Ok(4096), "what was pinned for writing can be written to");
    region.advise(0..1 << 20, Advice::Cold).unwrap();
    assert!(absent(call(&region, false)));
    let mut copy = Vec::new();
    region.write_from(0..8192, &mut copy).unwrap();
    assert!(copy[..4096].iter().all(|byte| *byte == b'x') && copy[4096..] == [b'x'; 4096]);
}

#[test]
fn pins_are_counted_and_leave_room_for_everybody_else() {
    let pager = pager(BUDGET, SWAP);
    let mut region = Region::new(&pager, LARGE).unwrap();
    region.iter_mut().step_by(4096).for_each(|byte| *byte = 2);
    let all = region.pin(0..LARGE).unwrap_err();
    assert!(matches!(&all, Error::Invalid { what } if what.contains("pinned")), "{all}");
    assert_eq!(pager.stats().unwrap().unevictable_pages, 0, "nothing is pinned after an error");
    let first = region.pin(0..3 << 20).unwrap();
    let second = region.pin(1 << 20..2 << 20).unwrap();
    assert_eq!(pager.stats().unwrap().unevictable_pages, 768);
    drop(first);
    assert_eq!(pager.stats().unwrap().unevictable_pages, 256, "the second one holds");
    assert!(region.iter().step_by(4096).all(|byte| *byte == 2));
    assert!(region.resident(1 << 20..2 << 20).unwrap().iter().all(|resident| *resident));
    assert!(pager.set_budget(64 * (64 << 10)).is_err());
    drop(second);
    assert_eq!(pager.stats().unwrap().unevictable_pages, 0);
    let mut guard = region.pin_mut(10..20).unwrap();
    guard.fill(5);
    drop(guard);
    region.advise(0..LARGE, Advice::Cold).unwrap();
    assert_eq!(region[9..21].iter().map(|byte| u32::from(*byte)).sum::<u32>(), 50);
}

#[test]
fn a_region_goes_while_other_threads_fault_in_others() {
    let pager = pager(BUDGET, SWAP);
    let mut steady = Region::new(&pager, LARGE / 4).unwrap();
    steady.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert!(steady.iter().step_by(4096).all(|byte| *byte == 1));
                }
            });
        }
        for round in 0..60_u8 {
            let mut passing = Region::new(&pager, 2 << 20).unwrap();
            assert!(passing.iter().all(|byte| *byte == 0));
            passing.fill(round | 1);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_temporary_swap_file_is_nobody_elses_and_goes() {
    let directory = Directory::new("temporary");
    let path = directory.join("swap.bin");
    let mut options = LocalOptions::new(BUDGET, 64 << 20);
    options.swap_file = Some(path.clone());
    let pager = Pager::local(&options).unwrap();
    assert!(std::fs::metadata(&path).unwrap().len() >= 64 << 20);
    assert!(std::fs::File::open(&path).is_err(), "nobody else may open it");
    let error = Pager::local(&options).unwrap_err();
    assert!(matches!(&error, Error::Invalid { what } if what.contains("in use")), "{error}");
    let region = Region::new(&pager, 1 << 20).unwrap();
    drop(pager);
    assert!(path.exists(), "the region needs it");
    drop(region);
    assert!(!path.exists());
}

#[test]
fn a_kept_swap_file_is_used_again_and_its_old_content_never_shows() {
    let directory = Directory::new("kept");
    let path = directory.join("swap.bin");
    let mut options = LocalOptions::new(BUDGET, 64 << 20);
    options.swap_file = Some(path.clone());
    options.keep = true;
    for round in 1..4 {
        let pager = Pager::local(&options).unwrap();
        let mut region = Region::new(&pager, 48 << 20).unwrap();
        assert!(region.iter().step_by(100).all(|byte| *byte == 0), "round {round}");
        region.fill(round);
        assert!(region.iter().all(|byte| *byte == round));
    }
    let len = std::fs::metadata(&path).unwrap().len();
    assert!(len >= 64 << 20);

    // Left by a system that went down: a file of ours is not in the way of a temporary one.
    options.keep = false;
    drop(Pager::local(&options).unwrap());
    assert!(!path.exists());
}

#[test]
fn a_file_that_is_not_ours_is_left_alone() {
    let directory = Directory::new("foreign");
    let path = directory.join("precious.txt");
    std::fs::write(&path, "precious").unwrap();
    for keep in [false, true] {
        let mut options = LocalOptions::new(BUDGET, 64 << 20);
        options.swap_file = Some(path.clone());
        options.keep = keep;
        let error = Pager::local(&options).unwrap_err();
        assert!(matches!(&error, Error::Invalid { what } if what.contains("left alone")), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}

#[test]
fn no_space_is_an_error_at_creation() {
    let directory = Directory::new("full");
    let path = directory.join("swap.bin");
    for keep in [false, true] {
        let mut options = LocalOptions::new(BUDGET, 1 << 60);
        options.swap_file = Some(path.clone());
        options.keep = keep;
        let error = Pager::local(&options).unwrap_err();
        assert!(matches!(error, Error::SwapFull { .. }), "{error}");
        assert!(!path.exists());
    }
    let mut options = LocalOptions::new(BUDGET, 64 << 20);
    options.swap_file = Some(directory.join("missing").join("swap.bin"));
    let error = Pager::local(&options).unwrap_err();
    assert!(matches!(error, Error::System { .. }) && error.to_string().contains("missing"), "{error}");
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason() {
    let refused = |change: &dyn Fn(&mut LocalOptions), word: &str| {
        let mut options = LocalOptions::new(BUDGET, 64 << 20);
        change(&mut options);
        let error = Pager::local(&options).unwrap_err();
        assert!(matches!(&error, Error::Invalid { what } if what.contains(word)), "{error}");
    };
    refused(&|options| options.budget = 1 << 20, "at least");
    refused(&|options| options.unit = 12288, "power of two");
    refused(&|options| options.unit = 2 << 20, "power of two");
    refused(&|options| options.unit = 1 << 20, "at least");
    refused(&|options| options.swap_size = 0, "0 bytes");
    refused(&|options| options.keep = true, "path");
    assert!(matches!(Pager::connect(), Err(Error::Unsupported { .. })));
    assert!(matches!(Pager::connect_with(&ConnectOptions::default()), Err(Error::Unsupported { .. })));
    let pager = Pager::private(&PrivateOptions::new(BUDGET)).unwrap();
    assert!(matches!(Region::new(&pager, 0), Err(Error::Invalid { .. })));
    let too_many: Result<Vec<_>, _> = (0..2000).map(|_| Region::new(&pager, 1)).collect();
    assert!(matches!(too_many, Err(Error::Refused { .. })));
    Region::new(&pager, 1).unwrap();
}

/// Ends this process as programs with a bug do. Not a test by itself.
fn crash(how: &str) {
    #[allow(unconditional_recursion, reason = "that is the bug")]
    fn overflow(depth: u64) -> u64 {
        let buffer = std::hint::black_box([depth; 512]);
        buffer[7] + overflow(depth + 1)
    }
    match how {
        "null" => {
            // SAFETY: none, that is the bug.
            unsafe { std::hint::black_box(ptr::null_mut::<u8>()).write_volatile(1) };
        }
        "stack" => {
            /// What a program does that wants to know: wine 8 does not get further by itself.
            unsafe extern "system" fn last(pointers: *mut EXCEPTION_POINTERS) -> i32 {
                // SAFETY: the system's record; ends this process.
                unsafe {
                    if (*(*pointers).ExceptionRecord).ExceptionCode == EXCEPTION_STACK_OVERFLOW {
                        TerminateProcess(GetCurrentProcess(), EXCEPTION_STACK_OVERFLOW.cast_unsigned());
                    }
                }
                EXCEPTION_CONTINUE_SEARCH
            }
            // SAFETY: keeps the rules of handlers.
            unsafe { AddVectoredExceptionHandler(0, Some(last)) };
            println!("{}", overflow(1));
        }
        _ => panic!("{how}"),
    }
}

#[test]
fn null_dereference_and_stack_overflow_end_a_program_as_without_us() {
    if let Ok(how) = std::env::var("FMALLOC_TEST_CRASH") {
        let with_pager = how.strip_prefix("paged-");
        let pager = with_pager.map(|_| pager(BUDGET, SWAP));
        let mut region = pager.as_ref().map(|pager| Region::new(pager, LARGE / 8).unwrap());
        if let Some(region) = &mut region {
            region.fill(1);
        }
        crash(with_pager.unwrap_or(&how));
        return;
    }
    let end = |how: &str| {
        let test = "null_dereference_and_stack_overflow_end_a_program_as_without_us";
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture", "--test-threads", "1"]).env("FMALLOC_TEST_CRASH", how);
        command.output().unwrap().status.code().unwrap()
    };
    for how in ["null", "stack"] {
        let without = end(how);
        assert_eq!(end(&format!("paged-{how}")), without, "{how}");
        // The exception's number, of which wine leaves one byte.
        let expected = if how == "null" { 0xC000_0005_u32 } else { 0xC000_00FD };
        assert_eq!(without.cast_unsigned() & 0xff, expected & 0xff, "{how}");
    }
}

#[test]
fn pagers_come_and_go() {
    for _ in 0..20 {
        let pager = pager(BUDGET, 64 << 20);
        let mut region = Region::new(&pager, 1 << 20).unwrap();
        region.fill(1);
        let mut bytes = [0; 10];
        (&region[..]).read_exact(&mut bytes).unwrap();
        std::io::sink().write_all(&bytes).unwrap();
    }
}

/// Not a test: thousand faults a second and MiB a second for each unit of paging, by which the default was chosen.
/// `.ci/windows/run cargo test --release --target x86_64-pc-windows-gnu -p fmalloc-client --test windows -- --ignored --nocapture`
#[test]
#[ignore = "prints figures"]
fn figures_of_units() {
    let len = 512 << 20;
    for unit in [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20] {
        let mut options = LocalOptions::new(192 << 20, 1 << 30);
        options.unit = unit;
        let pager = Pager::local(&options).unwrap();
        let mut region = Region::new(&pager, len).unwrap();
        let timed = |region: &mut Region, work: &dyn Fn(&mut Region)| {
            let (start, before) = (std::time::Instant::now(), pager.stats().unwrap().faults);
            work(region);
            let seconds = start.elapsed().as_secs_f64();
            let faults = f64::from(u32::try_from(pager.stats().unwrap().faults - before).unwrap());
            (seconds, faults / seconds / 1000.0)
        };
        let mib = f64::from(u32::try_from(len >> 20).unwrap());
        let fill = timed(&mut region, &|region| region.as_mut_slice_of::<u64>().fill(7));
        let read =
            timed(&mut region, &|region| assert!(region.as_slice_of::<u64>().iter().all(|word| *word == 7)));
        let touches = 20_000_u32;
        let random = timed(&mut region, &|region| {
            let mut state = 1_u64;
            for _ in 0..touches {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = usize::try_from(state >> 33).unwrap() % len;
                region[at] = region[at].wrapping_add(1);
            }
        });
        println!(
            "unit {:4} KiB: fill {:.0} MiB/s, read {:.0} MiB/s, random {:.1} thousand touches/s ({:.1} thousand faults/s)",
            unit >> 10,
            mib / fill.0,
            mib / read.0,
            f64::from(touches) / random.0 / 1000.0,
            random.1
        );
    }
}
