//! The graph for BFS: made once by the conductor, in memory of its own, and kept in a file that every child loads into the
//! memory under test. R-MAT with the parameters of Graph500, in compressed rows; an edge is a weight and a target, of
//! which five bytes of sixteen are not zero: half-compressible, as the other data.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fmalloc_proto::num::{to_u64, to_usize};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::undo::{Change, Step, Undo};
use crate::rng::Rng;

/// Bytes of memory for each vertex, roughly: 15 to 31 edges.
const BYTES_PER_VERTEX: u64 = 256;
/// 32768ths of the edges in the first, the first two, and the first three quadrants: 57, 76 and 95 percent.
const QUADRANTS: [u64; 3] = [18678, 24904, 31130];
/// Bits for one step into a quadrant.
const BITS: u32 = 15;
/// The level of what was not reached.
pub(crate) const UNREACHED: u32 = u32::MAX;

/// What a child needs to know of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Graph {
    /// Row offsets, then edges, as words.
    pub(crate) file: PathBuf,
    /// Vertices, a power of two.
    pub(crate) vertices: usize,
    /// Edges.
    pub(crate) edges: usize,
    /// Where the search starts: the vertex with the most edges.
    pub(crate) root: u32,
    /// Edges that a search follows.
    pub(crate) followed: usize,
    /// [`edge_sum`] of these.
    pub(crate) edge_sum: u64,
    /// [`level_sum`] of all vertices.
    pub(crate) level_sum: u64,
}

/// Makes a graph that, with a level and a place in the queue for each vertex, fills so many bytes.
///
/// # Errors
/// What the file system says.
pub(crate) fn make(undo: &Undo, dir: &Path, bytes: u64) -> Result<(Graph, Change)> {
    let scale = (bytes / BYTES_PER_VERTEX).ilog2();
    ensure!((2..32).contains(&scale), "no graph fits {bytes} bytes");
    let vertices = 1_usize << scale;
    // Two words an edge; an offset, and half a word each for level and queue, a vertex.
    let edges = (to_usize(bytes) / 8 - (vertices + 1) - vertices) / 2;
    let pairs: Vec<(u32, u32)> = (0..to_u64(edges)).into_par_iter().map(|n| edge(n, scale)).collect();
    let (offsets, targets) = rows(vertices, &pairs);
    drop(pairs);

    let file = dir.join(format!("fmalloc-bench-{}.graph", std::process::id()));
    let write = || write(&file, &offsets, &targets).context("writing the graph");
    let ((), change) = undo.change(Step::RemoveFile(file.clone()), write)?;
    let degree = |v: u32| offsets[to_usize(u64::from(v)) + 1] - offsets[to_usize(u64::from(v))];
    let root = (0..u32::try_from(vertices)?).max_by_key(|v| degree(*v)).unwrap_or(0);
    let mut graph = Graph { file, vertices, edges, root, followed: 0, edge_sum: 0, level_sum: 0 };
    search(&mut graph, &offsets, &targets);
    Ok((graph, change))
}

/// What a search adds up over the edges that it follows.
pub(crate) fn edge_sum(weight: u64, target: u64) -> u64 {
    weight ^ target.rotate_left(20)
}

/// What is added up over all vertices.
pub(crate) fn level_sum(vertex: usize, level: u32) -> u64 {
    Rng::new(to_u64(vertex) << 32 ^ u64::from(level)).word()
}

/// From 1 to just below 2 in sixteenths, as the bits of a double.
fn weight(edge: usize) -> u64 {
    1.0_f64.to_bits() | (Rng::new(to_u64(edge)).word() & 15) << 48
}

fn edge(number: u64, scale: u32) -> (u32, u32) {
    let mut rng = Rng::new(number);
    let (mut from, mut to) = (0_u32, 0_u32);
    let mut random = 0;
    for step in 0..scale {
        if step % (64 / BITS) == 0 {
            random = rng.word();
        }
        let draw = random & ((1 << BITS) - 1);
        random >>= BITS;
        let (down, right) = match QUADRANTS.iter().position(|bound| draw < *bound) {
            Some(0) => (0, 0),
            Some(1) => (0, 1),
            Some(_) => (1, 0),
            None => (1, 1),
        };
        from = from << 1 | down;
        to = to << 1 | right;
    }
    (scramble(from, scale), scramble(to, scale))
}

/// Another name for each vertex: else the ones with many edges would be neighbours in memory.
fn scramble(vertex: u32, scale: u32) -> u32 {
    let mask = (1_u64 << scale) - 1;
    let mixed = u64::from(vertex).wrapping_mul(0x9e37_79b1) & mask;
    let mixed = (mixed ^ mixed >> (scale / 2)).wrapping_mul(0x85eb_ca6b) & mask;
    u32::try_from(mixed).unwrap_or_else(|_| unreachable!("less than 32 bits"))
}

fn rows(vertices: usize, pairs: &[(u32, u32)]) -> (Vec<u64>, Vec<u32>) {
    let index = |vertex: u32| to_usize(u64::from(vertex));
    let mut offsets = vec![0_u64; vertices + 1];
    pairs.iter().for_each(|(from, _)| offsets[index(*from) + 1] += 1);
    (0..vertices).for_each(|v| offsets[v + 1] += offsets[v]);
    let mut next = offsets.clone();
    let mut targets = vec![0; pairs.len()];
    for (from, to) in pairs {
        let place = &mut next[index(*from)];
        targets[to_usize(*place)] = *to;
        *place += 1;
    }
    (offsets, targets)
}

fn write(file: &Path, offsets: &[u64], targets: &[u32]) -> Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(file)?);
    for offset in offsets {
        out.write_all(&offset.to_ne_bytes())?;
    }
    for (number, target) in targets.iter().enumerate() {
        out.write_all(&weight(number).to_ne_bytes())?;
        out.write_all(&u64::from(*target).to_ne_bytes())?;
    }
    Ok(out.flush()?)
}

/// The plain search that others are compared with.
fn search(graph: &mut Graph, offsets: &[u64], targets: &[u32]) {
    let index = |vertex: u32| to_usize(u64::from(vertex));
    let mut levels = vec![UNREACHED; graph.vertices];
    let mut queue = VecDeque::from([graph.root]);
    levels[index(graph.root)] = 0;
    while let Some(vertex) = queue.pop_front() {
        let row = to_usize(offsets[index(vertex)])..to_usize(offsets[index(vertex) + 1]);
        for (edge, target) in row.clone().zip(targets[row].iter().copied()) {
            graph.followed += 1;
            graph.edge_sum = graph.edge_sum.wrapping_add(edge_sum(weight(edge), u64::from(target)));
            if levels[index(target)] == UNREACHED {
                levels[index(target)] = levels[index(vertex)] + 1;
                queue.push_back(target);
            }
        }
    }
    let sums = levels.iter().enumerate().map(|(vertex, level)| level_sum(vertex, *level));
    graph.level_sum = sums.fold(0, u64::wrapping_add);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_follow_the_quadrants_and_names_stay_unique() {
        let scale = 10;
        let mut names: Vec<u32> = (0..1 << scale).map(|v| scramble(v, scale)).collect();
        names.sort_unstable();
        assert!(names.iter().enumerate().all(|(n, name)| to_usize(u64::from(*name)) == n));

        let pairs: Vec<(u32, u32)> = (0..100_000).map(|n| edge(n, scale)).collect();
        let (offsets, targets) = rows(1 << scale, &pairs);
        assert_eq!((offsets[1 << scale], targets.len()), (100_000, 100_000));
        // The first vertex has (57 % + 19 %)^10 of all edges.
        let expected = 100_000.0 * 0.76_f64.powi(10);
        let first = to_usize(u64::from(scramble(0, scale)));
        let found = f64::from(u32::try_from(offsets[first + 1] - offsets[first]).unwrap());
        assert!((found / expected - 1.0).abs() < 0.1, "{found} of {expected}");
    }
}
