//! The cases that memmap2 0.9 tests, as far as they apply: same cases, own code. Those that do not are listed in
//! `docs/mmap.md` with the reason.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use fmalloc_client::mmap::{
    Advice, Mmap, MmapMut, MmapOptions, MmapRaw, RemapOptions, UncheckedAdvice, set_default_pager,
};
use fmalloc_client::{PAGE_SIZE, Pager, PrivateOptions};
use fmalloc_tests::place;
use tempfile::TempDir;

/// A directory for files, and a default pager. None where tests cannot run.
fn begin() -> Option<TempDir> {
    place::can_page().then(|| {
        let options = PrivateOptions {
            daemon: Some(place::binary("fmallocd")),
            swap_size: Some(64 << 20),
            ..PrivateOptions::new(8 << 20)
        };
        set_default_pager(Pager::private(&options).unwrap());
        place::directory()
    })
}

fn create(path: &Path, len: u64) -> File {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.set_len(len).unwrap();
    file
}

fn counting(len: usize) -> Vec<u8> {
    (0..=u8::MAX).cycle().take(len).collect()
}

fn map_mut(file: &File) -> MmapMut {
    // SAFETY: each file is this test's alone.
    unsafe { MmapMut::map_mut(file).unwrap() }
}

fn map(file: &File) -> Mmap {
    // SAFETY: as above.
    unsafe { Mmap::map(file).unwrap() }
}

/// Zeros at first, and then what is written.
fn assert_writable(mmap: &mut MmapMut, len: usize) {
    assert_eq!(mmap.len(), len);
    assert!(mmap.iter().all(|byte| *byte == 0));
    let bytes = counting(len);
    (&mut mmap[..]).write_all(&bytes).unwrap();
    assert_eq!(mmap[..], bytes[..]);
}

fn first_six(file: &mut File) -> [u8; 6] {
    let mut bytes = [0; 6];
    file.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn map_file() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 128);
    assert_writable(&mut map_mut(&file), 128);
}

#[test]
fn map_fd() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 128);
    // SAFETY: the file is this test's alone.
    let mut mmap = unsafe { MmapMut::map_mut(file.as_raw_fd()).unwrap() };
    assert_writable(&mut mmap, 128);
}

#[test]
fn map_empty_file() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 0);
    let mmap = map(&file);
    assert!(mmap.is_empty());
    assert_eq!(mmap.as_ptr().align_offset(size_of::<usize>()), 0);
    let mmap = map_mut(&file);
    assert!(mmap.is_empty());
    assert_eq!(mmap.as_ptr().align_offset(size_of::<usize>()), 0);
}

#[test]
fn map_anon() {
    let Some(_dir) = begin() else { return };
    assert_writable(&mut MmapMut::map_anon(128).unwrap(), 128);
}

#[test]
fn map_anon_zero_len() {
    let Some(_dir) = begin() else { return };
    assert!(MmapOptions::new().map_anon().unwrap().is_empty());
}

#[test]
fn map_anon_len_overflow() {
    let Some(_dir) = begin() else { return };
    let error = MmapMut::map_anon(1 << 63).unwrap_err();
    assert_eq!(error.to_string(), "memory map length overflows isize");
}

#[test]
fn file_write() {
    let Some(dir) = begin() else { return };
    let mut file = create(&dir.path().join("file"), 128);
    let mut mmap = map_mut(&file);
    (&mut mmap[..]).write_all(b"abc123").unwrap();
    mmap.flush().unwrap();
    assert_eq!(first_six(&mut file), *b"abc123");
}

#[test]
fn flush_range() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 128);
    // SAFETY: the file is this test's alone.
    let mut mmap = unsafe { MmapOptions::new().offset(2).len(6).map_mut(&file).unwrap() };
    (&mut mmap[..]).write_all(b"abc123").unwrap();
    mmap.flush_async_range(0, 6).unwrap();
    mmap.flush_range(0, 6).unwrap();
    assert_eq!(std::fs::read(dir.path().join("file")).unwrap()[..9], *b"\0\0abc123\0");
}

#[test]
fn map_copy() {
    let Some(dir) = begin() else { return };
    let mut file = create(&dir.path().join("file"), 128);
    // SAFETY: the file is this test's alone.
    let mut mmap = unsafe { MmapOptions::new().map_copy(&file).unwrap() };
    (&mut mmap[..]).write_all(b"abc123").unwrap();
    mmap.flush().unwrap();
    assert_eq!(mmap[..6], *b"abc123");
    assert_eq!(first_six(&mut file), [0; 6]);
    assert_eq!(map(&file)[..6], [0; 6]);
}

#[test]
fn map_copy_read_only() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 128);
    // SAFETY: the file is this test's alone.
    let mmap = unsafe { MmapOptions::new().map_copy_read_only(&file).unwrap() };
    assert_eq!(mmap[..6], [0; 6]);
    assert_eq!(map(&file)[..6], [0; 6]);
}

#[test]
fn map_offset() {
    let Some(dir) = begin() else { return };
    let (offset, len) = (u64::from(u32::MAX) + 2, 5432);
    let file = create(&dir.path().join("file"), offset + 5432);
    // SAFETY: the file is this test's alone.
    let inferred = unsafe { MmapOptions::new().offset(offset).map_mut(&file).unwrap() };
    assert_eq!(inferred.len(), len);
    // SAFETY: as above; the two are not used at the same time.
    let mut mmap = unsafe { MmapOptions::new().offset(offset).len(len).map_mut(&file).unwrap() };
    assert_writable(&mut mmap, len);
}

#[test]
fn index() {
    let Some(_dir) = begin() else { return };
    let mut mmap = MmapMut::map_anon(128).unwrap();
    mmap[0] = 42;
    assert_eq!(mmap[0], 42);
}

#[test]
fn sync_send() {
    fn is_sync_send<T: Sync + Send>() {}
    is_sync_send::<Mmap>();
    is_sync_send::<MmapMut>();
    is_sync_send::<MmapRaw>();
}

#[test]
fn jit_x86() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 4096);
    for mmap in [MmapMut::map_anon(4096).unwrap(), map_mut(&file)] {
        let refused = mmap.make_exec().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    }
    // SAFETY: always refused.
    let refused = unsafe { MmapOptions::new().map_exec(&file).unwrap_err() };
    assert!(refused.to_string().contains("memmap2"), "{refused}");
}

#[test]
fn mprotect_file() {
    let Some(dir) = begin() else { return };
    let mut file = create(&dir.path().join("file"), 256);
    let mut mmap = map_mut(&file).make_read_only().unwrap().make_mut().unwrap();
    (&mut mmap[..]).write_all(b"abc123").unwrap();
    mmap.flush().unwrap();
    assert_eq!(mmap[..6], *b"abc123");
    assert_eq!(first_six(&mut file), *b"abc123");
    assert_eq!(map(&file)[..6], *b"abc123");
}

#[test]
fn mprotect_file_that_was_mapped_for_reading() {
    let Some(dir) = begin() else { return };
    let path = dir.path().join("file");
    let file = create(&path, 256);
    let mut mmap = map(&file).make_mut().unwrap();
    mmap[..6].copy_from_slice(b"abc123");
    mmap.flush().unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[..6], *b"abc123");
    drop(mmap);
    let refused = map(&File::open(&path).unwrap()).make_mut().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{refused}");
    // SAFETY: the file is this test's alone.
    let refused = unsafe { MmapMut::map_mut(&File::open(&path).unwrap()).unwrap_err() };
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{refused}");
}

#[test]
fn mprotect_copy() {
    let Some(dir) = begin() else { return };
    let mut file = create(&dir.path().join("file"), 256);
    // SAFETY: the file is this test's alone.
    let mmap = unsafe { MmapOptions::new().map_copy(&file).unwrap() };
    let mut mmap = mmap.make_read_only().unwrap().make_mut().unwrap();
    (&mut mmap[..]).write_all(b"abc123").unwrap();
    mmap.flush().unwrap();
    assert_eq!(mmap[..6], *b"abc123");
    assert_eq!(first_six(&mut file), [0; 6]);
    assert_eq!(map(&file)[..6], [0; 6]);
}

#[test]
fn mprotect_anon() {
    let Some(_dir) = begin() else { return };
    let mmap = MmapMut::map_anon(256).unwrap();
    let mut mmap = mmap.make_read_only().unwrap().make_mut().unwrap();
    mmap[255] = 1;
    assert_eq!(mmap[255], 1);
}

#[test]
fn raw() {
    let Some(dir) = begin() else { return };
    let path = dir.path().join("file");
    std::fs::write(&path, b"abc123").unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mmap = MmapOptions::new().map_raw(&file).unwrap();
    assert_eq!(mmap.len(), 6);
    // SAFETY: nobody else has the mapping.
    assert_eq!(unsafe { mmap.as_ptr().read() }, b'a');
    // SAFETY: as above.
    unsafe { mmap.as_mut_ptr().write(b'z') };
    mmap.flush().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"zbc123");
}

#[test]
fn raw_read_only() {
    let Some(dir) = begin() else { return };
    let path = dir.path().join("file");
    std::fs::write(&path, b"abc123").unwrap();
    let mmap = MmapOptions::new().map_raw_read_only(&File::open(&path).unwrap()).unwrap();
    assert_eq!(mmap.len(), 6);
    // SAFETY: nobody else has the mapping.
    assert_eq!(unsafe { mmap.as_ptr().read() }, b'a');
}

#[test]
fn owning_ref() {
    fn is_stable<T: stable_deref_trait::StableDeref>() {}
    is_stable::<Mmap>();
    is_stable::<MmapMut>();
}

#[test]
fn advise() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 128);
    let mut mmap = map_mut(&file);
    mmap.advise(Advice::Random).unwrap();
    assert!(mmap.iter().all(|byte| *byte == 0));
    mmap.advise_range(Advice::Sequential, 0, mmap.len()).unwrap();
    assert_writable(&mut mmap, 128);
    // What was written is seen by others although it was not flushed.
    let other = map(&file);
    other.advise(Advice::Random).unwrap();
    assert_eq!(other[..], counting(128)[..]);
}

#[test]
fn advise_writes_unsafely() {
    let Some(_dir) = begin() else { return };
    let mut mmap = MmapMut::map_anon(PAGE_SIZE).unwrap();
    mmap.as_mut().fill(255);
    let mmap = mmap.make_read_only().unwrap();
    assert_eq!(mmap.as_ref()[0], 255);
    // SAFETY: nothing refers to the bytes.
    unsafe { mmap.unchecked_advise(UncheckedAdvice::DontNeed).unwrap() };
    assert_eq!(mmap.as_ref()[0], 0);
}

#[test]
fn advise_writes_unsafely_to_part_of_map() {
    let Some(_dir) = begin() else { return };
    let mut mmap = MmapMut::map_anon(2 * PAGE_SIZE).unwrap();
    mmap.as_mut().fill(255);
    let mmap = mmap.make_read_only().unwrap();
    assert_eq!((mmap[0], mmap[PAGE_SIZE]), (255, 255));
    // SAFETY: nothing refers to the bytes.
    unsafe {
        mmap.unchecked_advise_range(UncheckedAdvice::DontNeed, PAGE_SIZE, PAGE_SIZE).unwrap();
    }
    assert_eq!((mmap[0], mmap[PAGE_SIZE]), (255, 0));
}

#[test]
fn is_supported() {
    assert!(Advice::Normal.is_supported());
    assert!(Advice::Random.is_supported());
    assert!(Advice::Sequential.is_supported());
    assert!(Advice::WillNeed.is_supported());
    assert!(UncheckedAdvice::DontNeed.is_supported());
    assert!(!Advice::HugePage.is_supported());
}

fn locked_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn lock() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 128);
    let mmap = map(&file);
    assert_eq!(locked_kib(), 0);
    for _ in 0..2 {
        mmap.lock().unwrap();
        assert!(locked_kib() > 0);
    }
    for _ in 0..2 {
        mmap.unlock().unwrap();
        assert_eq!(locked_kib(), 0);
    }
}

fn assert_grows(offset: u64) {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 2000 + offset);
    // SAFETY: the file is this test's alone.
    let mut mmap = unsafe { MmapOptions::new().offset(offset).len(128).map_mut(&file).unwrap() };
    assert_eq!(mmap.len(), 128);
    assert!(mmap.iter().all(|byte| *byte == 0));
    // SAFETY: nothing refers to the bytes.
    unsafe { mmap.remap(2000, RemapOptions::new().may_move(true)).unwrap() };
    assert_writable(&mut mmap, 2000);
    drop(mmap);
    let content = std::fs::read(dir.path().join("file")).unwrap();
    assert_eq!(content[usize::try_from(offset).unwrap()..], counting(2000)[..]);
}

#[test]
fn remap_grow() {
    assert_grows(0);
}

#[test]
fn remap_with_offset() {
    assert_grows(77);
}

#[test]
fn remap_shrink() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 20_000);
    let mut mmap = map_mut(&file);
    assert_eq!(mmap.len(), 20_000);
    // SAFETY: nothing refers to the bytes.
    unsafe { mmap.remap(400, RemapOptions::new()).unwrap() };
    assert_writable(&mut mmap, 400);
}

#[test]
fn remap_len_overflow() {
    let Some(dir) = begin() else { return };
    let file = create(&dir.path().join("file"), 1024);
    // SAFETY: the file is this test's alone.
    let mut mmap = unsafe { MmapOptions::new().len(1024).map(&file).unwrap() };
    // SAFETY: nothing refers to the bytes.
    let error = unsafe { mmap.remap(1 << 63, RemapOptions::new().may_move(true)).unwrap_err() };
    assert_eq!(error.to_string(), "memory map length overflows isize");
    assert_eq!(mmap.len(), 1024);
}
