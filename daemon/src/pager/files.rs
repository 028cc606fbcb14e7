//! Regions over files: where their pages come from, and how changed ones get back.
//!
//! For a page of such a region `Zero` means that its content is in the file, of which nothing is known yet. The flag
//! `IN_FILE` says that the hash is that of bytes which the file has; without it a page that is present was changed. What
//! becomes of a changed page that is evicted depends on the region's mode: it is written back, or goes to the swap file as
//! any other, or is dropped. A page that is written back stays `pending` until the write has ended; it is not read from the
//! file before, and a newer content waits for the older one's write. Failed writes are tried again for as long as nothing
//! else has the bytes.
//!
//! A flush has the agent copy pages without taking them away (`Copying`): a store before the flush is in the copy, and one
//! beside it is or is not, as with `msync`.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use fmalloc_proto::messages::FileMode;
use fmalloc_proto::ring::{BatchKind, PageResult};

use super::evict::Content;
use super::page::{Buffer, FRESH, IN_FILE, PageId, RETRIED, STUCK, State, WANTED, Word};
use super::{Action, Pager, Store, WRITE_RETRY_MS};

/// Pages of one write.
const WRITE_MAX: usize = 64;

/// What a region's file is to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRegion {
    /// What becomes of changes.
    pub mode: FileMode,
    /// The error of the last write, until a flush finds that another one works.
    pub failed: Option<i32>,
}

/// Neighbouring pages of a region, to be read from its file or written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileTransfer {
    /// Names the operation.
    pub op: u32,
    /// The region.
    pub region: u16,
    /// Index of the first page.
    pub first: u64,
    /// First buffer.
    pub buffer: Buffer,
    /// Pages.
    pub pages: u32,
}

/// What came of reading a page of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileRead {
    /// It is in the buffer, and has this hash.
    Good(u64),
    /// The file ends before it.
    Beyond,
    /// It could not be read.
    Failed,
}

/// A page that is on its way to the file.
#[derive(Debug, Default, Clone, Copy)]
struct Pending {
    in_flight: bool,
    /// Waits to be written, after what is in flight.
    queued: Option<Buffer>,
}

/// A range of which all changes are to be written, or to be known.
#[derive(Debug)]
struct Flush {
    token: u64,
    region: u16,
    range: Range<u64>,
    /// From here on nothing was looked at.
    next: u64,
    /// Pages that were neither here nor there when they were looked at.
    later: Vec<PageId>,
    failed: Option<i32>,
}

/// A range that somebody waits for to be read in.
#[derive(Debug)]
struct Load {
    token: u64,
    region: u16,
    range: Range<u64>,
}

/// The part of a pager that is about files.
#[derive(Debug, Default)]
pub(super) struct Files {
    queue: VecDeque<(PageId, Buffer)>,
    pending: HashMap<PageId, Pending>,
    retry_at: u64,
    flushes: Vec<Flush>,
    flushed: Vec<(u64, Result<(), i32>)>,
    loads: Vec<Load>,
    loaded: Vec<u64>,
}

impl Files {
    fn is_queued(&self, page: PageId, buffer: Buffer) -> bool {
        self.pending.get(&page).is_some_and(|pending| pending.queued == Some(buffer))
    }

    fn is_in_flight(&self, page: PageId) -> bool {
        self.pending.get(&page).is_some_and(|pending| pending.in_flight)
    }

    /// Whether pages of a region are on their way to its file.
    pub(super) fn has_pending(&self, region: u16) -> bool {
        self.pending.keys().any(|page| page.region() == region)
    }

    /// When failed writes are to be tried again.
    pub(super) fn deadline(&self) -> Option<u64> {
        (!self.queue.is_empty() && self.retry_at > 0).then_some(self.retry_at)
    }
}

impl Flush {
    fn has(&self, page: PageId) -> bool {
        page.region() == self.region && self.range.contains(&page.index())
    }
}

impl<S: Store> Pager<S> {
    /// Makes a region that was just registered one over a file, or changes what becomes of its changes.
    pub fn set_file(&mut self, number: u16, mode: FileMode) {
        if let Some(region) = self.regions.get_mut(number) {
            region.file = Some(FileRegion { mode, failed: None });
        }
    }

    /// Whether a page belongs to a region over a file.
    #[must_use]
    pub fn has_file(&self, page: PageId) -> bool {
        self.file_of(page.region()).is_some()
    }

    /// What a region's file is to it, if it has one.
    #[must_use]
    pub fn file_of(&self, number: u16) -> Option<FileRegion> {
        self.regions.get(number)?.file
    }

    /// Whether pages wait for a file that could not be written lately.
    #[must_use]
    pub fn has_file_errors(&self) -> bool {
        !self.files.pending.is_empty()
            && self.regions.iter().any(|(_, region)| region.file.is_some_and(|file| file.failed.is_some()))
    }

    /// Whether anything is on its way to a file.
    #[must_use]
    pub fn has_file_writes(&self) -> bool {
        !self.files.pending.is_empty()
    }

    /// Starts to read a page that somebody waits for. False if no buffer is free or an older content of the page is still
    /// on its way to the file. The caller has reserved frame and table entry.
    pub(super) fn fetch_from_file(&mut self, page: PageId) -> bool {
        if self.files.pending.contains_key(&page) || self.fetch_file_run(page, 1, WANTED, false) == 0 {
            return false;
        }
        self.stats.faults_read += 1;
        self.read_ahead(page);
        true
    }

    /// Reads those of up to `want` pages that are not here; the first of them is held back if `hold` says so. Gives how
    /// many were looked at; fewer than asked where frames or buffers end.
    pub(super) fn window_file(&mut self, first: PageId, want: u64, mut hold: bool) -> u64 {
        let end = first.index() + want;
        let mut index = first.index();
        while index < end {
            let page = PageId::new(first.region(), index);
            let state = self.word(page).state();
            let packed = matches!(state, State::Warm | State::Filled);
            if !matches!(state, State::Zero | State::Cold) && (hold || !packed) {
                // A packed page costs nobody a wait: it is held back by being left alone.
                hold &= !packed;
                index += 1;
                continue;
            }
            let most = self.room_ahead(end - index);
            let fetched = match state {
                _ if most == 0 => 0,
                State::Zero => self.fetch_file_run(page, most, 0, hold),
                State::Cold => self.fetch_run(page, most, 0, hold),
                _ => self.unpack_run(page, most, 0),
            };
            if fetched == 0 {
                break;
            }
            self.stats.pages_readahead += fetched;
            index += fetched;
            hold = false;
        }
        index - first.index()
    }

    /// Reads as many of `want` neighbours as are in the file only, from `first` on. Gives how many.
    fn fetch_file_run(&mut self, first: PageId, want: u64, flags: u64, hold_first: bool) -> u64 {
        let mut count = 0;
        while count < want {
            let page = first.plus(count);
            let absent = self.word(page).state() == State::Zero && !self.files.pending.contains_key(&page);
            if !absent || !self.reserve(page) {
                break;
            }
            count += 1;
        }
        let Some((buffer, count)) = self.read_buffers.take(usize::try_from(count).unwrap_or(0)) else {
            return 0;
        };
        let op = self.new_op(0, buffer, hold_first);
        for n in 0..count {
            let page = first.plus(n as u64);
            let into = buffer + Buffer::try_from(n).unwrap_or(0);
            // Whoever waits for a frame for it does so without a mark if it was not described.
            let waits = if self.waiting.contains(&page) { WANTED } else { 0 };
            let word = self.word(page).with_state(State::Fetching).with_buffer(into);
            self.set(page, word.without(RETRIED | IN_FILE).with(flags | waits));
            self.ops[op as usize].pages.push(page);
        }
        let pages = u32::try_from(count).unwrap_or(0);
        let (region, first) = (first.region(), first.index());
        self.out.push_back(Action::ReadFile(FileTransfer { op, region, first, buffer, pages }));
        count as u64
    }

    /// Page `n` of read `op` has come, or not.
    pub fn file_page_read(&mut self, op: u32, n: usize, read: FileRead) {
        let super::fetch::Op { page, buffer, held, .. } = self.op_entry(op, n);
        let word = self.word(page);
        if word.state() != State::Fetching || word.buffer() != buffer {
            self.read_buffers.give(buffer); // discarded meanwhile
            return;
        }
        match read {
            FileRead::Good(hash) => {
                self.stats.file_pages_in += 1;
                self.set_hash(page, hash);
                self.arrived(page, word.with(IN_FILE), held);
            }
            FileRead::Failed if word.has(WANTED) && !word.has(RETRIED) => {
                self.stats.io_errors += 1;
                self.set(page, word.with(RETRIED));
                let again = self.new_op(0, buffer, false);
                self.ops[again as usize].pages.push(page);
                let (region, first) = (page.region(), page.index());
                self.out.push_back(Action::ReadFile(FileTransfer {
                    op: again,
                    region,
                    first,
                    buffer,
                    pages: 1,
                }));
            }
            FileRead::Failed | FileRead::Beyond => {
                self.stats.io_errors += u64::from(read == FileRead::Failed);
                self.read_buffers.give(buffer);
                self.set(page, word.with_state(State::Zero).without(RETRIED));
                // Whoever runs into it later may find that the file has grown, or can be read.
                if word.has(WANTED) {
                    self.lose(page);
                }
            }
        }
    }

    /// The content of a page is that of the file again: fetches it if somebody waits, else frees its frame.
    pub(super) fn settle_in_file(&mut self, page: PageId, word: Word) {
        let word = self.drop_slot(word);
        self.set(page, word.with_state(State::Zero).without(WANTED | IN_FILE | STUCK));
        if word.has(WANTED) {
            self.bring(page);
        }
    }

    /// What becomes of a page that the agent moved out of a region over a file; says whether the buffer is kept. None: the
    /// page has left its file and is evicted as any other.
    pub(super) fn evicted_of_file(
        &mut self,
        page: PageId,
        word: Word,
        mode: FileMode,
        content: Content,
        packed: Option<&[u8]>,
        buffer: Buffer,
    ) -> Option<bool> {
        if word.has(FRESH) {
            self.settle_in_file(page, word.without(FRESH));
            return Some(false);
        }
        let clean = word.has(IN_FILE) && self.slot_hash(page) == content.hash;
        if clean || mode == FileMode::ReadOnly {
            self.stats.pages_clean += 1;
            if word.has(WANTED) {
                self.map_from(page, word, buffer);
                return Some(true);
            }
            // Packed, it comes back sooner than from the file.
            if !(clean && self.admit(page, word, packed, true)) {
                self.settle_in_file(page, word);
            }
            return Some(false);
        }
        if mode == FileMode::Private {
            return None;
        }
        let word = self.drop_slot(word).without(IN_FILE);
        self.set_hash(page, content.hash);
        if word.has(WANTED) {
            self.map_from(page, word, buffer);
        } else {
            self.set(page, word.with_state(State::Writing).with_buffer(buffer));
            self.queue_write(page, buffer);
        }
        Some(true)
    }

    /// Whether an evicted page goes to its file, and not to where others go.
    pub(super) fn is_written_back(&self, page: PageId, word: Word, hash: u64) -> bool {
        let mode = self.file_of(page.region()).map(|file| file.mode);
        let clean = word.has(IN_FILE) && self.slot_hash(page) == hash;
        !clean && matches!(mode, Some(FileMode::Shared | FileMode::ReadOnly))
    }

    fn queue_write(&mut self, page: PageId, buffer: Buffer) {
        let pending = self.files.pending.entry(page).or_default();
        if let Some(older) = pending.queued.replace(buffer) {
            self.write_buffers.give(older);
        }
        self.files.queue.push_back((page, buffer));
    }

    /// Starts to write what waits for it, neighbours together.
    pub(super) fn write_files(&mut self) {
        if self.files.queue.is_empty() || self.now < self.files.retry_at {
            return;
        }
        self.files.retry_at = 0;
        let mut blocked = VecDeque::new();
        while let Some(&(page, buffer)) = self.files.queue.front() {
            if !self.files.is_queued(page, buffer) {
                self.files.queue.pop_front(); // a newer content has taken its place
                continue;
            }
            if self.files.is_in_flight(page) {
                blocked.extend(self.files.queue.pop_front());
                continue;
            }
            let follows = |(n, (next, into)): &(u16, &(PageId, Buffer))| {
                *next == page.plus((*n).into())
                    && *into == buffer + n
                    && self.files.is_queued(*next, *into)
                    && !self.files.is_in_flight(*next)
            };
            let count = (0..).zip(&self.files.queue).take(WRITE_MAX).take_while(follows).count();
            let op = self.new_op(0, buffer, false);
            for (page, _) in self.files.queue.drain(..count) {
                self.files.pending.insert(page, Pending { in_flight: true, queued: None });
                self.ops[op as usize].pages.push(page);
            }
            let pages = u32::try_from(count).unwrap_or(1);
            let (region, first) = (page.region(), page.index());
            self.out.push_back(Action::WriteFile(FileTransfer { op, region, first, buffer, pages }));
        }
        self.files.queue = blocked;
    }

    /// Write `op` has ended, with an errno if not all of it is in the file.
    pub fn file_write_ended(&mut self, op: u32, result: Result<(), i32>) {
        for n in 0..self.ops[op as usize].pages.len() {
            let super::fetch::Op { page, buffer, .. } = self.op_entry(op, n);
            let word = self.word(page);
            let queued = self.files.pending.get(&page).and_then(|pending| pending.queued);
            let alone = word.state() == State::Writing && word.buffer() == buffer;
            match (result, queued) {
                (_, Some(buffer)) => {
                    // Something newer follows, which counts.
                    self.files.pending.insert(page, Pending { in_flight: false, queued: Some(buffer) });
                }
                (Err(_), None) if self.is_worth_keeping(page, alone) => {
                    let pending = Pending { in_flight: false, queued: Some(buffer) };
                    self.files.pending.insert(page, pending);
                    self.files.queue.push_back((page, buffer));
                    continue;
                }
                (_, None) => {
                    self.files.pending.remove(&page);
                    if result.is_ok() && alone {
                        self.set(page, word.with_state(State::Zero).without(IN_FILE | STUCK));
                    } else if result.is_ok() && word.state().has_frame() && word.state() != State::Fetching {
                        self.set(page, word.with(IN_FILE));
                    }
                }
            }
            self.stats.file_pages_out += u64::from(result.is_ok());
            self.write_buffers.give(buffer);
        }
        if let Err(errno) = result {
            self.stats.io_errors += 1;
            self.files.retry_at = self.now + WRITE_RETRY_MS;
            self.file_failed(op, errno);
        }
        self.free_ops.push(op);
        self.end_flushes();
    }

    /// Whether the buffer of a failed write holds what nothing else has. A region that is given up waits for nothing.
    fn is_worth_keeping(&self, page: PageId, alone: bool) -> bool {
        let open = self.open_region(page.region()).is_some();
        // After a discard, too, what was on its way to the file shall get there.
        open && (alone || self.word(page).state() == State::Zero)
    }

    fn file_failed(&mut self, op: u32, errno: i32) {
        let Some(number) = self.ops[op as usize].pages.first().map(|page| page.region()) else { return };
        if let Some(file) = self.regions.get_mut(number).and_then(|region| region.file.as_mut()) {
            file.failed = Some(errno);
        }
        self.fail_flushes(number, errno);
    }

    fn fail_flushes(&mut self, number: u16, errno: i32) {
        for flush in self.files.flushes.iter_mut().filter(|flush| flush.region == number) {
            flush.failed.get_or_insert(errno);
            flush.next = flush.range.end;
            flush.later.clear();
        }
    }

    /// Has all changes of a range written that were made so far; of a private region, only found. See [`Pager::flushed`].
    pub fn flush(&mut self, token: u64, number: u16, range: Range<u64>) {
        // Whether it fails still is to be seen.
        self.files.retry_at = 0;
        if let Some(file) = self.regions.get_mut(number).and_then(|region| region.file.as_mut()) {
            file.failed = None;
        }
        let next = range.start;
        self.files.flushes.push(Flush {
            token,
            region: number,
            range,
            next,
            later: Vec::new(),
            failed: None,
        });
    }

    /// Flushes that have ended since the last call, with an errno if something could not be written.
    pub fn flushed(&mut self) -> Vec<(u64, Result<(), i32>)> {
        self.end_flushes();
        std::mem::take(&mut self.files.flushed)
    }

    /// Asks the agent for copies of what may have changed.
    pub(super) fn plan_copy(&mut self) -> bool {
        if self.files.flushes.is_empty() {
            return false;
        }
        let copying = self.batches.iter().filter(|batch| batch.kind == Some(BatchKind::Copy)).count();
        if copying > 0 && copying >= self.batches.len() / 2 {
            return false;
        }
        let Some(batch) = self.free_batch() else { return false };
        // Evictions need buffers too: leave them some.
        let coming = usize::try_from(self.evicting()).unwrap_or(usize::MAX);
        let room = self.write_buffers.free().saturating_sub(coming + self.write_buffers.len() / 4);
        let most = (self.sizes.ring.batch_pages() as usize).min(room);
        let mut pages = std::mem::take(&mut self.batches[batch].pages);
        pages.clear();
        let mut flushes = std::mem::take(&mut self.files.flushes);
        for flush in &mut flushes {
            for page in std::mem::take(&mut flush.later) {
                self.look_at(page, flush, most, &mut pages);
            }
            while pages.len() < most && flush.next < flush.range.end {
                let page = PageId::new(flush.region, flush.next);
                flush.next = self.next_present(page);
                self.look_at(page, flush, most, &mut pages);
            }
        }
        self.files.flushes = flushes;
        let any = !pages.is_empty();
        if any {
            self.ask(batch, BatchKind::Copy, pages);
        } else {
            self.batches[batch].pages = pages;
        }
        any
    }

    fn look_at(&mut self, page: PageId, flush: &mut Flush, most: usize, pages: &mut Vec<PageId>) {
        let word = self.word(page);
        let private = self.file_of(page.region()).is_some_and(|file| file.mode == FileMode::Private);
        match word.state() {
            State::Hot if private && !word.has(IN_FILE) => {}
            _ if self.regions.place(page).is_none() => {}
            State::Hot if pages.len() < most => {
                self.set(page, word.with_state(State::Copying));
                pages.push(page);
            }
            State::Hot | State::Evicting | State::Mapping | State::Probing | State::Copying => {
                flush.later.push(page);
            }
            _ => {}
        }
    }

    /// The agent has copied `page` to `buffer`. Says whether the buffer is kept.
    pub fn copied(&mut self, page: PageId, content: Content, buffer: Buffer) -> bool {
        let Some(word) = self.end_copying(page) else { return false };
        let mode = self.file_of(page.region()).map(|file| file.mode);
        if word.has(IN_FILE) && self.slot_hash(page) == content.hash {
            return false;
        }
        let word = self.word(page).without(IN_FILE);
        if mode != Some(FileMode::Shared) {
            self.set(page, word);
            return false;
        }
        let word = self.drop_slot(word);
        self.set(page, word);
        self.set_hash(page, content.hash);
        self.queue_write(page, buffer);
        true
    }

    /// The agent could not copy `page`, for the reason given.
    pub fn not_copied(&mut self, page: PageId, result: PageResult) {
        if self.end_copying(page).is_none() {
            return;
        }
        match result {
            PageResult::Absent => self.suspect(page),
            PageResult::Busy => {
                for flush in self.files.flushes.iter_mut().filter(|flush| flush.has(page)) {
                    let seen = page.index() < flush.next && flush.failed.is_none();
                    if seen && !flush.later.contains(&page) {
                        flush.later.push(page);
                    }
                }
            }
            _ => self.fail_flushes(page.region(), libc::EOPNOTSUPP),
        }
    }

    /// A page is just hot again; gives its word as it was.
    fn end_copying(&mut self, page: PageId) -> Option<Word> {
        self.leave_agent(page);
        let word = self.word(page);
        if word.state() != State::Copying {
            return None; // unmapped meanwhile
        }
        self.back_to_hot(page, word);
        self.enqueue(page);
        if word.has(FRESH) {
            self.suspect(page);
        }
        Some(word)
    }

    /// Ends the flushes that have nothing to wait for.
    fn end_flushes(&mut self) {
        let mut flushes = std::mem::take(&mut self.files.flushes);
        flushes.retain(|flush| {
            let at_agent = self
                .batches
                .iter()
                .filter(|batch| batch.kind == Some(BatchKind::Copy))
                .any(|batch| batch.pages.iter().any(|page| flush.has(*page)));
            let unseen = flush.next < flush.range.end || !flush.later.is_empty();
            let unwritten = flush.failed.is_none() && self.files.pending.keys().any(|page| flush.has(*page));
            let goes_on = at_agent || unseen || unwritten;
            if !goes_on {
                self.files.flushed.push((flush.token, flush.failed.map_or(Ok(()), Err)));
            }
            goes_on
        });
        self.files.flushes = flushes;
    }

    /// Runs of pages from `range` that differ from the file as far as is known, at most `most`, and where to go on.
    #[must_use]
    pub fn changed(&self, number: u16, range: Range<u64>, most: usize) -> (Vec<(u64, u64)>, Option<u64>) {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut index = range.start;
        while index < range.end {
            let page = PageId::new(number, index);
            let word = self.word(page);
            let in_file = match word.state() {
                State::Zero | State::Poisoned => true,
                State::Fetching | State::Held => word.slot().is_none(),
                _ => word.has(IN_FILE),
            };
            let full = runs.len() >= most;
            match runs.last_mut() {
                _ if in_file => {}
                Some((first, pages)) if *first + *pages == index => *pages += 1,
                _ if full => return (runs, Some(index)),
                _ => runs.push((index, 1)),
            }
            index = self.next_present(page);
        }
        (runs, None)
    }

    /// Reads a range in as far as frames allow; see [`Pager::loaded`].
    pub fn load(&mut self, token: u64, number: u16, range: Range<u64>) {
        self.will_need(number, range.clone());
        self.files.loads.push(Load { token, region: number, range });
    }

    /// Loads that have ended since the last call.
    pub fn loaded(&mut self) -> Vec<u64> {
        let mut loads = std::mem::take(&mut self.files.loads);
        loads.retain(|load| {
            let inside = |page: &PageId| page.region() == load.region && load.range.contains(&page.index());
            let asked = self.willneed.iter().any(|(region, range)| {
                *region == load.region && range.start < load.range.end && load.range.start < range.end
            });
            let is_free = |op: usize| u32::try_from(op).is_ok_and(|op| self.free_ops.contains(&op));
            let reading = || {
                let ops = self.ops.iter().enumerate().filter(|(number, _)| !is_free(*number));
                ops.flat_map(|(_, op)| &op.pages)
                    .any(|page| inside(page) && self.word(*page).state() == State::Fetching)
            };
            let goes_on = asked || reading() || self.map_queue.iter().any(inside);
            if !goes_on {
                self.files.loaded.push(load.token);
            }
            goes_on
        });
        self.files.loads = loads;
        std::mem::take(&mut self.files.loaded)
    }

    /// A region is being unregistered: what is on its way to the file gets there, and nobody waits any more.
    pub(super) fn close_file(&mut self, number: u16) {
        self.files.retry_at = 0;
        self.fail_flushes(number, libc::ESTALE);
    }
}
