//! A fault thread's work on the files behind regions: transfers, flushes, and what else a region over a file can be asked.

use std::collections::HashMap;
use std::sync::Arc;

use fmalloc_proto::PAGE;
use fmalloc_proto::limits::MAX_RUNS;
use fmalloc_proto::messages::{Changed, ErrorCode, Failure, FileMode, RegionRange};
use fmalloc_proto::num::to_usize;

use super::backing::{Backing, Claim, Writers, file_failure};
use super::handle::Answer;
use super::reactor::{Completion, Io, IoFailure};
use super::thread::FaultThread;
use crate::pager::files::{FileRead, FileTransfer};

/// A file for a region that is being registered.
pub(super) struct NewFile {
    pub(super) mode: FileMode,
    file: Arc<Backing>,
    len: u64,
    claim: Option<Arc<Claim>>,
}

/// A transfer of a file in flight; keeps the file open until it has ended.
struct Op {
    file: Arc<Backing>,
    /// First byte in the region.
    start: u64,
    /// Bytes that a write must transfer.
    len: u64,
}

/// Who waits for a flush.
struct Flushing {
    token: u64,
    file: Arc<Backing>,
    then: Then,
}

enum Then {
    Sync(Answer<Arc<Backing>>),
    Changed(u16, std::ops::Range<u64>, Answer<Changed>),
}

/// The files of one client.
pub(super) struct Files {
    writers: Arc<Writers>,
    of_region: HashMap<u16, NewFile>,
    ops: HashMap<u32, Op>,
    /// Writes that have ended without the reactor's help.
    ended: Vec<(u32, Result<(), i32>)>,
    flushes: Vec<Flushing>,
    loads: Vec<(u64, Answer<()>)>,
}

impl Files {
    pub(super) fn new(writers: Arc<Writers>) -> Self {
        Self {
            writers,
            of_region: HashMap::new(),
            ops: HashMap::new(),
            ended: Vec::new(),
            flushes: Vec::new(),
            loads: Vec::new(),
        }
    }

    /// Takes a file in for a region of `len` bytes, unless another writes to the same part of it.
    pub(super) fn admit(&self, file: Backing, mode: FileMode, len: u64) -> Result<NewFile, Failure> {
        let mut new = NewFile { mode, file: Arc::new(file), len, claim: None };
        if mode == FileMode::Shared {
            self.claim(&mut new)?;
        }
        Ok(new)
    }

    /// The file of a region once more, for one of `len` bytes that starts at the same place.
    pub(super) fn admit_like(&self, of: u16, len: u64) -> Result<NewFile, Failure> {
        let NewFile { mode, file, claim, .. } = self.of_region.get(&of).ok_or_else(no_file)?;
        if claim.as_ref().is_some_and(|claim| !claim.grow(len)) {
            return Err(busy());
        }
        Ok(NewFile { mode: *mode, file: Arc::clone(file), len, claim: claim.clone() })
    }

    fn claim(&self, new: &mut NewFile) -> Result<(), Failure> {
        let claim = self.writers.claim(&new.file, new.len).ok_or_else(busy)?;
        new.claim = Some(Arc::new(claim));
        Ok(())
    }

    pub(super) fn insert(&mut self, region: u16, file: NewFile) {
        self.of_region.insert(region, file);
    }

    pub(super) fn remove(&mut self, region: u16) {
        self.of_region.remove(&region);
    }

    pub(super) fn has_op(&self, op: u32) -> bool {
        self.ops.contains_key(&op)
    }

    /// Whether writes have ended of which the pager has not heard.
    pub(super) fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    fn file(&self, region: u16) -> Option<Arc<Backing>> {
        self.of_region.get(&region).map(|file| Arc::clone(&file.file))
    }
}

impl FaultThread {
    /// Starts to read pages from a file.
    pub(super) fn read_file(&mut self, transfer: FileTransfer) {
        let Some(file) = self.files.file(transfer.region) else {
            // Not to happen: a region is forgotten after its transfers.
            for n in 0..self.pager.op_pages(transfer.op).len() {
                self.pager.file_page_read(transfer.op, n, FileRead::Failed);
            }
            return self.pager.read_ended(transfer.op);
        };
        self.submit_file(file, transfer, u64::from(transfer.pages) * PAGE, true);
    }

    /// Starts to write pages to a file: whole ones as they are, of the last one no more than the file has. What the file
    /// does not have any more nobody can want.
    pub(super) fn write_file(&mut self, transfer: FileTransfer) {
        let Some(file) = self.files.file(transfer.region) else {
            return self.files.ended.push((transfer.op, Err(libc::ESTALE)));
        };
        let start = transfer.first * PAGE;
        let left = file.len().saturating_sub(start).min(u64::from(transfer.pages) * PAGE);
        let whole = left - left % PAGE;
        if left < u64::from(transfer.pages) * PAGE && left.div_ceil(PAGE) < u64::from(transfer.pages) {
            tracing::warn!(
                client = self.client,
                pid = self.pid,
                "a mapped file has become shorter: changes behind its end are dropped"
            );
        }
        if left > whole {
            let last = transfer.buffer + u16::try_from(whole / PAGE).unwrap_or(0);
            let bytes = &self.memory.page(last)[..to_usize(left - whole)];
            if let Err(errno) = file.write_end(bytes, start + whole) {
                return self.files.ended.push((transfer.op, Err(errno)));
            }
        }
        if whole == 0 {
            return self.files.ended.push((transfer.op, Ok(())));
        }
        self.submit_file(file, transfer, whole, false);
    }

    fn submit_file(&mut self, file: Arc<Backing>, transfer: FileTransfer, len: u64, is_read: bool) {
        let start = transfer.first * PAGE;
        let io = Io {
            token: u64::from(transfer.op) << 1 | u64::from(is_read),
            file: Some(file.fd()),
            is_read,
            offset: file.offset(start),
            memory: self.memory.buffer(transfer.buffer),
            len: u32::try_from(len).unwrap_or(u32::MAX),
        };
        self.files.ops.insert(transfer.op, Op { file, start, len });
        // SAFETY: the buffers are the transfer's until the pager hears that it ended, the memory lives as long as the
        // thread, which does not end while transfers are in flight, and the file is held by the entry just made.
        unsafe { self.reactor.submit(io) };
    }

    /// A transfer of a file has ended.
    pub(super) fn complete_file(&mut self, number: u32, completion: Completion) {
        let Some(op) = self.files.ops.remove(&number) else { return };
        let got = match completion.result {
            Ok(()) => op.len,
            Err(IoFailure::Short(got)) => got,
            Err(IoFailure::System(_)) => 0,
        };
        if completion.token & 1 == 0 {
            let result = completion.result.map_err(|failure| match failure {
                IoFailure::System(errno) => errno as i32,
                // A write that was cut short has met a full disk.
                IoFailure::Short(_) => libc::ENOSPC,
            });
            return self.end_file_write(number, result);
        }
        // Where the file ends, if it ends within what was asked for.
        let end = if completion.result.is_ok() { u64::MAX } else { op.file.len().saturating_sub(op.start) };
        for n in 0..self.pager.op_pages(number).len() {
            let first = PAGE * n as u64;
            let buffer = self.pager.op_buffer(number, n);
            let read = if first >= end {
                FileRead::Beyond
            } else if got < end.min(first + PAGE) {
                FileRead::Failed
            } else {
                if end < first + PAGE {
                    self.memory.page_mut(buffer)[to_usize(end - first)..].fill(0);
                }
                FileRead::Good(self.swap.key.hash(self.memory.page(buffer)))
            };
            self.pager.file_page_read(number, n, read);
        }
        self.pager.read_ended(number);
    }

    /// Tells the pager of writes that ended at once.
    pub(super) fn end_file_writes(&mut self) {
        for (op, result) in std::mem::take(&mut self.files.ended) {
            self.end_file_write(op, result);
        }
    }

    fn end_file_write(&mut self, op: u32, result: Result<(), i32>) {
        let region = self.pager.op_pages(op).first().map(|page| page.region());
        let known = region.and_then(|region| self.pager.file_of(region)).is_some_and(|f| f.failed.is_some());
        if let Err(errno) = result
            && !known
        {
            tracing::error!(
                client = self.client,
                pid = self.pid,
                region,
                "a mapped file cannot be written: {}",
                nix::errno::Errno::from_raw(errno).desc()
            );
        }
        self.pager.file_write_ended(op, result);
    }

    /// Has changes written. Nothing is asked of a region that leaves its file as it is.
    pub(super) fn flush(&mut self, range: &RegionRange, answer: Answer<Arc<Backing>>) {
        match self.file_part(range) {
            Ok((region, pages, file)) => {
                self.next_token += 1;
                let token = self.next_token;
                self.files.flushes.push(Flushing { token, file, then: Then::Sync(answer) });
                self.pager.flush(token, region, pages);
            }
            Err(failure) => drop(answer.send(Err(failure))),
        }
    }

    /// Finds out which pages differ from the file.
    pub(super) fn find_changed(&mut self, range: &RegionRange, answer: Answer<Changed>) {
        match self.file_part(range) {
            Ok((region, pages, file)) => {
                self.next_token += 1;
                let token = self.next_token;
                let then = Then::Changed(region, pages.clone(), answer);
                self.files.flushes.push(Flushing { token, file, then });
                self.pager.flush(token, region, pages);
            }
            Err(failure) => drop(answer.send(Err(failure))),
        }
    }

    /// Reads a part of a region in.
    pub(super) fn prefetch(&mut self, range: &RegionRange, answer: Answer<()>) {
        match self.part(range) {
            Ok((region, pages)) => {
                self.next_token += 1;
                self.files.loads.push((self.next_token, answer));
                self.pager.load(self.next_token, region, pages);
            }
            Err(failure) => drop(answer.send(Err(failure))),
        }
    }

    /// Lets a region change its file from now on.
    pub(super) fn make_writable(&mut self, region: u16) -> Result<(), Failure> {
        let Some(mut file) = self.files.of_region.remove(&region) else { return Err(no_file()) };
        let result = match file.mode {
            FileMode::ReadOnly if !file.file.is_writable() => Err(Failure {
                code: ErrorCode::Denied,
                text: "the file was open for reading only when it was mapped".to_owned(),
            }),
            FileMode::ReadOnly => self.files.claim(&mut file),
            FileMode::Shared | FileMode::Private => Ok(()),
        };
        if result.is_ok() && file.mode == FileMode::ReadOnly {
            file.mode = FileMode::Shared;
            self.pager.set_file(region, FileMode::Shared);
        }
        self.files.of_region.insert(region, file);
        result
    }

    fn file_part(&self, range: &RegionRange) -> Result<(u16, std::ops::Range<u64>, Arc<Backing>), Failure> {
        let (region, pages) = self.part(range)?;
        let file = self.files.file(region).ok_or_else(no_file)?;
        Ok((region, pages, file))
    }

    /// Answers who waits for a file.
    pub(super) fn answer_files(&mut self) {
        if !self.files.flushes.is_empty() {
            for (token, result) in self.pager.flushed() {
                let place = self.files.flushes.iter().position(|flushing| flushing.token == token);
                let Some(place) = place else { continue };
                let Flushing { file, then, .. } = self.files.flushes.swap_remove(place);
                match then {
                    Then::Sync(answer) => {
                        drop(answer.send(result.map(|()| file).map_err(file_failure)));
                    }
                    Then::Changed(region, pages, answer) => {
                        let changed = result.map_err(file_failure).map(|()| {
                            let (runs, next) = self.pager.changed(region, pages, MAX_RUNS);
                            Changed { runs, next }
                        });
                        drop(answer.send(changed));
                    }
                }
            }
        }
        if !self.files.loads.is_empty() {
            for token in self.pager.loaded() {
                if let Some(place) = self.files.loads.iter().position(|(other, _)| *other == token) {
                    let (_, answer) = self.files.loads.swap_remove(place);
                    drop(answer.send(Ok(())));
                }
            }
        }
    }
}

fn busy() -> Failure {
    let text = "another writable mapping has a part of this file already: two would undo each other's changes; drop the \
                other first, or map parts that do not overlap";
    Failure { code: ErrorCode::FileBusy, text: text.to_owned() }
}

fn no_file() -> Failure {
    Failure { code: ErrorCode::Invalid, text: "the region is not one over a file".to_owned() }
}
