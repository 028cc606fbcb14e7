//! A disk that stops at its n-th step: what was not synced by then is there or not, in part or whole.

use super::*;

/// Steps of a journalled flush in these tests at most.
const STEPS: usize = 200;
const INODE: u64 = 77;

/// The smallest part of a write that is there or not.
const SECTOR: usize = 512;

#[derive(Debug, Clone, Default)]
struct FailingDisk {
    /// What is on the disk, and what readers see.
    stable: [Vec<u8>; 2],
    seen: [Vec<u8>; 2],
    /// Writes that were not synced.
    open: [Vec<(usize, Vec<u8>)>; 2],
    /// The journal was cut and not synced.
    cut: bool,
    /// Steps that still work.
    left: usize,
    /// The one that does not stops the machine, or is only refused.
    refuses: bool,
}

fn put(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if file.len() < offset + bytes.len() {
        file.resize(offset + bytes.len(), 0);
    }
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl FailingDisk {
    fn new(file: &[u8], left: usize) -> Self {
        let mut disk = Self { left, ..Self::default() };
        (disk.stable[0], disk.seen[0]) = (file.to_vec(), file.to_vec());
        disk
    }

    fn step(&mut self) -> io::Result<()> {
        if self.left == 0 {
            if self.refuses {
                self.left = STEPS;
            }
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.left -= 1;
        Ok(())
    }

    /// The power comes back: sectors of open writes are there or not, as `coin` says.
    fn restart(mut self, mut coin: impl FnMut() -> bool) -> Self {
        if self.cut && coin() {
            self.stable[1].clear();
        }
        for which in 0..2 {
            for (offset, bytes) in std::mem::take(&mut self.open[which]) {
                for (n, sector) in bytes.chunks(SECTOR).enumerate() {
                    if coin() {
                        put(&mut self.stable[which], offset + n * SECTOR, sector);
                    }
                }
            }
        }
        self.seen = self.stable.clone();
        Self { left: STEPS, cut: false, ..self }
    }
}

impl Disk for FailingDisk {
    fn len(&self, which: Which) -> io::Result<u64> {
        Ok(to_u64(self.seen[which as usize].len()))
    }

    fn read(&self, which: Which, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let offset = to_usize(offset);
        let found = self.seen[which as usize].get(offset..offset + bytes.len());
        bytes.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write(&mut self, which: Which, bytes: &[u8], offset: u64) -> io::Result<()> {
        // Of the write that fails a part gets through.
        let failed = self.step();
        let bytes = if failed.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        put(&mut self.seen[which as usize], to_usize(offset), bytes);
        self.open[which as usize].push((to_usize(offset), bytes.to_vec()));
        failed
    }

    fn reserve(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        self.step()
    }

    fn sync(&mut self, which: Which) -> io::Result<()> {
        self.step()?;
        self.stable[which as usize].clone_from(&self.seen[which as usize]);
        self.open[which as usize].clear();
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        self.step()?;
        self.seen[1].clear();
        self.cut = true;
        self.sync(Which::Journal)?;
        self.cut = false;
        Ok(())
    }

    fn inode(&self) -> u64 {
        INODE
    }
}

/// A file of nine and a half pages, and what a mapping of it holds after some changes; with the runs of changed pages.
fn contents() -> (Vec<u8>, Vec<u8>, Vec<Range<usize>>) {
    let old: Vec<u8> = (0..9 * PAGE_SIZE + 2000).map(|n| u8::try_from(n / 512 % 251).unwrap()).collect();
    let mut new = old.clone();
    new.resize(10 * PAGE_SIZE, 0);
    let runs = vec![PAGE_SIZE..3 * PAGE_SIZE, 5 * PAGE_SIZE..6 * PAGE_SIZE, 9 * PAGE_SIZE..10 * PAGE_SIZE];
    for run in &runs {
        new[run.start + 7..run.end].iter_mut().for_each(|byte| *byte ^= 0xff);
    }
    (old, new, runs)
}

fn flush(book: &mut Book, disk: &mut FailingDisk, new: &[u8], runs: &[Range<usize>]) -> io::Result<()> {
    book.flush(disk, 0, runs, |page| &new[page..page + PAGE_SIZE])
}

/// The same bits again for each seed.
fn coins(seed: u64) -> impl FnMut() -> bool {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 40 & 1 == 1
    }
}

#[test]
fn a_flush_that_ends_has_changed_the_file_and_nothing_else() {
    let (old, new, runs) = contents();
    let mut disk = FailingDisk::new(&old, STEPS);
    flush(&mut Book::default(), &mut disk, &new, &runs).unwrap();
    assert_eq!(disk.stable[0], new[..old.len()], "and the file is no longer than before");
    assert!(disk.stable[1].is_empty());
}

#[test]
fn power_cut_at_any_step_shows_the_old_content_or_the_new_and_nothing_between() {
    let (old, new, runs) = contents();
    let whole = &new[..old.len()];
    let (mut olds, mut news) = (0, 0);
    for stop in 0.. {
        let mut ended = false;
        for seed in 0..200 {
            let mut disk = FailingDisk::new(&old, stop);
            ended = flush(&mut Book::default(), &mut disk, &new, &runs).is_ok();
            let mut coin = coins(seed * 1000 + to_u64(stop));
            let mut after = match seed {
                0 => disk.restart(|| false),
                1 => disk.restart(|| true),
                _ => disk.restart(&mut coin),
            };
            recover(&mut after).unwrap();
            let is_new = after.stable[0] == whole;
            assert!(is_new || (after.stable[0] == old && !ended), "stopped at step {stop}, seed {seed}");
            assert!(after.stable[1].is_empty());
            (olds, news) = (olds + u32::from(!is_new), news + u32::from(is_new));
        }
        if ended {
            assert!(stop > 8 && olds > 0 && news > 0, "{stop} steps, {olds} old, {news} new");
            return;
        }
    }
}

#[test]
fn power_cut_while_a_journal_is_replayed_leaves_it_to_be_replayed_again() {
    let (old, new, runs) = contents();
    // Stops when the journal is complete and the file not.
    let steps = (0..STEPS)
        .find(|stop| {
            let mut disk = FailingDisk::new(&old, *stop);
            let mut book = Book::default();
            flush(&mut book, &mut disk, &new, &runs).is_err() && book.unfinished
        })
        .unwrap();
    for stop in 0..20 {
        for seed in 0..50 {
            let mut disk = FailingDisk::new(&old, steps);
            flush(&mut Book::default(), &mut disk, &new, &runs).unwrap_err();
            let mut again = disk.restart(coins(seed));
            again.left = stop;
            let _ = recover(&mut again);
            let mut last = again.restart(coins(seed + 1));
            recover(&mut last).unwrap();
            assert_eq!(last.stable[0], new[..old.len()], "stopped at step {stop}, seed {seed}");
        }
    }
}

#[test]
fn a_refused_step_leaves_old_or_new_and_the_next_flush_completes_it() {
    let (old, new, runs) = contents();
    for stop in 0.. {
        let mut disk = FailingDisk { refuses: true, ..FailingDisk::new(&old, stop) };
        let mut book = Book::default();
        let first = flush(&mut book, &mut disk, &new, &runs);
        if first.is_ok() && disk.left < STEPS - 20 {
            return;
        }
        flush(&mut book, &mut disk, &new, &runs).unwrap();
        assert_eq!(disk.stable[0], new[..old.len()], "refused at step {stop}");
        assert!(disk.stable[1].is_empty());
    }
}

#[test]
fn pages_that_are_as_they_were_flushed_are_not_written_again() {
    let (old, mut new, runs) = contents();
    let mut disk = FailingDisk::new(&old, STEPS);
    let mut book = Book::default();
    flush(&mut book, &mut disk, &new, &runs).unwrap();
    disk.left = 0;
    flush(&mut book, &mut disk, &new, &runs).unwrap();
    disk.left = STEPS;
    new[PAGE_SIZE] ^= 1;
    flush(&mut book, &mut disk, &new, &runs).unwrap();
    assert_eq!(disk.stable[0], new[..old.len()]);
}

#[test]
fn a_journal_of_another_file_is_not_replayed() {
    let (old, new, runs) = contents();
    let mut disk = FailingDisk::new(&old, STEPS);
    flush(&mut Book::default(), &mut disk, &new, &runs).unwrap();
    let mut forged = FailingDisk::new(&old, STEPS);
    let mut hasher = HighwayHasher::new(KEY);
    for number in [INODE + 1, 0] {
        hasher.append(&number.to_le_bytes());
    }
    let words = [MAGIC, INODE + 1, 0, hasher.finalize64()];
    let header: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(&mut forged.seen[1], 0, &header);
    forged.seen[1].resize(PAGE_SIZE, 0);
    assert_eq!(recover(&mut forged).unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert_eq!(forged.seen[0], old);
}
