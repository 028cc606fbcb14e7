//! Regions and where their pages are in the client's address space.
//!
//! A region is a table of pages; segments map stretches of it to addresses. There is one segment until the program
//! calls `mremap` or `munmap` on a part: then segments split and move, while pages keep their names.

use std::collections::BTreeMap;
use std::ops::Range;

use fmalloc_proto::PAGE;
use fmalloc_proto::messages::Advice;

use super::files::FileRegion;
use super::page::PageId;
use super::ranges::Ranges;
use super::table::Table;

/// A stretch of a region at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The region.
    pub region: u16,
    /// First page.
    pub first: u64,
    /// Pages.
    pub pages: u64,
    /// Address of the first page.
    pub addr: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.addr + self.pages * PAGE
    }
}

/// A registered region.
#[derive(Debug)]
pub struct Region {
    /// Shown by `fmallocctl`.
    pub label: String,
    /// Address and length at registration.
    pub addr: u64,
    /// Length in bytes at registration.
    pub len: u64,
    /// Its pages.
    pub table: Table,
    /// Indices in use; the table may have room for more.
    pub pages: u64,
    /// What is claimed in swap.
    pub committed: Ranges,
    /// Pages that have a frame.
    pub resident: u64,
    /// Pages whose only copy is in swap.
    pub swapped: u64,
    /// Pages that are lost.
    pub poisoned: u64,
    /// Pages that the agent is working on.
    pub at_agent: u32,
    /// A part of it was discarded by the program: a hot page may be absent, and is zeros then.
    pub removed: bool,
    /// Being unregistered.
    pub closing: bool,
    /// Its content is that of a file.
    pub file: Option<FileRegion>,
    /// Hints, later ones win.
    pub advice: Vec<(Range<u64>, Advice)>,
    segments: Vec<Segment>,
}

impl Region {
    /// The hint that holds for page `index`.
    #[must_use]
    pub fn advice_at(&self, index: u64) -> Advice {
        self.advice.iter().rev().find(|(range, _)| range.contains(&index)).map_or(Advice::Normal, |(_, a)| *a)
    }

    /// Where it is mapped.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The segment that page `index` is in.
    #[must_use]
    pub fn segment_of(&self, index: u64) -> Option<Segment> {
        let after = self.segments.partition_point(|segment| segment.first <= index);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        (index < segment.first + segment.pages).then_some(*segment)
    }
}

/// All regions of a client.
#[derive(Debug, Default)]
pub struct Regions {
    slots: Vec<Option<Region>>,
    count: usize,
    by_addr: BTreeMap<u64, Segment>,
}

impl Regions {
    /// The region with this number.
    #[must_use]
    #[inline]
    pub fn get(&self, region: u16) -> Option<&Region> {
        self.slots.get(usize::from(region))?.as_ref()
    }

    /// The same, to be changed.
    #[inline]
    pub fn get_mut(&mut self, region: u16) -> Option<&mut Region> {
        self.slots.get_mut(usize::from(region))?.as_mut()
    }

    /// The same regions under the same numbers, with tables that `table` makes, but for those that are being unregistered.
    /// Nothing is counted for their pages.
    pub fn fork(&self, mut table: impl FnMut(&Region) -> Option<Table>) -> Self {
        let mut fork = |region: &Region| {
            let table = table(region)?;
            Some(Region {
                label: region.label.clone(),
                table,
                committed: region.committed.clone(),
                advice: region.advice.clone(),
                segments: region.segments.clone(),
                resident: 0,
                swapped: 0,
                poisoned: 0,
                at_agent: 0,
                closing: false,
                ..*region
            })
        };
        // Files are not inherited.
        let open = |region: &&Region| !region.closing && region.file.is_none();
        let slots: Vec<_> =
            self.slots.iter().map(|region| region.as_ref().filter(open).and_then(&mut fork)).collect();
        let stays = |segment: &Segment| slots.get(usize::from(segment.region)).is_some_and(Option::is_some);
        let by_addr = self.by_addr.iter().filter(|(_, s)| stays(s)).map(|(addr, s)| (*addr, *s)).collect();
        let count = slots.iter().flatten().count();
        Self { slots, by_addr, count }
    }

    /// All, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &Region)> {
        (0..=u16::MAX).zip(&self.slots).filter_map(|(number, region)| Some((number, region.as_ref()?)))
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether any segment lies in the `len` bytes from `addr` on.
    #[must_use]
    pub fn overlaps(&self, addr: u64, len: u64) -> bool {
        self.by_addr.range(..addr + len).next_back().is_some_and(|(_, segment)| segment.end() > addr)
    }

    /// Adds a region of `table.pages()` pages at `addr` and gives its number. None if there are 65,536 already.
    pub fn add(&mut self, label: String, addr: u64, table: Table) -> Option<u16> {
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        let number = u16::try_from(free).ok()?;
        let pages = table.pages();
        let region = Region {
            label,
            addr,
            len: pages * PAGE,
            table,
            pages,
            committed: Ranges::default(),
            resident: 0,
            swapped: 0,
            poisoned: 0,
            at_agent: 0,
            removed: false,
            closing: false,
            file: None,
            advice: Vec::new(),
            segments: Vec::new(),
        };
        if free == self.slots.len() {
            self.slots.push(Some(region));
        } else {
            self.slots[free] = Some(region);
        }
        self.count += 1;
        self.by_addr.insert(addr, Segment { region: number, first: 0, pages, addr });
        self.rebuild(number);
        Some(number)
    }

    /// Takes a region out, its segments with it.
    pub fn take(&mut self, number: u16) -> Option<Region> {
        self.by_addr.retain(|_, segment| segment.region != number);
        let region = self.slots.get_mut(usize::from(number))?.take();
        self.count -= usize::from(region.is_some());
        region
    }

    /// The page at `addr`.
    #[must_use]
    #[inline]
    pub fn resolve(&self, addr: u64) -> Option<PageId> {
        let (_, segment) = self.by_addr.range(..=addr).next_back()?;
        (addr < segment.end())
            .then(|| PageId::new(segment.region, segment.first + (addr - segment.addr) / PAGE))
    }

    /// Where `page` is, and how many pages follow it there without a gap, itself included.
    #[must_use]
    #[inline]
    pub fn place(&self, page: PageId) -> Option<(u64, u64)> {
        let segment = self.get(page.region())?.segment_of(page.index())?;
        let into = page.index() - segment.first;
        Some((segment.addr + into * PAGE, segment.pages - into))
    }

    /// The pieces of segments within `len` bytes from `addr` on.
    #[must_use]
    pub fn pieces(&self, addr: u64, len: u64) -> Vec<Segment> {
        let end = addr + len;
        let before = self.by_addr.range(..addr).next_back().map(|(_, segment)| segment);
        before
            .into_iter()
            .chain(self.by_addr.range(addr..end).map(|(_, segment)| segment))
            .filter(|segment| segment.end() > addr)
            .map(|segment| {
                let (from, to) = (segment.addr.max(addr), segment.end().min(end));
                let first = segment.first + (from - segment.addr) / PAGE;
                Segment { first, pages: (to - from) / PAGE, addr: from, ..*segment }
            })
            .collect()
    }

    /// Takes the mapping of a range away; the pages there no longer have a place.
    pub fn unmap(&mut self, addr: u64, len: u64) {
        for piece in self.pieces(addr, len) {
            self.cut(piece);
            self.rebuild(piece.region);
        }
    }

    /// Moves what is mapped at `from` to `to`.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) {
        let pieces = self.pieces(from, len);
        for piece in &pieces {
            self.cut(*piece);
        }
        for piece in pieces {
            let addr = to + (piece.addr - from);
            self.by_addr.insert(addr, Segment { addr, ..piece });
            self.rebuild(piece.region);
        }
    }

    /// The segment below `addr`: the one that grew, if the page at `addr` belongs to none. Where a region has moved away
    /// and left its addresses behind (MREMAP_DONTUNMAP) there may be none below; then any.
    #[must_use]
    pub fn below(&self, addr: u64) -> Option<Segment> {
        let below = self.by_addr.range(..=addr).next_back();
        below.or_else(|| self.by_addr.first_key_value()).map(|(_, segment)| *segment)
    }

    /// Gives the page at `addr` the region's next index, in the segment that ends there if it is the region's last.
    /// The table must have room.
    pub fn append(&mut self, number: u16, addr: u64) -> Option<PageId> {
        let region = self.get_mut(number)?;
        let index = region.pages;
        region.pages += 1;
        // New indices are the highest: they belong at the end of the list.
        let segment = match region.segments.pop_if(|s| s.end() == addr && s.first + s.pages == index) {
            Some(segment) => Segment { pages: segment.pages + 1, ..segment },
            None => Segment { region: number, first: index, pages: 1, addr },
        };
        region.segments.push(segment);
        self.by_addr.insert(segment.addr, segment);
        Some(PageId::new(number, index))
    }

    /// Takes `piece` out of the segment that holds it, leaving what is before and behind.
    fn cut(&mut self, piece: Segment) {
        let Some((_, &whole)) = self.by_addr.range(..=piece.addr).next_back() else { return };
        self.by_addr.remove(&whole.addr);
        if piece.addr > whole.addr {
            self.by_addr.insert(whole.addr, Segment { pages: piece.first - whole.first, ..whole });
        }
        let (first, addr) = (piece.first + piece.pages, piece.end());
        if whole.end() > addr {
            let pages = whole.first + whole.pages - first;
            self.by_addr.insert(addr, Segment { first, pages, addr, ..whole });
        }
    }

    /// Brings a region's own list of segments up to date.
    fn rebuild(&mut self, number: u16) {
        let mut segments: Vec<Segment> =
            self.by_addr.values().filter(|s| s.region == number).copied().collect();
        segments.sort_by_key(|segment| segment.first);
        if let Some(region) = self.get_mut(number) {
            region.segments = segments;
        }
    }
}
