//! A workload that survives lost pages: it reads and writes its region by system calls alone, which fail on a lost page
//! where a load would end the process.

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, anyhow, ensure};
use fmalloc_client::PAGE_SIZE;
use fmalloc_proto::num::to_u64;
use fmalloc_tests::pattern::{self, WORDS};
use fmalloc_tests::rng::Rng;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;

use crate::Outcome;
use crate::state::{Args, Memory, State};

/// What a page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// A pattern, or zeros for seed 0.
    Seed(u64),
    Lost,
}

/// `endure NAME SEED OPERATIONS`: writes a pattern to every page of a fresh region, reads all back, does so many
/// reads and writes at random, and reads all once more. A page that was lost once must stay lost; every other must be
/// as it was written. Gives how many pages are lost.
pub(crate) fn endure(state: &State, args: &mut Args<'_>) -> Outcome {
    let memory = state.memory(args.text()?)?;
    let (seed, operations): (u64, u64) = (args.number()?, args.number()?);
    let mut pages = Pages::new(&memory)?;
    for index in 0..memory.pages() {
        pages.write(index, seed)?;
    }
    pages.read_all().context("first pass")?;
    let mut rng = Rng::new(seed);
    for n in 0..operations {
        let index = rng.index(memory.pages());
        if rng.below(2) == 0 { pages.write(index, seed + n) } else { pages.read(index) }
            .with_context(|| format!("operation {n}"))?;
    }
    pages.read_all().context("last pass")?;
    let lost = pages.contents.iter().filter(|content| **content == Content::Lost).count();
    Ok(json!({ "pages": memory.pages(), "lost": lost }))
}

struct Pages<'a> {
    memory: &'a Memory,
    /// A page on the other side of the system calls.
    file: File,
    buffer: [u64; WORDS],
    contents: Vec<Content>,
}

impl<'a> Pages<'a> {
    fn new(memory: &'a Memory) -> anyhow::Result<Self> {
        let file = File::from(memfd_create(c"page", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(to_u64(PAGE_SIZE))?;
        let contents = vec![Content::Seed(0); memory.pages()];
        Ok(Self { memory, file, buffer: [0; WORDS], contents })
    }

    fn write(&mut self, index: usize, seed: u64) -> anyhow::Result<()> {
        pattern::write(seed, to_u64(index), &mut self.buffer);
        let (fd, at) = (self.file.as_raw_fd(), self.place(index));
        // SAFETY: a page of our own memory into the file.
        let got = unsafe { libc::pwrite(fd, self.buffer.as_ptr().cast(), PAGE_SIZE, 0) };
        ensure!(Errno::result(got)? == PAGE_SIZE as isize, "a short write of {got}");
        // SAFETY: a page of the region that nothing else uses.
        let got = unsafe { libc::pread(fd, at, PAGE_SIZE, 0) };
        self.note(index, got, Content::Seed(seed))
    }

    fn read(&mut self, index: usize) -> anyhow::Result<()> {
        let (fd, at) = (self.file.as_raw_fd(), self.place(index));
        // SAFETY: a page of the region into the file.
        let got = unsafe { libc::pwrite(fd, at, PAGE_SIZE, 0) };
        self.note(index, got, self.contents[index])?;
        let Content::Seed(seed) = self.contents[index] else { return Ok(()) };
        // SAFETY: the file has a page, and so has the buffer.
        let got = unsafe { libc::pread(fd, self.buffer.as_mut_ptr().cast(), PAGE_SIZE, 0) };
        ensure!(Errno::result(got)? == PAGE_SIZE as isize, "a short read of {got}");
        pattern::check(seed, to_u64(index), &self.buffer).map_err(|text| anyhow!(text))
    }

    fn read_all(&mut self) -> anyhow::Result<()> {
        (0..self.contents.len()).try_for_each(|index| self.read(index))
    }

    fn place(&self, index: usize) -> *mut libc::c_void {
        std::ptr::with_exposed_provenance_mut(self.memory.base() + index * PAGE_SIZE)
    }

    /// A call on a page gave `got`: the page holds `content` now, or it is lost.
    fn note(&mut self, index: usize, got: isize, content: Content) -> anyhow::Result<()> {
        match Errno::result(got) {
            Ok(count) => {
                ensure!(count == PAGE_SIZE as isize, "page {index}: {count} bytes only");
                ensure!(self.contents[index] != Content::Lost, "page {index} was lost and is back");
                self.contents[index] = content;
            }
            Err(Errno::EFAULT | Errno::EHWPOISON) => self.contents[index] = Content::Lost,
            Err(errno) => return Err(errno).with_context(|| format!("page {index}")),
        }
        Ok(())
    }
}
