//! Breadth-first search, level by level, each level shared by all threads. Graph, levels and queue are all in the memory
//! under test.

use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use fmalloc_proto::num::to_usize;

use super::{THREADS, check, on_threads};
use crate::bench::child::Desk;
use crate::bench::graph::{Graph, UNREACHED, edge_sum, level_sum};
use crate::bench::kinds::Workload;
use crate::bench::memory::Memory;

/// Vertices that a thread takes at once.
const CHUNK: usize = 64;
/// Vertices that a thread finds before it puts them into the queue.
const FOUND: usize = 256;
const LOAD: usize = 1 << 20;

/// Loads the graph, searches it, and compares levels and edges with what the conductor found.
///
/// # Errors
/// Levels or edges that differ, or what the system or reporting says.
pub(crate) fn all(desk: &Desk, memory: &mut Memory) -> Result<()> {
    let graph = desk.plan.graph.as_ref().context("no graph in the plan")?;
    desk.preparing("loading the graph")?;
    let length = (graph.vertices + 1 + 2 * graph.edges) * 8;
    let mut file = File::open(&graph.file).context("opening the graph")?;
    for piece in memory.bytes()[..length].chunks_mut(LOAD) {
        file.read_exact(piece)?;
    }
    if desk.plan.flip {
        memory.words()[graph.vertices + graph.edges] ^= 1 << 44;
    }
    let (words, tail) = (memory.shared(), memory.shared_tail(2 * graph.vertices));
    let (levels, queue) = tail.split_at(graph.vertices);
    levels.iter().for_each(|level| level.store(UNREACHED, Ordering::Relaxed));
    levels[to_usize(u64::from(graph.root))].store(0, Ordering::Relaxed);
    queue[0].store(graph.root, Ordering::Relaxed);
    let search = Search { graph, words, levels, queue, end: AtomicUsize::new(1), sum: AtomicU64::new(0) };
    desk.measure(Workload::Bfs, graph.followed, || search.run())?;

    desk.preparing("verifying")?;
    check(search.sum.into_inner() == graph.edge_sum, || "the search followed other edges".to_owned())?;
    let found = levels.iter().enumerate().map(|(v, level)| level_sum(v, level.load(Ordering::Relaxed)));
    check(found.fold(0, u64::wrapping_add) == graph.level_sum, || "the search found other levels".to_owned())
}

struct Search<'a> {
    graph: &'a Graph,
    words: &'a [AtomicU64],
    levels: &'a [AtomicU32],
    queue: &'a [AtomicU32],
    end: AtomicUsize,
    sum: AtomicU64,
}

impl Search<'_> {
    fn run(&self) -> Result<()> {
        let (mut start, mut level) = (0, 0);
        loop {
            let end = self.end.load(Ordering::Relaxed);
            if start == end {
                return Ok(());
            }
            let next = AtomicUsize::new(start);
            on_threads(THREADS, |_| self.part(&next, end, level))?;
            (start, level) = (end, level + 1);
        }
    }

    /// Takes vertices of the queue up to `end`, which are of this level, until there are no more.
    fn part(&self, next: &AtomicUsize, end: usize, level: u32) -> Result<()> {
        let word = |index: usize| self.words[index].load(Ordering::Relaxed);
        let edges = self.graph.vertices + 1;
        let mut found = Vec::with_capacity(FOUND);
        let mut sum = 0_u64;
        loop {
            let start = next.fetch_add(CHUNK, Ordering::Relaxed);
            if start >= end {
                break;
            }
            for vertex in &self.queue[start..end.min(start + CHUNK)] {
                let vertex = to_usize(u64::from(vertex.load(Ordering::Relaxed)));
                let row = to_usize(word(vertex))..to_usize(word(vertex + 1));
                check(row.end <= self.graph.edges, || format!("row {vertex} is wrong"))?;
                for edge in row {
                    let (weight, target) = (word(edges + 2 * edge), word(edges + 2 * edge + 1));
                    sum = sum.wrapping_add(edge_sum(weight, target));
                    let place = self.levels.get(to_usize(target));
                    check(place.is_some(), || format!("edge {edge} is wrong"))?;
                    if place.is_some_and(|place| claim(place, level + 1)) {
                        found.push(u32::try_from(target)?);
                        if found.len() == FOUND {
                            self.put(&mut found);
                        }
                    }
                }
            }
        }
        self.put(&mut found);
        self.sum.fetch_add(sum, Ordering::Relaxed);
        Ok(())
    }

    fn put(&self, found: &mut Vec<u32>) {
        let start = self.end.fetch_add(found.len(), Ordering::Relaxed);
        found
            .drain(..)
            .zip(&self.queue[start..])
            .for_each(|(vertex, place)| place.store(vertex, Ordering::Relaxed));
    }
}

/// Gives the vertex its level unless it has one.
fn claim(place: &AtomicU32, level: u32) -> bool {
    place.load(Ordering::Relaxed) == UNREACHED
        && place.compare_exchange(UNREACHED, level, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}
