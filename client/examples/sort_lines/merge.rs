//! Merges the sorted runs into the output file. Each thread merges its own range of keys, reading every run from front
//! to back. As lines keep their bytes, the place of a range in the output is the sum of its places in the runs.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::run::{goes_on, key};

/// Bytes that a thread collects before it writes them.
const BUFFER: usize = 256 << 10;
/// Lines looked at in each run to find ranges of equal size.
const SAMPLES: usize = 16;
/// Bytes of a sample that matter.
const SAMPLE_LEN: usize = 256;
/// Key of a stream that has ended: above that of any line.
const ENDED: u64 = u64::MAX;

/// Writes the lines of all runs of `text` to `output` in order.
pub(crate) fn write_all(
    text: &[u8],
    runs: &[Range<usize>],
    threads: usize,
    output: &File,
    done: &AtomicU64,
) -> io::Result<()> {
    let mut rests: Vec<&[u8]> = runs.iter().map(|run| &text[run.clone()]).collect();
    let mut ranges: Vec<Vec<&[u8]>> = Vec::new();
    for bound in bounds(&rests, threads) {
        let (low, high) = rests.iter().map(|rest| rest.split_at(first_not_below(rest, &bound))).unzip();
        ranges.push(low);
        rests = high;
    }
    ranges.push(rests);
    thread::scope(|scope| {
        let mut offset = 0;
        let mut workers = Vec::new();
        for range in ranges {
            let writer = Writer { file: output, offset, buffer: Vec::with_capacity(BUFFER), done };
            offset += range.iter().map(|part| part.len() as u64).sum::<u64>();
            workers.push(scope.spawn(move || merge(range, writer)));
        }
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Lines, perhaps cut, that divide the runs into `parts` ranges of about the same size.
fn bounds(runs: &[&[u8]], parts: usize) -> Vec<Vec<u8>> {
    if parts < 2 {
        return Vec::new();
    }
    let mut samples: Vec<Vec<u8>> = Vec::new();
    for run in runs {
        for number in 0..SAMPLES {
            let line = line_around(run, run.len() * (2 * number + 1) / (2 * SAMPLES));
            samples.push(run[line.start..line.end.min(line.start + SAMPLE_LEN)].to_vec());
        }
    }
    samples.sort_unstable();
    let bounds = (1..parts).filter_map(|part| samples.get(samples.len() * part / parts).cloned());
    bounds.collect()
}

/// The line that the byte at `place` belongs to, without its newline.
fn line_around(run: &[u8], place: usize) -> Range<usize> {
    let start = run[..place].iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    start..place + newline(&run[place..])
}

/// Bytes of the line at the start of `rest`.
fn newline(rest: &[u8]) -> usize {
    rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len())
}

/// Where in a sorted run the lines begin that are not below `bound`.
fn first_not_below(run: &[u8], bound: &[u8]) -> usize {
    let (mut low, mut high) = (0, run.len());
    while low < high {
        let mut line = line_around(&run[low..high], (high - low) / 2);
        line = low + line.start..low + line.end;
        if &run[line.clone()] < bound { low = line.end + 1 } else { high = line.start }
    }
    low
}

/// A sorted run, seen at its first line that has not been written.
struct Stream<'a> {
    key: u64,
    /// Bytes of the line without its newline.
    line: usize,
    rest: &'a [u8],
}

impl<'a> Stream<'a> {
    fn new(rest: &'a [u8]) -> Self {
        let mut stream = Self { key: ENDED, line: 0, rest };
        stream.look();
        stream
    }

    fn look(&mut self) {
        if self.rest.is_empty() {
            self.key = ENDED;
        } else {
            self.line = newline(self.rest);
            self.key = key(&self.rest[..self.line]);
        }
    }

    /// The line with its newline; the stream goes on to the next.
    fn take(&mut self) -> &'a [u8] {
        let (line, rest) = self.rest.split_at(self.line + 1);
        self.rest = rest;
        self.look();
        line
    }

    fn is_before(&self, other: &Self) -> bool {
        self.key < other.key
            || (self.key == other.key
                && goes_on(self.key)
                && self.rest[..self.line] < other.rest[..other.line])
    }
}

/// A tree of losers: the root holds the stream with the lowest line, and when that has moved on, one comparison on
/// each level finds the next.
struct Tree<'a> {
    streams: Vec<Stream<'a>>,
    /// Node 0 is the winner; node n plays the winners of nodes 2n and 2n + 1 and holds the loser. The leaves, from
    /// `streams.len()` on, are the streams.
    nodes: Vec<usize>,
}

impl<'a> Tree<'a> {
    fn new(parts: Vec<&'a [u8]>) -> Self {
        let streams: Vec<_> = parts.into_iter().map(Stream::new).collect();
        let count = streams.len();
        let mut winners: Vec<usize> = (0..2 * count).map(|leaf| leaf.saturating_sub(count)).collect();
        let mut nodes = vec![0; count.max(1)];
        for node in (1..count).rev() {
            let (a, b) = (winners[2 * node], winners[2 * node + 1]);
            (winners[node], nodes[node]) = if streams[b].is_before(&streams[a]) { (b, a) } else { (a, b) };
        }
        nodes[0] = winners.get(1).copied().unwrap_or(0);
        Self { streams, nodes }
    }

    /// The lowest line there is, with its newline.
    fn next(&mut self) -> Option<&'a [u8]> {
        let mut winner = self.nodes[0];
        let stream = self.streams.get_mut(winner).filter(|stream| stream.key != ENDED)?;
        let line = stream.take();
        let mut node = (self.streams.len() + winner) / 2;
        while node > 0 {
            let loser = self.nodes[node];
            if self.streams[loser].is_before(&self.streams[winner]) {
                self.nodes[node] = winner;
                winner = loser;
            }
            node /= 2;
        }
        self.nodes[0] = winner;
        Some(line)
    }
}

fn merge(parts: Vec<&[u8]>, mut writer: Writer<'_>) -> io::Result<()> {
    let mut tree = Tree::new(parts);
    while let Some(line) = tree.next() {
        writer.write(line)?;
    }
    writer.flush()
}

/// Writes at a place of its own in the output.
struct Writer<'a> {
    file: &'a File,
    offset: u64,
    buffer: Vec<u8>,
    done: &'a AtomicU64,
}

impl Writer<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.buffer.len() + line.len() > BUFFER {
            self.flush()?;
        }
        if line.len() > BUFFER {
            // Straight from paged memory.
            return self.put(line);
        }
        self.buffer.extend_from_slice(line);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        self.put(&buffer)?;
        buffer.clear();
        self.buffer = buffer;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.offset)?;
        self.offset += bytes.len() as u64;
        self.done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(lines: &[Vec<u8>]) -> Vec<u8> {
        lines.iter().flat_map(|line| [&line[..], b"\n"].concat()).collect()
    }

    /// Lines of few letters, so that many are equal or begin alike.
    fn lines(count: usize, seed: u64) -> Vec<Vec<u8>> {
        let mut state = seed;
        let mut next = move |end: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % end
        };
        let mut line = || (0..next(20)).map(|_| if next(2) == 0 { b'a' } else { b'b' }).collect();
        (0..count).map(|_| line()).collect()
    }

    #[test]
    fn runs_merge_into_one_order_whatever_their_number() {
        let file = std::env::temp_dir().join(format!("fmalloc-merge-{}", std::process::id()));
        let output = File::create(&file).unwrap();
        for count in [0, 1, 2, 3, 7, 64] {
            for threads in [1, 2, 5] {
                let runs: Vec<Vec<Vec<u8>>> = (0..count).map(|n| lines(200 * (n % 4), n as u64)).collect();
                let (mut text, mut places) = (Vec::new(), Vec::new());
                for mut run in runs.clone() {
                    run.sort_unstable();
                    let start = text.len();
                    text.extend(join(&run));
                    places.push(start..text.len());
                }
                let mut expected = runs.concat();
                expected.sort_unstable();
                output.set_len(0).unwrap();
                let done = AtomicU64::new(0);
                write_all(&text, &places, threads, &output, &done).unwrap();
                assert_eq!(std::fs::read(&file).unwrap(), join(&expected), "{count} runs, {threads} threads");
                assert_eq!(done.into_inner(), text.len() as u64);
            }
        }
        std::fs::remove_file(&file).unwrap();
    }

    #[test]
    fn bound_splits_a_run_before_its_first_line_not_below() {
        let run = b"\na\na\nab\nb\n";
        for (bound, place) in [("", 0), ("\0", 1), ("a", 1), ("aa", 5), ("ab", 5), ("b", 8), ("c", 10)] {
            assert_eq!(first_not_below(run, bound.as_bytes()), place, "{bound:?}");
        }
        assert_eq!(first_not_below(b"", b"x"), 0);
    }
}
