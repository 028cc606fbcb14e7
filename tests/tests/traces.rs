//! The allocator with what real programs do: content is kept, and little memory is lost to fragmentation.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::ptr::NonNull;

use fmalloc_client::heap::{Core, Plain};
use fmalloc_tests::trace::{self, Subject, TRACES};

struct Ours<'a>(&'a Core<Plain>);

impl Subject for Ours<'_> {
    fn alloc(&mut self, size: usize) -> NonNull<u8> {
        self.0.alloc(size, 16).unwrap()
    }

    fn free(&mut self, block: NonNull<u8>, _: usize) {
        // SAFETY: the replay does not use it any more.
        unsafe { self.0.free(block) }.unwrap();
    }

    fn realloc(&mut self, block: NonNull<u8>, _: usize, size: usize) -> NonNull<u8> {
        // SAFETY: as above.
        unsafe { self.0.realloc(block, size, 16) }.unwrap()
    }
}

#[test]
fn real_programs_keep_their_content_and_waste_little() {
    for name in TRACES {
        let events = trace::read(name);
        assert!(events.len() > 10_000, "{name}");
        let core = Core::new(Plain::new(1 << 30).unwrap()).unwrap();
        let mut used = 0;
        let peak = trace::replay(&events, &mut Ours(&core), || used = core.stats().used_bytes);
        core.check().unwrap();
        let stats = core.stats();
        // Blocks are rounded up to classes, by an eighth on average. What slabs have beyond that is not touched before it
        // is used: a few hundred KiB, whatever the size of the heap.
        assert!(used * 4 <= peak * 5, "{name}: {used} bytes in blocks for {peak}");
        assert!(
            stats.peak_bytes <= peak * 5 / 4 + (2 << 20),
            "{name}: {} bytes of pages for {peak}",
            stats.peak_bytes
        );
        assert_eq!(stats.used_blocks, 0);
        core.trim(0);
        assert_eq!(core.stats().committed_bytes, 0, "{name}");
    }
}
