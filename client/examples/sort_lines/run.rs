//! Sorts runs: parts of the text that fit into the budget together with an index and a copy. Threads take one run at a
//! time; each has an index and a scratch region of its own.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use fmalloc_client::{Pager, Region};

/// A line in the index: its key, and its place in the run as `start << 32 | length without newline`.
type Entry = [u64; 2];

/// Bytes of a line that are compared by key before whole tails are compared.
const DEEP: usize = 8 * STEP;
/// Bytes of a line in a key.
const STEP: usize = 7;

/// Lines that the index of a run may have: as many bytes as the run itself.
pub(crate) fn max_lines(run_len: usize) -> usize {
    run_len / size_of::<Entry>()
}

/// The first seven bytes of `tail` and its length up to eight, so that comparing keys as numbers compares tails:
/// equal keys that end in less than eight are equal tails, others differ after seven bytes if at all.
pub(crate) fn key(tail: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let head = tail.len().min(STEP);
    bytes[..head].copy_from_slice(&tail[..head]);
    bytes[STEP] = u8::try_from(tail.len()).map_or(8, |len| len.min(8));
    u64::from_be_bytes(bytes)
}

/// Whether lines with this key go on behind it.
pub(crate) fn goes_on(key: u64) -> bool {
    key & 0xff == 8
}

/// Sorts every run of `text` in place.
pub(crate) fn sort_all(
    pager: &Pager,
    text: &mut [u8],
    runs: &[Range<usize>],
    run_len: usize,
    threads: usize,
    done: &AtomicU64,
) -> Result<()> {
    let queue = Mutex::new(split(text, runs).into_iter());
    let take = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        let region = |label| {
            Region::labelled(pager, run_len, label)
                .with_context(|| format!("cannot get memory for the {label}"))
        };
        let (mut index, mut scratch) = (region("index")?, region("scratch")?);
        while let Some(run) = take() {
            let lines = sort(run, index.as_mut_slice_of::<Entry>(), &mut scratch);
            // Their content is of no use any more: without this it would be written out.
            if lines > 1 {
                index.discard(pages(lines * size_of::<Entry>()))?;
                scratch.discard(pages(run.len()))?;
            }
            done.fetch_add(run.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(runs.len())).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// The whole pages that hold the first `len` bytes.
fn pages(len: usize) -> Range<usize> {
    0..len.next_multiple_of(fmalloc_proto::PAGE_SIZE)
}

fn split<'a>(mut text: &'a mut [u8], runs: &[Range<usize>]) -> Vec<&'a mut [u8]> {
    runs.iter()
        .map(|run| {
            let (head, tail) = std::mem::take(&mut text).split_at_mut(run.len());
            text = tail;
            head
        })
        .collect()
}

/// Sorts the lines of one run in place and gives their number. A run of one line may be longer than `scratch`.
fn sort(run: &mut [u8], index: &mut [Entry], scratch: &mut [u8]) -> usize {
    let mut lines = 0;
    let mut start = 0;
    for line in run.split_inclusive(|byte| *byte == b'\n') {
        let body = &line[..line.len() - 1];
        index[lines] = [key(body), (start as u64) << 32 | body.len() as u64];
        start += line.len();
        lines += 1;
    }
    if lines < 2 {
        return lines;
    }
    let index = &mut index[..lines];
    sort_from(0, index, run);
    let mut end = 0;
    for entry in index {
        let line = place(entry);
        let target = end..end + line.len() + 1;
        end = target.end;
        scratch[target].copy_from_slice(&run[line.start..line.end + 1]);
    }
    run.copy_from_slice(&scratch[..end]);
    lines
}

/// Sorts lines whose first `depth` bytes are equal and whose keys are those of what follows.
fn sort_from(depth: usize, lines: &mut [Entry], run: &[u8]) {
    lines.sort_unstable_by_key(|entry| entry[0]);
    let depth = depth + STEP;
    for group in lines.chunk_by_mut(|a, b| a[0] == b[0]) {
        if group.len() == 1 || !goes_on(group[0][0]) {
            continue;
        }
        let tail = |entry: &Entry| {
            let line = place(entry);
            &run[line.start + depth..line.end]
        };
        if depth < DEEP {
            group.iter_mut().for_each(|entry| entry[0] = key(tail(entry)));
            sort_from(depth, group, run);
        } else {
            group.sort_unstable_by(|a, b| tail(a).cmp(tail(b)));
        }
    }
}

/// Where a line is in its run, without its newline.
#[allow(clippy::cast_possible_truncation, reason = "both halves are offsets within a run")]
fn place(entry: &Entry) -> Range<usize> {
    let start = (entry[1] >> 32) as usize;
    start..start + entry[1] as u32 as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(lines: &[&[u8]]) {
        let mut run: Vec<u8> = lines.iter().flat_map(|line| [line, &b"\n"[..]].concat()).collect();
        let mut expected = lines.to_vec();
        expected.sort_unstable();
        let mut scratch = vec![0; run.len()];
        assert_eq!(sort(&mut run, &mut vec![[0; 2]; lines.len()], &mut scratch), lines.len());
        let sorted: Vec<&[u8]> =
            run.strip_suffix(b"\n").unwrap_or(&run).split(|byte| *byte == b'\n').collect();
        assert_eq!(sorted, expected);
    }

    #[test]
    fn keys_order_like_tails() {
        let tails: [&[u8]; 9] =
            [b"", b"\0", b"\0\0", b"a", b"a\0", b"aaaaaaa", b"aaaaaaaa", b"ab", b"\xff\xff"];
        for (low, high) in tails.iter().zip(&tails[1..]) {
            assert!(key(low) < key(high), "{low:?} {high:?}");
        }
        assert!(goes_on(key(b"12345678")) && !goes_on(key(b"1234567")));
    }

    #[test]
    fn lines_sort_by_bytes() {
        check(&[b"b", b"a", b"", b"\xff", b"\0", b"a\0", b"ab", b"", b"a"]);
        check(&[b"only"]);
        let long = vec![b'x'; 3 * DEEP];
        let tails: Vec<Vec<u8>> = (0..=255)
            .rev()
            .filter(|byte| *byte != b'\n')
            .flat_map(|byte| {
                let long = &long;
                [0, 6, 7, 8, 14, DEEP - 1, DEEP, DEEP + 1, 3 * DEEP]
                    .into_iter()
                    .flat_map(move |len| [long[..len].to_vec(), [&long[..len], &[byte]].concat()])
            })
            .collect();
        check(&tails.iter().map(Vec::as_slice).collect::<Vec<_>>());
    }
}
