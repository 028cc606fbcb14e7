//! Finds the input files and reads them into the text region, cutting it into runs on the way, while the bytes are
//! still at hand. Keeps no list of the files: it goes through them twice, once for their sizes.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};

/// Bytes read at once.
const BLOCK: usize = 1 << 20;

/// Where the lines come from.
pub(crate) struct Inputs {
    /// Files and directories.
    pub(crate) paths: Vec<PathBuf>,
    /// A file with further ones, each ended by a zero byte.
    pub(crate) list: Option<PathBuf>,
}

/// What the inputs need.
#[derive(Default)]
pub(crate) struct Room {
    /// Regular files.
    pub(crate) files: usize,
    /// Their bytes, and one for each that may lack its last newline.
    pub(crate) bytes: usize,
}

/// What was read.
pub(crate) struct Loaded {
    /// Bytes in the region.
    pub(crate) bytes: usize,
    /// Lines in it.
    pub(crate) lines: u64,
    /// Runs of whole lines, in order, without gaps.
    pub(crate) runs: Vec<Range<usize>>,
}

impl Inputs {
    /// Files and bytes there are.
    pub(crate) fn room(&self) -> Result<Room> {
        let mut room = Room::default();
        self.visit(&mut |_, len| {
            room.files += 1;
            room.bytes += usize::try_from(len)? + 1;
            Ok(())
        })?;
        Ok(room)
    }

    /// Calls `each` with every regular file and its size.
    fn visit(&self, each: &mut dyn FnMut(&Path, u64) -> Result<()>) -> Result<()> {
        for path in &self.paths {
            visit(path, true, each)?;
        }
        let Some(list) = &self.list else { return Ok(()) };
        let file = File::open(list).with_context(|| format!("cannot open {}", list.display()))?;
        for name in BufReader::new(file).split(0) {
            visit(Path::new(&std::ffi::OsString::from_vec(name?)), true, each)?;
        }
        Ok(())
    }
}

/// Directories are gone through in the order of names; links in them are left out, as are sockets and the like.
fn visit(path: &Path, named: bool, each: &mut dyn FnMut(&Path, u64) -> Result<()>) -> Result<()> {
    let context = || format!("cannot read {}", path.display());
    let metadata = if named { path.metadata() } else { path.symlink_metadata() }.with_context(context)?;
    if metadata.is_dir() {
        let entries = path.read_dir().with_context(context)?;
        let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
        names.sort_unstable();
        for name in names {
            visit(&path.join(name), false, each)?;
        }
    } else if metadata.is_file() {
        each(path, metadata.len())?;
    } else if named {
        bail!("{} is neither a file nor a directory", path.display());
    }
    Ok(())
}

/// Reads all inputs into `text`, each line with a newline at its end. A run has at most `run_len` bytes and `max_lines`
/// lines, or is a single longer line.
pub(crate) fn load(
    inputs: &Inputs,
    text: &mut [u8],
    run_len: usize,
    max_lines: usize,
    done: &AtomicU64,
) -> Result<Loaded> {
    let mut end = 0;
    let mut cutter = Cutter::new(run_len, max_lines);
    inputs.visit(&mut |path, len| {
        let context = || format!("cannot read {}", path.display());
        let start = end;
        let room = text.len().min(start + usize::try_from(len)?);
        let mut file = File::open(path).with_context(context)?;
        while end < room {
            let block = end..room.min(end + BLOCK);
            // The kernel writes straight into paged memory here.
            let count = match file.read(&mut text[block]) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).with_context(context),
            };
            cutter.feed(&text[end..end + count]);
            end += count;
            done.fetch_add(count as u64, Ordering::Relaxed);
        }
        if end > start && text[end - 1] != b'\n' {
            let Some(place) = text.get_mut(end) else {
                bail!("{} has changed while it was read", path.display())
            };
            *place = b'\n';
            cutter.feed(b"\n");
            end += 1;
        }
        Ok(())
    })?;
    let lines = cutter.lines;
    Ok(Loaded { bytes: end, lines, runs: cutter.finish() })
}

/// Cuts a stream of bytes into runs of whole lines.
struct Cutter {
    run_len: usize,
    max_lines: usize,
    /// Bytes seen.
    seen: usize,
    /// All lines ended so far.
    lines: u64,
    /// Start of the line that has not ended.
    line_start: usize,
    run_start: usize,
    run_lines: usize,
    runs: Vec<Range<usize>>,
}

impl Cutter {
    fn new(run_len: usize, max_lines: usize) -> Self {
        Self {
            run_len,
            max_lines,
            seen: 0,
            lines: 0,
            line_start: 0,
            run_start: 0,
            run_lines: 0,
            runs: Vec::new(),
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.seen += part.len();
            if part.last() == Some(&b'\n') {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let full = self.seen - self.run_start > self.run_len || self.run_lines == self.max_lines;
        if full && self.run_lines > 0 {
            self.end_run();
        }
        self.lines += 1;
        self.run_lines += 1;
        self.line_start = self.seen;
    }

    fn end_run(&mut self) {
        self.runs.push(self.run_start..self.line_start);
        self.run_start = self.line_start;
        self.run_lines = 0;
    }

    fn finish(mut self) -> Vec<Range<usize>> {
        if self.run_lines > 0 {
            self.end_run();
        }
        self.runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &[u8], run_len: usize, max_lines: usize, block: usize) -> Vec<&[u8]> {
        let mut cutter = Cutter::new(run_len, max_lines);
        text.chunks(block).for_each(|part| cutter.feed(part));
        cutter.finish().into_iter().map(|run| &text[run]).collect()
    }

    #[test]
    fn runs_hold_whole_lines_within_limits() {
        for block in 1..12 {
            assert_eq!(cut(b"aa\nb\nccc\n\n", 5, 9, block), [&b"aa\nb\n"[..], b"ccc\n\n"]);
            assert_eq!(cut(b"\n\n\n\n\n", 100, 2, block), [&b"\n\n"[..], b"\n\n", b"\n"]);
            assert_eq!(
                cut(b"a\nlonger than a run\nb\n", 5, 9, block),
                [&b"a\n"[..], b"longer than a run\n", b"b\n"]
            );
            assert!(cut(b"", 5, 9, block).is_empty());
        }
    }
}
