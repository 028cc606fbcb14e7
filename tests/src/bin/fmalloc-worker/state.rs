//! What commands work on: the pager, and regions by name.

use std::collections::HashMap;
use std::str::{FromStr, SplitWhitespace};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, anyhow};
use fmalloc_client::{PAGE_SIZE, Pager, Region};
use fmalloc_proto::num::to_usize;
use fmalloc_proto::size::Size;
use fmalloc_tests::pattern::WORDS;

use crate::kin::{Children, Versions};

/// Everything that outlives a command.
#[derive(Default)]
pub(crate) struct State {
    pager: Mutex<Option<Pager>>,
    memories: Mutex<HashMap<String, Arc<Memory>>>,
    pub(crate) children: Children,
    pub(crate) versions: Versions,
}

impl State {
    pub(crate) fn pager(&self) -> anyhow::Result<Pager> {
        self.pager.lock().unwrap().clone().context("not connected")
    }

    pub(crate) fn set_pager(&self, pager: Option<Pager>) {
        *self.pager.lock().unwrap() = pager;
    }

    pub(crate) fn add(&self, name: &str, region: Region) {
        self.memories.lock().unwrap().insert(name.to_owned(), Arc::new(Memory::new(region)));
    }

    pub(crate) fn memory(&self, name: &str) -> anyhow::Result<Arc<Memory>> {
        self.memories.lock().unwrap().get(name).cloned().with_context(|| format!("no region {name:?}"))
    }

    pub(crate) fn remove(&self, name: &str) -> anyhow::Result<Arc<Memory>> {
        self.memories.lock().unwrap().remove(name).with_context(|| format!("no region {name:?}"))
    }

    pub(crate) fn clear(&self) {
        self.memories.lock().unwrap().clear();
    }
}

/// A region, and where its memory is: `mremap` can have moved that.
pub(crate) struct Memory {
    pub(crate) region: Mutex<Region>,
    base: AtomicUsize,
    len: AtomicUsize,
    /// What a churned region must hold, in memory that is not paged.
    pub(crate) shadow: Mutex<Vec<u64>>,
}

impl Memory {
    fn new(region: Region) -> Self {
        let (base, len) = (region.as_ptr().expose_provenance(), region.len());
        let shadow = Mutex::new(Vec::new());
        Self { region: Mutex::new(region), base: base.into(), len: len.into(), shadow }
    }

    pub(crate) fn base(&self) -> usize {
        self.base.load(Ordering::Relaxed)
    }

    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    pub(crate) fn pages(&self) -> usize {
        self.len() / PAGE_SIZE
    }

    /// Notes what `mremap` did.
    pub(crate) fn set_place(&self, base: usize, len: usize) {
        self.base.store(base, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
    }

    /// The words of a page. Threads that use it at once must use different pages.
    #[allow(clippy::mut_from_ref, reason = "workloads divide the pages among their threads")]
    pub(crate) fn page(&self, index: usize) -> &mut [u64] {
        assert!(index < self.pages());
        page_at(self.base() + index * PAGE_SIZE)
    }
}

/// The words of the page at `addr`, memory of a region that is read and written through nothing else at the moment.
pub(crate) fn page_at<'a>(addr: usize) -> &'a mut [u64] {
    // SAFETY: whole words of mapped, initialised memory; workloads divide the pages among their threads. A test that
    // has unmapped them expects the fault.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(addr), WORDS) }
}

/// The words of a command.
pub(crate) struct Args<'a>(SplitWhitespace<'a>);

impl<'a> Args<'a> {
    pub(crate) fn new(line: &'a str) -> Self {
        Self(line.split_whitespace())
    }

    pub(crate) fn text(&mut self) -> anyhow::Result<&'a str> {
        self.0.next().context("a word is missing")
    }

    pub(crate) fn optional(&mut self) -> Option<&'a str> {
        self.0.next()
    }

    pub(crate) fn number<T: FromStr>(&mut self) -> anyhow::Result<T> {
        let text = self.text()?;
        text.parse().map_err(|_| anyhow!("{text:?} is not such a number"))
    }

    pub(crate) fn number_or<T: FromStr>(&mut self, default: T) -> anyhow::Result<T> {
        self.0.clone().next().map_or(Ok(default), |_| self.number())
    }

    pub(crate) fn size(&mut self) -> anyhow::Result<u64> {
        Ok(self.text()?.parse::<Size>()?.0)
    }

    pub(crate) fn bytes(&mut self) -> anyhow::Result<usize> {
        self.size().map(to_usize)
    }

    /// Offset and length; by default all of `memory`.
    pub(crate) fn part(&mut self, memory: &Memory) -> anyhow::Result<std::ops::Range<usize>> {
        if self.0.clone().next().is_none() {
            return Ok(0..memory.len());
        }
        let start = self.bytes()?;
        Ok(start..start + self.bytes()?)
    }

    pub(crate) fn rest(&mut self) -> String {
        self.0.by_ref().collect::<Vec<_>>().join(" ")
    }
}
