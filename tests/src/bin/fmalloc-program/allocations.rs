//! Every function of the malloc family, on memory that is paged.

use std::ffi::{c_int, c_void};
use std::hint::black_box;
use std::ptr;

use fmalloc_tests::rng::Rng;

use crate::block::{Block, MIB};

unsafe extern "C" {
    fn memalign(align: usize, size: usize) -> *mut c_void;
    fn valloc(size: usize) -> *mut c_void;
    fn pvalloc(size: usize) -> *mut c_void;
    fn reallocarray(old: *mut c_void, count: usize, size: usize) -> *mut c_void;
}

fn errno() -> c_int {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

/// Blocks of libc, of before and after the beginning of paging, mixed.
pub(crate) fn all() {
    let before: Vec<Block> = (0..100).map(|n| filled(8192, n)).collect();
    let ballast: Vec<Block> = (0..32).map(|n| filled(MIB, 1000 + n)).collect();
    aligned();
    resized();
    zeroed();
    wrong();
    // SAFETY: takes nothing.
    let info = unsafe { libc::mallinfo2() };
    assert!(info.uordblks + info.hblkhd >= 32 * MIB, "{} + {}", info.uordblks, info.hblkhd);
    for (n, block) in before.iter().enumerate() {
        block.check(n);
    }
    for (n, block) in ballast.iter().enumerate() {
        block.check(1000 + n);
    }
    drop(ballast);
    // SAFETY: any number will do.
    unsafe { libc::malloc_trim(0) };
    // What was libc's at first grows into what is paged.
    for (n, block) in before.into_iter().enumerate() {
        // SAFETY: the block is ours.
        let grown = Block::from_raw(unsafe { libc::realloc(block.into_raw(), MIB / 2) }, 8192).unwrap();
        grown.check(n);
    }
}

fn filled(bytes: usize, seed: usize) -> Block {
    let mut block = Block::new(bytes);
    block.fill(seed);
    block
}

fn aligned() {
    for power in 4..=22 {
        let align = 1 << power;
        for size in [1, 100, 5000, MIB] {
            let mut place = ptr::null_mut();
            // SAFETY: there is room for a pointer, and the rest are plain numbers.
            let blocks = unsafe {
                assert_eq!(libc::posix_memalign(&raw mut place, align, size), 0);
                [place, memalign(align, size), libc::aligned_alloc(align, size.next_multiple_of(align))]
            };
            for start in blocks {
                assert!(start.addr().is_multiple_of(align), "{start:p} is not aligned to {align}");
                let mut block = Block::from_raw(start, size).unwrap();
                // SAFETY: the block is in use.
                assert!(unsafe { libc::malloc_usable_size(block.as_ptr()) } >= size);
                block.fill(power);
                block.check(power);
            }
        }
    }
    // SAFETY: plain numbers.
    for start in unsafe { [valloc(10), pvalloc(10), valloc(MIB), pvalloc(MIB + 1)] } {
        assert!(start.addr().is_multiple_of(4096));
        drop(Block::from_raw(start, 10).unwrap());
    }
}

fn resized() {
    let mut rng = Rng::new(1);
    let mut blocks: Vec<Option<(Block, usize, usize)>> = (0..64).map(|_| None).collect();
    for round in 0..4000 {
        let place = &mut blocks[rng.index(64)];
        let size = (rng.index(64) + 1) * 4096 + rng.index(4000);
        *place = match place.take() {
            None => Some((filled(size, round), size, round)),
            Some((block, old, seed)) if rng.below(4) > 0 => {
                // SAFETY: the block is ours.
                let start = unsafe { reallocarray(block.into_raw(), 1, size) };
                let kept = old.min(size) / 4096 * 4096;
                Block::from_raw(start, kept).unwrap().verified(seed);
                let mut block = Block::from_raw(start, size).unwrap();
                block.fill(round);
                Some((block, size, round))
            }
            Some((block, _, seed)) => {
                block.check(seed);
                None
            }
        };
    }
    for (block, _, seed) in blocks.into_iter().flatten() {
        block.check(seed);
    }
}

impl Block {
    /// Checks a block that stays.
    fn verified(self, seed: usize) {
        self.check(seed);
        self.into_raw();
    }
}

fn zeroed() {
    for round in 0..3 {
        for size in [1, 1000, 20_000, 3 * MIB] {
            // SAFETY: plain numbers; the bytes are the block's.
            unsafe {
                let start = libc::calloc(1, size);
                let bytes = std::slice::from_raw_parts_mut(start.cast::<u8>(), size);
                assert!(bytes.iter().all(|byte| *byte == 0), "calloc({size}) in round {round}");
                bytes.fill(0xaa);
                libc::free(start);
            }
        }
    }
}

fn wrong() {
    // SAFETY: sizes that no system has, and null pointers.
    unsafe {
        for size in [isize::MAX as usize, usize::MAX, usize::MAX - 4096, 1 << 50] {
            // Were nothing done with the result, the compiler would take the call for a success.
            assert!(black_box(libc::malloc(size)).is_null());
            assert_eq!(errno(), libc::ENOMEM);
            assert!(black_box(memalign(64, size)).is_null());
            assert_eq!(errno(), libc::ENOMEM);
        }
        assert!(black_box(libc::calloc(usize::MAX / 2, 3)).is_null());
        assert_eq!(errno(), libc::ENOMEM);
        assert!(black_box(reallocarray(ptr::null_mut(), usize::MAX / 2, 3)).is_null());
        assert_eq!(errno(), libc::ENOMEM);
        assert!(black_box(pvalloc(usize::MAX)).is_null());
        let mut place = ptr::dangling_mut();
        assert_eq!(libc::posix_memalign(&raw mut place, 3, 8), libc::EINVAL);
        assert_eq!(libc::posix_memalign(&raw mut place, 4, 8), libc::EINVAL);
        assert_eq!(libc::posix_memalign(&raw mut place, 64, 1 << 50), libc::ENOMEM);
        let kept = filled(2 * MIB, 5);
        assert!(black_box(libc::realloc(kept.as_ptr(), 1 << 50)).is_null());
        kept.check(5);
        libc::free(ptr::null_mut());
        assert_eq!(libc::malloc_usable_size(ptr::null_mut()), 0);
        let empty = black_box(libc::malloc(0));
        assert!(!empty.is_null());
        assert!(libc::realloc(empty, 0).is_null(), "it frees");
        // Free leaves errno alone.
        let block = black_box(libc::malloc(4 * MIB));
        *libc::__errno_location() = 4242;
        libc::free(block);
        assert_eq!(errno(), 4242);
    }
}

/// Threads that allocate, verify and free, and pass blocks on to one another.
pub(crate) fn threads(threads: usize, mib: usize) {
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..threads).map(|_| std::sync::mpsc::channel()).unzip();
    let each = mib / threads;
    std::thread::scope(|scope| {
        for (number, receiver) in receivers.into_iter().enumerate() {
            let to = senders[(number + 1) % threads].clone();
            scope.spawn(move || {
                let mut rng = Rng::new(number as u64);
                let mut kept = Vec::new();
                for round in 0..each {
                    let (mut sizes, mut sum) = (Vec::new(), 0);
                    while sum < MIB {
                        let size = 16 << rng.below(15);
                        sizes.push(size);
                        sum += size;
                    }
                    let seed = number * 1_000_000 + round;
                    let blocks: Vec<Block> = sizes.into_iter().map(|size| filled(size, seed)).collect();
                    if round % 3 == 0 {
                        // To one that has ended: then it is freed here.
                        let _ = to.send((seed, blocks));
                    } else {
                        kept.push((seed, blocks));
                    }
                    if round % 4 == 3 {
                        let (seed, blocks) = kept.swap_remove(rng.index(kept.len()));
                        blocks.iter().for_each(|block| block.check(seed));
                    }
                    if let Ok((seed, blocks)) = receiver.try_recv() {
                        let blocks: Vec<Block> = blocks;
                        blocks.iter().for_each(|block| block.check(seed));
                    }
                }
                for (seed, blocks) in kept {
                    blocks.iter().for_each(|block| block.check(seed));
                }
                drop(to);
                for (seed, blocks) in receiver.try_iter() {
                    blocks.iter().for_each(|block| block.check(seed));
                }
            });
        }
        drop(senders);
    });
}

/// Allocates in odd places: while libraries are loaded, in a signal handler, when a thread ends, at exit.
pub(crate) fn late() {
    let ballast: Vec<Block> = (0..64).map(|n| filled(MIB, n)).collect();
    for name in [c"libm.so.6", c"libresolv.so.2", c"libnss_files.so.2", c"libutil.so.1", c"libgcc_s.so.1"] {
        // SAFETY: libraries of the system.
        unsafe {
            let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW);
            assert!(!library.is_null(), "{name:?}");
            libc::dlclose(library);
        }
    }
    extern "C" fn handler(_: c_int) {
        let mut block = Block::new(MIB / 4);
        block.fill(7);
        block.check(7);
    }
    // SAFETY: while the signals come, this thread is not in libc.
    unsafe {
        libc::signal(libc::SIGUSR1, handler as *const () as libc::sighandler_t);
        for _ in 0..50 {
            libc::raise(libc::SIGUSR1);
        }
    }
    thread_local! {
        static LAST: std::cell::RefCell<Option<Block>> = const { std::cell::RefCell::new(None) };
    }
    for n in 0..20 {
        std::thread::spawn(move || LAST.set(Some(filled(MIB / 2, n)))).join().unwrap();
    }
    extern "C" fn at_exit() {
        let block = filled(8 * MIB, 3);
        block.check(3);
    }
    // SAFETY: a function that may run at any time.
    assert_eq!(unsafe { libc::atexit(at_exit) }, 0);
    ballast.iter().enumerate().for_each(|(n, block)| block.check(n));
}

/// Ends the process by SIGABRT.
pub(crate) fn double_free() {
    let ballast: Vec<Block> = (0..8).map(|n| filled(MIB, n)).collect();
    let start = ballast[3].as_ptr();
    drop(ballast);
    // SAFETY: it is not, which is what is to be found.
    unsafe { libc::free(start) };
}
